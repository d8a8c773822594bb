"""Adapters as tensors and as files: take them out of a model, put them back, save, load, add them up."""

import functools
import importlib.metadata
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from miss import files
from miss.adaptable import ADAPTER_DTYPES, check_settings, is_real
from miss.errors import CheckpointError, StateError, explain
from miss.fitting import (
    LayerRecord,
    apply_,
    check_fit,
    check_keys,
    copy_,
    key_of,
    named_tensors,
    own_adapters,
    record_of,
    unmerged,
)
from miss.linear import METHODS
from miss.targets import Targets, instances, joined, resolve

__all__ = [
    "IncompatibleKeys",
    "adapter_state_dict",
    "combine",
    "load",
    "load_adapter_state_dict",
    "save",
]

Model = TypeVar("Model", bound=nn.Module)


class IncompatibleKeys(NamedTuple):
    """The keys that `load_adapter_state_dict` left alone; both lists are empty where it is strict."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the adapters' tensors, by key: ``<module path>.miss_D``.

    Returns:
        A dict in the order of `adapted_modules`; each tensor has the shape, dtype and device of its ``miss_D``.

    Raises:
        StateError: a ``miss_D`` is no parameter of its own any more (pruned, parametrized).

    >>> from miss import inject
    >>> {key: d.shape for key, d in adapter_state_dict(inject(nn.Sequential(nn.Linear(8, 2)), "0", rank=4)).items()}
    {'0.miss_D': torch.Size([2, 4])}
    """
    return {
        key_of(name): layer.miss_D.detach().clone() for name, layer in own_adapters(model).items()
    }


def load_adapter_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True
) -> IncompatibleKeys:
    """Copy tensors into the adapters of a model, in place; all of them or, on an error, none.

    Args:
        model: an adapted model.
        state: what `adapter_state_dict` or `combine` returned; any device, the shape and dtype of each ``miss_D``.
        strict: the keys must be those of the model, no more and no fewer. Otherwise the rest is left alone and returned.

    Returns:
        ``(missing_keys, unexpected_keys)``.

    Raises:
        CheckpointError: a key is missing or unexpected; a tensor is of another shape or dtype, not finite, or without elements.
        StateError: the model is merged, or a ``miss_D`` cannot be written.

    >>> from miss import inject
    >>> model = inject(nn.Sequential(nn.Linear(8, 2)), "0", rank=4)
    >>> load_adapter_state_dict(model, {"0.miss_D": torch.ones(2, 4)})
    IncompatibleKeys(missing_keys=[], unexpected_keys=[])
    """
    where = "load_adapter_state_dict"
    adapters = {key_of(name): layer.miss_D for name, layer in unmerged(model).items()}
    missing, unexpected = (
        [key for key in adapters if key not in state],
        [key for key in state if key not in adapters],
    )
    if strict:
        check_keys(where, missing, unexpected)
    tensors = {key: tensor for key, tensor in state.items() if key in adapters}
    check_fit(where, tensors, adapters)
    copy_(where, tensors, adapters)
    return IncompatibleKeys(missing, unexpected)


def save(model: nn.Module, path: str | os.PathLike[str], extra: Targets = ()) -> None:
    """Write the adapters of a model, and all that `load` needs to inject them again, to one file.

    The file is written beside ``path`` and then renamed, so that ``path`` is the old file or the new one, whatever happens.

    Args:
        model: an adapted model; it may be merged.
        path: ends in ``.safetensors`` (recommended; the extra ``files`` installs that package) or ``.pt``.
        extra: modules, in the forms of `inject`'s ``targets``, with all that they contain, whose parameters and persistent
            buffers are written too, such as a new head.

    Raises:
        StateError: the model has no adapter.
        TargetError: an ``extra`` matches nothing.
        CheckpointError: the suffix is another one; a tensor is not finite, without elements, or no dense tensor; an ``extra``
            holds state that is no parameter or buffer; the file cannot be written. What was at ``path`` is still there.
        ImportError: ``path`` ends in ``.safetensors`` and that package is absent.

    >>> import tempfile
    >>> from miss import inject
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(inject(nn.Sequential(nn.Linear(8, 2)), "0", rank=4), f"{folder}/adapter.pt")
    ...     load(nn.Sequential(nn.Linear(8, 2)), f"{folder}/adapter.pt")[0]
    MiSSeLinear(in_features=8, out_features=2, bias=True, rank=4, scale=1.0, dropout=0.0)
    """
    where = files.check_path(path)
    adapted = own_adapters(model)
    if not adapted:
        raise StateError(explain("save", "the model has no adapter", do="inject first"))
    wanted = {id(module) for module in resolve(model, extra, "extra")}
    others: dict[str, Tensor] = {}
    for name, module in instances(model, nn.Module).items():
        if id(module) in wanted:
            own = named_tensors(name, module)
            state: dict[str, Any] = {}
            module._save_to_state_dict(state, joined(name, ""), False)
            if foreign := sorted(set(state) - set(own) - {key_of(name)}):
                raise CheckpointError(
                    explain(
                        where, f"extra holds state that is no parameter or buffer: {foreign[0]}"
                    )
                )
            others.update(own)
    tensors = {key_of(name): layer.miss_D.detach() for name, layer in adapted.items()} | others
    files.check_tensors(where, tensors)
    layers = {name: record_of(layer) for name, layer in adapted.items()}
    for name, record in layers.items():
        _check_record(name or "the model", record, adapted[name].miss_D.dtype)
    try:
        version = importlib.metadata.version("miss-torch")
    except importlib.metadata.PackageNotFoundError:  # imported from a folder
        version = "unknown"
    modules = {
        name: {k: v for k, v in record._asdict().items() if v is not None}
        for name, record in layers.items()
    }
    files.write(where, tensors, {"version": version, "modules": modules, "extra": sorted(others)})


def load(model: Model, path: str | os.PathLike[str]) -> Model:
    """Read a file that `save` wrote into a model, in place; all of it or, on an error, nothing. No code in the file is run.

    A model without adapters is injected as the file says, and frozen as by `inject`, the extra modules left out. One that has
    adapters must have the same ones: layers, methods, ranks, scales, shapes and dtypes; its ``dropout`` stays.

    Args:
        model: a base model, or an adapted one.
        path: ends in ``.safetensors`` or ``.pt``.

    Returns:
        ``model`` itself.

    Raises:
        CheckpointError: the file is missing, damaged, of a newer format, or does not fit the model; the message says in what.
        StateError: the model is merged, or a tensor of it cannot be written.
        ImportError: ``path`` ends in ``.safetensors`` and that package is absent.
    """
    where = files.check_path(path)
    tensors, about, intact = files.read(where)
    layers, extra = _parse(where, about)
    expected = {key_of(name) for name in layers} | extra
    check_keys(
        where,
        sorted(expected - set(tensors)),
        sorted(set(tensors) - expected),
        "the file's own list",
    )
    files.check_tensors(where, tensors)
    for name, record in layers.items():
        d = tensors[key_of(name)]
        if d.shape != record.d_shape or d.dtype not in ADAPTER_DTYPES:
            rule = f"{key_of(name)} does not fit its metadata"
            raise CheckpointError(
                explain(
                    where, rule, expected=record.d_shape, actual=f"{tuple(d.shape)} of {d.dtype}"
                )
            )
    if not intact:
        raise CheckpointError(explain(where, "is damaged: its content does not match its checksum"))
    return apply_(model, where, layers, tensors)


def combine(adapters: Iterable[tuple[Mapping[str, Tensor], float]]) -> dict[str, Tensor]:
    """The weighted sum of adapters. The delta is linear in D, so that this is the sum of the deltas; in fp64, rounded at the end.

    Args:
        adapters: ``(state, weight)`` pairs; the states, as `adapter_state_dict` returns them, have the same keys, shapes and
            dtypes and come from layers of the same ``method`` and ``scale``, which a state does not record.

    Returns:
        A new state, for `load_adapter_state_dict`, on the devices of the first.

    Raises:
        CheckpointError: there is no adapter; the states differ in what the message names; a weight or the sum is not finite.

    >>> combine([({"0.miss_D": torch.tensor([[1.0, 2.0]])}, 0.5), ({"0.miss_D": torch.tensor([[4.0, 0.0]])}, 2.0)])
    {'0.miss_D': tensor([[8.5000, 1.0000]])}
    """
    pairs = list(adapters)
    if not pairs or not all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], Mapping)
        for pair in pairs
    ):
        raise CheckpointError(
            explain("combine", "needs (state, weight) pairs, at least one", actual=f"{pairs!r:.80}")
        )
    first = pairs[0][0]
    if not first or any(
        isinstance(d, Tensor) and d.dtype not in ADAPTER_DTYPES for d in first.values()
    ):
        raise CheckpointError(explain("combine", "a state must hold adapters, of a floating dtype"))
    for position, (state, weight) in enumerate(pairs):
        where = f"combine, adapter {position}"
        if not is_real(weight):
            raise CheckpointError(
                explain(where, "the weight must be a finite number", actual=repr(weight))
            )
        check_keys(
            where,
            [key for key in first if key not in state],
            [key for key in state if key not in first],
            "adapter 0",
        )
        check_fit(where, state, first)
    total = {}
    for key, d in first.items():
        terms = (
            float(weight) * state[key].detach().to("cpu", torch.float64) for state, weight in pairs
        )
        total[key] = functools.reduce(torch.add, terms).to(d.device, d.dtype)
    files.check_tensors("combine, the sum", total)
    return total


def _parse(where: str, about: dict[str, Any]) -> tuple[dict[str, LayerRecord], set[str]]:
    """The description of a file as records, every field of it checked."""
    modules, extra = about.get("modules"), about.get("extra")
    if not isinstance(modules, dict) or not modules:
        raise CheckpointError(explain(where, "its metadata lists no adapted modules"))
    if not isinstance(extra, list) or not all(isinstance(key, str) for key in extra):
        raise CheckpointError(explain(where, "its metadata lists no extra tensors"))
    layers = {}
    for name, fields in modules.items():
        try:
            record = LayerRecord(**fields)
            out_features, in_features = record.shape
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                explain(where, f"metadata of module {name!r}: not the settings of an adapter")
            ) from error
        _check_record(f"{where}, metadata of module {name!r}", record, None)
        layers[name] = record._replace(shape=(out_features, in_features))
    return layers, set(extra)


def _check_record(where: str, record: LayerRecord, dtype: torch.dtype | None) -> None:
    """A `CheckpointError` unless the settings of a layer, and the dtype of its D, are within the rules of the constructor."""
    try:
        out_features, in_features = record.shape
        check_settings(where, scale=record.scale, dropout=record.dropout, adapter_dtype=dtype)
        METHODS[record.method].check_rank(where, record.rank, in_features, out_features)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            explain(where, "not the settings of an adapter", actual=f"{record}, {dtype}")
        ) from error
    cycled = record.rows is None or (
        type(record.rows) is int and record.rows > 0 and out_features % record.rows == 0
    )
    if (
        type(out_features) is not int
        or type(in_features) is not int
        or not cycled
        or (record.rows and record.method != "misse")
    ):
        raise CheckpointError(explain(where, "not the settings of an adapter", actual=record))
