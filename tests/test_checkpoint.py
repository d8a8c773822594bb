import builtins
import copy
import json
import pathlib
import subprocess
import sys

import pytest
import safetensors
import torch
import torch.nn.utils.prune
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from miss import (
    CheckpointError,
    MiSSeLinear,
    MiSSLinear,
    ShapeError,
    StateError,
    TargetError,
    adapted_modules,
    adapter_state_dict,
    combine,
    eject,
    inject,
    load,
    load_adapter_state_dict,
    merge,
    save,
    unmerge,
)
from tests.installed import ENVIRONMENT
from tests.models import TOKENS, Decoder, adapted_decoder, perturb, snapshot
from tests.strategies import DTYPES, Case, cases

suffixes = pytest.mark.parametrize("suffix", [".safetensors", ".pt"])


def same_adapters(one: nn.Module, other: nn.Module) -> bool:
    a, b = adapter_state_dict(one), adapter_state_dict(other)
    if list(a) != list(b):
        return False
    return all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@suffixes
@given(case=cases(), dtype=st.sampled_from(DTYPES), dropout=st.sampled_from([0.0, 0.25]))
def test_a_lone_layer_goes_through_a_file(
    tmp_path_factory, suffix: str, case: Case, dtype: torch.dtype, dropout: float
):
    layer = case.layer(torch.float64, dtype)
    path = tmp_path_factory.getbasetemp() / f"layer{suffix}"
    layer.miss_dropout = dropout
    save(layer, path)
    base = eject(copy.deepcopy(layer))
    assert load(base, path) is base
    assert repr(base) == repr(layer)
    assert same_adapters(base, layer)
    x = case.input()
    assert torch.equal(base.eval()(x), layer.eval()(x))


@suffixes
@pytest.mark.parametrize("merged", [False, True])
def test_a_model_of_both_forms_goes_through_a_file(
    tmp_path: pathlib.Path, suffix: str, merged: bool
):
    torch.manual_seed(0)
    model, path = Decoder(), tmp_path / f"adapter{suffix}"
    base = copy.deepcopy(model)
    inject(model, "q_proj", rank=3, scale=0.5, dropout=0.1)
    inject(model, ["mlp.0", "alias"], rank=2, method="miss", adapter_dtype=torch.bfloat16)
    perturb(model)
    on = model.eval()(TOKENS)
    if merged:
        merge(model)
    save(model, path)
    fresh, again = load(copy.deepcopy(base), path), load(copy.deepcopy(base), str(path))
    assert {MiSSLinear, MiSSeLinear} == {type(m) for m in adapted_modules(fresh).values()}
    for loaded in (fresh, again):
        assert same_adapters(loaded, model)
        assert torch.equal(loaded.eval()(TOKENS), on)
        for key, p in loaded.named_parameters():
            assert p.requires_grad == key.endswith("miss_D")
    perturb(fresh)
    assert not same_adapters(fresh, model)
    assert load(fresh, path) is fresh
    assert same_adapters(fresh, model)
    assert torch.equal(eject(fresh)(TOKENS), base.eval()(TOKENS))
    assert path.stat().st_size < 20_000
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_wrappers_leave_no_trace_in_a_file(tmp_path: pathlib.Path):
    model = adapted_decoder()
    save(torch.compile(model), tmp_path / "a.pt")
    assert same_adapters(load(Decoder(), tmp_path / "a.pt", any_base=True), model)
    assert same_adapters(load(torch.compile(Decoder()), tmp_path / "a.pt", any_base=True), model)
    wrapped = Decoder()
    wrapped.layers[1].mlp[0] = checkpoint_wrapper(wrapped.layers[1].mlp[0])
    assert same_adapters(load(wrapped, tmp_path / "a.pt", any_base=True), model)


class Classifier(nn.Module):
    """An encoder, and a head with running statistics and a buffer that is not saved.

    All of them have the same values.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))
        self.head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))
        self.head.register_buffer("transient", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


@suffixes
@pytest.mark.parametrize("targets", ["encoder.*", ["encoder.*", "head.1"]])
@pytest.mark.parametrize("extra", ["head", ["head"], ["head.0", "head.1"]])
def test_extra_modules_come_back_with_their_buffers(
    tmp_path: pathlib.Path, suffix: str, targets: object, extra: object
):
    torch.manual_seed(0)
    model = Classifier()
    base = copy.deepcopy(model)
    inject(model, targets, rank=2, trainable="head")
    perturb(model)
    for p in model.head.parameters():
        nn.init.normal_(p)
    x = torch.randn(16, 6)
    model.train()(x)
    on = model.eval()(x)
    merge(model)
    save(model, tmp_path / f"a{suffix}", extra=extra)
    loaded = load(copy.deepcopy(base), tmp_path / f"a{suffix}").eval()
    assert torch.equal(loaded(x), on)
    assert all(p.requires_grad for p in loaded.head.parameters())
    for key, p in loaded.encoder.named_parameters():
        assert p.requires_grad == ("miss_D" in key)
    unmerge(model)
    nn.init.zeros_(model.head[1].bias)
    assert torch.equal(load(model, tmp_path / f"a{suffix}")(x), on)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "head", nn.Identity()), r"7 unexpected: head\.0\.bias"),
        (
            lambda m: m.head.__setitem__(1, nn.Linear(6, 4)),
            r"head.1.* has another shape\n  expected: \(4",
        ),
        (
            lambda m: m.head.half(),
            r"head.* would be rounded\n.*float16\n.*float32\n  do: .*\.to\(torch\.float16\)",
        ),
        (
            lambda m: m.encoder.__setitem__(2, nn.Linear(6, 5)),
            r"the weight of module 'encoder.2' has another shape",
        ),
        (
            lambda m: m.encoder.__setitem__(2, nn.Identity()),
            r"module 'encoder.2' of the model cannot be adapted: it is a torch\.nn\..*\.Identity",
        ),
        (lambda m: m.encoder.__delitem__(2), "the model has no module 'encoder.2'"),
        (lambda m: m.encoder.__setitem__(2, m.encoder[0]), "two adapters are for one module"),
        (lambda m: inject(m, "encoder.0", rank=2), r"1 unexpected: encoder\.2\.miss_D"),
        (lambda m: inject(m, ["encoder.*", "head.1"], rank=2), r"1 missing: head\.1\.miss_D"),
        (
            lambda m: inject(m, "encoder.*", rank=3),
            "the rank of 'encoder.0' is not the model's\n  expected: 3\n  actual:   2",
        ),
        (lambda m: inject(m, "encoder.*", rank=2, method="miss"), "the method of 'encoder.0'"),
        (
            lambda m: inject(m, "encoder.*", rank=2, alternate=True),
            "the alternate of 'encoder.0' is not the model's\n  expected: True\n  actual:   False",
        ),
        (lambda m: inject(m, "encoder.*", rank=2, scale=2.0), "the scale of 'encoder.0'"),
        (
            lambda m: inject(m, "encoder.*", rank=2, adapter_dtype=torch.bfloat16),
            "encoder.0.miss_D has another dtype, and its values would be rounded",
        ),
        (lambda m: m.encoder[2].to("meta"), "encoder.2.miss_D of the model is on the meta device"),
        (lambda m: m.head[1].to("meta"), "head.1.bias of the model is on the meta device"),
        (lambda m: merge(inject(m, "encoder.*", rank=2)), "is merged"),
    ],
)
def test_a_file_that_does_not_fit_the_model_changes_nothing(
    tmp_path: pathlib.Path, change, message: str
):
    model = inject(Classifier(), "encoder.*", rank=2, trainable="head")
    perturb(model)
    save(model, tmp_path / "a.safetensors", extra="head")
    other = Classifier()
    change(other)
    before = None if any(p.is_meta for p in other.parameters()) else snapshot(other)
    with pytest.raises((CheckpointError, StateError), match=message) as error:
        load(other, tmp_path / "a.safetensors")
    assert isinstance(error.value, StateError) == ("meta" in message or "merged" in message)
    assert before is None or snapshot(other) == before


def test_save_refuses_what_it_cannot_write_and_keeps_the_old_file(tmp_path: pathlib.Path):
    model, path = inject(Classifier(), "encoder.*", rank=2, trainable="head"), tmp_path / "a.pt"
    save(model, path)
    before = path.read_bytes()

    class Stateful(nn.Linear):
        def get_extra_state(self) -> object:
            return {"step": 3}

    model.counted, model.empty = Stateful(2, 2), nn.Linear(2, 2)
    model.empty.weight = nn.Parameter(torch.zeros(0))
    for extra, message in (
        ("counted", "counted: holds state that is no Parameter or buffer: counted._extra_state"),
        ("empty", "empty.weight has no elements"),
    ):
        with pytest.raises(CheckpointError, match=message):
            save(model, path, extra=extra)
    with pytest.raises(CheckpointError, match=r"counted._extra_state\n  do: .*extra=\(\)"):
        save(model, path)  # it requires grad, so it may have been trained
    model.counted.requires_grad_(False)
    model.empty.requires_grad_(False)
    with pytest.raises(TargetError, match=r"extra: 'haed' matches nothing\n.*'head'"):
        save(model, path, extra="haed")
    with pytest.raises(StateError, match="the model has no adapter"):
        save(Classifier(), path)
    for wrong in ("a", "a.bin", "a.pt.gz", ".pt"):
        with pytest.raises(
            CheckpointError, match=r"expected: \.safetensors \(recommended\) or \.pt"
        ):
            save(model, tmp_path / wrong)
        with pytest.raises(CheckpointError, match="there is no such file"):
            load(model, tmp_path / wrong)
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            model.encoder[2].miss_D[0, 0] = value
        with pytest.raises(
            CheckpointError, match=r"encoder\.2\.miss_D has elements that are not finite"
        ):
            save(model, path)
        nn.init.zeros_(model.encoder[2].miss_D)
        with pytest.raises(ShapeError, match=r"scale must be a number\n.*\n.*scale="):
            model.encoder[2].scale = value
    assert model.encoder[2].scale == 1.0
    d = model.encoder[2].miss_D
    model.encoder[2].miss_D = nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(
        StateError, match=r"encoder\.2: its miss_D has another shape.*\n.*\(6, 2\)\n.*\(3, 2\)"
    ):
        save(model, path)
    model.encoder[2].miss_D = d
    model.encoder[2].to("meta")
    with pytest.raises(
        CheckpointError, match=r"encoder\.2\.miss_D is not an ordinary tensor with data"
    ):
        save(model, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("said", [{}, {"alternate": True}], ids=str)
def test_the_metadata_of_a_file(tmp_path: pathlib.Path, said: dict[str, bool]):
    model = inject(Classifier(), "encoder.0", rank=2, scale=0.5, **said)
    save(model, tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["miss"])
        running = ["num_batches_tracked", "running_mean", "running_var"]
        extra = [f"head.0.{name}" for name in running]
        assert set(file.keys()) == {".base", "encoder.0.miss_D", *extra}
        values = [file.get_tensor(".base").numel()]
    assert len(about.pop("sha256")) == 64
    assert about.pop("version")[0].isdigit()
    module = {"module": "encoder.0", "parameter": "weight"}
    module |= {"host": "miss.layers.linear.LinearHost"}
    layer = {"method": "misse", "rank": 2, "scale": 0.5, "dropout": 0.0, "shape": [6, 6]}
    adapters = {"encoder.0.miss_D": module | layer | said}
    weights = {"encoder.0.weight": [6, 6], "encoder.2.weight": [6, 6], "head.1.weight": [3, 6]}
    base = {name: ["float32", *shape] for name, shape in weights.items()}
    assert values == [4 * (36 + 36 + 18)]
    expected = {"format": 2, "adapters": adapters, "extra": extra, "trained": [], "base": base}
    assert about == expected


def test_safetensors_absent(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    model = adapted_decoder()
    save(model, tmp_path / "a.safetensors")
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.split(".")[0] == "safetensors":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for call in (
        lambda: save(model, tmp_path / "b.safetensors"),
        lambda: load(Decoder(), tmp_path / "a.safetensors"),
    ):
        with pytest.raises(
            ImportError, match=r"needs the package safetensors\n.*miss-torch\[files\].*\.pt"
        ):
            call()
    save(model, tmp_path / "b.pt")
    assert same_adapters(load(Decoder(), tmp_path / "b.pt", any_base=True), model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.pt"]


def test_a_process_of_its_own_loads_the_file(tmp_path: pathlib.Path):
    layer = MiSSeLinear(4, 3, rank=2)
    perturb(layer)
    save(layer, tmp_path / "a.pt")
    code = (
        "import sys, torch, miss; "
        "print(miss.load(torch.nn.Linear(4, 3), sys.argv[1], any_base=True).miss_D.tolist())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.pt")]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert json.loads(run.stdout) == layer.miss_D.tolist()


def test_two_tensors_do_not_go_into_one(tmp_path: pathlib.Path):
    model = inject(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)), "0", rank=2)
    save(model, tmp_path / "a.pt", extra=["1", "2"])
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    tied[2].weight = tied[1].weight
    before = snapshot(tied)
    with pytest.raises(
        CheckpointError,
        match=r"2\.weight and 1\.weight are one tensor|1\.weight and 2\.weight are one tensor",
    ):
        load(tied, tmp_path / "a.pt", any_base=True)
    assert snapshot(tied) == before


def test_a_pruned_adapter_is_not_taken_for_one(tmp_path: pathlib.Path):
    model = inject(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ["0", "1"], rank=2)
    state = adapter_state_dict(model)
    torch.nn.utils.prune.identity(model[1], "miss_D")
    for call in (
        lambda: load_adapter_state_dict(model, state),
        lambda: adapter_state_dict(model),
        lambda: save(model, tmp_path / "a.pt"),
        lambda: merge(model),
    ):
        with pytest.raises(
            StateError, match=r"1: .*its miss_D is no parameter of its own any more"
        ):
            call()


def test_8_bit_floats_can_be_extra(tmp_path: pathlib.Path):
    model = inject(nn.Sequential(nn.Linear(4, 4), nn.Module()), "0", rank=2)
    model[1].register_buffer("small", torch.ones(4).to(torch.float8_e4m3fn))
    save(model, tmp_path / "a.pt", extra="1")
    assert load(model, tmp_path / "a.pt")[1].small.dtype == torch.float8_e4m3fn
    with pytest.raises(CheckpointError, match="of a floating dtype"):
        combine([({"a": torch.tensor([1])}, 0.5)])


def test_a_complex_adapter_is_not_saved(tmp_path: pathlib.Path):
    model = inject(nn.Sequential(nn.Linear(4, 4)), "0", rank=2)
    model[0].miss_D = nn.Parameter(model[0].miss_D.detach().to(torch.complex64))
    with pytest.raises(
        CheckpointError, match=r"0: not the settings of an adapter\n.*\n.*complex64"
    ):
        save(model, tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())
