"""Files of format 1 still load.

They are written here from their description, by code that shares nothing with the package.
"""

import copy
import hashlib
import json
import pathlib

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from miss import CheckpointError, adapted_modules, adapter_state_dict, disabled, inject, load, save
from tests import reference
from tests.models import perturb, snapshot

suffixes = pytest.mark.parametrize("suffix", [".safetensors", ".pt"])

# By module path, what a file says of each layer: `rows` is of PEFT's mini form alone.
MISSE = {"method": "misse", "rank": 2, "scale": 0.5, "dropout": 0.25, "shape": [6, 5]}
MISS = {"method": "miss", "rank": 4, "scale": 1.0, "dropout": 0.0, "shape": [4, 6]}
MINI = {"method": "misse", "rank": 3, "scale": -2.0, "dropout": 0.0, "shape": [6, 4], "rows": 2}
MODULES = {"body.up": MISSE, "body.down": MISS, "out": MINI}
D_SHAPES = {"body.up": (6, 2), "body.down": (4, 6), "out": (2, 3)}


class Model(nn.Module):
    """Three linear layers, and a norm that is trained with its running statistics."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"up": nn.Linear(5, 6), "down": nn.Linear(6, 4)})
        self.out, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.out(self.body["down"](self.body["up"](x)).tanh()))


def base() -> Model:
    torch.manual_seed(0)
    return Model().double().eval()


def tensors() -> dict[str, Tensor]:
    """Each D, one of them in half precision, and the state of the norm."""
    torch.manual_seed(1)
    state = {f"{name}.miss_D": torch.randn(D_SHAPES[name]).double() for name in MODULES}
    state["body.down.miss_D"] = state["body.down.miss_D"].bfloat16()
    for key in ("weight", "bias", "running_mean", "running_var"):
        state[f"norm.{key}"] = torch.rand(6).double() + 1
    return state | {"norm.num_batches_tracked": torch.tensor(7)}


def write(path: pathlib.Path, state: dict[str, Tensor], modules: dict[str, object]) -> None:
    """A file of format 1: its description is one text, with a checksum of all else in it."""
    extra = sorted(key for key in state if not key.endswith("miss_D"))
    about = {"format": 1, "version": "0.1.0", "modules": modules, "extra": extra}
    sha = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(state):
        tensor = state[name]
        sha.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        sha.update(bytes(tensor.flatten().view(torch.uint8).tolist()))
    text = json.dumps(about | {"sha256": sha.hexdigest()})
    if path.suffix == ".pt":
        torch.save({"miss": text, "tensors": state}, path)
    else:
        save_file(state, path, {"miss": text})


@suffixes
def test_the_model_is_the_one_that_the_file_describes(tmp_path: pathlib.Path, suffix: str):
    path, state, x = tmp_path / f"a{suffix}", tensors(), torch.randn(3, 5).double()
    write(path, state, MODULES)
    plain = base()
    model = load(base(), path)
    kinds = {name: type(layer).__name__ for name, layer in adapted_modules(model).items()}
    assert kinds == {"body.up": "MiSSeLinear", "body.down": "MiSSLinear", "out": "MiSSeLinear"}
    for name, layer in adapted_modules(model).items():
        config, said = layer.miss_configs["weight"], MODULES[name]
        assert (layer.miss_form.name, config.rows) == (said["method"], said.get("rows"))
        assert (config.rank, config.scale) == (said["rank"], said["scale"])
        assert (config.dropout, list(config.shape)) == (said["dropout"], said["shape"])
        d = state[f"{name}.miss_D"]
        assert layer.miss_D.dtype == d.dtype
        assert torch.equal(layer.miss_D, d)
        whole = torch.cat([d] * (6 // len(d))) if name == "out" else d
        delta = said["scale"] * reference.delta(said["method"], whole.double(), *said["shape"])
        plain.get_submodule(name).weight.data += delta
    for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(model.norm.state_dict()[key], state[f"norm.{key}"])
    plain.norm.load_state_dict(model.norm.state_dict())
    torch.testing.assert_close(model(x), plain(x))
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == (key.endswith("miss_D") or key.startswith("norm."))


@suffixes
def test_it_is_the_model_that_a_file_of_today_gives(tmp_path: pathlib.Path, suffix: str):
    old, new, x = tmp_path / f"old{suffix}", tmp_path / f"new{suffix}", torch.randn(3, 5).double()
    write(old, tensors(), MODULES)
    model = load(base(), old)
    save(model, new, extra="norm")
    again = load(base(), new)
    assert repr(again) == repr(model)
    for one, other in zip(adapted_modules(model).values(), adapted_modules(again).values()):
        assert one.miss_configs == other.miss_configs
    assert torch.equal(again(x), model(x))
    on = model(x)
    perturb(model)
    assert load(model, old) is model  # an adapted model takes it too
    assert torch.equal(model(x), on)
    with disabled(model), disabled(again):
        assert torch.equal(again(x), model(x))


def test_a_lone_layer(tmp_path: pathlib.Path):
    torch.manual_seed(0)
    layer, d = nn.Linear(5, 6), torch.randn(6, 2)
    write(tmp_path / "a.pt", {"miss_D": d}, {"": MISSE})
    assert torch.equal(load(layer, tmp_path / "a.pt").miss_D, d)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, m: s.pop("out.miss_D") is None, "1 missing: out.miss_D"),
        (lambda s, m: m.pop("out"), "1 unexpected: out.miss_D"),
        (lambda s, m: m.clear(), "lists no adapted modules"),
        (lambda s, m: m.update(out=3), "'out.miss_D': not the settings of an adapter"),
        (lambda s, m: m["out"].update(rows=4), "'out.miss_D': not the settings of an adapter"),
        (lambda s, m: m["out"].update(rows=3), "out.miss_D does not fit its metadata"),
        (lambda s, m: m["out"].pop("rows"), "out.miss_D does not fit its metadata"),
        (lambda s, m: m["out"].update(rank=5), "'out.miss_D': not the settings of an adapter"),
        (
            lambda s, m: m["body.down"].update(rows=1),
            "'body.down.miss_D': not the settings of an adapter",
        ),
        (lambda s, m: m["body.up"].pop("shape"), "'body.up.miss_D': not the settings"),
        (lambda s, m: m["body.up"].update(shape=[6, 7]), "module 'body.up' has another shape"),
        (lambda s, m: m["body.up"].update(scale="1"), "'body.up.miss_D': not the settings"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: pathlib.Path, change, message: str):
    state, modules = tensors(), copy.deepcopy(MODULES)
    change(state, modules)
    write(tmp_path / "a.safetensors", state, modules)
    model = base()
    before = snapshot(model)
    with pytest.raises(CheckpointError) as error:
        load(model, tmp_path / "a.safetensors")
    assert message in str(error.value)
    assert snapshot(model) == before


@suffixes
def test_a_damaged_tensor_is_refused(tmp_path: pathlib.Path, suffix: str):
    path, state = tmp_path / f"a{suffix}", tensors()
    write(path, state, MODULES)
    content = bytearray(path.read_bytes())
    value = bytes(state["norm.running_var"].view(torch.uint8).tolist())
    content[content.index(value)] ^= 1
    path.write_bytes(content)
    model = inject(base(), "out", rank=2)
    before = adapter_state_dict(model)
    for target in (base(), model):
        with pytest.raises(CheckpointError, match=r"damaged|cannot be read"):
            load(target, path)
    assert torch.equal(adapter_state_dict(model)["out.miss_D"], before["out.miss_D"])
