"""What one target matches in a model, and the errors of a target that matches nothing."""

import difflib
import fnmatch
import re
import sys
import warnings
from collections.abc import Callable, Container, Iterable
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from miss.errors import TargetError, at, brief
from miss.layers import looks_linear
from miss.tree import Tree

__all__ = ["ALL_LINEAR", "FORMS", "Hits", "Target", "Targets", "fits", "hits", "is_plain"]
__all__ += ["listed", "nearest", "only_parameters", "shown", "unknown_name"]

Target: TypeAlias = "str | re.Pattern[str] | type[nn.Module] | Callable[[str, nn.Module], bool]"
Targets: TypeAlias = "Target | Iterable[Target]"
Matcher: TypeAlias = Callable[[str, nn.Module], bool]

ALL_LINEAR = "all-linear"
FORMS = "a str, compiled pattern, module type, callable(name, module), or an iterable of these"


class Hits(NamedTuple):
    """What one target matches: modules by id, and full names of Parameters by (module id, name)."""

    modules: dict[int, nn.Module]
    parameters: dict[tuple[int, str], str]
    left: dict[str, int]  # Parameters whose last component is the target; the ids of their modules


def hits(tree: Tree, target: Target, not_in_all_linear: Container[int]) -> Hits:
    """What a target matches, adaptable or not.

    ``"all-linear"`` leaves out the modules with an id in ``not_in_all_linear``.
    """
    matches = _matcher(target, not_in_all_linear)
    modules = {id(e.module): e.module for e in tree.entries if matches(e.name, e.module)}
    parameters: dict[tuple[int, str], str] = {}
    left: dict[str, int] = {}
    if isinstance(target, str) and is_plain(target):
        for full, module, parameter in tree.weights.get(target.rpartition(".")[2], ()):
            same = full == target and ("." in target or not modules)
            if same or ("." in target and full.endswith(f".{target}")):
                parameters.setdefault((id(module), _first_key(module, parameter)), full)
            elif "." not in target and id(module) not in modules:
                left[full] = id(module)
    return Hits(modules, parameters, left)


def _first_key(module: nn.Module, parameter: Tensor) -> str:
    """The first name of a Parameter in its module."""
    return next(key for key, p in module._parameters.items() if p is parameter)


def listed(targets: Targets, argument: str) -> list[Target]:
    """``targets`` as a list, each item checked to be of a known form."""
    items: list[Any] = [targets]
    single = isinstance(targets, (str, bytes, Tensor)) or callable(targets)
    if isinstance(targets, Iterable) and not single:
        items = list(targets)
    for item in items:
        known = isinstance(item, str)
        known |= isinstance(item, re.Pattern) and isinstance(item.pattern, str)
        if isinstance(item, type):
            known = issubclass(item, nn.Module)
        elif callable(item):
            known = not isinstance(item, nn.Module)
        if not known:
            with at(argument):
                do = _instead(item, argument)
                rule, actual = "unknown form of target", brief(item)
                raise TargetError(rule, expected=FORMS, actual=actual, do=do)
    return items


def _instead(item: object, argument: str) -> str:
    """What to write instead of a target of an unknown form."""
    if isinstance(item, nn.Module):
        return "give its name, as in model.named_modules()"
    if isinstance(item, Tensor):
        return "give its name, as in model.named_parameters()"
    if isinstance(item, getattr(sys.modules.get("peft.config"), "PeftConfigMixin", ())):
        return "give its values: miss.inject(model, config.target_modules, rank=config.r)"
    if argument == "targets":
        return "name layers, such as 'q_proj', or pass 'all-linear'"
    return "name modules, such as 'lm_head', or pass () for none"


def is_plain(target: Target) -> bool:
    """Whether a target is a name or the end of one."""
    return isinstance(target, str) and target != ALL_LINEAR and not set(target) & set("*?[")


def _matcher(target: Target, not_in_all_linear: Container[int]) -> Matcher:
    """``target`` as a test of (name, module)."""
    if isinstance(target, type):
        return lambda name, module: isinstance(module, target)
    if isinstance(target, re.Pattern):
        return lambda name, module: target.fullmatch(name) is not None
    if not isinstance(target, str):
        return target
    if target == ALL_LINEAR:
        return lambda name, module: looks_linear(module) and id(module) not in not_in_all_linear
    return lambda name, module: fits(target, name)


def fits(target: str, name: str) -> bool:
    """Whether a string matches a name: its end, from a dot on, or as a glob the whole of it."""
    if is_plain(target):
        return name == target or name.endswith(f".{target}")
    return fnmatch.fnmatchcase(name, target)


def only_parameters(target: Target, left: list[str]) -> TargetError:
    """The error of a target that only Parameters end in, and no module."""
    longer = dict.fromkeys(".".join(full.split(".")[-2:]) for full in left)
    rule = "matches no module; it is the last part of the names of Parameters"
    do = f"write {' or '.join(map(repr, list(longer)[:5]))} to mean the Parameter"
    return TargetError(rule, actual=", ".join(left[:5]), do=do)


def unknown_name(
    target: Target, names: list[str], start: str = "", weights: Iterable[str] = ()
) -> TargetError:
    """The error of a target that no name fits.

    Args:
        target: what matches nothing.
        names: those of modules that can be meant.
        start: says the target if the place does not.
        weights: the full names of Parameters that can be meant.
    """
    rule, do = f"{start}matches nothing", ""
    expected = nearest(target, names, weights)
    expected = expected or "a model with a layer that can be adapted, such as a torch.nn.Linear"
    if isinstance(target, str):
        several = re.split(r"[,\s]+", target.strip(" ,"))
        if _is_expression(target, names):
            rule, do = f"{rule}; a string is no regular expression", f"re.compile({target!r})"
        elif len(several) > 1:
            rule, do = f"{rule}; a string is one name", f"give a list: {several}"
    if not do and not _close(target, names, weights):
        do = "model.named_modules() has the names"
        if not start:  # the argument is targets, which alone takes it
            do += "; 'all-linear' is every linear layer"
    return TargetError(rule, expected=expected, do=do)


def _is_expression(target: str, names: Iterable[str]) -> bool:
    """Whether a string that matches nothing is meant as a regular expression."""
    if set(target) & set("(|\\$"):
        return True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what re says of strings that are no expression
            pattern = re.compile(target)
    except (re.error, OverflowError, RecursionError):
        return False
    return any(map(pattern.fullmatch, names))


def shown(target: Target) -> str:
    """A target, for a message."""
    return target.__name__ if isinstance(target, type) else repr(target)


def nearest(target: Target, names: list[str], weights: Iterable[str] = ()) -> str | None:
    """A hint for a mistyped target: the nearest names or endings of names; else some names.

    A Parameter is found by its last component. The hint gives its module's too, as a target does.
    """
    if near := _close(target, names, weights):
        return f"a name in the model: did you mean {' or '.join(near)}?"
    return f"a name in the model, such as {', '.join(map(repr, names[:5]))}" if names else None


def _close(target: Target, names: list[str], weights: Iterable[str]) -> list[str]:
    """Up to three names that are close to a target, whatever the case of letters."""
    pattern = target.pattern if isinstance(target, re.Pattern) else target
    if not isinstance(pattern, str):
        return []
    choices = {ALL_LINEAR: repr(ALL_LINEAR)}
    depth = pattern.count(".") + 1
    endings = [".".join(name.split(".")[-depth:]) for name in names]
    for name in [*endings, *names]:
        choices.setdefault(name.lower(), repr(name))
    for full in weights:
        own, ending = full.rpartition(".")[2], ".".join(full.split(".")[-2:])
        choices.setdefault(own.lower(), f"{ending!r} (a Parameter)")
    return [choices[near] for near in difflib.get_close_matches(pattern.lower(), choices, n=3)]
