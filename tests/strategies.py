"""Hypothesis strategies that the tests share, and the tolerance that goes with what they draw."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from miss import MiSSeLinear, MiSSLinear

FORMS = {"misse": MiSSeLinear, "miss": MiSSLinear}
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

    def layer(self, dtype: torch.dtype = torch.float64, adapter_dtype: torch.dtype | None = None) -> nn.Linear:
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


@st.composite
def cases(draw: st.DrawFn, max_size: int = 13) -> Case:
    """Layers of all shapes: ragged and even, rank 1 and full, bias or none, every leading shape, empty batches."""
    method = draw(st.sampled_from(sorted(FORMS)))
    in_features, out_features = draw(st.integers(1, max_size)), draw(st.integers(1, max_size))
    limit = in_features if method == "misse" else out_features
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
    """A bound on the rounding error of a result that sums ``terms`` products whose absolute values add up to ``magnitude``.

    Each of at most eight roundings to ``dtype`` (inputs cast, block sum, two products, their results, the final sum) costs
    one eps of the magnitude; each addition inside a sum costs one eps of the accumulator, fp32 for half precision. The
    last term is the spacing of the subnormals, for each term.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    accumulator = torch.finfo(torch.float32 if half else dtype).eps
    bound = (8 * torch.finfo(dtype).eps + terms * accumulator) * magnitude
    return bound + 8 * terms * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * (1 + magnitude)
