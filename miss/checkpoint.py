"""Adapters, and what is trained besides them, in one file."""

import importlib.metadata
import os
import warnings
from collections.abc import Iterable
from typing import TypeVar

from torch import Tensor, nn

from miss import files, fingerprint
from miss.errors import CheckpointError, at, named, some
from miss.extra import extra_tensors, trained_names
from miss.matching import Targets
from miss.merging import places
from miss.records import Record, described, parse, record_of
from miss.state import check_keys, fit, own_adapters, write_
from miss.tensors import ADAPTER_DTYPES
from miss.tree import Tree, joined

__all__ = ["load", "save"]

Model = TypeVar("Model", bound=nn.Module)


def save(model: nn.Module, path: str | os.PathLike[str], extra: "Targets | None" = None) -> None:
    """Write the adapters of a model, and all that `load` needs to inject them again, to one file.

    The file also holds all else that training changes, and a fingerprint of the base model, by
    which `load` recognises another one: up to 64 values of each weight.

    The file is written beside ``path`` and then renamed. So ``path`` is always the old file or the
    new one, whatever happens.

    Args:
        model: an adapted model; it may be merged.
        path: ends in ``.safetensors`` (recommended; the extra ``files`` installs that package) or
            ``.pt``.
        extra: what is written besides adapters. None is all that training changes: the Parameters
            that require grad, or that `inject` or `load` switched on, with the buffers of their
            modules; the running statistics of batch norm; and the weight and bias of an adapted
            layer that is part of a task head, or that ``from_pretrained`` made anew. ``()`` is
            nothing. Or modules and Parameters, as in ``trainable`` of `inject`. A module stands for
            all that it contains, buffers included.

    Raises:
        StateError: the model has no adapter, or something shards it.
        TargetError: an ``extra`` matches nothing.
        CheckpointError: the suffix is not supported; a tensor is not finite, has no elements, or is
            not dense; a module to write holds state that is no parameter or buffer; the file cannot
            be written. What was at ``path`` is still there then.
        ImportError: ``path`` ends in ``.safetensors`` and that package is absent.

    >>> import copy, tempfile
    >>> from miss import inject
    >>> base = nn.Sequential(nn.Linear(8, 2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(inject(copy.deepcopy(base), "0", rank=4), f"{folder}/adapter.pt")
    ...     load(base, f"{folder}/adapter.pt")[0]
    MiSSeLinear(in_features=8, out_features=2, bias=True, rank=4, scale=1.0, dropout=0.0)
    """
    with at("save"):
        tree = Tree(model)
        tree.refuse_sharded()
        tree.require_adapted()
        adapted = own_adapters(tree)
        others = extra_tensors(tree, extra)
        where = files.as_path(path)
    with at(where):
        files.check_path(where)
        tensors, records = {}, {}
        for place in places(adapted).values():
            record = record_of(place)
            tensors[record.key], records[record.key] = place.d, described(record)
            if place.d.dtype not in ADAPTER_DTYPES:
                with at(named(place.name)):
                    rule, expected = "not the settings of an adapter", "a real floating dtype"
                    raise CheckpointError(rule, expected=expected, actual=place.d.dtype)
        buffers = {key for key, t in others.items() if not isinstance(t, nn.Parameter)}
        files.check_tensors(tensors | others, buffers)
        try:
            version = importlib.metadata.version("miss-torch")
        except importlib.metadata.PackageNotFoundError:  # imported from a folder
            version = "unknown"
        base, values = fingerprint.taken(tree, others)
        about = {"version": version, "adapters": records, "extra": sorted(others)}
        about |= {"trained": trained_names(tree, others), "base": base}
        if values is not None:
            tensors[fingerprint.KEY] = values
        files.write(where, tensors | others, about)


def load(model: Model, path: str | os.PathLike[str], *, any_base: bool = False) -> Model:
    """Read a file that `save` wrote into a model, in place: all of it or, on an error, nothing.

    No code in the file is run. A model without adapters is injected as the file says, and frozen as
    by `inject`. A model with adapters must have the same layers, methods, signs, ranks, scales and
    shapes as the file. It keeps its own dropout. What was trained besides adapters requires grad
    again, and so do the task heads of a model that is injected. Tensors of the file are cast to the
    model's dtypes if no value is rounded.

    Args:
        model: a base model, or an adapted one.
        path: ends in ``.safetensors`` or ``.pt``.
        any_base: load adapters onto another base than the one that they were trained on.

    Returns:
        ``model`` itself.

    Raises:
        CheckpointError: the file is missing, damaged, of a newer format, or does not fit the model;
            the weights of adapted layers are not those that the adapters were trained on, in the
            coarser of both dtypes. The message says why.
        StateError: the model is merged, sharded, or wrapped by DistributedDataParallel, or a tensor
            of it cannot be written.
        ImportError: ``path`` ends in ``.safetensors`` and that package is absent.

    A `UserWarning` names other Parameters that differ from those of the file's base, such as a head
    that was frozen at random values, or embeddings that have been resized.
    """
    with at("load"):
        tree = Tree(model)
        tree.refuse_sharded()
        tree.refuse_wrapped()
        where = files.as_path(path)
    with at(where):
        if os.path.isfile(os.path.join(where, "adapter_config.json")):
            do = "miss.interop.peft.load(model, directory)"
            raise CheckpointError("is a directory that PEFT wrote", do=do)
        files.check_exists(where)
        files.check_path(where)
        tensors, about, intact = files.read(where)
        records, extra, trained = parse(about)
        base, values = about.get("base", {}), tensors.pop(fingerprint.KEY, None)
        fingerprint.check(base, values)
        expected = set(records) | extra
        missing, unexpected = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
        check_keys(missing, unexpected, "the file's own list")
        files.check_tensors(tensors, extra - trained)
        for key, record in records.items():
            d, shape = tensors[key], record.config.d_shape
            if d.shape != shape or d.dtype not in ADAPTER_DTYPES:
                rule, actual = f"{key} does not fit its metadata", f"{tuple(d.shape)} of {d.dtype}"
                raise CheckpointError(rule, expected=shape, actual=actual)
        if not intact:
            rule = "is damaged: its content does not match its checksum"
            raise CheckpointError(rule, do="save or copy it again")
        fitted = fit(tree, records, tensors)
        differing = [] if any_base else fingerprint.differing(tree, base, values)
        wrong, others = _by_adapter(tree, records.values(), differing)
        if wrong:
            rule = "the model has other weights than the base that the adapters were trained on"
            do = "load it onto that base, or pass any_base=True"
            raise CheckpointError(rule, actual=some(wrong), do=do)
        if others:
            text = f"{where}: its base, which it does not hold, had other values of {some(others)}"
            warnings.warn(text, UserWarning, stacklevel=2)
        write_(tree, fitted, extra, trained)
    return model


def _by_adapter(
    tree: Tree, records: Iterable[Record], names: list[str]
) -> tuple[list[str], list[str]]:
    """Which of ``names`` are Parameters that are adapted, and which are others."""
    own: dict[str, Tensor | None] = {}
    for name, module in tree.of_type(nn.Module).items():
        own |= {joined(name, key): parameter for key, parameter in module._parameters.items()}
    adapted = {id(tree.modules[r.module]._parameters[r.parameter]) for r in records}
    adapters = [name for name in names if id(own.get(name)) in adapted]
    return adapters, [name for name in names if name not in adapters]
