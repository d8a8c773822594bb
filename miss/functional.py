"""The maths of MiSS and its reshaping, as pure functions on tensors (arXiv 2409.15371, section 4).

One letter per axis, here and everywhere:

=====  ==========================================================================
``b``  leading axes of the input, any number of them, written ``...`` in patterns
``i``  input features
``o``  output features
``r``  rank: rows of one block of the input (MiSSe)
``g``  blocks of ``r`` inputs
``n``  shards of the output (MiSS); the rank of that form
``s``  rows in one shard
=====  ==========================================================================

Every function consists of differentiable torch operations. So each of them works under autograd
(twice), ``torch.func`` and ``torch.compile``, and with tensor subclasses.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor

from miss.tensors import is_dtensor

__all__ = ["Product", "add_miss", "add_misse", "block_factor", "block_mean", "block_reduce"]
__all__ += ["block_sum", "cycle_rows", "expand_blocks", "expand_shards", "scaled", "shard_runs"]
__all__ += ["shard_sum"]

Product: TypeAlias = Callable[[Tensor, Tensor], Tensor]

# How many fp16 elements the CPU averages at a time: `mean` makes an fp32 copy of its whole input.
_CHUNK = 1 << 18


def block_sum(x: Tensor, rank: int, alternate: bool = False) -> Tensor:
    """Sum the blocks of the input (Eq. 4-5).

    ``S[..., j]`` is the sum of ``x[..., c]`` over all ``c`` with ``c mod rank == j``. A last block
    that is shorter than ``rank`` counts as padded with zeros, without a copy of ``x``.

    Args:
        x: ``(..., i)``.
        rank: from 1 to ``i``.
        alternate: block ``c // rank`` enters with the sign ``(-1)^(c // rank)``. The even blocks
            are summed, and the odd ones, and the sums are subtracted.

    Shape:
        ``(..., i) -> (..., r)``, in the dtype of ``x``.

    >>> block_sum(torch.arange(5.0), rank=2)  # 0 + 2 + 4, 1 + 3
    tensor([6., 4.])
    >>> block_sum(torch.arange(5.0), rank=2, alternate=True)  # 0 - 2 + 4, 1 - 3
    tensor([ 2., -2.])
    """
    if alternate:
        even, odd = _even_and_odd(block_sum, x, rank)
        return even - odd
    blocks, tail = _split(x, rank)
    total = _reduce(blocks, rank, "sum")
    return total if tail is None else total + tail


def block_mean(x: Tensor, rank: int, alternate: bool = False) -> Tensor:
    """The mean of the blocks: ``block_sum(x, rank) / g``, where ``g`` includes a short last block.

    The mean stays in range where the sum may overflow fp16. Arguments are as in `block_sum`; with
    alternating signs ``g`` is rounded up to an even number.

    Shape:
        ``(..., i) -> (..., r)``, in the dtype of ``x``.

    >>> block_mean(torch.tensor([6e4, 1.0, 6e4, 3.0], dtype=torch.float16), rank=2)
    tensor([6.0000e+04, 2.0000e+00], dtype=torch.float16)
    """
    if alternate:
        even, odd = _even_and_odd(block_mean, x, rank)
        return 0.5 * even - 0.5 * odd
    blocks, tail = _split(x, rank)
    if x.dtype == torch.float16 and x.device.type == "cpu" and not torch.compiler.is_compiling():
        rows = rearrange(blocks, "... i -> (...) i")
        chunks = torch.split(rows, max(1, _CHUNK // blocks.shape[-1]))
        means = torch.cat([_reduce(chunk, rank, "mean") for chunk in chunks])
        mean = means.reshape(*x.shape[:-1], rank)
    else:
        mean = _reduce(blocks, rank, "mean")
    whole = blocks.shape[-1] // rank
    return mean if tail is None else mean * (whole / (whole + 1)) + tail / (whole + 1)


def block_reduce(x: Tensor, rank: int, dtype: torch.dtype, alternate: bool = False) -> Tensor:
    """What MiSSe multiplies by D, in ``dtype``: `block_sum`, or in fp16 `block_mean`.

    In fp16 the sum may overflow. ``x`` is not cast: it is summed in its own dtype, in half
    precision with torch's fp32 accumulator, and only the result is cast.
    """
    return (block_mean if dtype == torch.float16 else block_sum)(x, rank, alternate).to(dtype)


def block_factor(in_features: int, rank: int, dtype: torch.dtype, alternate: bool = False) -> float:
    """The quotient of `block_sum` and `block_reduce`: 1, or in fp16 the number of blocks."""
    blocks = -(-in_features // rank)
    blocks += blocks % 2 if alternate else 0
    return float(blocks) if dtype == torch.float16 else 1.0


def expand_blocks(d: Tensor, in_features: int, alternate: bool = False) -> Tensor:
    """The dense delta of MiSSe at scale 1: column ``c`` is ``d[:, c mod r]`` (Eq. 6).

    Args:
        d: ``(..., r)``.
        in_features: ``i``, at least ``r``.
        alternate: column ``c`` has the sign ``(-1)^(c // r)``.

    Shape:
        ``(..., r) -> (..., i)``; for the delta ``(o, r) -> (o, i)``.

    >>> expand_blocks(torch.tensor([[1, 2]]), in_features=5)
    tensor([[1, 2, 1, 2, 1]])
    """
    d = torch.cat((d, -d), dim=-1) if alternate else d
    rank = d.shape[-1]
    return repeat(d, "... r -> ... (g r)", r=rank, g=-(-in_features // rank))[..., :in_features]


def expand_shards(d: Tensor, out_features: int) -> Tensor:
    """The dense delta of MiSS at scale 1: row ``d[k]`` once for each row of shard ``k`` (Eq. 2).

    Shards are contiguous; their sizes differ by at most one, larger first.

    Args:
        d: ``(n, i)``.
        out_features: ``o``, at least ``n``.

    Shape:
        ``(n, i) -> (o, i)``.

    >>> expand_shards(torch.tensor([[1], [2]]), out_features=5).flatten()
    tensor([1, 1, 1, 2, 2])
    """
    runs = shard_runs(out_features, d.shape[0])
    return torch.cat([repeat(d[run], "n ... -> (n s) ...", s=size) for run, _, size in runs])


def shard_sum(y: Tensor, shards: int) -> Tensor:
    """Sum the outputs of each shard, ``(..., o) -> (..., n)``: the transpose of `expand_shards`.

    >>> shard_sum(torch.arange(5.0), shards=2)  # 0 + 1 + 2, 3 + 4
    tensor([3., 7.])
    """
    runs = shard_runs(y.shape[-1], shards)
    # `narrow`, because a slice of everything is an alias, and batched gradients
    # (`torch.autograd.grad(is_grads_batched=True)`) do not support aliases.
    parts = [(y.narrow(-1, rows.start, rows.stop - rows.start), size) for _, rows, size in runs]
    sums = [reduce(part, "... (n s) -> ... n", "sum", s=size) for part, size in parts]
    return torch.cat(sums, dim=-1) if len(sums) > 1 else sums[0]


def cycle_rows(d: Tensor, out_features: int) -> Tensor:
    """Repeat the rows of ``d`` in turn, until there is one for each output.

    Row ``k`` of the result is ``d[k mod m]``; for ``m = o`` the result is ``d`` itself. With this
    PEFT's mini form shares D along the output too.

    Args:
        d: ``(m, r)``.
        out_features: ``o``, a multiple of ``m``.

    Shape:
        ``(m, r) -> (o, r)``.

    >>> cycle_rows(torch.tensor([[1], [2]]), out_features=4).flatten()
    tensor([1, 2, 1, 2])
    """
    rows = d.shape[0]
    if rows == out_features:
        return d
    return repeat(d, "m r -> (t m) r", m=rows, t=out_features // rows)


def add_misse(
    x: Tensor,
    y: Tensor,
    d: Tensor,
    scale: float = 1.0,
    product: Product = F.linear,
    rank: int | None = None,
    alternate: bool = False,
) -> Tensor:
    """``y + scale * d S`` with ``S = block_sum(x)``: MiSSe without its dense delta (Eq. 7).

    Args:
        x: the input, ``(..., i)``.
        y: the base layer's output, ``(..., o)``; its dtype is also the result's.
        d: ``(o, r)``, in any floating dtype.
        scale: factor of the delta.
        product: the base layer's own operation without a bias, with ``d`` for its weight.
        rank: ``r``, if it is not the length of the last axis of ``d``.
        alternate: whether the signs of the blocks alternate.

    Shape:
        ``(..., o)``. Only ``S`` is cast, not ``x`` or ``y``: ``x`` is summed in its own dtype, in
        half precision with torch's fp32 accumulator. In fp16, where the sum may overflow, ``S`` is
        a mean, and ``d`` is multiplied by the number of blocks.
    """
    rank = d.shape[-1] if rank is None else rank
    factor = block_factor(x.shape[-1], rank, y.dtype, alternate)
    if is_dtensor(x):
        factor = 2.0 ** math.ceil(math.log2(factor))  # its inverse is exact in fp16
        signs = _factor(partial(expand_blocks, alternate=alternate), rank, x)
        s = F.linear(x, signs / factor).to(y.dtype)
    else:
        s = block_reduce(x, rank, y.dtype, alternate)
    return y + product(s, scaled(d, scale * factor, y.dtype))


def add_miss(
    x: Tensor,
    y: Tensor,
    d: Tensor,
    scale: float = 1.0,
    product: Product = F.linear,
    rank: int | None = None,
) -> Tensor:
    """``y + scale * repeat(d x)``: MiSS without its dense delta (Eq. 3, repeated after ``d x``).

    Args:
        x, y, scale, product: as in `add_misse`.
        d: ``(n, i)``, in any floating dtype.
        rank: ``n``, if it is not the length of the first axis of ``d``.

    Shape:
        ``(..., o)``. Output ``k`` of the small product ``d x``, of shape ``(..., n)``, is added to
        every row of shard ``k``.
    """
    rank = d.shape[0] if rank is None else rank
    x = x.to(y.dtype) if x.is_floating_point() else x  # a layer may cast its input or output
    z = product(x, scaled(d, scale, y.dtype))
    if is_dtensor(y):
        return y + F.linear(z, _factor(expand_shards, rank, y))
    sums = []
    for run, rows, size in shard_runs(y.shape[-1], rank):
        shards = rearrange(y[..., rows], "... (n s) -> ... n s", s=size)
        both = shards + rearrange(z[..., run], "... n -> ... n 1")
        sums.append(rearrange(both, "... n s -> ... (n s)"))
    return torch.cat(sums, dim=-1) if len(sums) > 1 else sums[0]


def _even_and_odd(total: Callable[..., Tensor], x: Tensor, rank: int) -> tuple[Tensor, ...]:
    """``total``, a sum or mean of blocks, of the even blocks of ``x``, and of the odd ones."""
    missing = 2 * rank - x.shape[-1]
    x = F.pad(x, (0, missing)) if missing > 0 else x
    return total(x, 2 * rank).chunk(2, dim=-1)


def _split(x: Tensor, rank: int) -> tuple[Tensor, Tensor | None]:
    """The whole blocks of ``x``, ``(..., g * r)``, and a short last one padded to ``(..., r)``."""
    whole = x.shape[-1] - x.shape[-1] % rank
    if whole == x.shape[-1]:
        return x, None
    return x[..., :whole], F.pad(x[..., whole:], (0, rank - (x.shape[-1] - whole)))


def _reduce(blocks: Tensor, rank: int, how: str) -> Tensor:
    return reduce(blocks, "... (g r) -> ... r", how, g=blocks.shape[-1] // rank, r=rank)


def shard_runs(out_features: int, shards: int) -> list[tuple[slice, slice, int]]:
    """Runs of equal shards, larger first: ``(which shards, which outputs, outputs per shard)``."""
    out_features, shards = int(out_features), int(shards)  # torch.jit.trace gives tensors
    size, larger = out_features // shards, out_features % shards
    cut = larger * (size + 1)
    equal = (slice(larger, shards), slice(cut, out_features), size)
    return [(slice(0, larger), slice(0, cut), size + 1), equal] if larger else [equal]


def _factor(expand: Callable[[Tensor, int], Tensor], rank: int, like: Any) -> Tensor:
    """The factor of a form, of 0, 1 and -1, as wide as the DTensor ``like``.

    A product with it is right however ``like`` is sharded. A reshape is not, because a DTensor
    cannot split an axis whose shards are not whole blocks.
    """
    from torch.distributed.tensor import DTensor, Replicate

    factor = expand(torch.eye(rank, dtype=like.dtype, device=like.device), like.shape[-1])
    return DTensor.from_local(
        factor, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False
    )


def scaled(d: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """``factor * d``, multiplied in fp32 or wider and rounded once to ``dtype``."""
    if factor != 1:
        d = d.to(torch.promote_types(d.dtype, torch.float32)) * factor
    return d if d.dtype == dtype else d.to(dtype)
