"""What the fast path of convolutions is made of: convolutions, sums of channels and gradients.

As in `miss.gradients`, the gradients make new tensors where a backward is itself differentiated,
transformed by `torch.func` or seen by a dispatch mode; elsewhere they are added in place, a part of
the batch at a time.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miss.functional import expand_blocks, shard_runs, shard_sum
from miss.fused import fast_block_reduce
from miss.gradients import add_blocks_, add_shards_, in_place, times

__all__ = ["Window", "channel_blocks", "channel_shards", "conv_bias_grad", "miss_conv_input_grad"]
__all__ += ["misse_conv_input_grad", "parts_of"]

# The parts of a batch in which what is as wide as an input or an output is made and added.
_PARTS = 4


class Window(NamedTuple):
    """How a convolution moves its kernel: the arguments of `torch.convolution`."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The convolution of ``x``."""
        rest: Any = *self, False, (0,) * len(self.stride), 1
        return torch.convolution(x, weight, bias, *rest)

    def input_grad(self, dy: Tensor, weight: Tensor, sizes: Sequence[int]) -> Tensor:
        """The gradient of an input whose windows move over ``sizes``.

        It is a transposed convolution, which takes no input, unlike torch's own backward.
        """
        left = []  # positions at the end that no window reaches
        for size, moves, kernel, step, pad, gap in zip(
            sizes, dy.shape[2:], weight.shape[2:], *self
        ):
            left.append(size - ((moves - 1) * step - 2 * pad + gap * (kernel - 1) + 1))
        rest: Any = *self, True, left, 1
        return torch.convolution(dy, weight, None, *rest)

    def weight_grad(self, dy: Tensor, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The gradient of a weight of ``shape``."""
        like = dy.new_empty(1).expand(shape)
        rest = *self, False, (0,) * len(self.stride), 1, (False, True, False)
        found: Tensor = torch.ops.aten.convolution_backward(dy, x, like, None, *rest)[1]
        return found


def channel_blocks(x: Tensor, rank: int, dtype: torch.dtype, alternate: bool) -> Tensor:
    """`functional.block_reduce` of the channels, in the layout of ``x``."""
    if dtype == torch.float16 or not x.is_contiguous():
        s = fast_block_reduce(x.movedim(1, -1), rank, dtype, alternate).movedim(-1, 1)
        return s.contiguous() if x.is_contiguous() else s
    width = 2 * rank if alternate else rank
    blocks, rest = divmod(x.shape[1], width)
    s = x.narrow(1, 0, blocks * width).view(len(x), blocks, width, *x.shape[2:]).sum(1)
    if rest:
        s.narrow(1, 0, rest).add_(x.narrow(1, blocks * width, rest))
    if alternate:
        even, odd = s.chunk(2, dim=1)
        s = even - odd
    return s.to(dtype)


def channel_shards(dy: Tensor, shards: int) -> Tensor:
    """`functional.shard_sum` of the channels, in the layout of ``dy``."""
    if not dy.is_contiguous():
        return shard_sum(dy.movedim(1, -1), shards).movedim(-1, 1)
    sums = []
    for run, rows, size in shard_runs(dy.shape[1], shards):
        part = dy.narrow(1, rows.start, rows.stop - rows.start)
        sums.append(part.view(len(dy), run.stop - run.start, size, *dy.shape[2:]).sum(2))
    return torch.cat(sums, dim=1) if len(sums) > 1 else sums[0]


def misse_conv_input_grad(
    node: Any, dy: Tensor, ds: Tensor | None, weight: Tensor, d: Tensor
) -> Tensor:
    """The gradient of ``x`` by ``weight`` and the delta of ``d``, plus the part of ``ds``.

    ``ds`` is the gradient of ``S``, the block sum divided by ``node.factor``.
    """
    window: Window = node.window
    channels, *sizes = node.x_shape[1:]
    if ds is None and in_place():
        if _sum_fits(dy, weight, node.x_shape, len(dy) * d.shape[1] * math.prod(sizes)):
            both = weight.clone()
            add_blocks_(both.movedim(1, -1), d.movedim(1, -1), node.alternate)
            return window.input_grad(dy, both, sizes)
        dx = window.input_grad(dy, weight, sizes)
        part = window.input_grad(dy, d, sizes)
        add_blocks_(dx.movedim(1, -1), part.movedim(1, -1), node.alternate)
        return dx
    part = window.input_grad(dy, d, sizes)
    part = part if ds is None else part + times(ds, 1 / node.factor)
    whole = expand_blocks(part.movedim(1, -1), channels, node.alternate).movedim(-1, 1)
    return window.input_grad(dy, weight, sizes) + whole


def miss_conv_input_grad(node: Any, dy: Tensor, weight: Tensor, d: Tensor) -> Tensor:
    """The gradient of ``x`` by ``weight`` and the delta of ``d``."""
    window: Window = node.window
    sizes = node.x_shape[2:]
    if in_place() and _sum_fits(dy, weight, node.x_shape):
        both = weight.clone()
        add_shards_(both.movedim(0, -1), d.movedim(0, -1))
        return window.input_grad(dy, both, sizes)
    dx, dz = window.input_grad(dy, weight, sizes), channel_shards(dy, len(d))
    if not in_place():
        return dx + window.input_grad(dz, d, sizes)
    for some in parts_of(len(dy)):
        dx.narrow(0, *some).add_(window.input_grad(dz.narrow(0, *some), d, sizes))
    return dx


def _sum_fits(dy: Tensor, weight: Tensor, shape: Sequence[int], beside: int = 0) -> bool:
    """Whether the gradient of an input of ``shape`` is made by the sum of weight and delta.

    Then one convolution does for both. The sum, and the ``beside`` elements that are held with it,
    take at most a fifth of the memory of ``y`` and ``dx``; torch's own backward on CPUs takes three
    halves of that. In half precision the sum would round D. This was measured on CPUs, so the sum
    is made only there.
    """
    cpu = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)
    return cpu and 5 * (weight.numel() + beside) <= dy.numel() + math.prod(shape)


def parts_of(length: int, split: bool = True) -> Iterator[tuple[int, int]]:
    """Start and length of the parts of a batch."""
    step = -(-length // _PARTS) if split else length
    for start in range(0, length, step):
        yield start, min(step, length - start)


def conv_bias_grad(dy: Tensor) -> Tensor:
    """The gradient of the bias."""
    return dy.sum((0, *range(2, dy.dim())))
