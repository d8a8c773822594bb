"""Convolutions of torch: their hosts, and the public classes, `MiSSeConv2d` and the like."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from miss import fused_conv
from miss.errors import StateError, at
from miss.forms import LayerConfig, MiSS, MiSSe
from miss.layers.host import Host
from miss.layers.names import TorchLayer

__all__ = ["CLASSES", "CONVOLUTIONS", "HOSTS", "MiSSConv1d", "MiSSConv2d", "MiSSConv3d"]
__all__ += ["MiSSeConv1d", "MiSSeConv2d", "MiSSeConv3d"]

# The fast path of each form, by name and sign; keys as in `miss.layers.linear`.
FAST: dict[tuple[str, bool], Callable[..., Tensor]] = {
    ("misse", False): fused_conv.misse_conv,
    ("misse", True): partial(fused_conv.misse_conv, alternate=True),
    ("miss", False): fused_conv.miss_conv,
}


class ConvHost(Host):
    """A convolution: a weight ``(out, in, *kernel)``, channels before the axes of the kernel."""

    lora = "lora_A.weight", "lora_B.weight"

    @staticmethod
    def product(layer: Any, x: Tensor, d: Tensor, parameter: str) -> Tensor:
        """The layer's own convolution of ``x`` with ``d``."""
        found: Tensor = layer._conv_forward(x, d, None)
        return found

    @staticmethod
    def fast(layer: Any, x: Tensor) -> Tensor | None:
        """Base and delta in one node of the graph, if `fused_conv.fits` and no dropout is active.

        The padding must be zeros, and given as numbers.
        """
        config: LayerConfig = layer._miss_configs["weight"]
        if layer.training and config.dropout:
            return None
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return None
        weight, bias, d = layer.weight, layer.bias, layer.miss_D
        if weight.shape != config.shape or d.shape != config.d_shape:
            return None
        if not fused_conv.fits(x, weight, bias, d):
            return None
        window = fused_conv.Window(layer.stride, layer.padding, layer.dilation)
        fast = FAST[config.form.name, config.form.alternate]
        return fast(x, weight, bias, d, config.scale, window)

    @staticmethod
    def with_weights(layer: Any, weights: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
        """As in `Host`, without a copy of the layer, which a compiler could not follow."""
        x = args[0] if args else kwargs["input"]
        return layer._conv_forward(x, weights["weight"], layer.bias)

    @staticmethod
    def lora_refusal(layer: Any) -> str | None:
        """PEFT's own convolution takes stride and padding alone from the layer."""
        if any(gap > 1 and size > 1 for gap, size in zip(layer.dilation, layer.kernel_size)):
            return f"has dilation={layer.dilation}, which PEFT's LoRA ignores"
        if layer.padding_mode != "zeros" and any(layer._reversed_padding_repeated_twice):
            return f"has padding_mode={layer.padding_mode!r}, which PEFT's LoRA ignores"
        return None

    @staticmethod
    def refusal(layer: Any) -> str | None:
        """Groups, across which blocks and shards would share D."""
        if layer.groups == 1:
            return None
        rule = "blocks and shards would reach over groups: see miss.register, for a type of yours"
        return f"has groups={layer.groups}; {rule}"


class Conv1dHost(ConvHost):
    """`nn.Conv1d`."""

    features = -2


class Conv2dHost(ConvHost):
    """`nn.Conv2d`."""

    features = -3


class Conv3dHost(ConvHost):
    """`nn.Conv3d`."""

    features = -4


CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d
HOSTS: dict[Any, type[Host]] = dict(zip(CONVOLUTIONS, (Conv1dHost, Conv2dHost, Conv3dHost)))


class _AdaptedConv(TorchLayer):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        rank: int,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        scale: float = 1.0,
        dropout: float = 0.0,
        alternate: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        own: Any = super().__init__
        sizes = in_channels, out_channels, kernel_size
        own(*sizes, stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        if (reason := self.miss_host.refusal(self)) is not None:
            with at(type(self).__name__):
                raise StateError(reason)
        settings = {"scale": scale, "dropout": dropout, "alternate": alternate}
        self._miss_begin(rank, adapter_dtype=adapter_dtype, **settings)


class _Conv1d(_AdaptedConv, nn.Conv1d):
    miss_host, miss_type = Conv1dHost, nn.Conv1d


class _Conv2d(_AdaptedConv, nn.Conv2d):
    miss_host, miss_type = Conv2dHost, nn.Conv2d


class _Conv3d(_AdaptedConv, nn.Conv3d):
    miss_host, miss_type = Conv3dHost, nn.Conv3d


class MiSSeConv1d(_Conv1d):
    r"""A 1-d convolution whose delta repeats one block of ``rank`` channels along the input.

    Equation and arguments are those of `MiSSeConv2d`, over one axis. ``miss_D`` is
    ``(out_channels, rank, *kernel_size)``.

    Shape:
        As `nn.Conv1d`.

    Raises:
        ShapeError: a setting is outside its rule.
        StateError: ``groups`` is not 1.

    >>> MiSSeConv1d(10, 4, 3, rank=2).miss_D.shape
    torch.Size([4, 2, 3])
    """

    miss_form = MiSSe


class MiSSConv1d(_Conv1d):
    r"""A 1-d convolution whose delta repeats each of ``rank`` filters along one shard of channels.

    Equation and arguments are those of `MiSSConv2d`, over one axis. ``miss_D`` is
    ``(rank, in_channels, *kernel_size)``.

    Shape:
        As `nn.Conv1d`.

    Raises:
        ShapeError: a setting is outside its rule.
        StateError: ``groups`` is not 1.

    >>> MiSSConv1d(10, 4, 3, rank=2).miss_D.shape
    torch.Size([2, 10, 3])
    """

    miss_form = MiSS


class MiSSeConv2d(_Conv2d):
    r"""A 2-d convolution whose delta repeats one block of ``rank`` channels along the input.

    .. math:: y = W_0 * x + b + \mathrm{scale} \cdot D * S, \qquad S_j = \sum_{c \bmod r = j} x_c

    This is MiSS\ :sup:`e` (Eq. 4-7) with channels as features. Channel ``c`` of the delta is
    ``scale * D[:, c mod rank]``. `forward` never builds the delta.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias, padding_mode,
            device, dtype: as in `nn.Conv2d`.
        rank: from 1 to ``in_channels``.
        groups: 1.
        scale, dropout, alternate, adapter_dtype: as in `MiSSeLinear`.

    Shape:
        As `nn.Conv2d`.

    Attributes:
        weight: as in `nn.Conv2d`; the constructor freezes it, and the bias.
        miss_D: ``(out_channels, rank, *kernel_size)``, zero at first; trainable.

    Raises:
        ShapeError: ``rank``, ``scale``, ``dropout``, ``alternate`` or ``adapter_dtype`` is outside
            its rule.
        StateError: ``groups`` is not 1.

    >>> layer = MiSSeConv2d(10, 4, 3, rank=2, padding=1)
    >>> layer(torch.randn(1, 10, 8, 8)).shape, layer.miss_D.shape
    (torch.Size([1, 4, 8, 8]), torch.Size([4, 2, 3, 3]))
    """

    miss_form = MiSSe


class MiSSConv2d(_Conv2d):
    r"""A 2-d convolution whose delta repeats each of ``rank`` filters along one shard of channels.

    .. math:: y = W_0 * x + b + \mathrm{scale} \cdot \mathrm{repeat}(D * x)

    This is MiSS (Eq. 2-3) with channels as features. Output channel ``o`` of the delta is
    ``scale * D[k]`` for the shard ``k`` that ``o`` lies in.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias, padding_mode,
            device, dtype: as in `nn.Conv2d`.
        rank: the number of shards, from 1 to ``out_channels``.
        groups: 1.
        scale, dropout, adapter_dtype: as in `MiSSeLinear`.
        alternate: False; this form has no blocks of the input.

    Shape:
        As `nn.Conv2d`.

    Attributes:
        weight: as in `MiSSeConv2d`.
        miss_D: ``(rank, in_channels, *kernel_size)``, zero at first; trainable.

    Raises:
        ShapeError: ``rank``, ``scale``, ``dropout``, ``alternate`` or ``adapter_dtype`` is outside
            its rule.
        StateError: ``groups`` is not 1.

    >>> layer = MiSSConv2d(10, 4, 3, rank=2, padding=1)
    >>> layer(torch.randn(1, 10, 8, 8)).shape, layer.miss_D.shape
    (torch.Size([1, 4, 8, 8]), torch.Size([2, 10, 3, 3]))
    """

    miss_form = MiSS


class MiSSeConv3d(_Conv3d):
    r"""A 3-d convolution whose delta repeats one block of ``rank`` channels along the input.

    Equation and arguments are those of `MiSSeConv2d`, over three axes. ``miss_D`` is
    ``(out_channels, rank, *kernel_size)``.

    Shape:
        As `nn.Conv3d`.

    Raises:
        ShapeError: a setting is outside its rule.
        StateError: ``groups`` is not 1.

    >>> MiSSeConv3d(10, 4, 3, rank=2).miss_D.shape
    torch.Size([4, 2, 3, 3, 3])
    """

    miss_form = MiSSe


class MiSSConv3d(_Conv3d):
    r"""A 3-d convolution whose delta repeats each of ``rank`` filters along one shard of channels.

    Equation and arguments are those of `MiSSConv2d`, over three axes. ``miss_D`` is
    ``(rank, in_channels, *kernel_size)``.

    Shape:
        As `nn.Conv3d`.

    Raises:
        ShapeError: a setting is outside its rule.
        StateError: ``groups`` is not 1.

    >>> MiSSConv3d(10, 4, 3, rank=2).miss_D.shape
    torch.Size([2, 10, 3, 3, 3])
    """

    miss_form = MiSS


CLASSES: tuple[type[TorchLayer], ...] = (MiSSeConv1d, MiSSConv1d, MiSSeConv2d, MiSSConv2d)
CLASSES += (MiSSeConv3d, MiSSConv3d)
