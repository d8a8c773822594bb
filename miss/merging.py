"""`merge` puts the deltas into the weights, `unmerge` takes them out, bit for bit."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from miss.errors import StateError, at, merged_error, named
from miss.forms import LayerConfig
from miss.layers.base import AdaptedLayer
from miss.layers.host import base_name, d_name
from miss.layers.swap import drop_base, keep_base
from miss.tensors import Owners, largest, owners, quantised, tied_to, unwritable
from miss.tree import Tree, joined

__all__ = ["Place", "bake_", "check_mergeable", "check_restorable", "guard", "held", "merge"]
__all__ += ["places", "refuse_loading", "restore_", "unmerge"]

_UNQUANTISED = "load the base in half precision, miss.load the adapters into it, merge that"
_BLOCK = 1 << 17  # elements of a weight that are merged at a time: they stay in a core's cache


class Place(NamedTuple):
    """An adapted Parameter: its layer's name, its own name, the layer and the settings."""

    name: str
    parameter: str
    layer: AdaptedLayer
    config: LayerConfig

    @property
    def weight(self) -> Tensor:
        """The Parameter's values."""
        weight: Any = self.layer._parameters[self.parameter]
        return Tensor.detach(weight)

    @property
    def d(self) -> Tensor:
        """The values of D."""
        d: Any = self.layer._parameters[d_name(self.parameter)]
        return Tensor.detach(d)

    @property
    def base(self) -> Tensor | None:
        """The kept base while merged."""
        return self.layer._buffers.get(base_name(self.parameter))


def places(layers: Mapping[str, AdaptedLayer]) -> dict[str, Place]:
    """The adapted Parameters by their layer's name; if it has several, by their own full names."""
    found = {}
    for name, layer in layers.items():
        for parameter, config in layer.miss_configs.items():
            alone = len(layer.miss_configs) == 1
            key = name if alone else joined(name, parameter)
            found[key] = Place(name, parameter, layer, config)
    return found


def merge(model: nn.Module) -> dict[str, float]:
    """Add each adapter's delta to its weight, in place: ``W = W0 + delta_weight()``.

    A merged layer runs the plain layer's `forward`. The sum is made in fp32 or wider and rounded
    once to the weight's dtype. Each layer keeps a copy of its base weight, so adapted weights take
    twice the memory while merged; ``eject(model, merge=True)`` keeps no copy. While merged,
    `state_dict` is that of the merged plain model: the sums, and no D. Loading into the model,
    resetting an adapter, and a forward in training mode with gradients raise a `StateError`.
    Layers that are merged already stay as they are.

    Args:
        model: an adapted model, or a part of one. A weight that the part shares with something
            outside of it is not recognised.

    Returns:
        For each adapted layer, by name, the relative error that rounding left on its delta:
        ``|W - W0 - delta| / |delta|`` in the Frobenius norm, 0.0 for a zero delta. A layer with
        several D's has an entry for each Parameter. In half precision small deltas are lost.

    Raises:
        StateError: the model has no adapter; something shards it; a weight is tied (the other owner
            is named), quantised or otherwise not writable in place; ``miss_D`` or the sum is not
            finite. The model is unchanged then.

    >>> from miss import inject
    >>> model = inject(nn.Sequential(nn.Linear(8, 2)), "0", rank=4)
    >>> merge(model), model[0].merged
    ({'0': 0.0}, True)
    """
    with at("merge"):
        tree = Tree(model)
        tree.refuse_sharded()
        found = places(tree.require_adapted())
        check_mergeable(tree, found)
        errors, done = {}, []
        try:
            for name, place in found.items():
                if fresh := place.base is None:
                    with torch.inference_mode(False):
                        keep_base(place.layer, place.parameter, place.weight.clone())
                    done.append(place)
                errors[name] = _add_to_base_(place, write=fresh)
        except BaseException:  # out of memory, or interrupted
            for place in done:
                restore_(place)
            raise
        guard(tree)
        return errors


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: each base weight is copied back, bit for bit, and the copy is freed.

    Layers that are not merged stay as they are.

    Args:
        model: a model, or a part of one.

    Raises:
        StateError: something shards the model; the weight of a merged layer has since been
            parametrized, pruned, tied, or replaced by one of another shape or dtype. The model is
            unchanged then.

    >>> from miss import inject
    >>> model = inject(nn.Sequential(nn.Linear(8, 2)), "0", rank=4)
    >>> merge(model), unmerge(model), model[0].merged
    ({'0': 0.0}, None, False)
    """
    with at("unmerge"):
        tree = Tree(model)
        tree.refuse_sharded()
        found = places(tree.adapted)
        check_restorable(tree, found)
        for place in found.values():
            if place.base is not None:
                restore_(place)
        guard(tree)


def check_mergeable(tree: Tree, found: Mapping[str, Place]) -> None:
    """Raise a `StateError` that names the first place that cannot be merged, and why."""
    holders = held(tree)
    for place in found.values():
        if place.base is None:
            with at(named(place.name)):
                if (reason := _unfit(place) or _not_finite(place)) is not None:
                    raise StateError(f"cannot be merged: {reason}")
                if (reason := _tied(place, holders)) is not None:
                    do = "use it unmerged, or inject again with this layer in exclude"
                    raise StateError(f"cannot be merged: {reason}", do=do)


def check_restorable(tree: Tree, found: Mapping[str, Place]) -> None:
    """Raise a `StateError` that names the first place whose base cannot be copied back, and why."""
    holders = held(tree)
    for place in found.values():
        if place.base is not None:
            with at(named(place.name)):
                if (reason := _unrestorable(place) or _tied(place, holders)) is not None:
                    do = "put it back; or miss.eject(model, merge=True), which keeps the weights"
                    raise StateError(f"cannot be unmerged: {reason}", do=do)


def bake_(place: Place) -> None:
    """Add the delta to a Parameter that has been checked; no copy of its base is kept."""
    with torch.inference_mode(False), torch.no_grad():
        for rows, delta in _deltas(place):
            weight = place.weight[rows]
            torch.add(weight.to(delta.dtype), delta, out=weight)


def restore_(place: Place) -> None:
    """Copy the base back into a merged Parameter."""
    with torch.inference_mode(False), torch.no_grad():
        place.weight.copy_(cast(Tensor, place.base))
    drop_base(place.layer, place.parameter)


def refuse_loading(module: nn.Module, *args: Any) -> None:
    """A hook on each module that is or holds a merged layer: `load_state_dict` is refused.

    Nothing is loaded then. If only a part of a model was given to `merge`, what comes before that
    part is loaded before the refusal.
    """
    if any(isinstance(inner, AdaptedLayer) and inner.miss_merged for inner in module.modules()):
        with at(type(module).__name__):
            raise merged_error("a weight that is loaded now would be lost when it is unmerged")


def guard(tree: Tree) -> None:
    """Hook `refuse_loading` to each module that is or holds a merged layer, and to no other."""
    holding = tree.holding(layer for layer in tree.adapted.values() if layer.miss_merged)
    for module in tree.unique:
        hooks = module._load_state_dict_pre_hooks
        ours = [k for k, hook in hooks.items() if getattr(hook, "hook", 0) is refuse_loading]
        if id(module) not in holding:
            for key in ours:
                del hooks[key]
        elif not ours:
            register: Any = module.register_load_state_dict_pre_hook  # torch gives it no types
            register(refuse_loading)


def _deltas(place: Place) -> Iterator[tuple[slice, Tensor]]:
    """The scaled delta in fp32 or wider, some rows at a time, as pairs (rows, their delta)."""
    config, d = place.config, place.d
    wide = torch.promote_types(torch.promote_types(place.weight.dtype, d.dtype), torch.float32)
    d = config.form.whole(config.scale * d.to(wide), config)
    rows = config.shape[0]
    step = max(1, _BLOCK // max(1, math.prod(config.shape[1:])))
    for start in range(0, rows, step):
        some = slice(start, start + step)
        yield some, config.form.window(d, config, some)


def _add_to_base_(place: Place, write: bool) -> float:
    """The relative error of a merged Parameter's delta; if ``write``, first set it to the sum."""
    weight, base = place.weight, cast(Tensor, place.base)
    size = abs(place.config.scale) * largest(place.d) if weight.numel() else 0.0
    # Squares of deltas outside this range would leave that of fp32.
    unit = size if size and not 1e-8 < size < 1e8 else 1.0
    lost2 = size2 = 0.0
    with torch.inference_mode(False), torch.no_grad():
        for rows, delta in _deltas(place):
            before = base[rows].to(delta.dtype)
            if write:
                torch.add(before, delta, out=weight[rows])
            lost = (weight[rows].to(delta.dtype) - before).sub_(delta)
            lost2 += float(torch.linalg.vector_norm(lost / unit if unit != 1 else lost)) ** 2
            size2 += float(torch.linalg.vector_norm(delta / unit if unit != 1 else delta)) ** 2
    return math.sqrt(lost2 / (size2 or 1.0))


def _unrestorable(place: Place) -> str | None:
    """Why the base cannot be copied back; None if it can."""
    base, name = place.base, place.parameter
    weight = place.layer._parameters.get(name)
    if weight is None or base is None:
        return f"its {name} is no parameter of its own any more (parametrized, pruned?)"
    if (weight.shape, weight.dtype) != (base.shape, base.dtype):
        was, now = (f"{tuple(t.shape)} of {t.dtype}" for t in (base, weight))
        return f"its {name} has been replaced: {was} by {now}"
    reason = None if base.is_meta and weight.is_meta else unwritable(weight)
    return reason and f"its {name} {reason}"


def _unfit(place: Place) -> str | None:
    """Why the Parameter cannot take the delta; None if it can."""
    name, own = place.parameter, place.layer._parameters
    weight, d = own.get(name), own.get(d_name(name))
    if weight is None or d is None:
        gone = name if weight is None else d_name(name)
        return f"its {gone} is no parameter of its own any more (parametrized, pruned?)"
    for key, tensor in ((name, weight), (d_name(name), d)):
        if (kind := quantised(tensor)) is not None:
            return f"its {key} is quantised ({kind}): {_UNQUANTISED}"
        if (reason := unwritable(tensor)) is not None:
            return f"its {key} {reason}"
    shapes = (name, weight, place.config.shape), (d_name(name), d, place.config.d_shape)
    for key, tensor, shape in shapes:
        if tensor.shape != shape:
            found = f"the shape {tuple(tensor.shape)}, not {shape}"
            return f"its {key} has {found} (partitioned? resized?)"
    if weight.device != d.device:
        return f"its {name} is on {weight.device} and {d_name(name)} on {d.device}"
    return None


def _not_finite(place: Place) -> str | None:
    weight = place.weight
    if not weight.numel():
        return None
    size = largest(place.d)
    if not math.isfinite(size):
        return f"{d_name(place.parameter)} is not finite"
    bound = largest(weight) + abs(place.config.scale) * size  # cheap, and nearly always enough
    if bound <= torch.finfo(weight.dtype).max:
        return None
    for rows, delta in _deltas(place):
        if not torch.isfinite((weight[rows] + delta).to(weight.dtype)).all():
            return f"the sum of weight and delta is not finite in {weight.dtype}"
    return None


def held(tree: Tree) -> Owners:
    """By storage, each tensor that a module of the model holds, with its full name."""
    pairs = []
    for name, module in tree.of_type(nn.Module).items():
        for held in (module._parameters, module._buffers, module.__dict__):
            pairs += [(joined(name, key), value) for key, value in held.items()]
    return owners(pairs)


def _tied(place: Place, holders: Owners) -> str | None:
    own = joined(place.name, place.parameter)
    owner = tied_to(own, place.weight, holders)
    return owner and f"its {place.parameter} is tied to {owner}, which would change too"
