"""An adapter directory of Hugging Face PEFT (0.21).

It holds ``adapter_config.json`` and ``adapter_model.safetensors``.
"""

import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from miss import files
from miss.errors import CheckpointError, StateError, at, named, some
from miss.layers.base import AdaptedLayer
from miss.layers.linear import LinearHost
from miss.state import named_tensors, own_adapters
from miss.tensors import contiguous
from miss.tree import Tree, joined

__all__ = ["PREFIX", "adapted", "aliased", "base_config", "read", "saved_modules", "write"]

PREFIX = "base_model.model."  # of every key
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapted(tree: Tree) -> dict[str, AdaptedLayer]:
    """The adapted layers; a `StateError` if there is none, or if PEFT has no key for one."""
    tree.refuse_sharded()
    tree.require_adapted()
    layers = own_adapters(tree)
    if "" in layers:
        rule = "a lone layer has no module path, and PEFT needs one"
        raise StateError(rule, do="wrap it in a module")
    if (name := aliased(tree, layers)) is not None:
        with at(name):
            raise StateError("is held under two names, of which PEFT would adapt the first alone")
    for name, layer in layers.items():
        if layer.miss_host is not LinearHost:
            with at(name):
                kind = layer.miss_type.__name__
                rule = f"is a {kind}, of which nothing is known to PEFT; it adapts torch.nn.Linear"
                raise StateError(rule, do="miss.save(model, path)")
    return layers


def aliased(tree: Tree, names: Iterable[str]) -> str | None:
    """The first of the layers ``names`` that the model holds in more than one place; else None."""
    return next((name for name in names if tree.times_held[id(tree.modules.get(name))] > 1), None)


def base_config(tree: Tree, names: Iterable[str]) -> dict[str, Any]:
    """What every configuration says of the layers ``names``.

    It lists the layers by their last components, by their whole names, or in a regular expression.
    PEFT also matches a listed name with the end of longer names, so this takes the first of the
    three that matches only these layers.
    """
    wanted = set(names)
    targets: list[str] | str = "|".join(map(re.escape, sorted(wanted)))
    for choice in ({name.rpartition(".")[2] for name in wanted}, wanted):
        matched = set()
        for name in tree.of_type(nn.Module):
            if any(f".{name}".endswith(f".{chosen}") for chosen in choice):
                matched.add(name)
        if matched == wanted:
            targets = sorted(choice)
            break
    base = getattr(getattr(tree.root, "config", None), "_name_or_path", None)
    return {
        "base_model_name_or_path": base if isinstance(base, str) else None,
        "bias": "none",
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": targets,
        "task_type": None,
    }


def saved_modules(
    tree: Tree, adapted: Mapping[str, AdaptedLayer], others: Mapping[str, Tensor]
) -> tuple[list[str], dict[str, Tensor]]:
    """``modules_to_save``, and its tensors by key without `PREFIX`.

    PEFT saves whole modules, and takes every module whose name ends in one of the list. Parameters
    of an adapted layer have keys with ``base_layer``.

    Args:
        tree: the model.
        adapted: its adapted layers.
        others: what is to be saved besides adapters, by full name.

    Raises:
        StateError: a module to save holds adapters, or is the model itself.

    A `UserWarning` names running statistics of modules that are not saved.
    """
    holding = tree.holding([*adapted.values(), tree.root])
    tensors: dict[str, Tensor] = {}
    tops: list[str] = []
    running: list[str] = []
    for name, module in tree.of_type(nn.Module).items():
        wanted = [key for key in named_tensors(name, module) if key in others]
        parameters = [k for k in module._parameters if joined(name, k) in wanted]
        if isinstance(module, AdaptedLayer):
            for key in parameters:
                tensors[f"{name}.base_layer.{key}"] = others[joined(name, key)]
        elif parameters and id(module) in holding:
            with at(joined(name, parameters[0])):
                rule = "PEFT saves whole modules besides adapters, and this one holds adapters"
                do = "miss.save(model, path); or pass extra=() or the modules to save"
                raise StateError(rule, actual=f"a Parameter of {named(name)}", do=do)
        elif parameters and not any(name.startswith(f"{top}.") for top in tops):
            tops.append(name)
        elif not parameters:
            running += wanted
    for name, module, _ in tree.entries:
        if tops and name.endswith(tuple(tops)) and id(module) in holding:
            with at(named(name)):
                rule = "holds adapters, and PEFT would save it whole: it goes by the ends of names"
                do = "miss.save(model, path); or pass extra=() or the modules to save"
                raise StateError(rule, actual=f"modules_to_save={tops}", do=do)
        parts = name.split(".")
        ends = (".".join(parts[: n + 1]).endswith(tuple(tops)) for n in range(len(parts)))
        if tops and any(ends):
            tensors |= named_tensors(name, module)
    if lost := [key for key in running if key not in tensors]:
        text = f"running statistics are not written, since PEFT has no place for them: {some(lost)}"
        warnings.warn(text, UserWarning, stacklevel=3)
    return tops, tensors


def write(folder: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write both files, each atomically, the tensors first; the folder is made if it is missing.

    Raises:
        CheckpointError: a tensor is not finite, has no elements or is not dense, or a file cannot
            be written.
        ImportError: safetensors is absent.
    """
    files.check_tensors(tensors)
    content = files.safetensors_bytes(contiguous(tensors), {"format": "pt"})
    if os.path.isfile(folder):
        do = "give a directory; miss.save(model, path) writes one file"
        raise CheckpointError("cannot be written: it is a file", do=do)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot be written: {error}") from error
    text = json.dumps(config, indent=2, sort_keys=True).encode()
    for name, data in ((WEIGHTS, content), (CONFIG, text)):
        path = os.path.join(folder, name)
        with at(path):
            files.write_bytes(path, data)


def read(folder: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a directory, on the CPU; keys are without `PREFIX`.

    Names are also without the wrapper of `torch.compile`, which PEFT writes. No code in a file is
    run.

    Raises:
        CheckpointError: a file is missing or damaged, or a key lacks the prefix.
        ImportError: safetensors is absent and needed.
    """
    if os.path.isfile(folder):
        do = "give the directory; miss.load(model, path) loads a file that miss.save wrote"
        raise CheckpointError("is a file", expected="a directory that PEFT wrote", do=do)
    if not os.path.isdir(folder):
        do = "give a local directory; nothing is downloaded"
        raise CheckpointError("there is no such directory", do=do)
    path = os.path.join(folder, CONFIG)
    for name in (CONFIG, WEIGHTS):
        if not os.path.isfile(os.path.join(folder, name)):
            do = f"give a directory that PEFT wrote with {CONFIG} and {WEIGHTS}"
            raise CheckpointError(f"has no {name}", do=do)
    with at(path):
        try:
            with open(path, encoding="utf-8") as file:
                config = json.load(file)
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise CheckpointError("is not a JSON object", actual=type(config).__name__)
    path = os.path.join(folder, WEIGHTS)
    with at(path):
        _, tensors = files.read_tensors(path)
        foreign = [key for key in tensors if not key.startswith(PREFIX)]
        if foreign:
            expected = f"{PREFIX}<module path>..."
            raise CheckpointError(f"key {foreign[0]!r} is not of PEFT", expected=expected)
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(config.get(field), list):
            config[field] = [_uncompiled(name) for name in config[field]]
    return config, {_uncompiled(key.removeprefix(PREFIX)): t for key, t in tensors.items()}


def _uncompiled(name: Any) -> Any:
    if not isinstance(name, str):
        return name
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
