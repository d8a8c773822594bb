"""`Host`, which describes a base layer, and the names of what an adapter adds to the layer."""

import copy
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from miss.errors import StateError, at
from miss.forms import Axes, LayerConfig

__all__ = ["Depth", "Host", "base_name", "d_name", "named_input"]


class Host:
    """Describes one type of layer; subclass it and `register` it to adapt layers of your own.

    A host is never instantiated: its functions take the layer. It gives a form the axes of the
    weight, and the layer's own operation with D in place of the weight.

    Attributes:
        axes: for each Parameter that can be adapted, by name: its axes "out" and "in".
        features: the axis of the layer's input, and of its output, that holds the features.
        drops: whether inputs of the adapter can be dropped; if not, dropout is a `ShapeError`.
        stands_for: another host, if D means the same there: files move between the layers of both.
        lora: what PEFT's LoRA calls its two tensors of such a layer; None if it has none.
        peft: whether PEFT's MiSS adapts such a layer.
        attributes: class attributes that an adapted layer has in place of its type's own.
    """

    axes: ClassVar[Mapping[str, Axes]] = {"weight": (0, 1)}
    features: ClassVar[int] = -1
    drops: ClassVar[bool] = True
    stands_for: "ClassVar[type[Host] | None]" = None
    lora: ClassVar[tuple[str, str] | None] = None
    peft: ClassVar[bool] = False
    attributes: ClassVar[Mapping[str, Any]] = {}

    @staticmethod
    def sizes(layer: Any, parameter: str) -> tuple[int, ...]:
        """The shape of a Parameter; a host of packed weights takes it from other attributes."""
        return tuple(getattr(layer, parameter).shape)

    @staticmethod
    def product(layer: Any, x: Tensor, d: Tensor, parameter: str) -> Tensor:
        """The layer's operation on ``x`` with ``d`` in place of the Parameter and no bias.

        Args:
            layer: the base layer.
            x: an input of the layer; for MiSSe its "in" features are cut to the rank.
            d: D, in the layout of the Parameter, one axis cut to the rank.
            parameter: the name of the Parameter, for a host of several.

        Shape:
            That of the layer's output; for MiSS its "out" features are cut to the rank.

        Raises:
            StateError: the host does not define it.
        """
        raise StateError("a host must define product(layer, x, d, parameter)")

    @staticmethod
    def blank(layer: Any, parameter: str) -> int | None:
        """A position of the axis "in" at which the delta stays zero; None if there is none."""
        return None

    @classmethod
    def add(cls, layer: Any, x: Tensor, y: Tensor, parameter: str, config: LayerConfig) -> Tensor:
        """``y`` plus the product of a Parameter's delta with the layer's input ``x``.

        It drops inputs, moves the features last and back, and leaves the sums to the form. A host
        whose input has no features overrides it.

        Shape:
            That of ``y``.
        """
        d = config.form.whole(getattr(layer, d_name(parameter)), config)
        x = F.dropout(x, config.dropout) if layer.training and config.dropout > 0 else x
        product = partial(cls.product, layer, parameter=parameter)
        if cls.features == -1:
            return config.form.add(x, y, d, config.scale, product, config.rank)
        x, y = x.movedim(cls.features, -1), y.movedim(cls.features, -1)
        product = partial(_moved, product, cls.features)
        y = config.form.add(x, y, d, config.scale, product, config.rank)
        return y.movedim(-1, cls.features)

    @staticmethod
    def fast(layer: Any, x: Tensor) -> Tensor | None:
        """Base and delta at once, if the host has a faster way that applies; else None.

        Shape:
            That of the layer's output.
        """
        return None

    @staticmethod
    def with_weights(layer: Any, weights: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
        """The base layer's output with other tensors as some Parameters; ``layer`` is unchanged."""
        other = copy.copy(layer)
        other._parameters = {**layer._parameters, **weights}
        return layer.miss_type.forward(other, *args, **kwargs)

    @staticmethod
    def lora_refusal(layer: Any) -> str | None:
        """Why PEFT's LoRA would compute something else on this layer; None if it would not."""
        return None

    @staticmethod
    def refusal(layer: nn.Module) -> str | None:
        """Why this layer cannot be adapted although others of its type can; None if it can."""
        return None


def _moved(product: Any, features: int, x: Tensor, d: Tensor) -> Tensor:
    """``product`` between tensors whose features have been moved to the end."""
    y: Tensor = product(x.movedim(-1, features), d).movedim(features, -1)
    return y


class Depth:
    """How many `disabled` contexts a layer is in; copies and pickles of it are in none."""

    count: int = 0

    def __reduce__(self) -> tuple[type["Depth"], tuple[()]]:
        return Depth, ()


def named_input(layer: Any, kwargs: dict[str, Any]) -> Any:
    """The first argument of an adapted layer's own ``forward``, which was given by name.

    Raises:
        StateError: it was not given, and the layer can do without.
    """
    _, first, *_ = inspect.signature(layer.miss_type.forward).parameters
    if first not in kwargs:
        layer.miss_type.forward(layer, **kwargs)  # raises as the layer does, if it needs it
        with at(type(layer).__name__):
            rule = "the input must be the first argument, or be given by its name"
            raise StateError(rule, expected=first, actual=", ".join(kwargs))
    return kwargs[first]


def d_name(parameter: str) -> str:
    """The name of the D of a Parameter: ``miss_D`` for ``weight``, else with the Parameter's name.

    The word "weight" is left out, because initialisers look for it in names.

    >>> d_name("weight"), d_name("in_proj_weight"), d_name("weight_ih_l0"), d_name("down_proj")
    ('miss_D', 'miss_D_in_proj', 'miss_D_ih_l0', 'miss_D_down_proj')
    """
    if parameter == "weight":  # at once, since every forward asks
        return "miss_D"
    return "_".join(["miss_D", *(part for part in parameter.split("_") if part != "weight")])


def base_name(parameter: str) -> str:
    """The name of the buffer that keeps the base of a Parameter while merged."""
    return d_name(parameter).replace("miss_D", "miss_base")
