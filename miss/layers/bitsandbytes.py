"""Hosts of the quantised linear layers of bitsandbytes, which is not imported.

Their packed weight has no shape to read, so the sizes come from ``in_features`` and
``out_features``. A D means the same as on `nn.Linear`, so files move between the two.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from miss import around
from miss.errors import ShapeError, at
from miss.forms import LayerConfig
from miss.layers.host import Host
from miss.layers.linear import LinearHost

__all__ = ["Linear4bitHost", "Linear8bitHost"]


class _QuantisedHost(LinearHost):
    """What both hosts share: sizes from attributes, and a fast path around the base's forward."""

    stands_for: "ClassVar[type[Host] | None]" = LinearHost

    @staticmethod
    def sizes(layer: Any, parameter: str) -> tuple[int, ...]:
        """``(out_features, in_features)``."""
        return layer.out_features, layer.in_features

    @staticmethod
    def product(layer: Any, x: Tensor, d: Tensor, parameter: str) -> Tensor:
        """``x d^T``.

        Raises:
            ShapeError: the input is of whole numbers, for which bitsandbytes raises nothing.
        """
        if not x.is_floating_point():
            with at(type(layer).__name__):
                raise ShapeError("needs an input of a floating dtype", actual=str(x.dtype))
        return LinearHost.product(layer, x, d, parameter)

    @staticmethod
    def fast(layer: Any, x: Tensor) -> Tensor | None:
        """Base and delta with the delta added in place, if `around.fits` and no dropout is active.

        bitsandbytes returns an output, and a gradient of the input, that nothing else holds.
        """
        config: LayerConfig = layer._miss_configs["weight"]
        d = layer.miss_D
        dropped = layer.training and config.dropout
        if dropped or d.shape != config.d_shape or not around.fits(x, d):
            return None
        if config.shape != (layer.out_features, layer.in_features):
            return None
        base, whole = partial(layer.miss_type.forward, layer), config.form.whole(d, config)
        if config.form.axis == 0:
            return around.miss_around(base, x, whole, config.scale)
        return around.misse_around(base, x, whole, config.scale, config.form.alternate)


class Linear4bitHost(_QuantisedHost):
    """``bitsandbytes.nn.Linear4bit``: nf4 or fp4, with or without double quantisation.

    On a CPU with AVX512-BF16, bitsandbytes repacks the weight at the first forward in eval mode.
    The repacked weight gives the input no gradient, and is not unpacked exactly. An adapted layer
    is not repacked.
    """

    attributes: ClassVar[Mapping[str, Any]] = {
        "support_avx512bf16_for_cpu": property(lambda layer: False)
    }

    @staticmethod
    def refusal(layer: Any) -> str | None:
        """The weight is not quantised yet, or is repacked for inference."""
        state = getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)
        if state is None:
            return _unquantised(layer)
        if getattr(state, "packing_format_for_cpu", False):
            do = "load the model anew, and inject before the first forward in eval mode"
            return f"has a weight that bitsandbytes has repacked for inference on this CPU: {do}"
        return None


class Linear8bitHost(_QuantisedHost):
    """``bitsandbytes.nn.Linear8bitLt``, with weights kept in int8 or quantised at each forward."""

    @staticmethod
    def refusal(layer: Any) -> str | None:
        """The weight is to be kept in int8, and is not yet."""
        late = layer.state.has_fp16_weights or layer.weight.dtype == torch.int8
        return None if late else _unquantised(layer)


def _unquantised(layer: nn.Module) -> str:
    where = layer.weight.device
    do = "load the weights, then model.to(device), which quantises; then inject"
    return f"is a {type(layer).__name__} whose weight, on {where}, is not quantised yet: {do}"
