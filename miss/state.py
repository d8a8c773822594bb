"""Put an adapter's tensors into a model: check all of them, then write all of them."""

from collections.abc import Container, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from miss import files
from miss.errors import CheckpointError, StateError, at, merged_error, named, replaced_error
from miss.forms import METHODS
from miss.heads import made_anew
from miss.inject import adopt_all_
from miss.layers import (
    AdaptedLayer,
    base_parameters,
    class_of,
    file_path,
    host_of,
    parameters_of,
    path_of,
)
from miss.layers.host import base_name, d_name
from miss.layers.swap import Adapter, new_d
from miss.merging import places
from miss.parents import refuse_offloaded
from miss.plan import candidates
from miss.records import Record, record_of
from miss.tensors import can_be_trained, is_lazy, same, unwritable
from miss.trained import keep_, unadapted_head
from miss.tree import Tree, joined

__all__ = ["Fit", "base_tensors", "check_fit", "check_keys", "copy_", "fit", "named_tensors"]
__all__ += ["no_module", "own_adapters", "refuse_merged", "write_"]


class Fit(NamedTuple):
    """Tensors that fit a model: by key, each and where it goes, and the adapters to inject."""

    tensors: Mapping[str, Tensor]
    slots: Mapping[str, Tensor]
    plan: list[Adapter]


def fit(tree: Tree, records: Mapping[str, Record], tensors: Mapping[str, Tensor]) -> Fit:
    """Check adapters and other tensors against a model, which is not changed.

    Args:
        tree: a base model, or one with the same adapters.
        records: by key, the settings of each D.
        tensors: by key, each D, which fits its settings, and other parameters and buffers.

    Raises:
        CheckpointError: a record or a tensor does not fit the model.
        StateError: the model is merged.
    """
    adapted = own_adapters(tree)
    refuse_merged(adapted)
    plan: list[Adapter] = []
    if adapted:
        _check_same(records, adapted)
        slots: dict[str, Tensor] = {record_of(p).key: p.d for p in places(adapted).values()}
    else:
        try:
            plan = _plan(tree, records, tensors)
        except CheckpointError as error:
            error.do = error.do or "load it into the model whose adapters were saved"
            raise
        slots = dict(zip(records, (adapter.d for adapter in plan)))
    buffers: set[str] = set()
    for name, module in tree.of_type(nn.Module).items():
        own = named_tensors(name, module)
        slots |= {key: tensor for key, tensor in own.items() if key in tensors}
        buffers |= {joined(name, key) for key in module._buffers}
    check_keys([], sorted(set(tensors) - set(slots)))
    check_fit(tensors, slots, "build the model as the saved one was built", buffers)
    return Fit(tensors, slots, plan)


def write_(tree: Tree, fitted: Fit, extra: Iterable[str], trained: Container[str]) -> None:
    """Put what `fit` has checked into the model, injecting if it has no adapter; all or nothing.

    A model that is injected is frozen, as by `miss.inject`, except for its heads. Parameters of
    ``extra`` that are ``trained`` are switched on, in any model. A later `miss.save` writes all
    Parameters of ``extra`` again.

    Args:
        tree: the model.
        fitted: what `fit` returned for it.
        extra: the keys of the tensors that are no adapters.
        trained: the keys of the Parameters that were trained.

    Raises:
        CheckpointError: two tensors differ that are one in the model.
        StateError: a tensor of the model cannot be written.
    """
    tensors, slots, plan = fitted
    copy_(tensors, slots)
    on = list(unadapted_head(tree, [adapter.layer for adapter in plan]).values())
    others = {key: slots[key] for key in extra if isinstance(slots[key], nn.Parameter)}
    on += [slot for key, slot in others.items() if key in trained and can_be_trained(slot)]
    adopt_all_(tree, plan, on, made_anew(tree).values(), freeze=bool(plan))
    keep_(tree, others.values())


def own_adapters(tree: Tree) -> dict[str, AdaptedLayer]:
    """The adapted layers; a `StateError` if a D is only a part, or computed from something else."""
    adapted = tree.adapted
    for name, layer in adapted.items():
        for parameter, config in layer.miss_configs.items():
            key = d_name(parameter)
            d = layer._parameters.get(key)
            with at(named(name)):
                if d is None:
                    raise replaced_error(key)
                if d.shape != config.d_shape:
                    rule, actual = f"its {key} has another shape (partitioned?)", tuple(d.shape)
                    raise StateError(rule, expected=config.d_shape, actual=actual)
    return adapted


def refuse_merged(adapted: Mapping[str, AdaptedLayer]) -> None:
    """Raise a `StateError` if a layer is merged."""
    for name, layer in adapted.items():
        if layer.miss_merged:
            with at(named(name)):
                raise merged_error("an adapter that is loaded now would have no effect")


def base_tensors(name: str, module: nn.Module) -> dict[str, Tensor]:
    """The direct Parameters of the module ``name`` by full name, without D's.

    While it is merged, the kept base stands for a merged Parameter.
    """
    found: dict[str, Tensor] = dict(base_parameters(module))
    for parameter in module.miss_configs if isinstance(module, AdaptedLayer) else ():
        kept = module._buffers.get(base_name(parameter))
        if kept is not None:
            found[parameter] = kept
    return {joined(name, key): tensor for key, tensor in found.items()}


def named_tensors(name: str, module: nn.Module) -> dict[str, Tensor]:
    """`base_tensors` and the persistent buffers of a module, by full name."""
    found = base_tensors(name, module)
    for key, buffer in module._buffers.items():
        if buffer is not None and key not in module._non_persistent_buffers_set:
            found[joined(name, key)] = buffer
    return found


def check_keys(
    missing: list[str], unexpected: list[str], against: str = "the model", do: str = ""
) -> None:
    """Raise a `CheckpointError` unless both lists are empty."""
    counts = []
    for kind, keys in (("missing", missing), ("unexpected", unexpected)):
        if keys:
            counts.append(f"{len(keys)} {kind}: {', '.join(map(str, keys[:5]))}")
    if counts:
        rule = f"the keys are not those of {against}"
        raise CheckpointError(rule, actual="; ".join(counts), do=do)


def check_fit(
    tensors: Mapping[str, Tensor],
    slots: Mapping[str, Tensor],
    shaped: str = "",
    buffers: Container[str] = (),
) -> None:
    """Check each tensor against the one that it replaces: same shape, and no value is rounded.

    Args:
        tensors: by key, what is to be written.
        slots: by key, the tensors of the model.
        shaped: what to do if a tensor has another shape.
        buffers: the keys of tensors that may hold infinities.

    Raises:
        CheckpointError: a tensor has another shape, would be rounded, or fails
            `miss.files.check_tensors`.
    """
    files.check_tensors(tensors, buffers)
    for key, tensor in tensors.items():
        slot = slots[key]
        if is_lazy(slot):
            rule = f"{key} of the model has no shape yet"
            raise CheckpointError(rule, do="run the model once, then load")
        expected, actual = (f"{tuple(t.shape)} of {t.dtype}" for t in (slot, tensor))
        if tensor.shape != slot.shape:
            rule = f"{key} has another shape"
            raise CheckpointError(rule, expected=expected, actual=actual, do=shaped)
        if tensor.dtype != slot.dtype and not same(tensor.to(slot.dtype).to(tensor.dtype), tensor):
            rule = f"{key} has another dtype, and its values would be rounded"
            do = f"give the model's tensor the dtype {tensor.dtype} (a D has it if the model has "
            do += f"no adapter yet), or round it yourself with .to({slot.dtype})"
            raise CheckpointError(rule, expected=expected, actual=actual, do=do)


def copy_(tensors: Mapping[str, Tensor], slots: Mapping[str, Tensor]) -> None:
    """Write each tensor into its slot, after all have been moved to their devices."""
    for key in tensors:
        if (reason := unwritable(slots[key])) is not None:
            raise StateError(f"{key} of the model {reason}, so that nothing can be loaded into it")
    first: dict[tuple[torch.device, int], str] = {}
    for key in tensors:
        other = first.setdefault((slots[key].device, slots[key].data_ptr()), key)
        one, two = tensors[other], tensors[key]
        if other != key and not torch.equal(one.detach().cpu(), two.detach().cpu()):
            rule = f"{key} and {other} are one tensor in the model, and two that differ here"
            raise CheckpointError(rule)
    staged = {}
    with torch.inference_mode(False), torch.no_grad():
        for key, tensor in tensors.items():
            staged[key] = tensor.to(slots[key].device, copy=True)  # a slot may be a source too
        for key, tensor in staged.items():
            slots[key].copy_(tensor)


def _plan(
    tree: Tree, records: Mapping[str, Record], tensors: Mapping[str, Tensor]
) -> list[Adapter]:
    """The adapters to inject into a base model, in the order of ``records``, allocated and zero."""
    reasons = candidates(tree)
    plan: dict[tuple[int, str], Adapter] = {}
    for key, (name, parameter, path, config) in records.items():
        module = tree.modules.get(name)
        if module is None:
            raise no_module(tree, name)
        kind = f"is a {path_of(type(module))}"
        host = host_of(module)
        reason = reasons.get(id(module), kind)
        if host is None or reason is not None:
            rule = f"module {named(name)!r} of the model cannot be adapted: it {reason or kind}"
            raise CheckpointError(rule)
        if file_path(host) != path:
            rule = f"module {named(name)!r} of the model is another kind of layer: it {kind}"
            raise CheckpointError(rule, expected=path, actual=file_path(host))
        if parameter not in parameters_of(module):
            actual = ", ".join(parameters_of(module))
            rule = f"module {named(name)!r} has no Parameter {parameter!r}"
            raise CheckpointError(rule, actual=actual)
        sizes = host.sizes(module, parameter)
        if sizes != config.shape:
            rule = f"the {parameter} of module {named(name)!r} has another shape"
            raise CheckpointError(rule, expected=config.shape, actual=sizes)
        if (blank := host.blank(module, parameter)) != config.blank:
            rule = f"the {parameter} of module {named(name)!r} has another padding_idx"
            raise CheckpointError(rule, expected=config.blank, actual=blank)
        if (id(module), parameter) in plan:
            rule = f"two adapters are for one module of the model; the second is {named(name)!r}"
            raise CheckpointError(rule)
        cls = class_of(type(module), host, METHODS[config.form.name])
        d = new_d(module, parameter, config, tensors[key].dtype)
        plan[id(module), parameter] = Adapter(module, parameter, cls, config, d)
    forms = {(id(a.layer), a.cls, a.config.form.alternate) for a in plan.values()}
    if len(forms) > len({key for key, *_ in forms}):
        raise CheckpointError("the Parameters of one module are adapted in two forms")
    refuse_offloaded(tree, (adapter.layer for adapter in plan.values()))
    return list(plan.values())


def no_module(tree: Tree, name: str) -> CheckpointError:
    """The error of an adapter for a module that the model lacks, or has under a longer name."""
    error = CheckpointError(f"the model has no module {name!r}")
    for longer in tree.modules:
        if name and longer.endswith(f".{name}"):
            error.do = f"load it into the model's part {longer.removesuffix(f'.{name}')!r}"
            break
    return error


def _check_same(records: Mapping[str, Record], adapted: Mapping[str, AdaptedLayer]) -> None:
    """Check a file's adapters against a model's: the keys, and all settings except dropout."""
    own = {(record := record_of(place)).key: record for place in places(adapted).values()}
    missing = [key for key in own if key not in records]
    do = "miss.eject(model) first: a model without adapters is injected as the file says"
    check_keys(missing, [key for key in records if key not in own], do=do)
    for key, record in records.items():
        pair = record, own[key]
        theirs, ours = ({"alternate": False} | one.config.fields() for one in pair)
        if record.host != own[key].host:
            rule = f"{key} is for another kind of layer"
            raise CheckpointError(rule, expected=own[key].host, actual=record.host)
        for field in ("method", "alternate", "shape", "rank", "rows", "blank", "scale"):
            if theirs.get(field) != ours.get(field):
                rule = f"the {field} of {named(record.module)!r} is not the model's"
                expected, actual = ours.get(field), theirs.get(field)
                raise CheckpointError(rule, expected=expected, actual=actual, do=do)
