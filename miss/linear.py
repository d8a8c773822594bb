"""`MiSSeLinear` and `MiSSLinear`, the two forms: along which axis of the weight D is shared, and how."""

from miss import functional, fused
from miss.adapted import AdaptedLinear

__all__ = ["METHODS", "MiSSLinear", "MiSSeLinear", "method_of"]


class MiSSeLinear(AdaptedLinear):
    r"""A linear layer whose delta repeats one block of ``rank`` columns along the input (MiSS\ :sup:`e`, Eq. 4-7).

    .. math:: y = W_0 x + b + \mathrm{scale} \cdot D S, \qquad S_j = \sum_{c \bmod r = j} x_c

    Equivalently column ``c`` of the delta is ``scale * D[:, c mod rank]``; it is never built in `forward`.
    ``in_features`` need not be a multiple of ``rank``. `MiSSLinear` shares the other dimension: a different operator.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        rank: from 1 to ``in_features``.
        scale: factor of the delta; finite.
        dropout: probability, in ``[0, 1)``, of zeroing an input of the adapter (not of the base) in training mode.
        adapter_dtype: dtype of ``miss_D``; by default the weight's, or float32 where that is half precision.

    Shape:
        - Input: ``(..., in_features)``
        - Output: ``(..., out_features)``

    Attributes:
        weight: the base layer's, ``(out_features, in_features)``; the constructor freezes it.
        bias: the base layer's, ``(out_features)``, or None; the constructor freezes it.
        miss_D: ``(out_features, rank)``, zero at first; trainable. Where it has fewer rows, a divisor of ``out_features``, as in
            PEFT's mini form, row ``o`` of the delta is that of ``miss_D[o mod rows]``.

    Raises:
        ShapeError: ``rank``, ``scale``, ``dropout`` or ``adapter_dtype`` is outside its rule.

    >>> import torch
    >>> layer = MiSSeLinear(10, 3, rank=4)
    >>> layer(torch.randn(2, 7, 10)).shape, layer.miss_D.shape, layer.delta_weight().shape
    (torch.Size([2, 7, 3]), torch.Size([3, 4]), torch.Size([3, 10]))
    """

    shared_axis = 1
    expand = staticmethod(functional.expand_blocks)
    add_delta = staticmethod(functional.misse_linear)
    fused = staticmethod(fused.misse_linear)


class MiSSLinear(AdaptedLinear):
    r"""A linear layer whose delta repeats each of ``rank`` rows along one shard of the output (MiSS, Eq. 2-3).

    .. math:: y = W_0 x + b + \mathrm{scale} \cdot \mathrm{repeat}(D x)

    Output ``o`` of the delta is ``scale * (D x)[k]`` for the shard ``k`` that ``o`` lies in. The ``rank`` shards are
    contiguous; their sizes differ by at most one, larger first. `MiSSeLinear` shares the other dimension: a different
    operator.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        rank: the number of shards, from 1 to ``out_features``.
        scale, dropout, adapter_dtype: as in `MiSSeLinear`.

    Shape:
        - Input: ``(..., in_features)``
        - Output: ``(..., out_features)``

    Attributes:
        weight: the base layer's, ``(out_features, in_features)``; the constructor freezes it.
        bias: the base layer's, ``(out_features)``, or None; the constructor freezes it.
        miss_D: ``(rank, in_features)``, zero at first; trainable.

    Raises:
        ShapeError: ``rank``, ``scale``, ``dropout`` or ``adapter_dtype`` is outside its rule.

    >>> import torch
    >>> layer = MiSSLinear(10, 3, rank=2)
    >>> layer(torch.randn(2, 7, 10)).shape, layer.miss_D.shape, layer.delta_weight().shape
    (torch.Size([2, 7, 3]), torch.Size([2, 10]), torch.Size([3, 10]))
    """

    shared_axis = 0
    expand = staticmethod(functional.expand_shards)
    add_delta = staticmethod(functional.miss_linear)
    fused = staticmethod(fused.miss_linear)


METHODS: dict[str, type[AdaptedLinear]] = {"misse": MiSSeLinear, "miss": MiSSLinear}


def method_of(layer: AdaptedLinear) -> str:
    """The name of a layer's form, as `inject` takes it."""
    return next(method for method, form in METHODS.items() if isinstance(layer, form))
