"""MiSS adapters in the format of Hugging Face PEFT (`peft.tuners.miss`, 0.21), both ways. PEFT itself is not needed."""

import os
import re
from typing import Any, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from miss.adaptable import ADAPTER_DTYPES, is_real
from miss.errors import CheckpointError, StateError, explain
from miss.fitting import LayerRecord, apply_, check_keys, key_of, named_tensors, unmerged
from miss.functional import scaled
from miss.interop import directory as directories
from miss.linear import MiSSeLinear
from miss.targets import instances, walk

__all__ = ["load", "save"]

Model = TypeVar("Model", bound=nn.Module)

KEYS = {"MISS": ".miss_block", "BONE": ".bone_block"}  # Bone is the older name of the same form


def save(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapters as a directory that ``peft.PeftModel.from_pretrained`` loads.

    PEFT's default form is MiSSe at scale 1 and one rank: ``miss_block`` is D transposed, ``(r, out)``, or ``(r, mini_r)`` in the
    mini form, for a D of fewer rows. There is no scale: where a layer's is not 1, D is multiplied by it in fp32 and rounded.
    What was trained beside the adapters is not written: `miss.save` has ``extra`` for that.

    Args:
        model: an adapted model; not changed.
        directory: made where it is missing; the two files in it are replaced.

    Raises:
        StateError: the model has no adapter, or one that PEFT has no form for: a `MiSSLinear`, layers of several ranks or
            dropouts, or the model is itself an adapted layer.
        CheckpointError: a ``miss_D`` is not finite, or the files cannot be written.
        ImportError: safetensors is absent; the extra ``files`` installs it.
    """
    layers = directories.adapted(model)
    for name, layer in layers.items():
        if not isinstance(layer, MiSSeLinear):
            do = "miss.interop.lora.save writes it as LoRA, exactly"
            raise StateError(
                explain(name, f"is a {type(layer).__name__}, a form that PEFT does not have", do=do)
            )
    mini = any(layer.miss_D.shape[0] != layer.out_features for layer in layers.values())
    settings = {
        (layer.rank, layer.miss_D.shape[0] if mini else 1, layer.dropout)
        for layer in layers.values()
    }
    if len(settings) > 1:
        rule, actual = (
            "PEFT has one rank, mini_r and dropout for all layers",
            ", ".join(map(str, sorted(settings))),
        )
        raise StateError(explain("save", rule, actual=f"(rank, mini_r, dropout): {actual}"))
    ((rank, rows, dropout),) = settings
    tensors = {}
    for name, layer in layers.items():
        d = scaled(layer.miss_D.detach(), layer.scale, layer.miss_D.dtype)
        tensors[f"{directories.PREFIX}{name}{KEYS['MISS']}"] = rearrange(d, "o r -> r o")
    config = directories.base_config(model, layers) | {
        "peft_type": "MISS",
        "r": rank,
        "mini_r": rows,
        "miss_dropout": dropout,
        "init_weights": "mini" if mini else True,
    }
    directories.write(directory, config, tensors)


def load(model: Model, directory: str | os.PathLike[str]) -> Model:
    """Read a MiSS (or Bone) directory that PEFT wrote into a model, in place; all of it or, on an error, nothing.

    A model without adapters is injected; one that has adapters must have the same ones. Modules that were trained beside them
    (``modules_to_save``) are loaded too. No code in a file is run, and nothing is downloaded.

    Args:
        model: the base model that PEFT adapted, or that model adapted by `inject`.
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        ``model`` itself.

    Raises:
        CheckpointError: a file is missing or damaged, the adapter is of another type or of the form "bat", or it does not fit the
            model; the message names file, key and reason.
        StateError: the model is merged, or a tensor of it cannot be written.
        ImportError: safetensors is absent; the extra ``files`` installs it.
    """
    where = os.fspath(directory)
    config, tensors = directories.read(directory)
    suffix, rank, rows, dropout = _parse(where, config)
    unmerged(model)
    modules = dict(walk(model))
    blocks = {
        key.removesuffix(suffix): block for key, block in tensors.items() if key.endswith(suffix)
    }
    if not blocks:
        raise CheckpointError(explain(where, f"holds no adapter: no key ends in {suffix}"))
    expected = [f"{name}{suffix}" for name in _targets(where, model, config) if name not in blocks]
    expected += _saved_keys(where, model, config)
    check_keys(where, [key for key in expected if key not in tensors], [])
    if (name := directories.aliased(model, blocks)) is not None:
        raise CheckpointError(
            explain(
                where,
                f"{name}{suffix}: the model holds this layer under two names; PEFT adapts one",
            )
        )
    layers: dict[str, LayerRecord] = {}
    state = _others(
        where, model, {key: tensor for key, tensor in tensors.items() if not key.endswith(suffix)}
    )
    for name, block in blocks.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            kind = (
                "the model has no such module"
                if module is None
                else f"the module is a {type(module).__name__}"
            )
            raise CheckpointError(explain(where, f"{name}{suffix}: {kind}"))
        record = LayerRecord(
            "misse", rank, 1.0, dropout, (module.out_features, module.in_features), rows
        )
        expected_shape = record.d_shape[::-1]
        if (
            tuple(block.shape) != expected_shape
            or rank > module.in_features
            or module.out_features % expected_shape[1]
        ):
            rule = f"{name}{suffix} does not fit r, mini_r and the module, a Linear{record.shape[::-1]}"
            raise CheckpointError(
                explain(where, rule, expected=expected_shape, actual=tuple(block.shape))
            )
        if block.dtype not in ADAPTER_DTYPES:
            raise CheckpointError(
                explain(
                    where, f"{name}{suffix} has a dtype that no adapter has", actual=block.dtype
                )
            )
        if key_of(name) in state:
            raise CheckpointError(explain(where, f"the key {key_of(name)} is unexpected"))
        layers[name] = record if rows != module.out_features else record._replace(rows=None)
        state[key_of(name)] = rearrange(block, "r o -> o r")
    return apply_(model, where, layers, state)


def _parse(where: str, config: dict[str, Any]) -> tuple[str, int, int | None, float]:
    """The suffix of the adapters' keys, r, mini_r in the mini form, and dropout; a `CheckpointError` for what is neither form."""
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in KEYS:
        raise CheckpointError(
            explain(where, "unknown peft_type", expected="MISS or BONE", actual=repr(kind))
        )
    form = config.get("init_weights", True)
    if form == "bat":
        rule = "init_weights is 'bat', whose delta depends on the base weight and is not linear in the adapter"
        raise CheckpointError(
            explain(where, rule, do="merge it with PEFT, then adapt the merged model")
        )
    if not isinstance(form, bool) and form != "mini":
        rule = "init_weights names a form that is not read here"
        raise CheckpointError(
            explain(where, rule, expected='true, false or "mini"', actual=repr(form))
        )
    if config.get("bias", "none") != "none":
        raise CheckpointError(
            explain(
                where,
                "biases were trained too",
                expected='bias: "none"',
                actual=repr(config["bias"]),
            )
        )
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise CheckpointError(
            explain(where, "modules_to_save must be a list of names", actual=repr(saved))
        )
    targets = config.get("target_modules")
    if not isinstance(targets, str) and not (
        isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    ):
        raise CheckpointError(
            explain(
                where, "target_modules must be a string or a list of names", actual=repr(targets)
            )
        )
    layers = config.get("layers_to_transform")
    if layers is not None and not all(
        type(index) is int for index in (layers if isinstance(layers, list) else [layers])
    ):
        raise CheckpointError(
            explain(
                where, "layers_to_transform must be an int or a list of ints", actual=repr(layers)
            )
        )
    rank, dropout = config.get("r", 64), config.get(f"{kind.lower()}_dropout", 0.0)
    rows = config.get("mini_r", 1) if form == "mini" else None
    for field, number in (("r", rank), ("mini_r", rows)):
        if number is not None and (type(number) is not int or number < 1):
            raise CheckpointError(
                explain(where, f"{field} must be a positive int", actual=repr(number))
            )
    if not is_real(dropout) or not 0 <= dropout < 1:
        raise CheckpointError(
            explain(where, "the dropout must be a probability", actual=repr(dropout))
        )
    return KEYS[kind], rank, rows, float(dropout)


def _targets(where: str, model: nn.Module, config: dict[str, Any]) -> list[str]:
    """The linear layers that PEFT adapted, by the rules of its configuration."""
    try:
        return [name for name in instances(model, nn.Linear) if _is_target(name, config)]
    except (re.error, IndexError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(
            explain(where, f"the configuration of targets is damaged: {error}")
        ) from error


def _is_target(name: str, config: dict[str, Any]) -> bool:
    """A regular expression matches the whole name; a listed name matches itself, or, in the layers to transform, the end."""
    targets, layers, patterns = (
        config["target_modules"],
        config.get("layers_to_transform"),
        config.get("layers_pattern"),
    )
    saved = any(_matches(part, config.get("modules_to_save")) for part in _parts(name))
    if saved or _matches(name, config.get("exclude_modules")) or not _matches(name, targets):
        return False
    if isinstance(targets, str) or name in targets or layers is None or layers == []:
        return True
    # The first number counts: that of the layer, not of an expert inside.
    patterns = [patterns] if isinstance(patterns, str) and patterns else patterns or [r"[^.]+"]
    found = next(
        (
            match
            for p in patterns
            if (match := re.match(rf"(?:.*?\.)??(?:{p})\.(?P<index>\d+)\.", name))
        ),
        None,
    )
    return found is not None and int(found["index"]) in (
        [layers] if isinstance(layers, int) else layers
    )


def _saved_keys(where: str, model: nn.Module, config: dict[str, Any]) -> list[str]:
    """The keys of all tensors in the modules that ``modules_to_save`` names."""
    modules = instances(model, nn.Module)
    roots = {
        wanted: [name for name in modules if _matches(name, [wanted])]
        for wanted in config.get("modules_to_save") or []
    }
    # For a classifier PEFT lists both names that its head may have, of which a model has one.
    heads = (
        {"classifier", "score"} if config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") else set()
    )
    for wanted, found in roots.items():
        if not found and not (wanted in heads and any(roots.get(head) for head in heads)):
            raise CheckpointError(
                explain(where, f"modules_to_save: the model has no module {wanted!r}")
            )
    tops = [root for found in roots.values() for root in found]
    inside = [
        name for name in modules if any(name == top or name.startswith(f"{top}.") for top in tops)
    ]
    return [key for name in inside for key in named_tensors(name, modules[name])]


def _others(where: str, model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file that are no adapters, by their names in the model.

    PEFT adds the base weight of an adapted output head; it is left out where it is the model's own. Where PEFT trained one of
    two tied tensors, the other kept its value, which a tied model cannot show.
    """
    slots = {
        key: tensor
        for name, module in instances(model, nn.Module).items()
        for key, tensor in named_tensors(name, module).items()
    }
    others = {}
    for key, tensor in state.items():
        name = key.replace(".base_layer.", ".")
        slot = slots.get(name)
        if (
            name != key
            and slot is not None
            and not slot.is_meta
            and torch.equal(slot.detach().to("cpu", tensor.dtype), tensor)
        ):
            continue
        others[name] = tensor
    for name in others:
        tied = [key for key, slot in slots.items() if slot is slots.get(name) and key not in others]
        if tied:
            rule = f"{name} is tied to {tied[0]} in the model, and was trained without it"
            raise CheckpointError(
                explain(where, rule, do=f"untie them first: give {tied[0]} a Parameter of its own")
            )
    return others


def _matches(name: str, targets: Any) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets or [])


def _parts(name: str) -> list[str]:
    """``name`` and the modules that it lies in."""
    components = name.split(".")
    return [".".join(components[: n + 1]) for n in range(len(components))]
