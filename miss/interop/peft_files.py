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
from miss.extra import RUNNING
from miss.layers.base import AdaptedLayer
from miss.state import named_tensors, own_adapters
from miss.tensors import contiguous
from miss.tree import Tree, joined

__all__ = ["PREFIX", "adapted", "aliased", "base_config", "holders", "read", "saved_modules"]
__all__ += ["write"]

PREFIX = "base_model.model."  # of every key
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapted(tree: Tree, lora: bool = False) -> dict[str, AdaptedLayer]:
    """The adapted layers; a `StateError` if there is none, or if PEFT has no key for one.

    That is for PEFT's MiSS, or for its LoRA.
    """
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
        host = layer.miss_host
        if not (host.lora if lora else host.peft):
            with at(name):
                kind, what = layer.miss_type.__name__, "LoRA" if lora else "MiSS"
                rule = f"is a {kind}, and no layer of that type is known to PEFT's {what}"
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
    tensors: dict[str, Tensor] = {}
    tops: list[str] = []
    running: list[str] = []
    for name, module in tree.of_type(nn.Module).items():
        wanted = {key.rpartition(".")[2] for key in named_tensors(name, module) if key in others}
        if isinstance(module, AdaptedLayer):
            for key in wanted.intersection(module._parameters):
                tensors[f"{name}.base_layer.{key}"] = others[joined(name, key)]
        elif wanted <= set(RUNNING):
            running += [joined(name, key) for key in wanted]
        elif not name.startswith(tuple(f"{top}." for top in tops)):
            tops.append(name)
    tensors |= _inside(tree, tops, tree.holding([*adapted.values(), tree.root]))
    _refuse_half_ties(tree, tensors)
    if lost := sorted(key for key in running if key not in tensors):
        text = f"running statistics are not written, since PEFT has no place for them: {some(lost)}"
        warnings.warn(text, UserWarning, stacklevel=3)
    return tops, tensors


def _inside(tree: Tree, tops: list[str], holding: set[int]) -> dict[str, Tensor]:
    """The tensors, by each of their names, of the modules that PEFT takes for ``tops``.

    ``holding`` has the ids of the modules that hold adapters. A `StateError` names a module that
    cannot be saved whole.
    """
    found: dict[str, Tensor] = {}
    ends = tuple(tops)
    for name, module, _ in tree.entries:
        if not any(holder.endswith(ends) for holder in holders(name)):
            continue
        if name.endswith(ends) and (why := _unfit(tree, module, holding)) is not None:
            with at(named(name)):
                rule = f"PEFT cannot save it whole besides adapters: {why}"
                ends_in = "" if name in tops else ", in one of which its name ends"
                do = "miss.save(model, path); or pass extra=() or the modules to save"
                raise StateError(rule, actual=f"modules_to_save={tops}{ends_in}", do=do)
        found |= named_tensors(name, module)
    return found


def holders(name: str) -> list[str]:
    """The names of the modules that a module lies in, outermost first, and its own."""
    parts = name.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def _unfit(tree: Tree, module: nn.Module, holding: set[int]) -> str | None:
    """Why a module cannot be one of ``modules_to_save``; None if it can."""
    if id(module) in holding:
        return "it holds adapters"
    if tree.times_held[id(module)] > 1:
        return "the model holds it under two names"
    if isinstance(module, (nn.ParameterList, nn.ParameterDict)):
        return f"it is a {type(module).__name__}"
    return None


def _refuse_half_ties(tree: Tree, tensors: Mapping[str, Tensor]) -> None:
    """Raise a `StateError` if one name of a tied Parameter is written and another is not."""
    names: dict[int, list[str]] = {}
    for name, module in tree.of_type(nn.Module).items():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(joined(name, key))
    for own in names.values():
        left = [name for name in own if name not in tensors]
        if len(left) not in (0, len(own)):
            with at(next(name for name in own if name in tensors)):
                rule = "is tied to a Parameter that is not written, and PEFT would untie them"
                raise StateError(rule, actual=left[0], do=f"write both: extra={own}")


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
