"""`nn.Linear`: its host, and the two public classes, `MiSSeLinear` and `MiSSLinear`."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miss import fused
from miss.forms import LayerConfig, MiSS, MiSSe
from miss.layers.host import Host
from miss.layers.names import TorchLayer

__all__ = ["CLASSES", "LinearHost", "MiSSLinear", "MiSSeLinear"]

# The fast path of each form, by name and sign. The keys are no classes: a compiled graph has no
# guard on the class of a `LayerConfig` that it has already met as a key of a global dict.
FAST: dict[tuple[str, bool], Callable[..., Tensor]] = {
    ("misse", False): fused.misse_linear,
    ("misse", True): partial(fused.misse_linear, alternate=True),
    ("miss", False): fused.miss_linear,
}


class LinearHost(Host):
    """`nn.Linear`: a weight ``(out, in)``, features last, and a fast path."""

    lora = "lora_A.weight", "lora_B.weight"
    peft = True

    @staticmethod
    def product(layer: Any, x: Tensor, d: Tensor, parameter: str) -> Tensor:
        """``x d^T``."""
        return F.linear(x, d)

    @staticmethod
    def fast(layer: Any, x: Tensor) -> Tensor | None:
        """Base and delta in one node of the graph, if `fused.fits` and no dropout is active."""
        if x.is_nested:  # what nn.TransformerEncoder passes on in eval mode under a padding mask
            rows = [layer.forward(row) for row in x.unbind()]
            return torch.nested.as_nested_tensor(rows, layout=x.layout)
        config: LayerConfig = layer._miss_configs["weight"]
        if layer.training and config.dropout:
            return None
        weight, bias, d = layer.weight, layer.bias, layer.miss_D
        if weight.shape != config.shape or d.shape != config.d_shape:
            return None
        if not fused.fits(x, weight, bias, d):
            return None
        fast = FAST[config.form.name, config.form.alternate]
        return fast(x, weight, bias, config.form.whole(d, config), config.scale)

    @staticmethod
    def with_weights(layer: Any, weights: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
        """As in `Host`, without a copy of the layer, which a compiler could not follow."""
        x = args[0] if args else kwargs["input"]
        return F.linear(x, weights["weight"], layer.bias)


class _AdaptedLinear(TorchLayer, nn.Linear):
    """What the two classes share."""

    miss_host = LinearHost
    miss_type = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        scale: float = 1.0,
        dropout: float = 0.0,
        alternate: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        settings = {"scale": scale, "dropout": dropout, "alternate": alternate}
        self._miss_begin(rank, adapter_dtype=adapter_dtype, **settings)


class MiSSeLinear(_AdaptedLinear):
    r"""A linear layer whose delta repeats one block of ``rank`` columns along the input.

    This is MiSS\ :sup:`e` (Eq. 4-7).

    .. math:: y = W_0 x + b + \mathrm{scale} \cdot D S, \qquad S_j = \sum_{c \bmod r = j} x_c

    Equivalently, column ``c`` of the delta is ``scale * D[:, c mod rank]``. `forward` never builds
    the delta. ``in_features`` need not be a multiple of ``rank``. `MiSSLinear` is another operator:
    it shares the other dimension.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        rank: from 1 to ``in_features``.
        scale: factor of the delta; finite.
        dropout: probability, in ``[0, 1)``, of zeroing an input of the adapter (not of the base) in
            training mode.
        alternate: block ``c // rank`` of the inputs enters the sums ``S``, and column ``c`` the
            delta, with the sign ``(-1)^(c // rank)``. What all inputs have in common then cancels
            in each pair of blocks.
        adapter_dtype: dtype of ``miss_D``; by default the weight's, or float32 if that is half
            precision.

    Shape:
        - Input: ``(..., in_features)``
        - Output: ``(..., out_features)``

    Attributes:
        weight: the base layer's, ``(out_features, in_features)``; the constructor freezes it.
        bias: the base layer's, ``(out_features)``, or None; the constructor freezes it.
        miss_D: ``(out_features, rank)``, zero at first; trainable. In PEFT's mini form it has fewer
            rows, a divisor of ``out_features``: row ``o`` of the delta is then that of
            ``miss_D[o mod rows]``.

    Raises:
        ShapeError: ``rank``, ``scale``, ``dropout``, ``alternate`` or ``adapter_dtype`` is outside
            its rule.

    >>> import torch
    >>> layer = MiSSeLinear(10, 3, rank=4)
    >>> layer(torch.randn(2, 7, 10)).shape, layer.miss_D.shape, layer.delta_weight().shape
    (torch.Size([2, 7, 3]), torch.Size([3, 4]), torch.Size([3, 10]))
    """

    miss_form = MiSSe


class MiSSLinear(_AdaptedLinear):
    r"""A linear layer whose delta repeats each of ``rank`` rows along one shard of the output.

    This is MiSS (Eq. 2-3).

    .. math:: y = W_0 x + b + \mathrm{scale} \cdot \mathrm{repeat}(D x)

    Output ``o`` of the delta is ``scale * (D x)[k]`` for the shard ``k`` that ``o`` lies in. The
    ``rank`` shards are contiguous. Their sizes differ by at most one, larger first. `MiSSeLinear`
    is another operator: it shares the other dimension.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        rank: the number of shards, from 1 to ``out_features``.
        scale, dropout, adapter_dtype: as in `MiSSeLinear`.
        alternate: False; this form has no blocks of the input.

    Shape:
        - Input: ``(..., in_features)``
        - Output: ``(..., out_features)``

    Attributes:
        weight: the base layer's, ``(out_features, in_features)``; the constructor freezes it.
        bias: the base layer's, ``(out_features)``, or None; the constructor freezes it.
        miss_D: ``(rank, in_features)``, zero at first; trainable.

    Raises:
        ShapeError: ``rank``, ``scale``, ``dropout``, ``alternate`` or ``adapter_dtype`` is outside
            its rule.

    >>> import torch
    >>> layer = MiSSLinear(10, 3, rank=2)
    >>> layer(torch.randn(2, 7, 10)).shape, layer.miss_D.shape, layer.delta_weight().shape
    (torch.Size([2, 7, 3]), torch.Size([2, 10]), torch.Size([3, 10]))
    """

    miss_form = MiSS


CLASSES: tuple[type[TorchLayer], ...] = (MiSSeLinear, MiSSLinear)
