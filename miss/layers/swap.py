"""The swap of a layer's class, and the way back.

Nothing here goes through ``__setattr__`` or another method that a layer's type may have replaced:
what was checked must not fail half-way.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from miss.errors import ShapeError
from miss.forms import LayerConfig, variant
from miss.layers.base import AdaptedLayer
from miss.layers.forwards import change_class_, offloaded_error, offloads
from miss.layers.host import Depth, base_name, d_name
from miss.layers.loading import UNSET

__all__ = ["Adapter", "attach", "drop_base", "keep_base", "largest_rank", "new_adapter", "new_d"]
__all__ += ["swap_", "swap_back_"]


class Adapter(NamedTuple):
    """The adapter of one Parameter, checked and allocated, for `swap_` to put into its layer."""

    layer: nn.Module
    parameter: str
    cls: type[AdaptedLayer]
    config: LayerConfig
    d: nn.Parameter


def largest_rank(layer: nn.Module, parameter: str, cls: type[AdaptedLayer]) -> int:
    """The length of the axis of a Parameter that a class's form shares."""
    axes = cls.miss_host.axes[parameter]
    return cls.miss_host.sizes(layer, parameter)[axes[cls.miss_form.axis]]


def new_adapter(
    layer: nn.Module,
    parameter: str,
    cls: type[AdaptedLayer],
    rank: int,
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    alternate: bool = False,
    adapter_dtype: torch.dtype | None = None,
) -> Adapter:
    """The adapter of a Parameter, with a zero D; ``layer`` is not changed.

    Raises:
        ShapeError: a number is outside its rule.
        StateError: accelerate offloads the weights of the layer.
    """
    if offloads(layer):
        raise offloaded_error("D would not be trained")
    host: Any = cls.miss_host
    axes, shape = host.axes[parameter], host.sizes(layer, parameter)
    form, blank = variant(cls.miss_form, alternate=alternate), host.blank(layer, parameter)
    config = LayerConfig(form, rank, shape, axes, scale=scale, dropout=dropout, blank=blank)
    if config.dropout and not host.drops:
        rule = f"inputs of {cls.miss_type.__name__} layers cannot be dropped"
        raise ShapeError(rule, expected="dropout=0.0", actual=f"dropout={dropout!r}")
    return Adapter(layer, parameter, cls, config, new_d(layer, parameter, config, adapter_dtype))


def new_d(
    layer: nn.Module, parameter: str, config: LayerConfig, dtype: torch.dtype | None
) -> nn.Parameter:
    """A zero D on the Parameter's device, in ``dtype`` or, if that is None, in fp32 or wider."""
    weight: Any = layer._parameters[parameter]
    wide = weight.dtype if weight.dtype in (torch.float64, torch.float32) else torch.float32
    with torch.inference_mode(False):
        zeros = torch.zeros(config.d_shape, device=weight.device, dtype=dtype or wide)
        return nn.Parameter(zeros)


def swap_(adapter: Adapter) -> None:
    """Adapt a Parameter of a layer; everything has been checked."""
    layer, parameter, cls, config, d = adapter
    if not isinstance(layer, AdaptedLayer):
        change_class_(layer, cls)
    attach(layer, parameter, config, d)


def attach(layer: Any, parameter: str, config: LayerConfig, d: nn.Parameter) -> None:
    """Give an adapted layer the D of a Parameter."""
    layer.__dict__["_miss_configs"] = {**layer._miss_configs, parameter: config}
    layer.__dict__.setdefault("_miss_depth", Depth())
    layer._parameters[d_name(parameter)] = d
    if d.is_meta:
        own = layer._parameters.items()
        layer.__dict__[UNSET] = [key for key, p in own if p is not None and not p.requires_grad]


def keep_base(layer: AdaptedLayer, parameter: str, base: Tensor) -> None:
    """Keep the base of a Parameter beside it, in no `state_dict`."""
    layer._buffers[base_name(parameter)] = base
    layer._non_persistent_buffers_set.add(base_name(parameter))


def drop_base(layer: AdaptedLayer, parameter: str) -> None:
    """Free what `keep_base` kept."""
    layer._buffers.pop(base_name(parameter), None)
    layer._non_persistent_buffers_set.discard(base_name(parameter))


def swap_back_(layer: AdaptedLayer) -> None:
    """Make an adapted layer one of its own type again: each D goes, and no flag changes."""
    for parameter in layer.miss_configs:
        del layer._parameters[d_name(parameter)]
        drop_base(layer, parameter)
    for name in ("_miss_configs", "_miss_depth", UNSET):
        layer.__dict__.pop(name, None)
    change_class_(layer, layer.miss_type)
