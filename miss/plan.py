"""Which modules `inject` and `load` can adapt, and the adapters that `inject` is to put in."""

from collections.abc import Callable
from numbers import Integral

import torch
from torch import nn

from miss.errors import ShapeError, StateError, TargetError, at, merged_error, named
from miss.forms import Form
from miss.layers import AdaptedLayer, class_of, host_of, looks_known, path_of, refusal
from miss.layers.swap import Adapter, largest_rank, new_adapter
from miss.parents import read_weights
from miss.targets import Site
from miss.tree import Tree, joined

__all__ = ["candidates", "planned"]


def planned(
    sites: list[Site],
    form: type[Form],
    rank: int | Callable[[str, nn.Module], int],
    scale: float | Callable[[str, nn.Module], float],
    dropout: float,
    adapter_dtype: torch.dtype | None,
) -> list[Adapter]:
    """The adapters of the sites, allocated. The other arguments are those of `inject`.

    Raises:
        TargetError: no host adapts a module.
        StateError: a Parameter is adapted already, or its layer in another form.
        ShapeError: a setting is outside its rule; all layers too small for their rank are named.
    """
    plan: list[Adapter] = []
    small: list[tuple[str, int, ShapeError]] = []
    for site in sites:
        with at(named(site.name)):
            _check_unadapted(site, form)
            cls = _class_for(site.module, form)
            alone = len(cls.miss_host.axes) == 1
            name = site.name if alone else joined(site.name, site.parameter)
            own_rank = rank(name, site.module) if callable(rank) else rank
            own_scale = scale(name, site.module) if callable(scale) else scale
            try:
                adapter = new_adapter(
                    site.module,
                    site.parameter,
                    cls,
                    own_rank,
                    scale=own_scale,
                    dropout=dropout,
                    alternate=form.alternate,
                    adapter_dtype=adapter_dtype,
                )
            except ShapeError as error:
                limit = largest_rank(site.module, site.parameter, cls)
                if not isinstance(own_rank, Integral):
                    error.do = "give an int, or rank=lambda name, module: an int"
                    raise
                if own_rank <= limit:
                    raise
                small.append((named(name), limit, error))
                continue
        plan.append(adapter)
    if small:
        raise _too_small(small)
    return plan


def _too_small(small: list[tuple[str, int, ShapeError]]) -> ShapeError:
    """The error of the first layer that is too small for its rank; it names the others too."""
    name, _, error = small[0]
    others = [f"{other} (at most {limit})" for other, limit, _ in small[1:]]
    if others:
        error.actual = f"{error.actual}; too small as well: {', '.join(others)}"
    error.do = "give a smaller rank, exclude these layers, or pass rank=lambda name, module: ..."
    error.where = name
    return error


def candidates(tree: Tree) -> dict[int, str | None]:
    """By id, why each layer that looks known or has a host cannot be adapted; None if it can."""
    read = read_weights(tree)
    reasons = {}
    for module in tree.unique:
        if host_of(module) is not None or looks_known(module) or id(module) in read:
            reasons[id(module)] = read.get(id(module)) or refusal(module)
    return reasons


def _check_unadapted(site: Site, form: type[Form]) -> None:
    """Raise a `StateError` if a Parameter, or its layer in another form, is adapted already."""
    layer = site.module
    if not isinstance(layer, AdaptedLayer):
        return
    if site.parameter in layer.miss_configs:
        do = "miss.eject(model), or leave it out with exclude"
        raise StateError("is adapted already", do=do)
    own = f"method={layer.miss_form.name!r}, alternate={layer.miss_alternate}"
    wanted = f"method={form.name!r}, alternate={form.alternate}"
    if own != wanted:
        rule = "is adapted in another form; a layer has one"
        raise StateError(rule, expected=own, actual=wanted)
    if layer.miss_merged:
        raise merged_error("another of its Parameters cannot be adapted")


def _class_for(module: nn.Module, form: type[Form]) -> type[AdaptedLayer]:
    """The class that adapts a module, or the one that it has already."""
    if isinstance(module, AdaptedLayer):
        return type(module)
    host = host_of(module)
    if host is None:
        rule = f"no host adapts a {path_of(type(module))}"
        raise TargetError(rule, do="miss.register(type, host)")
    return class_of(type(module), host, form)
