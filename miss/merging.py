"""`merge` puts the deltas into the weights, `unmerge` takes them out, bit for bit."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from miss.adaptable import ADAPTER_DTYPES, unwritable
from miss.errors import StateError, explain, is_merged
from miss.linear import AdaptedLinear
from miss.targets import instances, joined

__all__ = ["bake_", "check_mergeable", "check_restorable", "guard", "merge", "refuse_loading", "restore_", "unmerge"]


def merge(model: nn.Module) -> dict[str, float]:
    """Add each adapter's delta to its weight, in place: ``W = W0 + delta_weight()``, after which `forward` is a plain linear.

    The sum is made in fp32 or wider and rounded once to the weight's dtype. Each layer keeps a copy of its base weight, so a
    merged model takes twice the memory of its adapted weights (and for the time of merging a few copies of one layer's weight
    in fp32); ``eject(model, merge=True)`` keeps none. While merged, `state_dict` holds the base weight; loading into the
    model, resetting an adapter, and a forward in training mode with gradients are a `StateError`. Layers that are merged
    already stay as they are.

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
            if not layer.merged:
                with torch.inference_mode(False):
                    layer.register_buffer("miss_base", layer.weight.detach().clone(), persistent=False)
                done.append(layer)
                bake_(layer)
            errors[name] = _rounding_error(layer)
    except BaseException:  # out of memory, or interrupted
        for layer in done:
            restore_(layer)
        raise
    guard(model)
    return {name: float(error) for name, error in errors.items()}


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
        if not layer.merged and (reason := _unfit(layer) or _tied(name, layer.weight, owners) or _not_finite(layer)):
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
        layer.weight.copy_(_sum(layer))


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
        raise is_merged(type(module).__name__, "a weight that is loaded now would be lost when it is unmerged")


def guard(model: nn.Module) -> None:
    """Place `refuse_loading` on each module that is or holds a merged layer, and take it off the others."""
    for module in model.modules():
        hooks = module._load_state_dict_pre_hooks
        ours = [key for key, wrapped in hooks.items() if getattr(wrapped, "hook", None) is refuse_loading]
        if not _holds_merged(module):
            for key in ours:
                del hooks[key]
        elif not ours:
            module.register_load_state_dict_pre_hook(refuse_loading)  # type: ignore[no-untyped-call]  # torch gives it no types


def _holds_merged(module: nn.Module) -> bool:
    return any(isinstance(inner, AdaptedLinear) and inner.merged for inner in module.modules())


def _wide(layer: AdaptedLinear) -> torch.dtype:
    return torch.promote_types(torch.promote_types(layer.weight.dtype, layer.miss_D.dtype), torch.float32)


def _delta(layer: AdaptedLinear) -> Tensor:
    """`delta_weight`, computed in fp32 or wider."""
    return layer.dense(layer.scale * layer.miss_D.detach().to(_wide(layer)))


def _sum(layer: AdaptedLinear) -> Tensor:
    return (layer.weight.detach() + _delta(layer)).to(layer.weight.dtype)


def _rounding_error(layer: AdaptedLinear) -> Tensor:
    """What `merge` returns for a merged layer. Both norms are taken of multiples of the delta's largest element."""
    delta = _delta(layer)
    if not delta.numel():
        return delta.new_zeros(())
    unit = delta.abs().amax()
    unit = unit.where(unit > 0, 1)
    lost = layer.weight.detach().to(delta.dtype) - layer.miss_base - delta
    size: Tensor = torch.linalg.vector_norm(delta / unit)
    error: Tensor = torch.linalg.vector_norm(lost / unit) / size.where(size > 0, 1)
    return error


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
    if not bound <= torch.finfo(weight.dtype).max and not torch.isfinite(_sum(layer)).all():
        return f"the sum of weight and delta is not finite in {weight.dtype}"
    return None


def _largest(tensor: Tensor) -> float:
    low, high = torch.aminmax(tensor)
    return max(-float(low), float(high))  # both are NaN where one element is


def _owners(model: nn.Module) -> dict[tuple[torch.device, int], list[tuple[str, Tensor]]]:
    """By storage, each tensor that a module of the model holds, with its full name."""
    owners: dict[tuple[torch.device, int], list[tuple[str, Tensor]]] = {}
    for name, module in instances(model, nn.Module).items():
        for key, value in [*module._parameters.items(), *module._buffers.items(), *module.__dict__.items()]:
            if type(value) in (nn.Parameter, Tensor) and value.layout == torch.strided and not value.is_meta:
                storage = value.device, value.untyped_storage().data_ptr()
                owners.setdefault(storage, []).append((joined(name, key), value))
    return owners


def _tied(name: str, weight: Tensor, owners: dict[tuple[torch.device, int], list[tuple[str, Tensor]]]) -> str | None:
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
