"""Short names on the package's own classes: ``rank`` for ``miss_rank`` and the like."""

from typing import Any, TypeVar, cast

import torch
from torch import nn

from miss.checks import check_adapter_dtype
from miss.errors import StateError, TargetError, at
from miss.layers.base import AdaptedLayer
from miss.layers.swap import Adapter, attach, new_adapter, swap_

__all__ = ["TorchLayer"]

Self = TypeVar("Self", bound="TorchLayer")


class ShortName:
    """A short name of a ``miss_`` attribute; an attribute of the object itself comes first."""

    def __init__(self, settable: bool = False) -> None:
        self.settable = settable

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name
        self.__doc__ = getattr(AdaptedLayer, f"miss_{name}").__doc__

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        if layer is None:
            found = getattr(AdaptedLayer, f"miss_{self.name}")
            return found if callable(found) else self
        for own in (layer.__dict__, layer._parameters, layer._buffers, layer._modules):
            if self.name in own:
                return own[self.name]
        return getattr(layer, f"miss_{self.name}")

    def __set__(self, layer: Any, value: Any) -> None:
        if self.name in layer.__dict__:
            layer.__dict__[self.name] = value
        elif self.settable:
            setattr(layer, f"miss_{self.name}", value)
        else:
            raise AttributeError(f"{self.name} of a {type(layer).__name__} cannot be assigned")

    def __delete__(self, layer: Any) -> None:
        if self.name not in layer.__dict__:
            raise AttributeError(f"{self.name} of a {type(layer).__name__} cannot be deleted")
        del layer.__dict__[self.name]


class TorchLayer(AdaptedLayer):
    """The short names of the package's classes for torch's own layer types.

    If the object itself has an attribute, Parameter, buffer or child of a short name, the name
    gives that instead.
    """

    rank = ShortName()
    scale = ShortName(settable=True)
    alternate = ShortName()
    merged = ShortName()
    delta_weight = ShortName()
    reset_adapter = ShortName()

    @classmethod
    def adopt_(
        cls: type[Self],
        layer: nn.Module,
        rank: int,
        *,
        scale: float = 1.0,
        dropout: float = 0.0,
        alternate: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> Self:
        """Turn ``layer`` itself into this class, with a zero D.

        The object, its parameters, hooks and ``requires_grad`` flags stay the same. The arguments
        are those of the constructor. Returns ``layer``.

        Raises:
            TargetError: ``layer`` is of another type.
            StateError: it is adapted already, or in a state that would bypass the adapter.
            ShapeError: a number is outside its rule.

        >>> from miss import MiSSeLinear
        >>> linear = nn.Linear(6, 4)
        >>> MiSSeLinear.adopt_(linear, rank=2) is linear
        True
        >>> linear
        MiSSeLinear(in_features=6, out_features=4, bias=True, rank=2, scale=1.0, dropout=0.0)
        """
        from miss.layers import (
            host_of,
            path_of,
            refusal,
        )  # late, because the registry imports this class

        with at(type(layer).__name__):
            if isinstance(layer, AdaptedLayer):
                raise StateError("is adapted already", do="miss.eject(layer) first")
            if type(layer) is not cls.miss_type:
                expected, actual = path_of(cls.miss_type), path_of(type(layer))
                rule, do = f"is not a {expected} itself", "miss.inject, which adapts it"
                if host_of(layer) is None:
                    rule = (isinstance(layer, cls.miss_type) and refusal(layer)) or rule
                    do = "miss.register(type, host) and miss.inject, for a type of your own"
                raise TargetError(rule, expected=expected, actual=actual, do=do)
            if (reason := refusal(layer)) is not None:
                raise StateError(reason)
            settings = {"scale": scale, "dropout": dropout, "alternate": alternate}
            plan = cls._miss_plan(layer, rank, adapter_dtype=adapter_dtype, **settings)
        for adapter in plan:
            swap_(adapter)
        return cast("Self", layer)

    @classmethod
    def _miss_plan(
        cls, layer: nn.Module, rank: int, *, adapter_dtype: torch.dtype | None, **settings: Any
    ) -> list[Adapter]:
        check_adapter_dtype(adapter_dtype)
        given = settings | {"adapter_dtype": adapter_dtype}
        return [new_adapter(layer, p, cls, rank, **given) for p in cls.miss_host.axes]

    def _miss_begin(self, rank: int, **settings: Any) -> None:
        """Freeze a layer that the constructor of its own type has made, and give it a zero D."""
        with at(type(self).__name__):
            plan = self._miss_plan(self, rank, **settings)
        self.requires_grad_(False)
        for adapter in plan:
            attach(self, adapter.parameter, adapter.config, adapter.d)
