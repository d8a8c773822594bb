"""An adapter directory of Hugging Face PEFT: ``adapter_config.json`` and ``adapter_model.safetensors`` (PEFT 0.21)."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from miss import files
from miss.adapted import AdaptedLinear
from miss.adapter import adapted_modules
from miss.errors import CheckpointError, StateError, explain
from miss.targets import instances, unwrapped, walk

__all__ = ["PREFIX", "adapted", "aliased", "base_config", "read", "write"]

PREFIX = "base_model.model."  # of every key
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapted(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted layers, or a `StateError` where there is none, or where the model is itself one, which PEFT has no key for."""
    layers = adapted_modules(model)
    if not layers:
        raise StateError(explain("save", "the model has no adapter", do="inject first"))
    if "" in layers:
        raise StateError(
            explain(
                "save",
                "a lone layer has no module path, and PEFT needs one",
                do="wrap it in a module",
            )
        )
    if (name := aliased(model, layers)) is not None:
        raise StateError(
            explain(name, "is held under two names, of which PEFT would adapt the first alone")
        )
    return layers


def aliased(model: nn.Module, names: Iterable[str]) -> str | None:
    """The first of the layers ``names`` that the modules of the model hold in more than one place; None if there is none."""
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    modules = dict(walk(model))
    return next((name for name in names if places[id(modules.get(name))] > 1), None)


def base_config(model: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """What every configuration says of the layers ``names``: their last components, or whole names, or a regular expression.

    PEFT takes a name for the end of others too, so that the shortest form is chosen that matches just these layers.
    """
    wanted = set(names)
    targets: list[str] | str = "|".join(map(re.escape, sorted(wanted)))
    for choice in ({name.rpartition(".")[2] for name in wanted}, wanted):
        if {
            name
            for name in instances(model, nn.Module)
            if any(f".{name}".endswith(f".{c}") for c in choice)
        } == wanted:
            targets = sorted(choice)
            break
    base = getattr(getattr(unwrapped(model), "config", None), "_name_or_path", None)
    return {
        "base_model_name_or_path": base if isinstance(base, str) else None,
        "bias": "none",
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": targets,
        "task_type": None,
    }


def write(
    directory: str | os.PathLike[str], config: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Write both files, each of them atomically, the tensors first; the folder is made where it is missing.

    Raises:
        CheckpointError: a tensor is not finite, has no elements or is no dense tensor, or a file cannot be written.
        ImportError: safetensors is absent.
    """
    folder = os.fspath(directory)
    files.check_tensors(folder, tensors)
    content = files.safetensors_bytes(folder, files.dense(tensors), {"format": "pt"})
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise CheckpointError(explain(folder, f"cannot be written: {error}")) from error
    files.write_bytes(os.path.join(folder, WEIGHTS), content)
    files.write_bytes(
        os.path.join(folder, CONFIG), json.dumps(config, indent=2, sort_keys=True).encode()
    )


def read(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a directory, on the CPU; keys are without `PREFIX`. No code in a file is run.

    Raises:
        CheckpointError: a file is missing or damaged, or a key lacks the prefix.
        ImportError: safetensors is absent and needed.
    """
    folder = os.fspath(directory)
    path = os.path.join(folder, CONFIG)
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(explain(path, f"cannot be read: {error}")) from error
    if not isinstance(config, dict):
        raise CheckpointError(explain(path, "is not a JSON object", actual=type(config).__name__))
    path = os.path.join(folder, WEIGHTS)
    _, tensors = files.read_tensors(path)
    foreign = [key for key in tensors if not key.startswith(PREFIX)]
    if foreign:
        raise CheckpointError(
            explain(
                path, f"key {foreign[0]!r} is not of PEFT", expected=f"{PREFIX}<module path>..."
            )
        )
    return config, {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
