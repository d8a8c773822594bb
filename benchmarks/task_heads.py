"""How often `miss.heads.head_of` finds the head of transformers' models.

Every model class that transformers exports is built on the meta device from its default config,
with the weighted sum of layers where the config offers one. What `head_of` says is compared with a
truth that does not use its rule.

- Which classes have a head: those in transformers' auto mappings for classification, question
  answering, multiple choice and x-vectors, unless a mapping for another task has them too. A class
  in no mapping has one if its name has one of these tasks after the word For.
- What the head is: the Parameters that plain models of the same config lack, and those whose shape
  depends on the number of labels. Plain models are what `AutoModel` builds, and every model of
  transformers inside the class, built anew from its own config. A Parameter of the former is
  recognised by name and shape, where all names may stand under one prefix more or less.

A class that cannot be built, or in which no plain model is found, is left out and listed.
"""

import argparse
import contextlib
import functools
import inspect
import json
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from measure import environment, require_extras, table
from miss.heads import head_of
from miss.tree import Tree

EXTRAS = {'pip install "miss-torch[benchmark]"': ("transformers",)}
TASKS = ("CLASSIFICATION", "QUESTION_ANSWERING", "MULTIPLE_CHOICE", "XVECTOR")
NAMED = re.compile("For.*(Classification|QuestionAnswering|MultipleChoice|XVector)")
QUICK = ("BertForSequenceClassification", "WhisperForAudioClassification", "BertForMaskedLM")
SETTINGS: dict[str, dict[str, Any]] = {  # by config: where the defaults cannot be built
    "EsmConfig": {"vocab_size": 33},
    "HunYuanDenseV1Config": {"head_dim": 128},
    "HunYuanMoEV1Config": {"head_dim": 128},
    "MinistralConfig": {"head_dim": 128},
    "NemotronConfig": {"head_dim": 128, "num_key_value_heads": 8},
    "PerceiverConfig": {"num_cross_attention_heads": 1},
    "ViltConfig": {"num_images": 2, "modality_type_vocab_size": 3},
}
WEIGHTED = "use_weighted_layer_sum"  # its weights are part of the head

Shapes = dict[str, torch.Size]


class UnbuiltError(Exception):
    """A class that has no truth, and why."""


class Found(NamedTuple):
    """A class: whether it has a head, and where `head_of` and the truth differ."""

    task: bool
    missed: list[str]
    false: list[str]


def exported() -> dict[str, type]:
    """Every model class of transformers that has a config, by name."""
    import transformers

    found = {}
    for name in dir(transformers):
        with contextlib.suppress(ImportError, AttributeError):  # of what it cannot import
            kind = getattr(transformers, name)
            model = inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedModel)
            if model and kind.config_class is not None and kind.__name__ == name:
                found[name] = kind
    return found


@functools.cache
def mapped() -> tuple[set[str], set[str]]:
    """The names of the classes in auto mappings of tasks with a head, and in the others."""
    from transformers.models.auto import modeling_auto

    tasks: set[str] = set()
    others: set[str] = set()
    for name, mapping in vars(modeling_auto).items():
        if name.endswith("_MAPPING_NAMES") and name.startswith("MODEL_FOR"):
            mine = name.removesuffix("_MAPPING_NAMES").endswith(TASKS) and "ZERO_SHOT" not in name
            for kinds in mapping.values():
                (tasks if mine else others).update([kinds] if isinstance(kinds, str) else kinds)
    return tasks, others


def has_head(name: str) -> bool:
    """Whether a class has a head, by the mappings; see above."""
    tasks, others = mapped()
    if name in tasks or name in others:
        return name in tasks - others
    return NAMED.search(name) is not None


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Models built here have no values and take no time to initialise."""
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def build(kind: type, config: Any = None, **settings: Any) -> nn.Module:
    """A model of a class, from its default config or the given one."""
    try:
        if config is None:
            settings |= SETTINGS.get(kind.config_class.__name__, {})
            config = kind.config_class(**settings)
            if hasattr(config, WEIGHTED):
                setattr(config, WEIGHTED, True)
        with on_meta():
            return kind(config)
    except Exception as error:  # whatever a config leads to
        lines = str(error).strip().splitlines() or [""]
        raise UnbuiltError(f"{type(error).__name__}: {lines[0]}") from error


def shapes(model: nn.Module) -> Shapes:
    """The shapes of the Parameters by name, each once."""
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def true_head(model: nn.Module) -> set[str]:
    """The names of the Parameters of the head of a task's model."""
    import transformers

    own = shapes(model)
    plain: set[str] = set()
    inner: dict[str, nn.Module] = {}  # the outermost models inside
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in inner)
        if name and not inside and isinstance(module, transformers.PreTrainedModel):
            inner[name] = module
            plain |= anew(module, f"{name}.", own)
    kinds: Any = transformers.MODEL_MAPPING.get(type(model.config), None)
    kind = kinds[0] if isinstance(kinds, tuple) else kinds
    if kind not in (None, type(model), *map(type, inner.values())):
        with contextlib.suppress(UnbuiltError):
            plain |= counterparts(own, shapes(build(kind)))
    if not plain:
        raise UnbuiltError("no plain model of its config is found in it")
    return (own.keys() - plain) | by_labels(model, own)


def anew(module: nn.Module, prefix: str, own: Shapes) -> set[str]:
    """Which of the Parameters under ``prefix`` the class has by itself; all if it is not built."""
    try:
        names = {prefix + name for name in shapes(build(type(module), module.config))}
    except UnbuiltError:
        names = own.keys()
    return {name for name in names & own.keys() if name.startswith(prefix)}


def by_labels(model: nn.Module, own: Shapes) -> set[str]:
    """The Parameters whose shape depends on the number of labels."""
    try:
        other = shapes(build(type(model), num_labels=model.config.num_labels + 5))
    except UnbuiltError:
        return set()
    return {name for name, shape in own.items() if other.get(name, shape) != shape}


def counterparts(names: Shapes, base: Shapes) -> set[str]:
    """The most of ``names`` that ``base`` has, in the same shape, with one prefix more or less."""
    best: set[str] = set()
    for prefix in prefixes(names):
        best = max(best, {prefix + n for n in base if names.get(prefix + n) == base[n]}, key=len)
    for prefix in prefixes(base):
        best = max(best, {n for n in names if base.get(prefix + n) == names[n]}, key=len)
    return best


def prefixes(names: Iterable[str]) -> list[str]:
    """What the names may begin with, up to two components."""
    found = {""}
    for name in names:
        first, *rest = name.split(".")
        found |= {f"{first}.", f"{first}.{rest[0]}."} if rest else set()
    return sorted(found)


def examine(kind: type) -> Found:
    """Build a class, and compare `head_of` with the truth."""
    model = build(kind)
    task = has_head(kind.__name__)
    truth = true_head(model) if task else set()
    found = set(head_of(Tree(model)))
    return Found(task, sorted(truth - found), sorted(found - truth))


def sweep(kinds: Mapping[str, type]) -> dict[str, Any]:
    """Examine classes; by what the truth says of them, how many there are and what is wrong."""
    result: dict[str, Any] = {"task": _empty(), "other": _empty(), "left out": {}}
    for name, kind in kinds.items():
        try:
            found = examine(kind)
        except UnbuiltError as reason:
            result["left out"][name] = {"task": has_head(name), "reason": str(reason)}
            continue
        group = result["task" if found.task else "other"]
        group["tried"] += 1
        group["right"] += not found.missed and not found.false
        for wrong in ("missed", "false"):
            if names := getattr(found, wrong):
                group[wrong][name] = names
    return result


def _empty() -> dict[str, Any]:
    return {"tried": 0, "right": 0, "missed": {}, "false": {}}


def report(result: Mapping[str, Any]) -> str:
    """The tables."""
    groups = {"with a head": result["task"], "without": result["other"]}
    head = ["classes", "tried", "right", "missed", "false"]
    lines = []
    for name, group in groups.items():
        counts = [group["tried"], group["right"], len(group["missed"]), len(group["false"])]
        lines.append([name, *counts])
    parts = [table(head, lines)]
    lines = []
    for group in groups.values():
        for wrong in ("missed", "false"):
            lines += [[name, wrong, _short(names)] for name, names in group[wrong].items()]
    if lines:
        parts.append(table(["class", "is", "Parameters"], lines))
    left = {name: own["reason"] for name, own in result["left out"].items() if own["task"]}
    if left:
        lines = [[name, reason[:80]] for name, reason in left.items()]
        parts.append(f"Left out, with a head:\n\n{table(['class', 'reason'], lines)}")
    others = len(result["left out"]) - len(left)
    parts.append(f"Left out, without: {others}")
    return "\n\n".join(parts)


def _short(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more


def main() -> None:
    """Examine the classes, print tables, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few classes: seconds")
    parser.add_argument("--json", type=Path, help="where to write what was found")
    args = parser.parse_args()
    require_extras("task_heads", EXTRAS)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    logging.disable()  # notes on configs that are left at their defaults
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    kinds = {name: getattr(transformers, name) for name in QUICK} if args.quick else exported()
    result = {"environment": environment(), **sweep(kinds)}
    print(report(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
