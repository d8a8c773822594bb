"""Classes of transformers that adapt themselves in ``__init__``, under ``from_pretrained``.

A D is zero if the checkpoint lacks it, and the checkpoint's if not; what a user gave is kept.
"""

import copy
import pathlib
import pickle
import sys

import pytest
import torch
import transformers
from torch import Tensor, nn

from miss import MiSSeLinear, MiSSLinear, adapted_modules, adapter_parameters, eject, inject, merge
from tests.models import perturb, snapshot
from tests.pretrained import TEXTS, llama


class Injects(transformers.LlamaForCausalLM):
    """Injects when all is built, as its own last step."""

    def __init__(self, config: transformers.LlamaConfig):
        super().__init__(config)
        inject(self, ["q_proj", "down_proj"], rank=3)


class InjectsFirst(transformers.LlamaForCausalLM):
    """Injects before transformers initialises; the other form."""

    def __init__(self, config: transformers.LlamaConfig):
        super().__init__(config)
        inject(self, ["q_proj", "lm_head"], rank=3, method="miss")
        self.post_init()


class Constructs(transformers.LlamaForCausalLM):
    """Constructs adapted layers in place of plain ones, and one that no base checkpoint has."""

    def __init__(self, config: transformers.LlamaConfig):
        super().__init__(config)
        width = config.hidden_size
        for layer in self.model.layers:
            layer.self_attn.q_proj = MiSSeLinear(width, width, 3, bias=False)
            layer.self_attn.o_proj = MiSSLinear(width, width, 3, bias=False)
        self.extra = MiSSeLinear(width, 2, 3)
        self.post_init()


CLASSES = {cls.__name__: cls for cls in (Injects, InjectsFirst, Constructs)}
PARTS = ["model.layers", "model.norm", "model.rotary_emb", "lm_head", "extra"]
DISPATCHED = dict.fromkeys(PARTS, "cpu") | {"model.embed_tokens": "disk"}  # so there are hooks
OPTIONS = {
    "plain": {},
    "dtype": {"dtype": torch.bfloat16},
    "device_map": {"device_map": "cpu"},
    "dispatched": {"device_map": DISPATCHED},
    "tied": {"tie_word_embeddings": True},  # unlike the base
}
every_class = pytest.mark.parametrize("name", sorted(CLASSES))


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    """torch fills what ``torch.empty`` and the like return with NaN in this mode."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def base(tmp_path: pathlib.Path) -> tuple[nn.Module, str]:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    return model.eval(), str(tmp_path / "base")


def filled(model: nn.Module) -> list[Tensor]:
    """Random values in every D; their copies."""
    perturb(model)
    return [d.detach().clone() for d in adapter_parameters(model)]


def assert_ds(model: nn.Module, expected: list[Tensor]):
    ds = adapter_parameters(model)
    assert len(ds) == len(expected)
    for d, want in zip(ds, expected):
        assert d.requires_grad
        assert torch.equal(d, want.to(d.dtype))
    for layer in adapted_modules(model).values():
        assert not any(p.requires_grad for p in (layer.weight, layer.bias) if p is not None)


@pytest.mark.parametrize("option", sorted(OPTIONS))
@every_class
@pytest.mark.filterwarnings("ignore:The following device_map keys", "ignore:Attempting to save")
def test_d_is_zero_from_the_plain_base_and_the_trained_one_from_its_own(
    name: str, option: str, base: tuple[nn.Module, str], tmp_path: pathlib.Path
):
    cls, options = CLASSES[name], OPTIONS[option] | {"offload_folder": str(tmp_path / "disk")}
    model = cls.from_pretrained(base[1], **options).eval()
    hooked = "_hf_hook" in vars(model.model.layers[0].self_attn.q_proj)
    assert hooked == (option == "dispatched")
    assert len(adapted_modules(model)) == {"Constructs": 5, "InjectsFirst": 3, "Injects": 4}[name]
    assert_ds(model, [torch.zeros_like(d) for d in adapter_parameters(model)])
    if option not in ("dtype", "tied"):
        assert torch.equal(model(TEXTS).logits, base[0](TEXTS).logits)
    trained = filled(model)
    want = model(TEXTS).logits
    model.save_pretrained(tmp_path / "own")
    again = cls.from_pretrained(tmp_path / "own", **options).eval()
    assert_ds(again, trained)
    assert torch.equal(again(TEXTS).logits, want)
    assert not any("_miss_unset" in vars(layer) for layer in adapted_modules(again).values())


def test_a_mismatched_d_is_zero(base: tuple[nn.Module, str], tmp_path: pathlib.Path):
    filled(model := inject(base[0], ["q_proj", "down_proj"], rank=2))
    model.save_pretrained(tmp_path / "own")
    again = Injects.from_pretrained(tmp_path / "own", ignore_mismatched_sizes=True)
    assert_ds(again, [torch.zeros(d.shape[0], 3) for d in adapter_parameters(again)])


def test_a_mark_that_is_taken_off_or_that_transformers_4_sets_leaves_d(monkeypatch):
    layer = MiSSeLinear(4, 4, 2, device="meta")
    layer.miss_D = nn.Parameter(torch.ones(4, 2))
    layer._is_hf_initialized = False
    assert layer.miss_D.all()
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "transformers.initialization")
        layer._is_hf_initialized = True
        assert layer.miss_D.all()
    layer._is_hf_initialized = True
    assert not layer.miss_D.any()


@every_class
def test_a_model_from_a_config_starts_at_zero(name: str, base: tuple[nn.Module, str]):
    model = CLASSES[name](base[0].config)
    assert_ds(model, [torch.zeros_like(d) for d in adapter_parameters(model)])


def built(how: str, folder: str) -> nn.Module:
    """A model that transformers has initialised, or not."""
    if how == "from_pretrained":
        return Injects.from_pretrained(folder)
    if how == "injected":
        return inject(transformers.LlamaForCausalLM.from_pretrained(folder), "q_proj", rank=3)
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    fresh = nn.Linear(12, 12, bias=False, device=None if how == "fresh layer" else "meta")
    model.model.layers[0].self_attn.q_proj = fresh
    inject(model, "q_proj", rank=3)
    if how == "assign":
        state = transformers.LlamaForCausalLM.from_pretrained(folder).state_dict()
        model.load_state_dict(state, strict=False, assign=True)
    return model.to_empty(device="cpu") if how == "to_empty" else model


COPIES = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("copied", sorted(COPIES))
@pytest.mark.parametrize(
    "how", ["from_pretrained", "injected", "fresh layer", "to_empty", "assign"]
)
def test_what_a_user_gave_survives_init_weights(how: str, copied: str, base: tuple[nn.Module, str]):
    model = built(how, base[1])
    trained = filled(model)
    model = COPIES[copied](model)
    model.init_weights()
    assert_ds(model, trained)


def test_the_mark_outlives_adapters(base: tuple[nn.Module, str]):
    model = transformers.LlamaForCausalLM.from_pretrained(base[1])
    layer = model.model.layers[0].self_attn.q_proj
    before = snapshot(model)
    assert layer._is_hf_initialized
    inject(model, "q_proj", rank=3, freeze=False)
    merge(model)
    assert layer._is_hf_initialized
    layer._is_hf_initialized = False
    assert layer._is_hf_initialized is False
    del layer._is_hf_initialized
    assert not hasattr(layer, "_is_hf_initialized")
    with pytest.raises(AttributeError, match="_is_hf_initialized"):
        del layer._is_hf_initialized
    layer._is_hf_initialized = True
    eject(model)
    assert layer._is_hf_initialized
    assert {k: v for k, v in snapshot(model).items() if not k.endswith("parameter")} == {
        k: v for k, v in before.items() if not k.endswith("parameter")
    }
