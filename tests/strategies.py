"""Hypothesis strategies that the tests share, and the tolerance that goes with what they draw."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from miss import AdaptedLayer, MiSSeLinear, MiSSLinear
from tests import reference

# The forms by the labels of the tests: what `inject` is told, and what makes a layer.
OPTIONS = {
    "misse": {"method": "misse"},
    "alternating": {"method": "misse", "alternate": True},
    "miss": {"method": "miss"},
}
FORMS = {
    "misse": partial(MiSSeLinear),
    "alternating": partial(MiSSeLinear, alternate=True),
    "miss": partial(MiSSLinear),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """A layer and an input to draw: ``leading`` is the leading shape of the input."""

    method: str
    in_features: int
    out_features: int
    rank: int
    bias: bool
    scale: float
    leading: tuple[int, ...]
    seed: int

    def layer(
        self, dtype: torch.dtype = torch.float64, adapter_dtype: torch.dtype | None = None
    ) -> nn.Linear:
        """The layer, with a random D."""
        torch.manual_seed(self.seed)
        layer = FORMS[self.method](
            self.in_features,
            self.out_features,
            self.rank,
            self.bias,
            scale=self.scale,
            dtype=dtype,
            adapter_dtype=adapter_dtype,
        )
        nn.init.normal_(layer.miss_D)
        return layer

    def input(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """A random input of the leading shape."""
        torch.manual_seed(self.seed + 1)
        return torch.randn(*self.leading, self.in_features, dtype=torch.float64).to(dtype)


def label_of(layer: AdaptedLayer) -> str:
    """The label of a layer's form."""
    return "alternating" if layer.miss_alternate else layer.miss_form.name


RAGGED = [Case(method, 10, 7, 3, True, 1.0, (2, 3), 0) for method in FORMS]
methods = pytest.mark.parametrize("method", FORMS)
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
ragged = pytest.mark.parametrize("case", RAGGED, ids=lambda case: case.method)


@st.composite
def cases(draw: st.DrawFn, max_size: int = 13) -> Case:
    """Layers of all shapes.

    Ragged and even, rank 1 and full, bias or none, every leading shape, empty batches.
    """
    method = draw(st.sampled_from(list(FORMS)))
    in_features, out_features = draw(st.integers(1, max_size)), draw(st.integers(1, max_size))
    limit = out_features if method == "miss" else in_features
    return Case(
        method=method,
        in_features=in_features,
        out_features=out_features,
        rank=draw(st.one_of(st.integers(1, limit), st.sampled_from([1, limit]))),
        bias=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 0.5, -2.0, 0.0])),
        leading=tuple(draw(st.lists(st.integers(0, 3), max_size=3))),
        seed=draw(st.integers(0, 2**16)),
    )


def tolerance(dtype: torch.dtype, magnitude: Tensor, terms: int) -> Tensor:
    """A bound on the rounding error of a sum of ``terms`` products.

    The absolute values of the products add up to ``magnitude``. Each of at most eight roundings to
    ``dtype`` (inputs cast, block sum, two products, their results, the final sum) costs one eps of
    the magnitude. Each addition inside a sum costs one eps of the accumulator, fp32 for half
    precision. Where signs alternate, the block sum is two sums whose difference is rounded again.
    The last term is the spacing of the subnormals, for each term.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    accumulator = torch.finfo(torch.float32 if half else dtype).eps
    bound = (8 * torch.finfo(dtype).eps + terms * accumulator) * magnitude
    return bound + 8 * terms * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * (
        1 + magnitude
    )


def assert_equals_oracle(case: Case, layer: nn.Linear, x: Tensor) -> None:
    """Output, gradient of the input, gradient of D, and the output with the delta merged.

    The gradient of the output is random.
    """
    dtype, x = x.dtype, x.detach().requires_grad_()
    y = layer(x)
    g = torch.randn(
        y.shape, generator=torch.Generator().manual_seed(case.seed), dtype=torch.float64
    ).to(dtype)
    grad_x, grad_d = torch.autograd.grad(y, (x, layer.miss_D), g)

    w, b = layer.weight.double(), None if layer.bias is None else layer.bias.double()
    x64, d64, g64 = (
        x.detach().double().requires_grad_(),
        layer.miss_D.detach().double().requires_grad_(),
        g.double(),
    )
    exact = reference.output(case.method, x64, w, b, d64, case.scale)
    exact_x, exact_d = torch.autograd.grad(exact, (x64, d64), g64, allow_unused=True)
    exact_d = torch.zeros_like(d64) if exact_d is None else exact_d

    # The same sums over absolute values bound the rounding.
    ax, ad, ag = x64.detach().abs().requires_grad_(), d64.detach().abs().requires_grad_(), g64.abs()
    ab, unsigned = None if b is None else b.abs(), reference.unsigned(case.method)
    size = reference.output(unsigned, ax, w.abs(), ab, ad, abs(case.scale))
    size_x, size_d = torch.autograd.grad(size, (ax, ad), ag, allow_unused=True)
    size_d = torch.zeros_like(ad) if size_d is None else size_d
    terms = case.in_features + case.out_features + x.numel() + 1

    merged = F.linear(x, (layer.weight + layer.delta_weight()).to(dtype), layer.bias)
    coarse = max(
        dtype, layer.miss_D.dtype, key=lambda dtype: torch.finfo(dtype).eps
    )  # what D's gradient and delta are rounded to
    for got, want, magnitude, rounded in (
        (y, exact, size, dtype),
        (merged, exact, size, coarse),
        (grad_x, exact_x, size_x, dtype),
        (grad_d, exact_d, size_d, coarse),
    ):
        assert got.shape == want.shape
        assert ((got.double() - want).abs() <= tolerance(rounded, magnitude.detach(), terms)).all()
    assert (y.dtype, grad_x.dtype, grad_d.dtype) == (dtype, dtype, layer.miss_D.dtype)
