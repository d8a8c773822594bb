"""Registered types that have ways of their own, and layers whose methods were replaced."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from miss import (
    Host,
    MiSSeLinear,
    StateError,
    TargetError,
    disabled,
    eject,
    inject,
    load,
    merge,
    register,
    save,
    unmerge,
)
from tests.models import snapshot


class Plain(nn.Module):
    """A linear layer that is no `nn.Linear`."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class PlainHost(Host):
    @staticmethod
    def product(layer: nn.Module, x: Tensor, d: Tensor, parameter: str) -> Tensor:
        return F.linear(x, d)


class Frozen(Plain):
    """Takes no new attributes and no new Parameters, and has methods of torch's names."""

    def __init__(self):
        super().__init__()
        self.__dict__["ready"] = True

    def __setattr__(self, name: str, value: object):
        if "ready" in self.__dict__ and name not in self.__dict__:
            raise TypeError(f"frozen: {name}")
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None):
        if name != "weight":
            raise KeyError(name)
        super().register_parameter(name, param)

    def register_buffer(self, *args: object, **kwargs: object):
        raise KeyError("no buffers")

    def get_parameter(self) -> str:
        return "a method of the type's own"

    get_buffer = get_parameter


class Old(Plain):
    """As types were written before torch had ``recurse``."""

    def _apply(self, fn: object) -> nn.Module:
        return super()._apply(fn)


class Delegating(Plain):
    """Answers for what it holds."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 6)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class PicklesByName(Plain):
    def __reduce__(self) -> tuple[object, ...]:
        return PicklesByName, (), self.__dict__


class PicklesByType(Plain):
    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (), self.__dict__


class NewArguments(Plain):
    def __new__(cls, *sizes: int) -> "NewArguments":
        return super().__new__(cls)

    def __getnewargs__(self) -> tuple[int, int]:
        return 6, 8


class Casting(Plain):
    """Computes in fp32 and gives fp64."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).double()


class Writing(Plain):
    """Writes to its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


GOOD = [Frozen, Old, Delegating, PicklesByName, PicklesByType, NewArguments, Casting, Writing]
for kind in GOOD:
    register(kind, PlainHost, example=(kind(), torch.randn(3, 8)))


class CopiesItself(Plain):
    def __deepcopy__(self, memo: object) -> "CopiesItself":
        return CopiesItself()


class ForgetsState(Plain):
    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in super().__getstate__().items() if key[:5] != "_miss"}


class Resets(Plain):
    def reset_parameters(self, gain: float = 1.0) -> str:
        nn.init.constant_(self.weight, gain)
        return "done"


class Loose(Plain):
    def forward(self, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        return F.linear(x if y is None else y, self.weight)


class Pair(Plain):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


for kind in (CopiesItself, ForgetsState, Resets, Loose, Pair):
    register(kind, PlainHost)


class Closed(Plain):
    def __init_subclass__(cls) -> None:
        raise TypeError("no subclasses")


class Named(Plain):
    miss_rank = "its own"


class OwnD(Plain):
    miss_D = None


def injected(kind: type[nn.Module], method: str = "misse") -> nn.Sequential:
    model = inject(nn.Sequential(kind()), "0", rank=4, method=method)
    nn.init.normal_(model[0]._parameters["miss_D"])
    return model


@pytest.mark.parametrize("method", ["misse", "miss"])
@pytest.mark.parametrize("kind", GOOD)
def test_a_type_with_ways_of_its_own_lives_like_any_other(kind, method: str, tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(kind()).eval()
    model = inject(copy.deepcopy(base), "0", rank=4, method=method)
    nn.init.normal_(model[0]._parameters["miss_D"])
    x = torch.randn(3, 8)
    output = model(x.clone())
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(model, protocol))
        assert type(again[0]) is type(model[0])
        assert torch.equal(again(x.clone()), output)
    for copied in (copy.deepcopy(model), nn.Sequential(copy.copy(model[0]))):
        assert torch.equal(copied(x.clone()), output)
    save(model, tmp_path / "a.pt")
    assert torch.equal(load(copy.deepcopy(base), tmp_path / "a.pt")(x.clone()), output)
    merge(model)
    torch.testing.assert_close(model(x.clone()).float(), output.float())
    with disabled(model):
        assert torch.equal(model(x.clone()), base(x.clone()))
    unmerge(model)
    assert torch.equal(model.float()(x.clone()), output)
    assert type(eject(model)[0]) is kind
    assert model[0].__dict__.keys() == base[0].__dict__.keys()


def test_a_copy_that_would_lose_the_adapter_is_refused():
    with pytest.raises(StateError, match=r"__deepcopy__ of .*CopiesItself leaves out the adapter"):
        copy.deepcopy(injected(CopiesItself))
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(StateError, match=r"__getstate__ of .*ForgetsState leaves out"):
            copied(injected(ForgetsState))


def test_reset_parameters_takes_and_gives_what_the_types_own_does():
    layer = injected(Resets)[0]
    assert layer.reset_parameters(0.5) == "done"
    assert layer.weight.unique().tolist() == [0.5]
    assert not layer.miss_D.any()


def test_a_call_without_the_input_is_an_error():
    x = torch.randn(3, 8)
    with pytest.raises(StateError, match="the input must be the first argument"):
        injected(Loose)[0](y=x)
    with pytest.raises(TypeError, match="inp"):
        MiSSeLinear(8, 6, 2)(inp=x)
    with pytest.raises(TypeError, match="input"):
        MiSSeLinear(8, 6, 2)()


def test_a_layer_of_several_outputs_is_told_so():
    with pytest.raises(StateError, match="returns one tensor"):
        injected(Pair)(torch.randn(3, 8))


def test_a_type_that_cannot_be_subclassed_is_refused():
    with pytest.raises(StateError, match="Closed cannot be subclassed"):
        register(Closed, PlainHost)


@pytest.mark.parametrize("kind", [Named, OwnD])
def test_no_attribute_of_a_class_is_hidden(kind):
    register(kind, PlainHost)
    model = nn.Sequential(kind())
    before = snapshot(model)
    with pytest.raises(TargetError, match="attributes of its own named"):
        inject(model, "0", rank=4)
    assert snapshot(model) == before


def test_eject_refuses_a_pruned_d():
    model = inject(nn.Sequential(nn.Linear(8, 8)), "0", rank=4)
    prune.l1_unstructured(model[0], "miss_D", 0.5)
    with pytest.raises(StateError, match="its miss_D is no parameter of its own any more"):
        eject(model)
    prune.remove(model[0], "miss_D")
    assert list(eject(model).state_dict()) == ["0.weight", "0.bias"]


def test_methods_of_short_names_can_be_called_on_the_class():
    layer = MiSSeLinear(8, 6, 2)
    assert MiSSeLinear.delta_weight(layer).shape == (6, 8)
    MiSSeLinear.reset_adapter(layer)


class Renames(Plain):
    """Stores its weight under another key."""

    def _save_to_state_dict(self, state: dict[str, Tensor], prefix: str, keep_vars: bool):
        super()._save_to_state_dict(state, prefix, keep_vars)
        state[f"{prefix}packed"] = state.pop(f"{prefix}weight")

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: object):
        if f"{prefix}packed" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}packed")
        super()._load_from_state_dict(state, prefix, *args)


register(Renames, PlainHost)


def rename(module: nn.Module, state: dict[str, Tensor], prefix: str, *args: object):
    if f"{prefix}packed" in state:
        state[f"{prefix}weight"] = state.pop(f"{prefix}packed")


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("kind", [Renames, nn.Linear])
def test_a_merged_weight_under_another_key_is_not_loaded(kind: type[nn.Module], marked: bool):
    layer = Renames() if kind is Renames else nn.Linear(8, 6)
    model = inject(nn.Sequential(layer), "0", rank=4)
    nn.init.normal_(model[0].miss_D)
    merge(model)
    state = copy.deepcopy(model.state_dict())
    unmerge(model)
    if kind is nn.Linear:
        model[0].register_load_state_dict_pre_hook(rename)
        state["0.packed"] = state.pop("0.weight")
    before = snapshot(model)
    with pytest.raises(StateError, match="the incoming weight is a merged one"):
        model.load_state_dict(state if marked else dict(state), strict=False)
    assert snapshot(model) == before
    own = copy.deepcopy(model.state_dict())
    model.load_state_dict(own)
    assert all(torch.equal(tensor, own[key]) for key, tensor in model.state_dict().items())
