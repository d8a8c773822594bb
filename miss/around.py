"""A fast path around a base layer whose own operation is a node of the graph: quantised layers.

`add_misse` and `add_miss` of `miss.functional` define the result and work on everything. Tests
compare this path with them. `_Take` stands before the base layer, `_Give` behind it. `_Give` adds
the delta to the base's fresh output in place, and the backward of `_Take` the adapter's part of the
input's gradient to the base's fresh gradient. So nothing of that width is held twice, and MiSSe
keeps only its block sums for the backward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from miss.functional import block_factor, expand_blocks, scaled, shard_sum
from miss.fused import fast_block_reduce, own, untransformed
from miss.gradients import adapter_grad, add_blocks_, add_shards_, in_place, rows_of, times
from miss.tensors import is_ordinary

__all__ = ["fits", "miss_around", "misse_around"]

Base = Callable[[Tensor], Tensor]


def fits(x: Tensor, d: Tensor) -> bool:
    """Whether the fast path applies.

    It needs an ordinary dense input of a real dtype and an ordinary D. No autocast, compiler,
    forward-mode derivative, `torch.func` transform, dispatch mode or tracer may be active.
    """
    if not untransformed() or getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0:
        return False
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or torch.is_autocast_enabled(kind):
        return False
    ordinary = is_ordinary(x) and is_ordinary(d) and x.layout == torch.strided
    return ordinary and x.is_floating_point() and x.numel() > 0


def misse_around(
    base: Base, x: Tensor, d: Tensor, scale: float = 1.0, alternate: bool = False
) -> Tensor:
    """``base(x) + scale * d S``, with ``S = block_sum(x)`` (Eq. 7).

    Only for arguments that `fits` accepts. No argument is changed.

    Args:
        base: the base layer's own forward. It must return an output, and in the backward a gradient
            of its input, that nothing else holds, in the dtype of ``x``.
        x: the input, ``(..., i)``.
        d: ``(o, r)``.
        scale: factor of the delta.
        alternate: whether the signs of the blocks alternate.

    Shape:
        ``(..., o)``.
    """
    rank = d.shape[1]
    factor = block_factor(x.shape[-1], rank, x.dtype, alternate)
    if torch.is_grad_enabled() and x.requires_grad:
        inner: Any = _TakeSums.apply
        x, s = inner(x, rank, alternate, factor)
    else:
        s = fast_block_reduce(x.detach(), rank, x.dtype, alternate)
    give: Any = _GiveProduct.apply
    y: Tensor = give(base(x), s, d, scale * factor)
    return y


def miss_around(base: Base, x: Tensor, d: Tensor, scale: float = 1.0) -> Tensor:
    """``base(x) + scale * repeat(d x)`` (Eq. 3).

    Arguments are as in `misse_around`, except that ``d`` is ``(n, i)``.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        inner: Any = _TakeProduct.apply
        x, z = inner(x, d, scale)
    else:
        z = torch.nn.functional.linear(x, scaled(d, scale, x.dtype))
    give: Any = _GiveShards.apply
    y: Tensor = give(base(x), z)
    return y


class _TakeSums(torch.autograd.Function):
    """Passes the input on to the base layer, with its block sums."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rank: int, alternate: bool, factor: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.alternate, ctx.factor = x.shape, alternate, factor
        return x.view_as(x), fast_block_reduce(x, rank, x.dtype, alternate)

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
        if ds is None:
            return dx, None, None, None
        ds = times(ds, 1 / ctx.factor)
        if dx is None or not _writable(dx):
            part = expand_blocks(ds, ctx.shape[-1], ctx.alternate)
            return part if dx is None else dx + part, None, None, None
        return add_blocks_(dx, ds, ctx.alternate), None, None, None


class _TakeProduct(torch.autograd.Function):
    """Passes the input on to the base layer, with its product with D."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, d: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, d)
        ctx.scale = scale
        return x.view_as(x), torch.nn.functional.linear(x, scaled(d, scale, x.dtype))

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, dz: Tensor | None) -> tuple[Tensor | None, ...]:
        if dz is None:
            return dx, None, None
        x, d = ctx.saved_tensors
        dd = adapter_grad(dz, x, ctx.scale, d.dtype) if ctx.needs_input_grad[1] else None
        d = scaled(d, ctx.scale, dz.dtype)
        if dx is None or not _writable(dx):
            return dz @ d if dx is None else dx + dz @ d, dd, None
        dx.view(-1, dx.shape[-1]).addmm_(rows_of(dz), d)
        return dx, dd, None


class _GiveProduct(torch.autograd.Function):
    """Adds ``factor * d S`` to the base layer's output, in place."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, s: Tensor, d: Tensor, factor: float) -> Tensor:
        ctx.set_materialize_grads(False)
        _, need_s, need_d, _ = ctx.needs_input_grad
        ctx.save_for_backward(s if need_d else None, d if need_s else None)
        ctx.factor, ctx.dtype = factor, d.dtype
        y = y.contiguous()
        y.view(-1, y.shape[-1]).addmm_(rows_of(s), scaled(d, factor, y.dtype).t())
        return own(y)  # what a node returns as it was given is a view, closed to in-place writes

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 4
        s, d = ctx.saved_tensors
        ds = dy @ scaled(d, ctx.factor, dy.dtype) if ctx.needs_input_grad[1] else None
        dd = adapter_grad(dy, s, ctx.factor, ctx.dtype) if ctx.needs_input_grad[2] else None
        return dy, ds, dd, None


class _GiveShards(torch.autograd.Function):
    """Adds ``z[..., k]`` to every output of shard ``k`` of the base layer, in place."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.shards = z.shape[-1]
        return own(add_shards_(y.contiguous(), z))

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        return dy, None if dy is None else shard_sum(dy, ctx.shards)


def _writable(dx: Tensor) -> bool:
    """Whether the gradient that a base layer gave may be written in place."""
    return in_place() and is_ordinary(dx) and dx.is_contiguous()
