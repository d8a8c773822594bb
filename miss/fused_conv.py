"""The fast path of convolutions: base and delta in one node of the autograd graph.

As in `miss.fused`, the delta is added to the base's output in place, MiSSe keeps only the block
sums ``S`` of its input, and the adapter's part of the input's gradient takes no memory of that
width. The plain path, `Host.add` with `miss.functional`, defines the result. Channels are the
second axis, and the axes of the kernel's windows follow.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from miss import fused
from miss.functional import add_miss, add_misse, block_factor, block_reduce, scaled
from miss.gradients import add_shards_
from miss.gradients_conv import (
    Window,
    channel_blocks,
    channel_shards,
    conv_bias_grad,
    miss_conv_input_grad,
    misse_conv_input_grad,
    parts_of,
)

__all__ = ["Window", "fits", "miss_conv", "misse_conv"]


def fits(x: Tensor, weight: Tensor, bias: Tensor | None, d: Tensor) -> bool:
    """Whether the fast path applies: to a batch that is not empty, where `fused.fits`."""
    return x.dim() == weight.dim() and x.numel() > 0 and fused.fits(x, weight, bias, d)


def misse_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    d: Tensor,
    scale: float,
    window: Window,
    alternate: bool = False,
) -> Tensor:
    """The base's convolution of ``x``, plus ``scale`` times that of ``S`` with ``d`` (Eq. 7).

    Only for arguments that `fits` accepts: nothing is checked here, and a weight that requires a
    gradient would get none. No argument is changed.

    Args:
        x: the input, ``(b, i, ...)``.
        weight, bias: the base layer's, ``(o, i, ...)`` and ``(o)``.
        d: ``(o, r, ...)``.
        scale: factor of the delta.
        window: how the kernel moves.
        alternate: whether the signs of the blocks alternate.

    Shape:
        ``(b, o, ...)``.

    >>> x, weight, d = torch.ones(1, 4, 1), torch.zeros(1, 4, 1), torch.ones(1, 2, 1)
    >>> misse_conv(x, weight, None, d, 0.5, Window((1,), (0,), (1,)))  # S = (2, 2)
    tensor([[[2.]]])
    """
    args = x, *fused.autocast(weight, bias), d, scale, window, alternate
    run: Any = _MiSSe.apply if torch.is_grad_enabled() else _misse
    y: Tensor = run(*args)[0]
    return y


def miss_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, d: Tensor, scale: float, window: Window
) -> Tensor:
    """The base's convolution, plus ``scale`` times that with ``d``, repeated by shards (Eq. 3).

    Arguments are as in `misse_conv`, except that ``d`` is ``(n, i, ...)``.
    """
    weight, bias = fused.autocast(weight, bias)
    args = fused.cast(x, weight.dtype), weight, bias, d, scale, window
    run: Any = _MiSS.apply if torch.is_grad_enabled() else _miss
    y: Tensor = run(*args)
    return y


def _misse(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    d: Tensor,
    scale: float,
    window: Window,
    alternate: bool,
) -> tuple[Tensor, Tensor]:
    y = window.conv(fused.cast(x, weight.dtype), weight, bias)
    s = channel_blocks(x, d.shape[1], y.dtype, alternate)
    factor = scale * block_factor(x.shape[1], d.shape[1], y.dtype, alternate)
    d = scaled(d, factor, y.dtype)
    for some in parts_of(len(y), y.numel() > x.numel()):
        y.narrow(0, *some).add_(window.conv(s.narrow(0, *some), d))
    return y, s


def _miss(
    x: Tensor, weight: Tensor, bias: Tensor | None, d: Tensor, scale: float, window: Window
) -> Tensor:
    y = window.conv(x, weight, bias)
    z = window.conv(x, scaled(d, scale, y.dtype))
    add_shards_(y.movedim(1, -1), z.movedim(1, -1))
    return y


class _MiSSe(torch.autograd.Function):
    """The node of MiSSe, with the outputs ``y`` and ``S``.

    The backward reads ``S``. As ``S`` is an output, a derivative of the backward reaches ``x``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        d: Tensor,
        scale: float,
        window: Window,
        alternate: bool,
    ) -> tuple[Tensor, Tensor]:
        y, s = _misse(x, weight, bias, d, scale, window, alternate)
        _save(ctx, x, weight, d, scale, window, s)
        ctx.factor = block_factor(x.shape[1], d.shape[1], y.dtype, alternate)
        ctx.alternate, ctx.y_shape = alternate, y.shape
        return fused.no_view(y), s

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None and ds is None:
            return (None,) * 7
        weight, d, s = ctx.saved_tensors
        if dy is None:
            dy = s.new_zeros(ctx.y_shape)
        need_x, _, need_bias, need_d, *_ = ctx.needs_input_grad
        dx = dd = None
        if need_d:
            grad = ctx.window.weight_grad(dy, s, ctx.d_shape)
            dd = scaled(grad, ctx.scale * ctx.factor, ctx.dtype)
        if need_x:
            dx = misse_conv_input_grad(ctx, dy, ds, weight, scaled(d, ctx.scale, dy.dtype))
        return dx, None, conv_bias_grad(dy) if need_bias else None, dd, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        x, _, d = ctx.saved_tensors
        add = partial(add_misse, rank=d.shape[1], alternate=ctx.alternate)
        y_t = _tangent(add, ctx, *tangents[:4])
        x_t = torch.zeros_like(x) if tangents[0] is None else tangents[0]
        s_t = block_reduce(x_t.movedim(1, -1), d.shape[1], y_t.dtype, ctx.alternate)
        return y_t, s_t.movedim(-1, 1)


class _MiSS(torch.autograd.Function):
    """The node of MiSS, with the output ``y``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        d: Tensor,
        scale: float,
        window: Window,
    ) -> Tensor:
        _save(ctx, x, weight, d, scale, window, x)
        return fused.no_view(_miss(x, weight, bias, d, scale, window))

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 6
        weight, d, x = ctx.saved_tensors
        need_x, _, need_bias, need_d, *_ = ctx.needs_input_grad
        dx = dd = None
        if need_d:
            dz = channel_shards(dy, ctx.d_shape[0])
            dd = scaled(ctx.window.weight_grad(dz, x, ctx.d_shape), ctx.scale, ctx.dtype)
            del dz
        if need_x:
            dx = miss_conv_input_grad(ctx, dy, weight, scaled(d, ctx.scale, dy.dtype))
        return dx, None, conv_bias_grad(dy) if need_bias else None, dd, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _tangent(add_miss, ctx, *tangents[:4])


def _save(
    ctx: Any, x: Tensor, weight: Tensor, d: Tensor, scale: float, window: Window, by_d: Tensor
) -> None:
    """Keep only what the backward will read. D's gradient needs ``by_d``, which D convolves."""
    need_x, _, _, need_d, *_ = ctx.needs_input_grad
    ctx.save_for_backward(
        weight if need_x else None, d if need_x else None, by_d if need_d else None
    )
    ctx.save_for_forward(x, weight, d)
    ctx.set_materialize_grads(False)
    ctx.scale, ctx.window, ctx.dtype = scale, window, d.dtype
    ctx.x_shape, ctx.d_shape = x.shape, d.shape


def _tangent(
    add: Callable[..., Tensor], ctx: Any, x_t: Any, weight_t: Any, bias_t: Any, d_t: Any
) -> Tensor:
    """The tangent of the output, which is linear in input and bias, and in weight and D."""
    x, weight, d = ctx.saved_tensors
    x_t = torch.zeros_like(x) if x_t is None else x_t
    weight_t = torch.zeros_like(weight) if weight_t is None else weight_t
    d_t = torch.zeros_like(d) if d_t is None else d_t

    def product(x: Tensor, d: Tensor) -> Tensor:
        found: Tensor = ctx.window.conv(x.movedim(-1, 1), d).movedim(1, -1)
        return found

    def both(x: Tensor, weight: Tensor, bias: Tensor | None, d: Tensor) -> Tensor:
        y = ctx.window.conv(fused.cast(x, weight.dtype), weight, bias).movedim(1, -1)
        added: Tensor = add(x.movedim(1, -1), y, d, ctx.scale, product).movedim(-1, 1)
        return added

    return both(x_t, weight, bias_t, d) + both(x, weight_t, None, d_t)
