"""The fast path of linear layers: base and delta in one node of the autograd graph.

`add_misse` and `add_miss` of `miss.functional` define the result and work on everything. Tests
compare this path with them. It saves memory: the delta is added to the base's output in place, and
the adapter's part of the input's gradient to the base's part, so nothing of that width is held
twice. Of its input MiSSe keeps only the block sums ``S``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miss.functional import add_miss, add_misse, block_factor, block_reduce, scaled, shard_sum
from miss.gradients import (
    adapter_grad,
    add_shards_,
    miss_input_grad,
    misse_input_grad,
    rows_of,
    times,
    transformed,
    watched,
)
from miss.tensors import is_ordinary

__all__ = ["autocast", "cast", "fast_block_reduce", "fits", "miss_linear", "misse_linear"]
__all__ += ["no_view", "own", "untransformed"]


def fits(x: Tensor, weight: Tensor, bias: Tensor | None, d: Tensor) -> bool:
    """Whether the fast path applies.

    It needs ordinary dense tensors, one real dtype to compute in, and a frozen weight. No compiler,
    `torch.func` transform, dispatch mode or tracer may be active.
    """
    if not untransformed():
        return False
    if not (is_ordinary(x) and is_ordinary(weight) and is_ordinary(d)):
        return False
    if not (bias is None or is_ordinary(bias)):
        return False
    if weight.requires_grad or not x.layout == weight.layout == torch.strided or not weight.numel():
        return False
    return x.is_floating_point() and (
        x.dtype == weight.dtype or _compute_dtype(x) == _compute_dtype(weight)
    )


def untransformed() -> bool:
    """Whether no compiler, `torch.func` transform, dispatch mode or tracer is active."""
    tracing: Any = torch.jit.is_tracing  # type: ignore[attr-defined]  # torch's stubs lack it
    return not (torch.compiler.is_compiling() or transformed() or watched() or tracing())


def misse_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    d: Tensor,
    scale: float,
    alternate: bool = False,
) -> Tensor:
    """``F.linear(x, weight, bias) + scale * d S``, with ``S = block_sum(x)`` (Eq. 7).

    Only for arguments that `fits` accepts: nothing is checked here, and a weight that requires a
    gradient would get none. No argument is changed.

    Args:
        x: the input, ``(..., i)``.
        weight, bias: the base layer's, ``(o, i)`` and ``(o)``.
        d: ``(o, r)``.
        scale: factor of the delta.
        alternate: whether the signs of the blocks alternate.

    Shape:
        ``(..., o)``.

    >>> x, weight, d = torch.ones(1, 4), torch.zeros(1, 4), torch.ones(1, 2)
    >>> misse_linear(x, weight, None, d, scale=0.5)  # S = (2, 2)
    tensor([[2.]])
    """
    args = x, *autocast(weight, bias), d, scale, alternate
    run: Any = _MiSSe.apply if torch.is_grad_enabled() else _misse
    y: Tensor = run(*args)[0]
    return y


def miss_linear(x: Tensor, weight: Tensor, bias: Tensor | None, d: Tensor, scale: float) -> Tensor:
    """``F.linear(x, weight, bias) + scale * repeat(d x)`` (Eq. 3).

    Arguments are as in `misse_linear`, except that ``d`` is ``(n, i)``.
    """
    weight, bias = autocast(weight, bias)
    args = cast(x, weight.dtype), weight, bias, d, scale
    run: Any = _MiSS.apply if torch.is_grad_enabled() else _miss
    y: Tensor = run(*args)
    return y


def _misse(
    x: Tensor, weight: Tensor, bias: Tensor | None, d: Tensor, scale: float, alternate: bool
) -> tuple[Tensor, Tensor]:
    y = F.linear(cast(x, weight.dtype), weight, bias)
    s = fast_block_reduce(x, d.shape[1], y.dtype, alternate)
    factor = scale * block_factor(x.shape[-1], d.shape[1], y.dtype, alternate)
    if _few(x, d, y.dtype):
        y.add_(F.linear(times(s.to(d.dtype), factor), d))
    else:
        y.view(-1, y.shape[-1]).addmm_(rows_of(s), scaled(d, factor, y.dtype).t())
    return y, s


def fast_block_reduce(x: Tensor, rank: int, dtype: torch.dtype, alternate: bool) -> Tensor:
    """As in `miss.functional`, without einops except in fp16.

    To parse its pattern, einops takes as long as a small layer takes in all.
    """
    if dtype == torch.float16:
        return block_reduce(x, rank, dtype, alternate)
    width = 2 * rank if alternate else rank
    blocks, rest = divmod(x.shape[-1], width)
    s = (x[..., :-rest] if rest else x).view(*x.shape[:-1], blocks, width).sum(-2)
    if rest:
        s[..., :rest].add_(x[..., -rest:])
    if alternate:
        even, odd = s.chunk(2, dim=-1)
        s = even - odd
    return s.to(dtype)


def _miss(x: Tensor, weight: Tensor, bias: Tensor | None, d: Tensor, scale: float) -> Tensor:
    y = F.linear(x, weight, bias)
    if _few(x, d, y.dtype):
        return add_shards_(y, times(F.linear(x.to(d.dtype), d), scale))
    return add_shards_(y, F.linear(x, scaled(d, scale, y.dtype)))


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
        alternate: bool,
    ) -> tuple[Tensor, Tensor]:
        y, s = _misse(x, weight, bias, d, scale, alternate)
        _save(ctx, x, weight, d, scale, s)
        ctx.factor = block_factor(x.shape[-1], d.shape[1], y.dtype, alternate)
        ctx.alternate = alternate
        return no_view(y), s

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None and ds is None:
            return (None,) * 6
        weight, d, s = ctx.saved_tensors
        if dy is None:
            dy = s.new_zeros(*s.shape[:-1], ctx.rows)
        need_x, _, need_bias, need_d, *_ = ctx.needs_input_grad
        dx = None
        if need_x:
            rest = ctx.scale, ctx.factor, ctx.alternate
            dx = misse_input_grad(dy, ds, weight, d, *rest)
        dbias = rows_of(dy).sum(0) if need_bias else None
        dd = adapter_grad(dy, s, ctx.scale * ctx.factor, ctx.dtype) if need_d else None
        return dx, None, dbias, dd, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        x, _, d = ctx.saved_tensors
        y_t = _tangent(partial(add_misse, alternate=ctx.alternate), ctx, *tangents[:5])
        x_t = torch.zeros_like(x) if tangents[0] is None else tangents[0]
        return y_t, block_reduce(x_t, d.shape[1], y_t.dtype, ctx.alternate)


class _MiSS(torch.autograd.Function):
    """The node of MiSS, with the output ``y``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, d: Tensor, scale: float
    ) -> Tensor:
        _save(ctx, x, weight, d, scale, x)
        return no_view(_miss(x, weight, bias, d, scale))

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 5
        weight, d, x = ctx.saved_tensors
        need_x, _, need_bias, need_d, _ = ctx.needs_input_grad
        dz = shard_sum(dy, ctx.rows)
        dx = miss_input_grad(dy, dz, weight, scaled(d, ctx.scale, dy.dtype)) if need_x else None
        dbias = rows_of(dy).sum(0) if need_bias else None
        dd = adapter_grad(dz, x, ctx.scale, ctx.dtype) if need_d else None
        return dx, None, dbias, dd, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _tangent(add_miss, ctx, *tangents)


def _save(ctx: Any, x: Tensor, weight: Tensor, d: Tensor, scale: float, by_d: Tensor) -> None:
    """Keep only what the backward will read. D's gradient needs ``by_d``, which D multiplies."""
    need_x, _, _, need_d, *_ = ctx.needs_input_grad
    ctx.save_for_backward(
        weight if need_x else None, d if need_x else None, by_d if need_d else None
    )
    ctx.save_for_forward(x, weight, d)
    ctx.set_materialize_grads(False)
    ctx.scale, ctx.dtype, ctx.rows = scale, d.dtype, len(d)


def no_view(y: Tensor) -> Tensor:
    """``y`` as a tensor of its own: autograd forbids writing to a view that a node returns."""
    return y if y.dim() == 2 else own(y)


def own(y: Tensor) -> Tensor:
    """A tensor of its own over the elements of ``y``."""
    empty: Any = y.new_empty(0)
    moved: Tensor = empty.set_(y)
    return moved


def _tangent(
    plain: Callable[..., Tensor], ctx: Any, x_t: Any, weight_t: Any, bias_t: Any, d_t: Any, _: None
) -> Tensor:
    """The tangent of the output, which is linear in input and bias, and in weight and D."""
    x, weight, d = ctx.saved_tensors
    x_t = torch.zeros_like(x) if x_t is None else x_t
    weight_t = torch.zeros_like(weight) if weight_t is None else weight_t
    d_t = torch.zeros_like(d) if d_t is None else d_t
    first = plain(x_t, F.linear(cast(x_t, weight.dtype), weight, bias_t), d, ctx.scale)
    return first + plain(x, F.linear(cast(x, weight.dtype), weight_t), d_t, ctx.scale)


def _few(x: Tensor, d: Tensor, dtype: torch.dtype) -> bool:
    """Whether D is wider than ``dtype``, and casting its factor is cheaper than casting D.

    That is so for fewer rows of ``x`` than an eighth of the rank.
    """
    return (
        dtype != d.dtype
        and torch.promote_types(dtype, d.dtype) == d.dtype
        and 8 * x.numel() < min(d.shape) * x.shape[-1]
    )


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which `F.linear` takes a real ``tensor``: its own, or that of autocast."""
    kind = tensor.device.type
    if (
        not torch.amp.is_autocast_available(kind)
        or not torch.is_autocast_enabled(kind)
        or tensor.dtype == torch.float64
    ):
        return tensor.dtype
    return torch.get_autocast_dtype(kind)


def autocast(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in the dtype in which torch computes with the weight."""
    dtype = _compute_dtype(weight)
    return cast(weight, dtype), None if bias is None else cast(bias, dtype)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``; itself, if it has it."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
