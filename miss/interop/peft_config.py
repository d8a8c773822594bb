"""What the configuration of a PEFT directory says: its form, its layers, and what else it holds."""

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from miss.checks import is_real
from miss.errors import CheckpointError
from miss.forms import MiSSeMini
from miss.interop.peft_files import holders
from miss.state import named_tensors
from miss.tree import Tree

__all__ = ["KEYS", "Settings", "others", "parse", "saved_keys", "targets"]

KEYS = {"MISS": ".miss_block", "BONE": ".bone_block"}  # Bone is the older name of the same form


class Settings(NamedTuple):
    """The suffix of the adapters' keys, r, mini_r in the mini form, and dropout."""

    suffix: str
    rank: int
    rows: int | None
    dropout: float


def parse(config: dict[str, Any]) -> Settings:
    """The settings of a configuration; a `CheckpointError` for a form that is not read here."""
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in KEYS:
        do = "merge it with PEFT's merge_and_unload, where it has one; then miss.inject"
        raise CheckpointError(
            "unknown peft_type", expected="MISS or BONE", actual=repr(kind), do=do
        )
    form = config.get("init_weights", True)
    if form == "bat":
        why = "whose delta depends on the base weight and is not linear in D"
        rule = f"init_weights is 'bat', {why}"
        raise CheckpointError(rule, do="merge it with PEFT, then adapt the merged model")
    if not isinstance(form, bool) and form != MiSSeMini.peft:
        rule, expected = "init_weights names a form that is not read here", 'true, false or "mini"'
        raise CheckpointError(rule, expected=expected, actual=repr(form))
    if config.get("bias", "none") != "none":
        actual = repr(config["bias"])
        raise CheckpointError("biases were trained too", expected='bias: "none"', actual=actual)
    if not _are_names(config.get("modules_to_save") or []):
        actual = repr(config["modules_to_save"])
        raise CheckpointError("modules_to_save must be a list of names", actual=actual)
    named = config.get("target_modules")
    if not isinstance(named, str) and not _are_names(named):
        rule = "target_modules must be a string or a list of names"
        raise CheckpointError(rule, actual=repr(named))
    layers = config.get("layers_to_transform")
    listed = layers if isinstance(layers, list) else [layers]
    if layers is not None and not all(type(index) is int for index in listed):
        rule = "layers_to_transform must be an int or a list of ints"
        raise CheckpointError(rule, actual=repr(layers))
    rank, dropout = config.get("r", 64), config.get(f"{kind.lower()}_dropout", 0.0)
    rows = config.get("mini_r", 1) if form == MiSSeMini.peft else None
    for field, number in (("r", rank), ("mini_r", rows)):
        if number is not None and (type(number) is not int or number < 1):
            raise CheckpointError(f"{field} must be a positive int", actual=repr(number))
    if not is_real(dropout) or not 0 <= dropout < 1:
        raise CheckpointError("the dropout must be a probability", actual=repr(dropout))
    return Settings(KEYS[kind], rank, rows, float(dropout))


def targets(tree: Tree, config: dict[str, Any]) -> list[str]:
    """The linear layers that PEFT adapted, by the rules of its configuration."""
    try:
        return [name for name in tree.of_type(nn.Linear) if _is_target(name, config)]
    except (re.error, IndexError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"the configuration of targets is damaged: {error}") from error


def saved_keys(tree: Tree, config: dict[str, Any]) -> list[str]:
    """The keys of all tensors in the modules that ``modules_to_save`` names."""
    modules = tree.of_type(nn.Module)
    roots = {}
    for wanted in config.get("modules_to_save") or []:
        roots[wanted] = [name for name in modules if _matches(name, [wanted])]
    # For a classifier PEFT lists both names that its head may have; a model has one of them.
    classifier = config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS")
    heads = {"classifier", "score"} if classifier else set()
    for wanted, found in roots.items():
        other_is_there = wanted in heads and any(map(roots.get, heads))
        if not found and not other_is_there:
            raise CheckpointError(f"modules_to_save: the model has no module {wanted!r}")
    tops = set().union(*roots.values())
    keys: list[str] = []
    for name, module in modules.items():
        if not tops.isdisjoint(holders(name)):
            keys += named_tensors(name, module)
    return keys


def others(tree: Tree, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file that are no adapters, by their names in the model.

    PEFT adds the base weight of an adapted output head, which is left out if it equals the model's
    own. If PEFT trained one of two tied tensors, the other kept its value. A tied model cannot hold
    both values, so that is a `CheckpointError`.
    """
    slots: dict[str, Tensor] = {}
    for name, module in tree.of_type(nn.Module).items():
        slots |= named_tensors(name, module)
    found = {}
    for key, tensor in state.items():
        name = key.replace(".base_layer.", ".")
        slot = slots.get(name)
        if name != key and _equal(slot, tensor):
            continue
        found[name] = tensor
    for name in found:
        tied = [key for key, slot in slots.items() if slot is slots.get(name) and key not in found]
        if tied:
            rule = f"{name} is tied to {tied[0]} in the model, and was trained without it"
            do = f"untie them first: give {tied[0]} a Parameter of its own"
            raise CheckpointError(rule, do=do)
    return found


def _equal(own: Tensor | None, tensor: Tensor) -> bool:
    if own is None or own.is_meta:
        return False
    return torch.equal(own.detach().to("cpu", tensor.dtype), tensor)


def _is_target(name: str, config: dict[str, Any]) -> bool:
    """Whether PEFT adapts a layer.

    A regular expression must match the whole name. A listed name matches the same name and, in the
    layers to transform, the end of a name.
    """
    named, layers = config["target_modules"], config.get("layers_to_transform")
    saved = any(_matches(holder, config.get("modules_to_save")) for holder in holders(name))
    if saved or _matches(name, config.get("exclude_modules")) or not _matches(name, named):
        return False
    if isinstance(named, str) or name in named or layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern")
    patterns = [patterns] if isinstance(patterns, str) and patterns else patterns
    # Without a pattern PEFT passes over layers at the root: their list must lie in another module.
    before, patterns = (r"(?:.*?\.)??", patterns) if patterns else (r".*?\.", [r"[^.]*"])
    for pattern in patterns:  # the first number counts: that of the layer, not of an expert inside
        found = re.match(rf"{before}(?:{pattern})\.(?P<index>\d+)\.", name)
        if found is not None:
            return int(found["index"]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _matches(name: str, named: Any) -> bool:
    if isinstance(named, str):
        return re.fullmatch(named, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in named or [])
