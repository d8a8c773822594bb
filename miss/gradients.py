"""The gradients of the fast path, and what it writes in place.

Functions whose names end in ``_`` write to their first argument. The others make new tensors where
a backward is itself differentiated, transformed by `torch.func` or seen by a dispatch mode.
"""

import torch
from torch import Tensor

from miss.functional import expand_blocks, scaled, shard_runs

__all__ = ["adapter_grad", "add_blocks_", "add_shards_", "in_place", "miss_input_grad"]
__all__ += ["misse_input_grad", "rows_of", "times", "transformed", "watched"]

# Whether a transform of torch.func is active, and how many dispatch modes are: selective
# checkpointing, tracers, counters. torch has no public names for these. If they are missing, the
# fast path is not taken.
transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
watched = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


def add_blocks_(x: Tensor, s: Tensor, alternate: bool = False) -> Tensor:
    """Add ``s[..., c mod r]`` to ``x[..., c]`` in place, for a contiguous ``x``; returns ``x``.

    With ``alternate`` it is subtracted in every other block. This is the transpose of `block_sum`.

    >>> add_blocks_(torch.zeros(5), torch.tensor([1.0, 2.0]))
    tensor([1., 2., 1., 2., 1.])
    """
    blocks, rest = divmod(x.shape[-1], s.shape[-1])
    whole = x[..., : x.shape[-1] - rest] if rest else x
    # Where `view` would need a copy, it is an error; einops would write to the copy.
    view, each = whole.view(*x.shape[:-1], blocks, s.shape[-1]), s.unsqueeze(-2)
    if alternate:
        view[..., ::2, :].add_(each)
        view[..., 1::2, :].sub_(each)
    else:
        view.add_(each)
    if rest:
        x[..., -rest:].add_(s[..., :rest], alpha=-1 if alternate and blocks % 2 else 1)
    return x


def add_shards_(y: Tensor, z: Tensor) -> Tensor:
    """Add ``z[..., k]`` to every output of shard ``k`` in place (Eq. 2); returns ``y``.

    ``y`` must be contiguous.

    >>> add_shards_(torch.zeros(5), torch.tensor([1.0, 2.0]))
    tensor([1., 1., 1., 2., 2.])
    """
    for run, rows, size in shard_runs(y.shape[-1], z.shape[-1]):
        y[..., rows].view(*y.shape[:-1], run.stop - run.start, size).add_(z[..., run].unsqueeze(-1))
    return y


def misse_input_grad(
    dy: Tensor,
    ds: Tensor | None,
    weight: Tensor,
    d: Tensor,
    scale: float,
    factor: float,
    alternate: bool = False,
) -> Tensor:
    """``dy (weight + expand_blocks(scale * d))`` plus the part of ``ds``.

    ``ds`` is the gradient of ``S``, the block sum divided by ``factor``.
    """
    d = scaled(d, scale, dy.dtype)
    if ds is None and in_place() and (rows := _tile_rows(dy, weight, d)):
        return _input_grad_by_tiles(dy, weight, d, rows, alternate)
    part = dy @ d if ds is None else dy @ d + times(ds, 1 / factor)
    dx = dy @ weight
    if ds is None and in_place():
        return add_blocks_(dx, part, alternate)
    return dx + expand_blocks(part, dx.shape[-1], alternate)


def _input_grad_by_tiles(
    dy: Tensor, weight: Tensor, d: Tensor, rows: int, alternate: bool
) -> Tensor:
    """The same by tiles of the sum ``weight + expand_blocks(d)``, some rows at a time.

    For many tokens building the sum is less work than the product ``dy d``.
    """
    dx, dy = dy.new_empty(*dy.shape[:-1], weight.shape[1]), rows_of(dy)
    tile = weight.new_empty(rows, weight.shape[1])
    for start in range(0, len(weight), rows):
        some = start, min(rows, len(weight) - start)
        both = tile[: some[1]].copy_(weight.narrow(0, *some))
        add_blocks_(both, d.narrow(0, *some), alternate)
        dx.view(-1, dx.shape[-1]).addmm_(dy.narrow(1, *some), both, beta=1 if start else 0)
    return dx


def _tile_rows(dy: Tensor, weight: Tensor, d: Tensor) -> int:
    """How many rows of the weight make a tile; 0 if tiles do not pay or would round D.

    In half precision a tile would round D. A tile and ``S`` take at most a twelfth of the memory of
    the base's output and gradient. Products of fewer than 192 rows are slower. This was measured on
    CPUs, so tiles are used only there.
    """
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        return 0
    o, i = weight.shape
    rows = dy.numel() // o * ((i + o) // 12 - d.shape[1]) // i
    return min(rows, 512, o) if rows >= 192 else 0


def miss_input_grad(dy: Tensor, dz: Tensor, weight: Tensor, d: Tensor) -> Tensor:
    """``dy (weight + expand_shards(d))``, with ``dz = shard_sum(dy)``."""
    dx = dy @ weight
    if not in_place() or dx.dtype != d.dtype:  # in a backward under autocast
        return dx + dz @ d
    dx.view(-1, dx.shape[-1]).addmm_(rows_of(dz), d)
    return dx


def adapter_grad(dy: Tensor, s: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """``factor * dy^T s`` in the dtype of D.

    If that is another dtype, the product is made a part at a time, which takes less memory.
    """
    dy, s = rows_of(dy), rows_of(s)
    if dy.dtype == dtype or not in_place():
        return scaled(dy.t() @ s, factor, dtype)
    dd = dy.new_empty(dy.shape[1], s.shape[1], dtype=dtype)
    narrow, wide, out = (s, dy, dd.t()) if len(dd) > dd.shape[1] else (dy, s, dd)
    for start in range(0, out.shape[1], 512):
        part = 1, start, min(512, out.shape[1] - start)
        product = narrow.t() @ wide.narrow(*part)
        out.narrow(*part).copy_(product if factor == 1 else scaled(product, factor, dtype))
        del product  # before the next one is made
    return dd


def in_place() -> bool:
    """Whether a backward may write in place: nothing differentiates, transforms or watches it."""
    return not torch.is_grad_enabled() and not transformed() and not watched()


def rows_of(x: Tensor) -> Tensor:
    """``x`` as a matrix, its leading axes made one."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def times(x: Tensor, factor: float) -> Tensor:
    """``x * factor``, or ``x`` itself for a factor of 1."""
    return x if factor == 1 else x * factor
