"""The fast path around a base layer equals the plain path, and writes to nothing but fresh tensors.

The base layer is a node of its own, as a quantised one is: its output is fresh, and so is the
gradient that it gives its input.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from miss import around
from miss.functional import add_miss, add_misse
from tests.strategies import FORMS, tolerance

PLAIN = {"misse": add_misse, "alternating": partial(add_misse, alternate=True), "miss": add_miss}
FAST = {
    "misse": around.misse_around,
    "alternating": partial(around.misse_around, alternate=True),
    "miss": around.miss_around,
}
SHAPES = [
    ((4,), 10, 7, 3),
    ((2, 3), 12, 8, 4),
    ((2, 1, 2), 5, 9, 5),
    ((3,), 6, 6, 1),
    ((), 8, 4, 2),
]
forms = pytest.mark.parametrize("form", FORMS)


class Product(torch.autograd.Function):
    """``x W^T``; like a quantised product, its 3-D output is a view of a fresh tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.saved_tensors[0], None


def case(
    form: str, shape: tuple[Any, ...], dtype: torch.dtype = torch.float64, d_dtype: Any = None
) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor, Tensor]:
    """A base, an input, D, and a gradient of the output."""
    leading, i, o, r = shape
    torch.manual_seed(0)
    weight, x = torch.randn(o, i), torch.randn(*leading, i)
    d = torch.randn(*((min(r, o), i) if form == "miss" else (o, r)))
    x, d = x.to(dtype).requires_grad_(), d.to(d_dtype or dtype).requires_grad_()
    weight, dy = weight.to(dtype), torch.randn(*leading, o).to(dtype)
    return lambda x: Product.apply(x, weight), x, d, dy


@forms
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("x_needs", [True, False])
@pytest.mark.parametrize("d_needs", [True, False])
def test_it_equals_the_plain_path(form, shape, x_needs, d_needs):
    base, x, d, dy = case(form, shape)
    x.requires_grad_(x_needs), d.requires_grad_(d_needs)
    found = []
    for y in (FAST[form](base, x, d, 0.5), PLAIN[form](x, base(x), d, 0.5)):
        wanted = [t for t in (x, d) if t.requires_grad]
        found.append((y, *(torch.autograd.grad(y, wanted, dy) if wanted else ())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_precision_under_a_wide_d_is_within_rounding(form, dtype):
    base, x, d, dy = case(form, ((2, 3), 22, 7, 3), dtype, torch.float32)
    y = FAST[form](base, x, d, 0.5)
    grads = torch.autograd.grad(y, (x, d), dy)
    assert (y.dtype, [g.dtype for g in grads]) == (dtype, [dtype, torch.float32])
    weight = base(torch.eye(22, dtype=dtype)).T.double()
    x, d, dy = (t.detach().double() for t in (x, d, dy))
    x.requires_grad_(), d.requires_grad_()
    exact = PLAIN[form](x, x @ weight.T, d, 0.5)
    wanted = torch.autograd.grad(exact, (x, d), dy)
    x, d = (t.detach().abs().requires_grad_() for t in (x, d))
    unsigned = PLAIN["miss" if form == "miss" else "misse"]
    size = unsigned(x, x @ weight.T.abs(), d, 0.5)
    sizes = torch.autograd.grad(size, (x, d), dy.abs())
    for got, want, bound in zip((y, *grads), (exact, *wanted), (size, *sizes)):
        assert ((got.double() - want).abs() <= tolerance(dtype, bound.detach(), 60)).all()


@forms
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_derivatives_of_first_and_second_order(form, shape):
    base, x, d, _ = case(form, shape)

    def run(x: Tensor, d: Tensor) -> Tensor:
        return FAST[form](base, x, d, -0.5)

    assert torch.autograd.gradcheck(run, (x, d))
    assert torch.autograd.gradgradcheck(run, (x, d))


@forms
def test_the_delta_goes_into_the_bases_output_and_gradient(form):
    base, x, d, dy = case(form, ((3,), 10, 7, 3))
    kept: dict[str, Tensor] = {}

    def watched(x: Tensor) -> Tensor:
        x.register_hook(lambda dx: kept.update(dx=dx))
        kept["y"] = base(x)
        return kept["y"]

    before = [t.detach().clone() for t in (x, d, dy)]
    y = FAST[form](watched, x, d)
    assert y.data_ptr() == kept["y"].data_ptr()
    (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    assert dx.data_ptr() == kept["dx"].data_ptr()
    assert all(torch.equal(*pair) for pair in zip((x, d, dy), before))
    (dx,) = torch.autograd.grad(y, x, dy.requires_grad_(), create_graph=True)
    assert dx.data_ptr() != kept["dx"].data_ptr()  # a differentiable backward writes to nothing
    y = FAST[form](watched, x, d)
    y.retain_grad(), x.retain_grad()
    y.backward(dy.detach())
    assert torch.equal(y.grad, before[2])


@forms
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_the_output_may_be_written_in_place(form, shape):
    base, x, d, dy = case(form, shape)
    want = FAST[form](base, x, d).relu()
    got = FAST[form](base, x, d).relu_()
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(y, x, dy)[0] for y in (got, want)))


@forms
@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing(form, reentrant):
    base, x, d, dy = case(form, ((3,), 10, 7, 3))
    got = []
    for run in (FAST[form], partial(checkpoint, FAST[form], use_reentrant=reentrant)):
        x.grad = d.grad = None
        run(base, x, d).backward(dy)
        got.append((x.grad, d.grad))
    assert all(torch.equal(*pair) for pair in zip(*got))


def test_the_rule():
    x, d = torch.randn(2, 4), torch.randn(3, 2)
    assert around.fits(x, d)
    assert around.fits(x.bfloat16(), d)
    assert not around.fits(torch.ones(2, 4, dtype=torch.int64), d)
    assert not around.fits(x[:0], d)
    assert not around.fits(x.to_sparse(), d)
    with torch.autocast("cpu"):
        assert not around.fits(x, d)
    with torch.autograd.forward_ad.dual_level():
        assert not around.fits(x, d)
    seen = []
    torch.func.vmap(lambda row: seen.append(around.fits(row, d)) or row)(x)
    assert seen == [False]
