"""The settings of a linear layer: those of its constructor, of `adopt_`, and its short names."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from miss import (
    MiSSeLinear,
    MissError,
    MiSSLinear,
    ShapeError,
    StateError,
    TargetError,
    eject,
    inject,
)
from tests.strategies import forms


@forms
def test_constructor_freezes_the_base(form: partial[nn.Linear]):
    layer = form(6, 4, 2, device="cpu", dtype=torch.float64)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"miss_D"}
    assert list(layer.state_dict()) == ["weight", "bias", "miss_D"]
    assert isinstance(layer, nn.Linear)
    assert not layer.miss_D.any()
    assert layer.miss_D.dtype == torch.float64


def test_adapter_dtype():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert MiSSeLinear(4, 4, 2, dtype=dtype).miss_D.dtype == torch.float32
    layer = MiSSeLinear(4, 4, 2, dtype=torch.float32, adapter_dtype=torch.bfloat16)
    assert layer.miss_D.dtype == layer.delta_weight().dtype == torch.bfloat16
    assert layer(torch.randn(4)).dtype == torch.float32


@forms
def test_adopt_keeps_the_object_and_its_flags(form: partial[nn.Linear]):
    linear = nn.Linear(6, 4).eval()
    linear.bias.requires_grad_(False)
    parameters = [id(p) for p in linear.parameters()]
    with torch.inference_mode():
        assert form.func.adopt_(linear, 2, scale=3, **form.keywords) is linear
    assert [id(p) for p in linear.parameters()][:2] == parameters
    assert (
        linear.weight.requires_grad,
        linear.bias.requires_grad,
        linear.miss_D.requires_grad,
    ) == (True, False, True)
    assert not linear.miss_D.is_inference()
    assert not linear.training
    assert (linear.rank, linear.scale) == (2, 3.0)
    with pytest.raises(StateError, match="already"):
        form.func.adopt_(linear, 2)
    with pytest.raises(TargetError, match="NonDynamicallyQuantizableLinear"):
        form.func.adopt_(nn.MultiheadAttention(4, 2).out_proj, 2)
    with pytest.raises(TargetError, match=r"ReLU: is not a torch\.nn\.modules\.linear\.Linear"):
        form.func.adopt_(nn.ReLU(), 2)


@forms
def test_settings_that_can_be_assigned(form: partial[nn.Linear]):
    layer, x = form(8, 4, 2, scale=3, dropout=0.5), torch.randn(64, 8)
    nn.init.ones_(layer.miss_D)
    assert (layer.miss_scale, layer.miss_dropout, layer.miss_rank) == (3.0, 0.5, 2)
    assert not hasattr(layer, "dropout")
    layer.miss_dropout = 0.0
    one = layer(x)
    layer.scale = -6
    assert (layer.scale, layer.miss_configs["weight"].scale) == (-6.0, -6.0)
    base = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x) - base, -2 * (one - base))
    for name, value in (("scale", torch.nan), ("miss_scale", "1"), ("miss_dropout", 1.0)):
        with pytest.raises(ShapeError, match=name.removeprefix("miss_")):
            setattr(layer, name, value)
    for name in ("rank", "alternate", "merged", "miss_rank", "miss_alternate", "miss_merged"):
        with pytest.raises(AttributeError):
            setattr(layer, name, 1)
    assert (layer.scale, layer.miss_dropout, layer.rank, layer.merged) == (-6.0, 0.0, 2, False)
    assert layer.alternate is layer.miss_alternate is form.keywords.get("alternate", False)


@forms
def test_what_the_layer_itself_has_is_not_hidden_by_a_short_name(form: partial[nn.Linear]):
    layer, x = nn.Linear(6, 4), torch.randn(3, 6)
    layer.rank, layer.merged = "mine", nn.Identity()
    layer.register_buffer("scale", torch.ones(2))
    base = layer(x)
    form.func.adopt_(layer, 2, **form.keywords)
    assert torch.equal(layer(x), base)
    assert (layer.rank, layer.merged) == ("mine", layer._modules["merged"])
    assert torch.equal(layer.scale, torch.ones(2))
    assert (layer.miss_rank, layer.miss_scale, layer.miss_merged) == (2, 1.0, False)
    layer.rank, layer.scale = "yours", torch.zeros(2)
    assert (layer.rank, layer.miss_rank, layer.miss_scale) == ("yours", 2, 1.0)
    assert not layer._buffers["scale"].any()
    del layer.rank
    assert layer.rank == 2
    eject(layer)
    assert type(layer) is nn.Linear
    assert not layer.scale.any()


@pytest.mark.parametrize("rank", [0, -1, True, 1.0, "4", None, 7, 10**30])
def test_wrong_rank(rank: object):
    with pytest.raises(ShapeError, match=r"(?s)rank.*1 <= rank <= 6"):
        MiSSeLinear(6, 10, rank)
    with pytest.raises(ShapeError, match=r"(?s)rank.*1 <= rank <= 6"):
        MiSSLinear(10, 6, rank)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), "1", None, True, 10**400, torch.tensor(1.0)], ids=str
)
def test_wrong_scale_and_dropout(value: object):
    with pytest.raises(ShapeError, match="scale"):
        MiSSeLinear(6, 4, 2, scale=value)
    with pytest.raises(ShapeError, match="dropout"):
        MiSSeLinear(6, 4, 2, dropout=value)


def test_wrong_alternate():
    for make in (
        lambda **options: MiSSLinear(6, 4, 2, **options),
        lambda **options: MiSSLinear.adopt_(nn.Linear(6, 4), 2, **options),
        lambda **options: inject(nn.Linear(6, 4), "", rank=2, method="miss", **options),
    ):
        make(alternate=False)
        with pytest.raises(ShapeError, match=r"(?s)only MiSSe sums blocks.*MiSS with alternate"):
            make(alternate=True)
        for value in (1, "yes", None):
            with pytest.raises(ShapeError, match=f"must be True or False\n.*alternate={value!r}"):
                make(alternate=value)


def test_other_wrong_arguments():
    for dropout in (-0.1, 1, 1.5):
        with pytest.raises(ShapeError, match="0 <= dropout < 1"):
            MiSSLinear(6, 4, 2, dropout=dropout)
    for dtype in (torch.int64, "float32", torch.complex64):
        with pytest.raises(ShapeError, match="adapter_dtype"):
            MiSSLinear(6, 4, 2, adapter_dtype=dtype)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        MiSSLinear(6, 4, 2)(torch.randn(2, 5))
    assert issubclass(ShapeError, MissError)
