"""Tensors of an adapter against the model that they are for: check all of it, then write all of it."""

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from miss import files
from miss.adaptable import unwritable
from miss.adapted import AdaptedLinear
from miss.adapter import adapted_modules
from miss.errors import CheckpointError, StateError, explain, is_merged
from miss.inject import Adapter, adopt_all_, linear_layers
from miss.linear import METHODS, method_of
from miss.targets import instances, joined, walk

__all__ = [
    "LayerRecord",
    "apply_",
    "check_fit",
    "check_keys",
    "copy_",
    "key_of",
    "named_tensors",
    "own_adapters",
]
__all__ += ["record_of", "unmerged"]

Model = TypeVar("Model", bound=nn.Module)


class LayerRecord(NamedTuple):
    """What a file says of one adapted layer, beside its tensor.

    ``shape`` is the weight's; ``rows`` those of a MiSSe D that has fewer than outputs.
    """

    method: str
    rank: int
    scale: float
    dropout: float
    shape: tuple[int, int]
    rows: int | None = None

    @property
    def d_shape(self) -> tuple[int, int]:
        """The shape of D."""
        return METHODS[self.method].adapter_shape(*self.shape, self.rank, self.rows)


def apply_(
    model: Model, where: str, layers: Mapping[str, LayerRecord], tensors: Mapping[str, Tensor]
) -> Model:
    """Put adapters and other tensors into a model, injecting where it has no adapter; all or, on an error, nothing.

    Args:
        model: a base model, or one with the same adapters.
        where: the file, for messages.
        layers: by module path, the settings of each layer.
        tensors: by key, the D of each layer, which fit the settings, and other parameters and buffers of the model.

    Raises:
        CheckpointError: what there is does not fit the model.
        StateError: the model is merged, or a tensor of it cannot be written.
    """
    adapted = unmerged(model)
    plan: list[Adapter] = []
    if adapted:
        _check_same(where, layers, adapted)
        slots: dict[str, Tensor] = {key_of(name): layer.miss_D for name, layer in adapted.items()}
    else:
        plan = _plan(model, where, layers, tensors)
        slots = {key_of(name): adapter.d for name, adapter in zip(layers, plan)}
    owners = []
    for name, module in instances(model, nn.Module).items():
        others = {
            key: tensor for key, tensor in named_tensors(name, module).items() if key in tensors
        }
        owners += [module] if others else []
        slots |= others
    check_keys(where, [], sorted(set(tensors) - set(slots)))
    check_fit(where, tensors, slots)
    copy_(where, tensors, slots)
    if plan:
        adopt_all_(model, plan, owners, freeze=True)
    return model


def key_of(name: str) -> str:
    """The key of the adapter of the layer ``name``."""
    return joined(name, "miss_D")


def record_of(layer: AdaptedLinear) -> LayerRecord:
    """The settings of an adapted layer."""
    method = method_of(layer)
    rows = (
        layer.miss_D.shape[0]
        if method == "misse" and layer.miss_D.shape[0] != layer.out_features
        else None
    )
    return LayerRecord(
        method,
        layer.rank,
        layer.scale,
        layer.dropout,
        (layer.out_features, layer.in_features),
        rows,
    )


def own_adapters(model: nn.Module) -> dict[str, AdaptedLinear]:
    """`adapted_modules`, or a `StateError` where a ``miss_D`` is computed from something else."""
    adapted = adapted_modules(model)
    for name, layer in adapted.items():
        if "miss_D" not in layer._parameters:
            rule = "its miss_D is no parameter of its own any more (pruned, parametrized?)"
            raise StateError(
                explain(name or type(layer).__name__, rule, do="remove what replaced it")
            )
    return adapted


def unmerged(model: nn.Module) -> dict[str, AdaptedLinear]:
    """`own_adapters`, or a `StateError` where one is merged."""
    adapted = own_adapters(model)
    for name, layer in adapted.items():
        if layer.merged:
            raise is_merged(
                name or type(layer).__name__, "an adapter that is loaded now would have no effect"
            )
    return adapted


def named_tensors(name: str, module: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of one module, without adapters; the base weight also while merged."""
    own = {**module._parameters, **module._buffers}
    transient = set(module._non_persistent_buffers_set)
    if isinstance(module, AdaptedLinear):
        transient.add("miss_D")
        if module.merged:
            own["weight"] = module.miss_base
    return {
        joined(name, key): t for key, t in own.items() if t is not None and key not in transient
    }


def check_keys(
    where: str, missing: list[str], unexpected: list[str], against: str = "the model"
) -> None:
    """A `CheckpointError` unless both lists are empty."""
    kinds = (("missing", missing), ("unexpected", unexpected))
    counts = [
        f"{len(keys)} {kind}: {', '.join(map(str, keys[:5]))}" for kind, keys in kinds if keys
    ]
    if counts:
        raise CheckpointError(
            explain(where, f"the keys are not those of {against}", actual="; ".join(counts))
        )


def check_fit(where: str, tensors: Mapping[str, Tensor], slots: Mapping[str, Tensor]) -> None:
    """Each tensor against the one that it is to replace or to be added to."""
    files.check_tensors(where, tensors)
    for key, tensor in tensors.items():
        expected, actual = (f"{tuple(t.shape)} of {t.dtype}" for t in (slots[key], tensor))
        if expected != actual:
            raise CheckpointError(
                explain(
                    where, f"{key} has another shape or dtype", expected=expected, actual=actual
                )
            )


def copy_(where: str, tensors: Mapping[str, Tensor], slots: Mapping[str, Tensor]) -> None:
    """Write each tensor into its slot, after all have been brought to their devices."""
    for key in tensors:
        if (reason := unwritable(slots[key])) is not None:
            raise StateError(
                explain(
                    where, f"{key} of the model {reason}, so that nothing can be loaded into it"
                )
            )
    first: dict[tuple[torch.device, int], str] = {}
    for key in tensors:
        other = first.setdefault((slots[key].device, slots[key].data_ptr()), key)
        if other != key and not torch.equal(
            tensors[other].detach().cpu(), tensors[key].detach().cpu()
        ):
            raise CheckpointError(
                explain(
                    where,
                    f"{key} and {other} are one tensor in the model, and two that differ here",
                )
            )
    with torch.inference_mode(False), torch.no_grad():
        staged = {
            key: tensor.to(slots[key].device, copy=True) for key, tensor in tensors.items()
        }  # a slot may be a source too
        for key, tensor in staged.items():
            slots[key].copy_(tensor)


def _plan(
    model: nn.Module, where: str, layers: Mapping[str, LayerRecord], tensors: Mapping[str, Tensor]
) -> list[Adapter]:
    """The adapters to inject into a base model, in the order of ``layers``, allocated and zero."""
    modules = dict(walk(model))  # the last of a name, since a wrapper comes before what it wraps
    reasons = linear_layers(model)
    plan: dict[int, Adapter] = {}
    for name, record in layers.items():
        linear = modules.get(name)
        if linear is None:
            raise CheckpointError(explain(where, f"the model has no module {name!r}"))
        if not isinstance(linear, nn.Linear) or reasons[id(linear)] is not None:
            reason = reasons.get(id(linear), f"is a {type(linear).__name__}")
            raise CheckpointError(
                explain(where, f"module {name!r} of the model cannot be adapted: it {reason}")
            )
        if (linear.out_features, linear.in_features) != record.shape:
            shape = (linear.out_features, linear.in_features)
            rule = f"the weight of module {name!r} has another shape"
            raise CheckpointError(explain(where, rule, expected=record.shape, actual=shape))
        if id(linear) in plan:
            raise CheckpointError(
                explain(
                    where, f"two adapters are for one module of the model; the second is {name!r}"
                )
            )
        form = METHODS[record.method]
        d = form.new_adapter(linear, record.rank, tensors[key_of(name)].dtype, record.rows)
        plan[id(linear)] = Adapter(linear, form, d, float(record.scale), float(record.dropout))
    return list(plan.values())


def _check_same(
    where: str, layers: Mapping[str, LayerRecord], adapted: Mapping[str, AdaptedLinear]
) -> None:
    """The adapters of a file against those of a model: their layers, and the settings but for dropout."""
    missing, unexpected = (
        [name for name in adapted if name not in layers],
        [name for name in layers if name not in adapted],
    )
    check_keys(where, list(map(key_of, missing)), list(map(key_of, unexpected)))
    for name, record in layers.items():
        own = record_of(adapted[name])
        for field in ("method", "shape", "rank", "rows", "scale"):
            if getattr(record, field) != getattr(own, field):
                rule = f"the {field} of {name or 'the adapter'!r} is not the model's"
                raise CheckpointError(
                    explain(
                        where, rule, expected=getattr(own, field), actual=getattr(record, field)
                    )
                )
