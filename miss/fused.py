"""The fast path of the two layers: base and delta in one node of the graph, which adds in place and keeps little.

`misse_linear` and `miss_linear` of `miss.functional` are the truth: they work on everything, and this path is tested equal to
them. Here the delta is added to the base's output where that stands, and the adapter's part of the gradient of the input to
the base's, so that nothing of their width is held twice; and of its input MiSSe keeps only the block sums ``S``.
"""

from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miss.functional import (
    add_blocks_,
    add_shards_,
    block_factor,
    block_reduce,
    cycle_rows,
    expand_blocks,
    scaled,
    shard_sum,
)
from miss.functional import miss_linear as plain_miss
from miss.functional import misse_linear as plain_misse

__all__ = ["fits", "miss_linear", "misse_linear"]

_PLAIN = (Tensor, nn.Parameter)
_PLAIN_OR_NONE = (*_PLAIN, NoneType)
# Whether a transform of torch.func is at work, and how many dispatch modes (selective checkpointing, tracers, counters) look on.
# torch has no public names for these; where they are missing, the answer is yes.
_transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_watched = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


def fits(x: Tensor, weight: Tensor, bias: Tensor | None, d: Tensor) -> bool:
    """Whether the fast path applies: ordinary dense tensors that meet in one real dtype, a frozen weight, ordinary execution."""
    if torch.compiler.is_compiling() or _transformed() or _watched() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    if not (
        type(x) in _PLAIN
        and type(weight) in _PLAIN
        and type(d) in _PLAIN
        and type(bias) in _PLAIN_OR_NONE
    ):
        return False
    if weight.requires_grad or not x.layout == weight.layout == torch.strided or not weight.numel():
        return False
    return x.is_floating_point() and (
        x.dtype == weight.dtype or _compute_dtype(x) == _compute_dtype(weight)
    )


def misse_linear(x: Tensor, weight: Tensor, bias: Tensor | None, d: Tensor, scale: float) -> Tensor:
    """``F.linear(x, weight, bias) + scale * d S``, with ``S = block_sum(x)`` (Eq. 7).

    Only for arguments that `fits`: nothing is checked here, and a weight that requires a gradient would get none. No argument
    is changed.

    Args:
        x: the input, ``(..., i)``.
        weight, bias: the base layer's, ``(o, i)`` and ``(o)``.
        d: ``(o, r)``, or ``(m, r)`` with fewer rows, which are cycled.
        scale: factor of the delta.

    Shape:
        ``(..., o)``.

    >>> x, weight, d = torch.ones(1, 4), torch.zeros(1, 4), torch.ones(1, 2)
    >>> misse_linear(x, weight, None, d, scale=0.5)  # S = (2, 2)
    tensor([[2.]])
    """
    args = x, *_autocast(weight, bias), cycle_rows(d, len(weight)), scale
    y: Tensor = _MiSSe.apply(*args)[0] if torch.is_grad_enabled() else _misse(*args)[0]  # type: ignore[no-untyped-call]
    return y


def miss_linear(x: Tensor, weight: Tensor, bias: Tensor | None, d: Tensor, scale: float) -> Tensor:
    """``F.linear(x, weight, bias) + scale * repeat(d x)`` (Eq. 3). Arguments as in `misse_linear`, but ``d`` is ``(n, i)``."""
    weight, bias = _autocast(weight, bias)
    args = _cast(x, weight.dtype), weight, bias, d, scale
    y: Tensor = _MiSS.apply(*args) if torch.is_grad_enabled() else _miss(*args)  # type: ignore[no-untyped-call]
    return y


def _misse(
    x: Tensor, weight: Tensor, bias: Tensor | None, d: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    y = F.linear(_cast(x, weight.dtype), weight, bias)
    s = _block_reduce(x, d.shape[1], y.dtype)
    factor = scale * block_factor(x.shape[-1], d.shape[1], y.dtype)
    if _few(x, d, y.dtype):
        y.add_(F.linear(_times(s.to(d.dtype), factor), d))
    else:
        y.view(-1, y.shape[-1]).addmm_(_rows(s), scaled(d, factor, y.dtype).t())
    return y, s


def _block_reduce(x: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """As in `miss.functional`, but for fp16 without einops, which takes as long to parse a pattern as a small layer takes."""
    if dtype == torch.float16:
        return block_reduce(x, rank, dtype)
    blocks, rest = divmod(x.shape[-1], rank)
    s = (x[..., :-rest] if rest else x).view(*x.shape[:-1], blocks, rank).sum(-2)
    if rest:
        s[..., :rest].add_(x[..., -rest:])
    return s.to(dtype)


def _miss(x: Tensor, weight: Tensor, bias: Tensor | None, d: Tensor, scale: float) -> Tensor:
    y = F.linear(x, weight, bias)
    few = _few(x, d, y.dtype)
    return add_shards_(
        y,
        _times(F.linear(x.to(d.dtype), d), scale)
        if few
        else F.linear(x, scaled(d, scale, y.dtype)),
    )


class _MiSSe(torch.autograd.Function):
    """Outputs ``y`` and ``S``, since the backward reads ``S``: so a derivative of the backward goes on through it to ``x``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, d: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        y, s = _misse(x, weight, bias, d, scale)
        _save(ctx, x, weight, d, scale, s)
        ctx.factor = block_factor(x.shape[-1], d.shape[1], y.dtype)
        return _no_view(y), s

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None and ds is None:
            return (None,) * 5
        weight, d, s = ctx.saved_tensors
        if dy is None:
            dy = s.new_zeros(*s.shape[:-1], ctx.rows)
        need_x, _, need_bias, need_d, _ = ctx.needs_input_grad
        dx = _misse_input_grad(dy, ds, weight, d, ctx.scale, ctx.factor) if need_x else None
        dbias = _rows(dy).sum(0) if need_bias else None
        dd = _adapter_grad(dy, s, ctx.scale * ctx.factor, ctx.dtype) if need_d else None
        return dx, None, dbias, dd, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        x, _, d = ctx.saved_tensors
        y_t = _tangent(plain_misse, ctx, *tangents)
        return y_t, block_reduce(
            torch.zeros_like(x) if tangents[0] is None else tangents[0], d.shape[1], y_t.dtype
        )


class _MiSS(torch.autograd.Function):
    """The output ``y``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, d: Tensor, scale: float
    ) -> Tensor:
        _save(ctx, x, weight, d, scale, x)
        return _no_view(_miss(x, weight, bias, d, scale))

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 5
        weight, d, x = ctx.saved_tensors
        need_x, _, need_bias, need_d, _ = ctx.needs_input_grad
        dz = shard_sum(dy, ctx.rows)
        dx = _miss_input_grad(dy, dz, weight, scaled(d, ctx.scale, dy.dtype)) if need_x else None
        dbias = _rows(dy).sum(0) if need_bias else None
        dd = _adapter_grad(dz, x, ctx.scale, ctx.dtype) if need_d else None
        return dx, None, dbias, dd, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _tangent(plain_miss, ctx, *tangents)


def _save(ctx: Any, x: Tensor, weight: Tensor, d: Tensor, scale: float, by_d: Tensor) -> None:
    """Keep what the backward will read, and no other tensor: ``by_d`` is what multiplies D, for its gradient."""
    need_x, _, _, need_d, _ = ctx.needs_input_grad
    ctx.save_for_backward(
        weight if need_x else None, d if need_x else None, by_d if need_d else None
    )
    ctx.save_for_forward(x, weight, d)
    ctx.set_materialize_grads(False)
    ctx.scale, ctx.dtype, ctx.rows = scale, d.dtype, len(d)


def _no_view(y: Tensor) -> Tensor:
    """``y`` as a tensor of its own: autograd would not let a user change a view in place that comes out of a node."""
    return y if y.dim() == 2 else y.new_empty(0).set_(y)  # type: ignore[call-overload]  # torch's stubs lack it


def _tangent(
    plain: Callable[..., Tensor], ctx: Any, x_t: Any, weight_t: Any, bias_t: Any, d_t: Any, _: None
) -> Tensor:
    """The output is linear in the input and the bias, and in the weight and D."""
    x, weight, d = ctx.saved_tensors
    x_t, weight_t, d_t = (
        torch.zeros_like(of) if t is None else t
        for t, of in ((x_t, x), (weight_t, weight), (d_t, d))
    )
    first = plain(x_t, F.linear(_cast(x_t, weight.dtype), weight, bias_t), d, ctx.scale)
    return first + plain(x, F.linear(_cast(x, weight.dtype), weight_t), d_t, ctx.scale)


def _misse_input_grad(
    dy: Tensor, ds: Tensor | None, weight: Tensor, d: Tensor, scale: float, factor: float
) -> Tensor:
    """``dy (weight + expand_blocks(scale * d))``, and what comes by ``S``, which is the block sum over ``factor``."""
    d = scaled(d, scale, dy.dtype)
    if ds is None and _in_place() and (rows := _tile_rows(dy, weight, d)):
        return _input_grad_by_tiles(dy, weight, d, rows)
    part = dy @ d if ds is None else dy @ d + _times(ds, 1 / factor)
    dx = dy @ weight
    return (
        add_blocks_(dx, part)
        if ds is None and _in_place()
        else dx + expand_blocks(part, dx.shape[-1])
    )


def _input_grad_by_tiles(dy: Tensor, weight: Tensor, d: Tensor, rows: int) -> Tensor:
    """The same with the sum ``weight + expand_blocks(d)`` built, some rows at a time: less work than ``dy d`` for many tokens."""
    dx, dy = dy.new_empty(*dy.shape[:-1], weight.shape[1]), _rows(dy)
    tile = weight.new_empty(rows, weight.shape[1])
    for start in range(0, len(weight), rows):
        some = start, min(rows, len(weight) - start)
        both = add_blocks_(tile[: some[1]].copy_(weight.narrow(0, *some)), d.narrow(0, *some))
        dx.view(-1, dx.shape[-1]).addmm_(dy.narrow(1, *some), both, beta=1 if start else 0)
    return dx


def _tile_rows(dy: Tensor, weight: Tensor, d: Tensor) -> int:
    """How many rows of the weight make a tile; 0 where tiles do not pay, or would round D to half precision.

    A tile and ``S`` take at most a twelfth of what the base's output and gradient take; products of fewer than 192 rows lose
    their speed. Measured on CPUs, and for them only.
    """
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        return 0
    o, i = weight.shape
    rows = dy.numel() // o * ((i + o) // 12 - d.shape[1]) // i
    return min(rows, 512, o) if rows >= 192 else 0


def _miss_input_grad(dy: Tensor, dz: Tensor, weight: Tensor, d: Tensor) -> Tensor:
    """``dy (weight + expand_shards(d))``, with ``dz = shard_sum(dy)``."""
    dx = dy @ weight
    if not _in_place() or dx.dtype != d.dtype:  # in a backward under autocast
        return dx + dz @ d
    dx.view(-1, dx.shape[-1]).addmm_(_rows(dz), d)
    return dx


def _adapter_grad(dy: Tensor, s: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """``factor * dy^T s``, in the dtype of D; where that is another, a part at a time, which takes less memory."""
    dy, s = _rows(dy), _rows(s)
    if dy.dtype == dtype or not _in_place():
        return scaled(dy.t() @ s, factor, dtype)
    dd = dy.new_empty(dy.shape[1], s.shape[1], dtype=dtype)
    narrow, wide, out = (s, dy, dd.t()) if len(dd) > dd.shape[1] else (dy, s, dd)
    for start in range(0, out.shape[1], 512):
        part = 1, start, min(512, out.shape[1] - start)
        product = narrow.t() @ wide.narrow(*part)
        out.narrow(*part).copy_(product if factor == 1 else scaled(product, factor, dtype))
        del product  # before the next one is made
    return dd


def _in_place() -> bool:
    """Whether a backward may write in place: it is not to be differentiated itself, transformed, or watched."""
    return not torch.is_grad_enabled() and not _transformed() and not _watched()


def _few(x: Tensor, d: Tensor, dtype: torch.dtype) -> bool:
    """Whether D is wider than ``dtype``, and it is cheaper to widen what is multiplied by it: rows by the eighth of its rank."""
    return (
        dtype != d.dtype
        and torch.promote_types(dtype, d.dtype) == d.dtype
        and 8 * x.numel() < min(d.shape) * x.shape[-1]
    )


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which `F.linear` takes a real ``tensor``, which is not its own under `torch.autocast`."""
    kind = tensor.device.type
    if (
        not torch.amp.is_autocast_available(kind)
        or not torch.is_autocast_enabled(kind)
        or tensor.dtype == torch.float64
    ):
        return tensor.dtype
    return torch.get_autocast_dtype(kind)


def _autocast(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    dtype = _compute_dtype(weight)
    return _cast(weight, dtype), None if bias is None else _cast(bias, dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor
