"""`merge` puts the deltas into the weights, `unmerge` takes them out, bit for bit."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from miss.adaptable import ADAPTER_DTYPES, unwritable
from miss.adapted import AdaptedLinear
from miss.errors import StateError, explain, is_merged
from miss.functional import cycle_rows, expand_blocks, expand_shards
from miss.targets import instances, joined

__all__ = [
    "bake_",
    "check_mergeable",
    "check_restorable",
    "guard",
    "merge",
    "refuse_loading",
    "restore_",
    "unmerge",
]

_BLOCK = 1 << 17  # elements of a weight that are merged at a time: they stay in a core's cache


def merge(model: nn.Module) -> dict[str, float]:
    """Add each adapter's delta to its weight, in place: ``W = W0 + delta_weight()``, after which `forward` is a plain linear.

    The sum is made in fp32 or wider and rounded once to the weight's dtype. Each layer keeps a copy of its base weight, so a
    merged model takes twice the memory of its adapted weights; ``eject(model, merge=True)`` keeps none. While merged,
    `state_dict` holds the base weight; loading into the model, resetting an adapter, and a forward in training mode with
    gradients are a `StateError`. Layers that are merged already stay as they are.

    Args:
        model: an adapted model, or a part of one; a weight that is shared with something outside of it is not recognised.

    Returns:
        For each adapted layer, by name, the relative error that rounding left on its delta:
        ``|W - W0 - delta| / |delta|`` in the Frobenius norm, 0.0 for a zero delta. In half precision small deltas drown.

    Raises:
        StateError: a weight is tied (the other owner is named), quantised or otherwise not to be written in place; ``miss_D``
            or the sum is not finite. The model is exactly as it was then.

    >>> from miss import inject
    >>> model = inject(nn.Sequential(nn.Linear(8, 2)), "0", rank=4)
    >>> merge(model), model[0].merged
    ({'0': 0.0}, True)
    """
    layers = instances(model, AdaptedLinear)
    check_mergeable(model, layers)
    errors, done = {}, []
    try:
        for name, layer in layers.items():
            if fresh := not layer.merged:
                with torch.inference_mode(False):
                    layer.register_buffer(
                        "miss_base", layer.weight.detach().clone(), persistent=False
                    )
                done.append(layer)
            errors[name] = _add_to_base_(layer, write=fresh)
    except BaseException:  # out of memory, or interrupted
        for layer in done:
            restore_(layer)
        raise
    guard(model)
    return errors


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: each base weight is copied back, bit for bit, and the copy is let go. Other layers stay as they are.

    Args:
        model: a model, or a part of one.

    Raises:
        StateError: the weight of a merged layer has since been parametrized, pruned, tied, or replaced by one of another shape
            or dtype. In that case nothing is changed.

    >>> from miss import inject
    >>> model = inject(nn.Sequential(nn.Linear(8, 2)), "0", rank=4)
    >>> merge(model), unmerge(model), model[0].merged
    ({'0': 0.0}, None, False)
    """
    layers = instances(model, AdaptedLinear)
    check_restorable(model, layers)
    for layer in layers.values():
        if layer.merged:
            restore_(layer)
    guard(model)


def check_mergeable(model: nn.Module, layers: Mapping[str, AdaptedLinear]) -> None:
    """Raise a `StateError` that names the first of the unmerged layers that cannot be merged, and why."""
    owners = _owners(model)
    for name, layer in layers.items():
        if not layer.merged and (
            reason := _unfit(layer) or _tied(name, layer.weight, owners) or _not_finite(layer)
        ):
            raise StateError(explain(name or type(layer).__name__, f"cannot be merged: {reason}"))


def check_restorable(model: nn.Module, layers: Mapping[str, AdaptedLinear]) -> None:
    """Raise a `StateError` where the base weight of a merged layer cannot be copied back into the one that was merged."""
    owners = _owners(model)
    for name, layer in layers.items():
        if layer.merged and (reason := _unrestorable(layer) or _tied(name, layer.weight, owners)):
            raise StateError(explain(name or type(layer).__name__, f"cannot be unmerged: {reason}"))


def bake_(layer: AdaptedLinear) -> None:
    """Add the delta to the weight of a layer that has been checked; nothing is kept."""
    with torch.inference_mode(False), torch.no_grad():
        for rows, delta in _deltas(layer):
            weight = layer.weight.detach()[rows]
            torch.add(weight.to(delta.dtype), delta, out=weight)


def restore_(layer: AdaptedLinear) -> None:
    """Copy the base weight back into a merged layer."""
    with torch.inference_mode(False), torch.no_grad():
        layer.weight.copy_(layer.miss_base)
    del layer.miss_base


def refuse_loading(module: nn.Module, *args: Any) -> None:
    """A hook on each module that is or holds a merged layer, which stops `load_state_dict` before anything is loaded into it.

    A model of which only a part was given to `merge` is stopped at that part, after what comes before it.
    """
    if _holds_merged(module):
        raise is_merged(
            type(module).__name__, "a weight that is loaded now would be lost when it is unmerged"
        )


def guard(model: nn.Module) -> None:
    """Place `refuse_loading` on each module that is or holds a merged layer, and take it off the others."""
    for module in model.modules():
        hooks = module._load_state_dict_pre_hooks
        ours = [
            key
            for key, wrapped in hooks.items()
            if getattr(wrapped, "hook", None) is refuse_loading
        ]
        if not _holds_merged(module):
            for key in ours:
                del hooks[key]
        elif not ours:
            module.register_load_state_dict_pre_hook(refuse_loading)  # type: ignore[no-untyped-call]  # torch gives it no types


def _holds_merged(module: nn.Module) -> bool:
    return any(isinstance(inner, AdaptedLinear) and inner.merged for inner in module.modules())


def _deltas(layer: AdaptedLinear) -> Iterator[tuple[slice, Tensor]]:
    """`delta_weight` in fp32 or wider, some rows at a time: which rows, and their delta."""
    o, i = layer.out_features, layer.in_features
    wide = torch.promote_types(
        torch.promote_types(layer.weight.dtype, layer.miss_D.dtype), torch.float32
    )
    d = layer.scale * layer.miss_D.detach().to(wide)
    numbers = torch.arange(len(d), device=d.device)[:, None]
    shares_columns = layer.shared_axis == 1
    source = (cycle_rows if shares_columns else expand_shards)(numbers, o).squeeze(
        1
    )  # the row of D for each row of the delta
    step = max(1, _BLOCK // max(1, i))
    for start in range(0, o, step):
        rows = slice(start, start + step)
        yield rows, expand_blocks(d[source[rows]], i) if shares_columns else d[source[rows]]


def _add_to_base_(layer: AdaptedLinear, write: bool) -> float:
    """Set the weight of a layer, which has kept its base, to the sum, if ``write``; return the relative error of rounding."""
    weight, base = layer.weight.detach(), layer.miss_base
    largest = abs(layer.scale) * _largest(layer.miss_D.detach()) if weight.numel() else 0.0
    unit = (
        largest if largest and not 1e-8 < largest < 1e8 else 1.0
    )  # or squares would leave the range of fp32
    lost2 = size2 = 0.0
    with torch.inference_mode(False), torch.no_grad():
        for rows, delta in _deltas(layer):
            before = base[rows].to(delta.dtype)
            if write:
                torch.add(before, delta, out=weight[rows])
            lost = (weight[rows].to(delta.dtype) - before).sub_(delta)
            lost2 += float(torch.linalg.vector_norm(lost / unit if unit != 1 else lost)) ** 2
            size2 += float(torch.linalg.vector_norm(delta / unit if unit != 1 else delta)) ** 2
    return math.sqrt(lost2 / (size2 or 1.0))


def _unrestorable(layer: AdaptedLinear) -> str | None:
    """Why the base weight cannot be copied back."""
    weight, base = layer._parameters.get("weight"), layer.miss_base
    if weight is None:
        return "its weight is no parameter of its own any more (parametrized, pruned?)"
    if (weight.shape, weight.dtype) != (base.shape, base.dtype):
        return f"its weight has been replaced: {tuple(base.shape)} of {base.dtype} by {tuple(weight.shape)} of {weight.dtype}"
    reason = None if base.is_meta and weight.is_meta else unwritable(weight)
    return reason and f"its weight {reason}"


def _unfit(layer: AdaptedLinear) -> str | None:
    """Why the weight cannot take the delta."""
    weight, d = layer._parameters.get("weight"), layer.miss_D
    if weight is None or "miss_D" not in layer._parameters:
        return f"its {'weight' if weight is None else 'miss_D'} is no parameter of its own any more (parametrized, pruned?)"
    for name, tensor in (("weight", weight), ("miss_D", d)):
        if tensor.dtype not in ADAPTER_DTYPES:
            return f"its {name} is quantised ({tensor.dtype})"
        if (reason := unwritable(tensor)) is not None:
            return f"its {name} {reason}"
    if weight.shape != (layer.out_features, layer.in_features):
        return f"its weight has the shape {tuple(weight.shape)} (partitioned?)"
    if weight.device != d.device:
        return f"its weight is on {weight.device} and miss_D on {d.device}"
    return None


def _not_finite(layer: AdaptedLinear) -> str | None:
    weight = layer.weight.detach()
    if not weight.numel():
        return None
    largest = _largest(layer.miss_D.detach())
    if not math.isfinite(largest):
        return "miss_D is not finite"
    bound = _largest(weight) + abs(layer.scale) * largest  # cheap, and nearly always enough
    if bound <= torch.finfo(weight.dtype).max:
        return None
    if not all(
        torch.isfinite((weight[rows] + delta).to(weight.dtype)).all()
        for rows, delta in _deltas(layer)
    ):
        return f"the sum of weight and delta is not finite in {weight.dtype}"
    return None


def _largest(tensor: Tensor) -> float:
    low, high = torch.aminmax(tensor)
    return max(-float(low), float(high))  # both are NaN where one element is


def _owners(model: nn.Module) -> dict[tuple[torch.device, int], list[tuple[str, Tensor]]]:
    """By storage, each tensor that a module of the model holds, with its full name."""
    owners: dict[tuple[torch.device, int], list[tuple[str, Tensor]]] = {}
    for name, module in instances(model, nn.Module).items():
        for key, value in [
            *module._parameters.items(),
            *module._buffers.items(),
            *module.__dict__.items(),
        ]:
            if (
                type(value) in (nn.Parameter, Tensor)
                and value.layout == torch.strided
                and not value.is_meta
            ):
                storage = value.device, value.untyped_storage().data_ptr()
                owners.setdefault(storage, []).append((joined(name, key), value))
    return owners


def _tied(
    name: str, weight: Tensor, owners: dict[tuple[torch.device, int], list[tuple[str, Tensor]]]
) -> str | None:
    if weight.is_meta:
        return None
    for owner, other in owners[weight.device, weight.untyped_storage().data_ptr()]:
        if owner != joined(name, "weight") and _overlap(weight, other):
            return f"its weight is tied to {owner}, which would change too"
    return None


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage may have an element in common: their ranges of memory meet."""
    if not a.numel() or not b.numel():
        return False
    (start_a, end_a), (start_b, end_b) = _range(a), _range(b)
    return start_a < end_b and start_b < end_a


def _range(tensor: Tensor) -> tuple[int, int]:
    first = int(tensor.storage_offset())
    last = first + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return first * tensor.itemsize, (last + 1) * tensor.itemsize
