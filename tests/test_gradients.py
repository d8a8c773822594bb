"""The gradients of the fast path, first and second, batched, in every dtype and by tiles."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from miss import MiSSeLinear, gradients
from tests.paths import both_paths, plain_path
from tests.strategies import DTYPES, RAGGED, Case, assert_equals_oracle, cases, ragged


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(
            "misse", 13, 240, 2, True, 0.5, (2, 70), 0
        ),  # two tiles, the second one short; a short last block
        Case("misse", 12, 120, 3, False, 1.0, (400,), 1),  # one tile
        Case("alternating", 13, 240, 2, True, 0.5, (2, 70), 0),
        Case("alternating", 12, 120, 3, False, 1.0, (400,), 1),
    ],
    ids=str,
)
def test_gradient_by_tiles_equals_oracle(case: Case, dtype: torch.dtype):
    real = gradients._input_grad_by_tiles
    with mock.patch.object(gradients, "_input_grad_by_tiles", wraps=real) as tiles:
        assert_equals_oracle(case, case.layer(dtype), case.input(dtype))
    assert tiles.call_count == 1
    assert (tiles.call_args.args[3] < case.out_features) == (case.in_features == 13)


@given(case=cases(max_size=6))
def test_second_derivatives_equal_those_of_the_plain_path(case: Case):
    def penalty(layer: nn.Linear, x: Tensor) -> tuple[Tensor, ...]:
        wanted = layer.miss_D, x
        first = torch.autograd.grad((layer(x).tanh() ** 2).sum(), wanted, create_graph=True)
        return torch.autograd.grad(
            sum((grad**2).sum() for grad in first), wanted
        )  # D's gradient depends on x through S, too

    fast = penalty(case.layer(), case.input().requires_grad_())
    with plain_path():
        plain = penalty(case.layer(), case.input().requires_grad_())
    for got, want in zip(fast, plain):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "case",
    [*RAGGED, *(Case(m, 13, 120, 2, True, 0.5, (140,), 0) for m in ("misse", "alternating"))],
    ids=str,
)
def test_batched_gradients(case: Case):
    layer, x = case.layer(), case.input().requires_grad_()
    y = layer(x)
    many = torch.randn(3, *y.shape, dtype=y.dtype)
    singly = [torch.autograd.grad(y, (x, layer.miss_D), g, retain_graph=True) for g in many]
    looped = [torch.stack(grads) for grads in zip(*singly)]
    batched = torch.autograd.grad(
        y, (x, layer.miss_D), many, retain_graph=True, is_grads_batched=True
    )
    mapped = torch.vmap(lambda g: torch.autograd.grad(y, (x, layer.miss_D), g, retain_graph=True))(
        many
    )
    for want, *both in zip(looped, batched, mapped):
        for got in both:
            torch.testing.assert_close(got, want)


@ragged
def test_backward_inside_autocast_of_a_forward_outside(case: Case):
    layer, x = case.layer(torch.float32), case.input(torch.float32).requires_grad_()

    def grads() -> Tensor:
        y = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            return torch.cat(
                [grad.flatten() for grad in torch.autograd.grad(y.sum(), (x, layer.miss_D))]
            )

    fast, plain = both_paths(grads)
    torch.testing.assert_close(
        fast, plain, rtol=0, atol=float(8 * torch.finfo(torch.bfloat16).eps * plain.abs().max())
    )


@ragged
def test_batched_second_derivatives(case: Case):
    layer, x = case.layer(), case.input().requires_grad_()
    many = torch.randn(5, *layer.miss_D.shape, dtype=torch.float64)

    def mixed() -> Tensor:
        y = layer(x)
        [grad] = torch.autograd.grad(y, layer.miss_D, y.detach(), create_graph=True)
        return torch.autograd.grad(grad, x, many, is_grads_batched=True)[0]

    torch.testing.assert_close(*both_paths(mixed))


@ragged
def test_the_base_may_change_where_only_d_is_trained(case: Case):
    layer, x = case.layer(), case.input()
    y = layer(x)
    want = torch.autograd.grad(y.sum(), layer.miss_D, retain_graph=True)
    with torch.no_grad():
        layer.weight.zero_()
        layer.miss_D.zero_()
    assert torch.equal(*want, *torch.autograd.grad(y.sum(), layer.miss_D))


@ragged
def test_no_gradient_stays_none(case: Case):
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, g: Tensor) -> None:
            return None

    layer, x = case.layer(), case.input().requires_grad_()
    Stop.apply(layer(x)).sum().backward()
    assert layer.miss_D.grad is None
    assert x.grad is None


def test_fp16_gradient_of_the_input_stays_in_range():
    layer = MiSSeLinear(400, 4, 1, dtype=torch.float16)  # 400 blocks
    nn.init.ones_(layer.miss_D)
    nn.init.zeros_(layer.weight)
    x = torch.zeros(2, 400, dtype=torch.float16, requires_grad=True)
    layer(x).backward(torch.full((2, 4), 1000.0, dtype=torch.float16))
    assert (x.grad == 4000).all()


def test_gradient_of_an_fp16_adapter_is_scaled_before_it_is_rounded():
    layer = MiSSeLinear(2, 1, 1, scale=0.5, adapter_dtype=torch.float16)
    layer(torch.tensor([[1e5, 0.0]])).sum().backward()
    assert torch.equal(layer.miss_D.grad, torch.tensor([[5e4]], dtype=torch.float16))
