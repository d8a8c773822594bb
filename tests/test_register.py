"""`register`: what it takes, what it refuses at once, and what a `Host` may say besides."""

import copy
import math
import pathlib
import re
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import miss
from miss import (
    AdaptedLayer,
    Host,
    MiSSeLinear,
    MissError,
    StateError,
    TargetError,
    adapted_modules,
    disabled,
    inject,
    load,
    merge,
    register,
    save,
    summary,
)
from miss.layers import class_of, host_of
from tests.hosts import FakeQuantHost, FakeQuantLinear
from tests.models import snapshot


class Scaled(nn.Linear):
    """What a host must know of: it doubles its output."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Forgetful(Host):
    """Leaves out the factor."""

    @staticmethod
    def product(layer: nn.Module, x: Tensor, d: Tensor, parameter: str) -> Tensor:
        return F.linear(x, d)


class ScaledHost(Host):
    @staticmethod
    def product(layer: nn.Module, x: Tensor, d: Tensor, parameter: str) -> Tensor:
        return 2 * F.linear(x, d)


class Crosswise(ScaledHost):
    axes = {"weight": (1, 0)}  # noqa: RUF012  # as a user writes it


class Failing(ScaledHost):
    @staticmethod
    def product(layer: nn.Module, x: Tensor, d: Tensor, parameter: str) -> Tensor:
        raise KeyError("stride")


class NoProduct(Host):
    pass


class WrongAxes(ScaledHost):
    axes = {"weight": (0, 0)}  # noqa: RUF012


class Elsewhere(ScaledHost):
    axes = {"kernel": (0, 1)}  # noqa: RUF012


class Unchanging(nn.Linear):
    """Its outputs differ from call to call, so that a zero D cannot leave them as they are."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + torch.rand(())


def local_types() -> tuple[type[nn.Module], type[Host]]:
    class Local(nn.Linear):
        pass

    class LocalHost(ScaledHost):
        pass

    return Local, LocalHost


EXAMPLE = (Scaled(6, 4), torch.randn(3, 6))
LOCAL, LOCAL_HOST = local_types()


@pytest.mark.parametrize(
    ("layer_type", "host", "example", "error", "message"),
    [
        (nn.Linear(2, 2), ScaledHost, None, TargetError, "needs a module type"),
        ("Linear", ScaledHost, None, TargetError, "needs a module type"),
        (Tensor, ScaledHost, None, TargetError, "needs a module type"),
        (None, ScaledHost, None, TargetError, "needs a module type"),
        (MiSSeLinear, ScaledHost, None, TargetError, "an adapted class is no type to adapt"),
        (Scaled, ScaledHost(), None, TargetError, "needs a subclass of miss.Host"),
        (Scaled, Host, None, TargetError, "needs a subclass of miss.Host"),
        (Scaled, nn.Linear, None, TargetError, "needs a subclass of miss.Host"),
        (Scaled, NoProduct, None, TargetError, r"NoProduct defines no product\(layer, x, d"),
        (Scaled, WrongAxes, None, TargetError, r"(?s)WrongAxes\.axes.*from 0.*\(0, 0\)"),
        (nn.Linear, ScaledHost, None, StateError, r"(?s)Linear is registered already.*LinearHost"),
        (
            LOCAL,
            ScaledHost,
            None,
            StateError,
            "(?s)Local cannot be imported by its name.*top level",
        ),
        (Scaled, LOCAL_HOST, None, StateError, "LocalHost cannot be imported by its name"),
        (
            Scaled,
            Forgetful,
            EXAMPLE,
            StateError,
            "(?s)not that of the layer with the delta.*product",
        ),
        (Scaled, Crosswise, EXAMPLE, StateError, r"raises .*\n.*axes and product"),
        (Scaled, Failing, EXAMPLE, StateError, r"raises KeyError: 'stride'"),
        (Scaled, Elsewhere, EXAMPLE, StateError, r"(?s)example of Scaled: .*no Parameter.*kernel"),
        (
            Unchanging,
            Forgetful,
            (Unchanging(6, 4), torch.randn(3, 6)),
            StateError,
            "zero D changes",
        ),
        (Scaled, ScaledHost, (nn.Linear(6, 4), torch.randn(3, 6)), TargetError, "registered type"),
        (Scaled, ScaledHost, Scaled(6, 4), TargetError, r"expected: \(a Scaled, its input\)"),
        (Scaled, ScaledHost, (Scaled(6, 4),), TargetError, "registered type"),
        (Scaled, ScaledHost, (Scaled(6, 4), torch.randn(3, 5)), StateError, "raises RuntimeError"),
        (Scaled, ScaledHost, (Scaled(6, 4), "x"), StateError, "raises TypeError"),
    ],
)
def test_bad_input_is_an_error_at_register(layer_type, host, example, error, message: str):
    before = snapshot(example[0]) if isinstance(example, tuple) else None
    with pytest.raises(error, match=message) as caught:
        register(layer_type, host, example)
    assert str(caught.value).startswith("register")
    assert isinstance(caught.value, MissError)
    assert before is None or snapshot(example[0]) == before
    if isinstance(layer_type, type) and layer_type is not nn.Linear:
        with pytest.raises(TargetError):
            inject(nn.Sequential(Scaled(4, 4)), "0", rank=2)


def test_an_unregistered_subclass_is_told_of_register():
    message = "(?s)" + re.escape(f"is a {Scaled.__module__}.Scaled") + ".*miss.register"
    with pytest.raises(TargetError, match=message):
        inject(nn.Sequential(Scaled(4, 4)), "0", rank=2)
    with pytest.raises(TargetError, match=r"(?s)Scaled with a forward of its own.*miss\.register"):
        MiSSeLinear.adopt_(Scaled(4, 4), 2)
    with pytest.raises(TargetError, match=r"(?s)torch.*Linear itself.*Inherits.*miss\.inject"):
        MiSSeLinear.adopt_(Inherits(4, 4), 2)


class Inherits(nn.Linear):
    pass


class Registered(Scaled):
    pass


def test_a_registered_type_is_adapted_wherever_a_target_matches_it():
    state = torch.get_rng_state()
    register(Registered, ScaledHost, example=(Registered(6, 4), torch.randn(3, 6)))
    with pytest.raises(StateError, match="registered already"):
        register(Registered, ScaledHost)
    register_state = torch.get_rng_state()
    torch.set_rng_state(state)
    Registered(6, 4), torch.randn(3, 6)
    assert torch.equal(torch.get_rng_state(), register_state)  # the check draws no random numbers
    for targets in (
        "0",
        "*",
        "all-linear",
        nn.Linear,
        Registered,
        lambda name, module: name == "0",
    ):
        model = inject(nn.Sequential(Registered(6, 4)), targets, rank=2)
        assert isinstance(model[0], Registered)
        assert isinstance(model[0], AdaptedLayer)
        assert type(model[0]).__name__ == "MiSSeRegistered"
        assert list(adapted_modules(model)) == ["0"]
        assert type(model[0]) is class_of(Registered, ScaledHost, miss.forms.MiSSe)

    class Under(Registered):
        pass

    with pytest.raises(TargetError, match="Under"):
        inject(nn.Sequential(Under(6, 4)), "0", rank=2)


class Masked(nn.Linear):
    """Takes a second argument, which leaves outputs out."""

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(hidden)
        return y if mask is None else y + mask


def test_the_input_is_found_however_a_layer_is_called():
    register(Masked, Forgetful)
    torch.manual_seed(0)
    layer, x, mask = Masked(6, 4), torch.randn(3, 6), torch.randn(4)
    inject(layer, Masked, rank=2)
    nn.init.normal_(layer.miss_D)
    want = F.linear(x, layer.weight + layer.miss_delta_weight(), layer.bias)
    for y in (layer(x), layer(hidden=x), layer(x, None), layer(mask=None, hidden=x)):
        torch.testing.assert_close(y, want)
    for y in (layer(x, mask), layer(mask=mask, hidden=x), layer(x, mask=mask)):
        torch.testing.assert_close(y, want + mask)


def test_a_registered_type_has_no_short_names():
    names = {"rank", "scale", "merged", "delta_weight", "reset_adapter", "alternate", "dropout"}
    own = set(dir(class_of(FakeQuantLinear, FakeQuantHost, miss.forms.MiSSe))) - set(
        dir(FakeQuantLinear)
    )
    assert not own & names
    own -= {"_is_hf_initialized"}  # how transformers says that a layer is initialised
    assert all(name.startswith(("miss_", "_miss_")) for name in own), own


def test_the_mixin_defines_its_own_names_forward_and_torchs_hooks_and_nothing_else():
    # The last is how transformers says that a layer is initialised, so that D can be zeroed then.
    allowed = set(dir(nn.Module)) | {"forward", "__init_subclass__", "_is_hf_initialized"}
    for name in vars(AdaptedLayer):
        assert name.startswith(("miss_", "_miss_", "__")) or name in allowed, name
    assert AdaptedLayer.__mro__[1:] == (object,)


def test_short_names_can_only_be_read_but_scale():
    layer = MiSSeLinear(6, 4, 2)
    layer.scale = 3
    assert layer.miss_scale == layer.scale == 3.0
    for name in ("rank", "alternate", "merged", "delta_weight", "reset_adapter"):
        with pytest.raises(AttributeError, match=name):
            setattr(layer, name, 1)
        with pytest.raises(AttributeError, match=name):
            delattr(layer, name)
    assert not hasattr(layer, "dropout")
    assert torch.equal(layer.delta_weight(), layer.miss_delta_weight("weight"))
    assert host_of(layer) is host_of(nn.Linear(2, 2))


def test_an_attribute_of_the_objects_own_can_be_assigned_and_deleted():
    layer = nn.Linear(6, 4)
    layer.rank, layer.scale = "mine", "too"
    MiSSeLinear.adopt_(layer, 2, scale=0.5)
    layer.rank, layer.scale = "still", "mine"
    assert (layer.rank, layer.scale, layer.miss_rank, layer.miss_scale) == ("still", "mine", 2, 0.5)
    del layer.rank, layer.scale
    assert (layer.rank, layer.scale) == (2, 0.5)


def test_the_seam_can_be_replaced_on_an_object_and_in_a_subclass():
    x = torch.randn(3, 6)

    class Doubled(MiSSeLinear):
        def miss_delta(self, x: Tensor, y: Tensor) -> Tensor:
            return 2 * super().miss_delta(x, y)

    layer = Doubled(6, 4, 2)
    assert torch.equal(layer(x), 2 * F.linear(x, layer.weight, layer.bias))
    layer = MiSSeLinear(6, 4, 2)
    seen = []
    layer.miss_delta = lambda x, y: (seen.append(x), y + 1)[1]
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias) + 1)
    assert seen[0] is x


class Packed(nn.Module):
    """Keeps a matrix as one flat Parameter."""

    def __init__(self, shape: tuple[int, int] = (4, 6), odd: bool = False):
        super().__init__()
        self.shape, self.odd = shape, odd
        self.weight = nn.Parameter(torch.randn(math.prod(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.view(self.shape))


class PackedHost(Forgetful):
    @staticmethod
    def sizes(layer: Packed, parameter: str) -> tuple[int, ...]:
        return layer.shape

    @staticmethod
    def refusal(layer: Packed) -> str | None:
        return "is odd" if layer.odd else None


def test_a_host_gives_the_shape_of_a_packed_weight(tmp_path: pathlib.Path):
    if host_of(Packed()) is None:
        register(Packed, PackedHost)
    torch.manual_seed(0)
    base, x = nn.Sequential(Packed()), torch.randn(3, 6)
    model = inject(copy.deepcopy(base), "0", rank=2)
    nn.init.normal_(model[0].miss_D)
    assert model[0].miss_configs["weight"].shape == (4, 6)
    dense = base[0].weight.view(4, 6) + model[0].miss_delta_weight()
    torch.testing.assert_close(model(x), F.linear(x, dense))
    save(model, tmp_path / "a.pt")
    assert torch.equal(load(copy.deepcopy(base), tmp_path / "a.pt")(x), model(x))
    before = snapshot(model)
    with pytest.raises(StateError, match=r"0: cannot be merged: its weight has the shape \(24,\)"):
        merge(model)
    assert snapshot(model) == before


def test_a_host_refuses_some_layers_of_its_type():
    if host_of(Packed()) is None:
        register(Packed, PackedHost)
    with pytest.raises(TargetError, match="1: is odd"):
        inject(nn.Sequential(Packed(), Packed(odd=True)), "1", rank=2)
    model = inject(nn.Sequential(Packed(), Packed(odd=True)), Packed, rank=2)
    assert list(adapted_modules(model)) == ["0"]
    assert summary(model).skipped == {"1": "is odd"}


class Quick(nn.Linear):
    pass


class QuickHost(Forgetful):
    """Notes which of its functions are called."""

    calls: ClassVar[list[str]] = []

    @staticmethod
    def fast(layer: nn.Module, x: Tensor) -> Tensor | None:
        if x.dim() != 2:
            return None
        QuickHost.calls.append("fast")
        return F.linear(x, layer.weight + layer.miss_delta_weight(), layer.bias)

    @staticmethod
    def with_weights(layer: nn.Module, weights, args, kwargs) -> Tensor:
        QuickHost.calls.append("with_weights")
        return F.linear(*args, weights["weight"], layer.bias)


def test_a_hosts_own_ways_are_taken_where_they_apply():
    register(Quick, QuickHost)
    torch.manual_seed(0)
    layer, x = Quick(6, 4).eval(), torch.randn(3, 6)
    base = layer(x)
    inject(layer, Quick, rank=2)
    nn.init.normal_(layer.miss_D)
    want = F.linear(x, layer.weight + layer.miss_delta_weight(), layer.bias)
    assert torch.equal(layer(x), want)
    assert QuickHost.calls == ["fast"]
    torch.testing.assert_close(layer(x[None]), want[None])
    with disabled(layer):
        assert torch.equal(layer(x), base)
    assert QuickHost.calls == ["fast"]
    merge(layer)
    with disabled(layer):
        assert torch.equal(layer(x), base)
    assert QuickHost.calls == ["fast", "with_weights"]
