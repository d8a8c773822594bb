"""MiSS adapters in the format of Hugging Face PEFT (`peft.tuners.miss`, 0.21), both ways.

PEFT itself is not needed.
"""

import os
from typing import TypeVar

from einops import rearrange
from torch import Tensor, nn

from miss import files
from miss.errors import CheckpointError, StateError, at
from miss.extra import extra_tensors
from miss.forms import LayerConfig, MiSSe, MiSSeMini
from miss.functional import scaled
from miss.heads import head_of
from miss.interop import peft_config, peft_files
from miss.layers import path_of
from miss.layers.linear import LinearHost
from miss.matching import Targets
from miss.merging import places
from miss.records import Record
from miss.state import check_keys, fit, no_module, own_adapters, refuse_merged, write_
from miss.tensors import ADAPTER_DTYPES
from miss.tree import Tree

__all__ = ["load", "save"]

Model = TypeVar("Model", bound=nn.Module)


def save(
    model: nn.Module, directory: str | os.PathLike[str], extra: "Targets | None" = None
) -> None:
    """Write the adapters as a directory that ``peft.PeftModel.from_pretrained`` loads.

    PEFT's default form is MiSSe at scale 1 and one rank. ``miss_block`` is D transposed:
    ``(r, out)``, or ``(r, mini_r)`` in the mini form. PEFT has no scale: if a layer's scale is not
    1, D is multiplied by it in fp32 and rounded. What is trained besides adapters becomes
    ``modules_to_save``, in which PEFT keeps whole modules.

    Args:
        model: an adapted model; not changed.
        directory: made if it is missing; the two files in it are replaced.
        extra: what is written besides adapters, as in `miss.save`.

    Raises:
        StateError: the model has no adapter, something shards it, or it is itself an adapted layer;
            PEFT has no form for its adapters: a `MiSSLinear`, a layer of a registered type or with
            two names, layers of several ranks or dropouts; a Parameter that is trained besides
            adapters and whose module holds adapters.
        CheckpointError: a D is not finite, or the files cannot be written.
        ImportError: safetensors is absent; the extra ``files`` installs it.

    A `UserWarning` names running statistics that the directory cannot hold.
    """
    with at("save"):
        tree = Tree(model)
        adapted = peft_files.adapted(tree)
        found = places(adapted)
        for name, place in found.items():
            if place.config.form.peft is None:
                with at(name):
                    signs = " with alternating signs" if place.config.form.alternate else ""
                    kind = f"{type(place.layer).__name__}{signs}"
                    rule = f"is a {kind}, a form that PEFT does not have"
                    raise StateError(rule, do="miss.interop.lora.save(model, directory)")
        forms = {place.config.form.peft for place in found.values()}
        mini = forms != {MiSSe.peft}
        settings = set()
        for place in found.values():
            rows = place.config.d_shape[0] if mini else 1
            settings.add((place.config.rank, rows, place.config.dropout))
        if len(settings) > 1:
            rule = "PEFT has one rank, mini_r and dropout for all layers"
            actual = ", ".join(map(str, sorted(settings)))
            do = "miss.interop.lora.save(model, directory), which takes several ranks"
            raise StateError(rule, actual=f"(rank, mini_r, dropout): {actual}", do=do)
        ((rank, rows, dropout),) = settings
        folder = files.as_path(directory)
        others = extra_tensors(tree, extra)
        modules, besides = peft_files.saved_modules(tree, adapted, others)
    tensors = {f"{peft_files.PREFIX}{key}": tensor for key, tensor in besides.items()}
    for name, place in found.items():
        d = scaled(place.d, place.config.scale, place.d.dtype)
        tensors[f"{peft_files.PREFIX}{name}{peft_config.KEYS['MISS']}"] = rearrange(d, "o r -> r o")
    config = peft_files.base_config(tree, found) | {
        "modules_to_save": modules or None,
        "peft_type": "MISS",
        "r": rank,
        "mini_r": rows,
        "miss_dropout": dropout,
        "init_weights": MiSSeMini.peft if mini else MiSSe.peft,
    }
    with at(folder):
        peft_files.write(folder, config, tensors)


def load(model: Model, directory: str | os.PathLike[str]) -> Model:
    """Read a MiSS (or Bone) directory that PEFT wrote into a model, in place: all or nothing.

    A model without adapters is injected. A model with adapters must have the same ones. Modules
    that were trained besides the adapters (``modules_to_save``) are loaded too. No code in a file
    is run, and nothing is downloaded.

    Args:
        model: the base model that PEFT adapted, or that model adapted by `inject`.
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        ``model`` itself.

    Raises:
        CheckpointError: a file is missing or damaged, the adapter is of another type or of the form
            "bat", or it does not fit the model; the message names file, key and reason.
        StateError: the model is merged, sharded, or wrapped by DistributedDataParallel, or a tensor
            of it cannot be written.
        ImportError: safetensors is absent; the extra ``files`` installs it.
    """
    with at("load"):
        tree = Tree(model)
        tree.refuse_sharded()
        tree.refuse_wrapped()
        folder = files.as_path(directory)
    with at(folder):
        about, tensors = peft_files.read(folder)
        settings = peft_config.parse(about)
        suffix = settings.suffix
        refuse_merged(own_adapters(tree))
        blocks, others = {}, {}
        for key, tensor in tensors.items():
            if key.endswith(suffix):
                blocks[key.removesuffix(suffix)] = tensor
            else:
                others[key] = tensor
        if not blocks:
            raise CheckpointError(f"holds no adapter: no key ends in {suffix}")
        targets = peft_config.targets(tree, about)
        expected = [f"{name}{suffix}" for name in targets if name not in blocks]
        expected += peft_config.saved_keys(tree, about)
        check_keys([key for key in expected if key not in tensors], [])
        if (name := peft_files.aliased(tree, blocks)) is not None:
            rule = f"{name}{suffix}: the model holds this layer under two names; PEFT adapts one"
            raise CheckpointError(rule)
        records: dict[str, Record] = {}
        state = peft_config.others(tree, others)
        for name, block in blocks.items():
            config = _config(tree, f"{name}{suffix}", name, block, settings)
            record = Record(name, "weight", path_of(LinearHost), config)
            if record.key in state:
                raise CheckpointError(f"the key {record.key} is unexpected")
            records[record.key] = record
            state[record.key] = rearrange(block, "r o -> o r")
        extra = set(state) - set(records)
        # The base of an adapted layer is written if it is a head, or else was trained.
        untrained = {key for key in head_of(tree) if key not in others}
        write_(tree, fit(tree, records, state), extra, extra - untrained)
    return model


def _config(
    tree: Tree, key: str, name: str, block: Tensor, settings: peft_config.Settings
) -> LayerConfig:
    """The settings of one layer, after a check of its block against them and the model."""
    module = tree.modules.get(name)
    _, rank, rows, dropout = settings
    if module is None:
        error = no_module(tree, name)
        error.do = error.do or "load it into the model that PEFT adapted"
        raise error
    if not isinstance(module, nn.Linear):
        raise CheckpointError(f"{key}: the module is a {type(module).__name__}")
    out_features, in_features = shape = module.out_features, module.in_features
    expected = (rank, rows or out_features)
    if tuple(block.shape) != expected or rank > in_features or out_features % expected[1]:
        kind = f"a Linear({in_features}, {out_features})"
        rule = f"{key} does not fit r, mini_r and the module, {kind}"
        do = "load it into the model that PEFT adapted"
        raise CheckpointError(rule, expected=expected, actual=tuple(block.shape), do=do)
    if block.dtype not in ADAPTER_DTYPES:
        raise CheckpointError(f"{key} has a dtype that no adapter has", actual=block.dtype)
    if rows is None or rows == out_features:
        return LayerConfig(MiSSe, rank, shape, dropout=dropout)
    return LayerConfig(MiSSeMini, rank, shape, dropout=dropout, rows=rows)
