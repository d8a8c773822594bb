"""Adapters as dicts of tensors: take them out, put them back, add them up."""

import functools
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from miss import files
from miss.checks import is_real
from miss.errors import CheckpointError, StateError, at, brief
from miss.forms import Form
from miss.layers.loading import KEY, about_of, check_form, metadata
from miss.merging import places
from miss.records import record_of
from miss.state import check_fit, check_keys, copy_, own_adapters, refuse_merged
from miss.tensors import ADAPTER_DTYPES
from miss.tree import Tree

__all__ = ["IncompatibleKeys", "adapter_state_dict", "combine", "load_adapter_state_dict"]


class IncompatibleKeys(NamedTuple):
    """The keys that `load_adapter_state_dict` left alone; both lists are empty if it is strict."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def adapter_state_dict(model: nn.Module) -> OrderedDict[str, Tensor]:
    """Copies of the adapters' tensors, by key: ``<module path>.miss_D``. It works merged or not.

    Returns:
        An OrderedDict in the order of `adapted_modules`. Each tensor has the shape, dtype and
        device of its D. ``_metadata`` of the OrderedDict says the form of each layer.

    Raises:
        StateError: something shards the model; a D is no parameter of its own any more (pruned,
            parametrized).

    >>> from miss import inject
    >>> state = adapter_state_dict(inject(nn.Sequential(nn.Linear(8, 2)), "0", rank=4))
    >>> {key: d.shape for key, d in state.items()}
    {'0.miss_D': torch.Size([2, 4])}
    """
    with at("adapter_state_dict"):
        tree = Tree(model)
        tree.refuse_sharded()
        state: OrderedDict[str, Tensor] = OrderedDict()
        layers = vars(state)["_metadata"] = OrderedDict()
        for place in places(own_adapters(tree)).values():
            state[record_of(place).key] = place.d.clone()
            layers[place.name] = {KEY: metadata(place.layer, merged=False)}
        return state


def load_adapter_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True
) -> IncompatibleKeys:
    """Copy tensors into the adapters of a model, in place: all of them or, on an error, none.

    Args:
        model: an adapted model.
        state: what `adapter_state_dict` or `combine` returned, on any device, with the shape of
            each D. It is cast to D's dtype if no value is rounded. If it says the form of a layer,
            that is checked.
        strict: the keys must be exactly those of the model. If False, missing and unexpected keys
            are left alone and returned.

    Returns:
        ``(missing_keys, unexpected_keys)``.

    Raises:
        CheckpointError: ``state`` is no mapping; a key is missing or unexpected; a tensor is of
            another form or shape, would be rounded, is not finite, or has no elements.
        StateError: the model is merged, something shards it, or a D cannot be written.

    >>> from miss import inject
    >>> model = inject(nn.Sequential(nn.Linear(8, 2)), "0", rank=4)
    >>> load_adapter_state_dict(model, {"0.miss_D": torch.ones(2, 4)})
    IncompatibleKeys(missing_keys=[], unexpected_keys=[])
    """
    with at("load_adapter_state_dict"):
        tree = Tree(model)
        tree.refuse_sharded()
        adapted = own_adapters(tree)
        refuse_merged(adapted)
        if not isinstance(state, Mapping):
            rule, expected = "the state must be a mapping", "what adapter_state_dict returned"
            do = "miss.load(model, path) loads a file that miss.save wrote"
            raise CheckpointError(rule, expected=expected, actual=brief(state), do=do)
        found = {record_of(place).key: place for place in places(adapted).values()}
        missing = [key for key in found if key not in state]
        unexpected = [key for key in state if key not in found]
        if strict:
            do = "give what adapter_state_dict returned; strict=False loads the keys that fit"
            check_keys(missing, unexpected, do=do)
        tensors = {key: tensor for key, tensor in state.items() if key in found}
        for key in tensors:
            with at(f"load_adapter_state_dict, {key}"):
                _check_form(found[key].config.form, about_of(state, key))
        slots: dict[str, Tensor] = {key: place.d for key, place in found.items()}
        check_fit(tensors, slots, "inject with the rank and the method of the state, onto its base")
        copy_(tensors, slots)
        return IncompatibleKeys(missing, unexpected)


def combine(adapters: Iterable[tuple[Mapping[str, Tensor], float]]) -> OrderedDict[str, Tensor]:
    """The weighted sum of adapters, in fp64, rounded at the end.

    The delta is linear in D, so this is also the weighted sum of the deltas.

    Args:
        adapters: ``(state, weight)`` pairs, with states as `adapter_state_dict` returns them. The
            states must have the same keys, shapes, dtypes and forms. They must come from layers of
            the same ``scale``, which a state does not record and which is not checked.

    Returns:
        A new state, for `load_adapter_state_dict`, on the devices of the first.

    Raises:
        CheckpointError: there is no adapter; the states differ, and the message says in what; a
            weight or the sum is not finite.

    >>> one = {"0.miss_D": torch.tensor([[1.0, 2.0]])}
    >>> two = {"0.miss_D": torch.tensor([[4.0, 0.0]])}
    >>> dict(combine([(one, 0.5), (two, 2.0)]))
    {'0.miss_D': tensor([[8.5000, 1.0000]])}
    """
    pairs = list(adapters) if isinstance(adapters, Iterable) else []
    with at("combine"):
        if not pairs or not all(map(_is_pair, pairs)):
            rule = "needs (state, weight) pairs, at least one"
            do = "miss.combine([(state, 0.5), (other, 0.5)])"
            raise CheckpointError(rule, actual=brief(adapters), do=do)
        first = pairs[0][0]
        known = all(d.dtype in ADAPTER_DTYPES for d in first.values() if isinstance(d, Tensor))
        if not first or not known:
            raise CheckpointError("a state must hold adapters, of a floating dtype")
    for position, (state, weight) in enumerate(pairs):
        with at(f"combine, adapter {position}"):
            _check_term(state, weight, first)
    total: OrderedDict[str, Tensor] = OrderedDict()
    vars(total)["_metadata"] = getattr(first, "_metadata", OrderedDict()).copy()
    for key, d in first.items():
        terms = (float(weight) * s[key].detach().to("cpu", torch.float64) for s, weight in pairs)
        total[key] = functools.reduce(torch.add, terms).to(d.device, d.dtype)
    with at("combine, the sum"):
        files.check_tensors(total)
    return total


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], Mapping)


def _check_term(state: Mapping[str, Tensor], weight: float, first: Mapping[str, Tensor]) -> None:
    if not is_real(weight):
        raise CheckpointError("the weight must be a finite number", actual=repr(weight))
    unexpected = [key for key in state if key not in first]
    do = "combine adapters of the same layers"
    check_keys([key for key in first if key not in state], unexpected, "adapter 0", do)
    check_fit(state, first, "combine adapters of one rank and method")
    for key in state:
        if state[key].dtype != first[key].dtype:
            expected, actual = first[key].dtype, state[key].dtype
            rule = f"{key} has another dtype than in adapter 0"
            raise CheckpointError(rule, expected=expected, actual=actual)
        theirs, ours = about_of(state, key), about_of(first, key)
        if theirs and ours and theirs != ours:
            rule = f"{key} is of another form than in adapter 0"
            raise CheckpointError(rule, expected=ours, actual=theirs)


def _check_form(form: type[Form], about: Mapping[str, Any]) -> None:
    try:
        check_form(form, about)
    except StateError as error:
        settings = {"method": about.get("form"), "alternate": about.get("alternate")}
        given = [f"{key}={value!r}" for key, value in settings.items() if value is not None]
        found = error.expected, error.actual
        do = f"inject with {', '.join(given)}"
        raise CheckpointError(error.rule, expected=found[0], actual=found[1], do=do) from None
