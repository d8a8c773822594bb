"""List the adapters of a model, and switch them off for a while."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from miss.layers import AdaptedLayer
from miss.layers.host import d_name
from miss.tree import Tree

__all__ = ["adapted_modules", "adapter_parameters", "disabled"]

_COUNT = threading.Lock()  # guards the depth counters of `disabled`


def adapted_modules(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The adapted layers of a model, each once, under its first name (``""`` for the model itself).

    Raises:
        TargetError: ``model`` is not a module.

    >>> from miss import inject
    >>> adapted_modules(inject(nn.Sequential(nn.Linear(8, 2)), "0", rank=4))
    {'0': MiSSeLinear(in_features=8, out_features=2, bias=True, rank=4, scale=1.0, dropout=0.0)}
    """
    return Tree(model).adapted


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Each D of each adapted layer, in the order of `adapted_modules`, for an optimizer.

    Raises:
        TargetError: ``model`` is not a module.
    """
    found = []
    for layer in Tree(model).adapted.values():
        found += [getattr(layer, d_name(parameter)) for parameter in layer.miss_configs]
    return found


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside this context the model computes what its base does, in every thread.

    Contexts may nest and overlap. No weight is changed: the forward of each layer leaves out its
    delta, and uses the kept base weight while merged. With activation checkpointing, run the
    backward inside too, because it repeats the forward.

    Raises:
        TargetError: ``model`` is not a module.

    >>> import torch
    >>> from miss import inject
    >>> model = inject(nn.Sequential(nn.Linear(8, 2)), "0", rank=4)
    >>> with disabled(model):
    ...     base = model(torch.ones(1, 8))
    """
    layers = list(Tree(model).adapted.values())
    _count(layers, 1)
    try:
        yield
    finally:
        _count(layers, -1)


def _count(layers: Iterable[AdaptedLayer], step: int) -> None:
    with _COUNT:
        for layer in layers:
            if isinstance(layer, AdaptedLayer):  # a layer may have been ejected meanwhile
                layer._miss_depth.count = max(0, layer._miss_depth.count + step)
