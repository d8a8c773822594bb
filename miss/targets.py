"""Resolve ``targets`` to the modules and Parameters of a model. Nothing is changed."""

import difflib
import fnmatch
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from miss.errors import TargetError, at, named
from miss.layers import looks_linear, parameters_of, path_of
from miss.tensors import has_two_axes
from miss.tree import Tree, joined

__all__ = ["Selection", "Site", "Target", "Targets", "modules_of", "select"]

Target: TypeAlias = "str | re.Pattern[str] | type[nn.Module] | Callable[[str, nn.Module], bool]"
Targets: TypeAlias = "Target | Iterable[Target]"
Matcher: TypeAlias = Callable[[str, nn.Module], bool]

ALL_LINEAR = "all-linear"
FORMS = "a str, compiled pattern, module type, callable(name, module), or an iterable of these"


class Site(NamedTuple):
    """A Parameter to adapt: its module's first name, the module, and the Parameter's name in it."""

    name: str
    module: nn.Module
    parameter: str


class Selection(NamedTuple):
    """What `select` found: what to adapt, what was passed over and why, ``trainable`` modules."""

    adapt: list[Site]
    skipped: list[tuple[nn.Module, str]]
    trainable: list[nn.Module]


class Hits(NamedTuple):
    """What one target matches: modules by id, and full names of Parameters by (module id, name)."""

    modules: dict[int, nn.Module]
    parameters: dict[tuple[int, str], str]
    left: dict[str, int]  # Parameters whose last component is the target; the ids of their modules


def select(
    tree: Tree,
    targets: Targets,
    candidates: Mapping[int, str | None],
    *,
    exclude: Targets = (),
    trainable: Targets = (),
) -> Selection:
    """Resolve ``targets``, sorted by name; `miss.inject` says what each form of target matches.

    Args:
        tree: the model.
        targets: one target or an iterable of them.
        candidates: by id, why a module that looks adaptable cannot be adapted; None if it can.
        exclude, trainable: in the forms of ``targets``; a module stands for all that it contains.

    Raises:
        TargetError: a target is malformed or matches nothing; a plain string matches what cannot be
            adapted; nothing is left to adapt.
    """
    trained = modules_of(tree, trainable, "trainable")
    excluded, excluded_parameters = _excluded(tree, exclude)

    def left_out(key: int, parameter: str) -> bool:
        return key in excluded or (key, parameter) in excluded_parameters

    adapt: dict[tuple[int, str], Site] = {}
    skipped: dict[int, tuple[nn.Module, str]] = {}
    wanted = _listed(targets, "targets")
    if not wanted:
        with at("targets"):
            raise TargetError("must name at least one module", expected=FORMS, actual=repr(targets))
    for target in wanted:
        hits = _hits(tree, target, tree.output_head | {id(module) for module in trained})
        refused = {key: why for key in hits.modules if (why := candidates.get(key)) is not None}
        meant = [key for key in refused if key not in excluded]
        if meant and _is_plain(target):
            with at(named(tree.first[meant[0]])):
                raise TargetError(f"{refused[meant[0]]} (target {target!r})")
        sites = _sites(tree, target, hits, candidates, left_out)
        if not sites:
            with at(f"target {_shown(target)}"):
                raise _no_match(target, tree, candidates, hits, refused)
        for site in sites:
            key = id(site.module), site.parameter
            if not left_out(*key):
                adapt[key] = site
        skipped.update((key, (hits.modules[key], refused[key])) for key in meant)
        left = [full for full, key in hits.left.items() if key not in excluded]
        if hits.modules and left:
            text = f"target {target!r} means modules; Parameters of that name are not adapted: "
            warnings.warn(text + ", ".join(left), UserWarning, stacklevel=3)
    if not adapt:
        with at("exclude"):
            rule = "nothing is left to adapt: exclude covers all that targets match"
            raise TargetError(rule, actual=f"targets={targets!r}, exclude={exclude!r}")
    sites = sorted(adapt.values(), key=lambda site: (site.name, site.parameter))
    return Selection(sites, list(skipped.values()), trained)


def modules_of(tree: Tree, targets: Targets, argument: str) -> list[nn.Module]:
    """The modules that ``targets`` match, and all that these contain.

    A `TargetError` names the ``argument`` if a target is malformed or matches nothing.
    """
    tops: list[nn.Module] = []
    names = [entry.name for entry in tree.entries if entry.name]
    for target in _listed(targets, argument):
        hits = _hits(tree, target, tree.output_head)
        if not hits.modules:
            with at(argument):
                raise _unknown_name(target, names, f"{_shown(target)} ")
        tops += hits.modules.values()
    return list(tree.inside(tops).values())


def _excluded(tree: Tree, exclude: Targets) -> tuple[set[int], set[tuple[int, str]]]:
    """The modules and the Parameters that ``exclude`` stands for."""
    tops: list[nn.Module] = []
    names = [entry.name for entry in tree.entries if entry.name]
    parameters: set[tuple[int, str]] = set()
    for target in _listed(exclude, "exclude"):
        hits = _hits(tree, target, tree.output_head)
        if not hits.modules and not hits.parameters:
            with at("exclude"):
                if hits.left:
                    raise _only_parameters(target, list(hits.left))
                raise _unknown_name(target, names, f"{_shown(target)} ")
        tops += hits.modules.values()
        parameters |= set(hits.parameters)
    return set(tree.inside(tops)), parameters


def _hits(tree: Tree, target: Target, not_linear: set[int]) -> Hits:
    """What a target matches, adaptable or not; ``"all-linear"`` leaves ``not_linear`` out."""
    matches = _matcher(target, not_linear)
    modules = {id(e.module): e.module for e in tree.entries if matches(e.name, e.module)}
    parameters: dict[tuple[int, str], str] = {}
    left: dict[str, int] = {}
    if isinstance(target, str) and _is_plain(target):
        for full, module, parameter in tree.weights.get(target.rpartition(".")[2], ()):
            same = full == target and ("." in target or not modules)
            if same or ("." in target and full.endswith(f".{target}")):
                parameters.setdefault((id(module), _first_key(module, parameter)), full)
            elif "." not in target and id(module) not in modules:
                left[full] = id(module)
    return Hits(modules, parameters, left)


def _sites(
    tree: Tree,
    target: Target,
    hits: Hits,
    candidates: Mapping[int, str | None],
    left_out: Callable[[int, str], bool],
) -> list[Site]:
    """The Parameters to adapt among what a target matches; those left out may be among them."""
    sites: list[Site] = []
    refused: dict[bool, TargetError] = {}  # the first one, by whether it is left out
    for key, module in hits.modules.items():
        if candidates.get(key, "") is None:
            sites += [Site(tree.first[key], module, p) for p in parameters_of(module)]
    by_id = {id(module): module for module in tree.unique} if hits.parameters else {}
    for (key, parameter), full in hits.parameters.items():
        module, why = by_id[key], candidates.get(key, "")
        if why is None and parameter in parameters_of(module):
            sites.append(Site(tree.first[key], module, parameter))
            continue
        why = why or f"no host of a {path_of(type(module))} adapts it: see miss.register"
        error = TargetError(f"is a Parameter that cannot be adapted: {why} (target {target!r})")
        error.where = full
        refused.setdefault(left_out(key, parameter), error)
    if False in refused or (refused and not sites):
        raise refused.get(False) or refused[True]
    return sites


def _first_key(module: nn.Module, parameter: Tensor) -> str:
    """The first name of a Parameter in its module."""
    return next(key for key, p in module._parameters.items() if p is parameter)


def _listed(targets: Targets, argument: str) -> list[Target]:
    """``targets`` as a list, each item checked to be of a known form."""
    items: list[Any] = [targets]
    if isinstance(targets, Iterable) and not isinstance(targets, str) and not callable(targets):
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
                raise TargetError("unknown form of target", expected=FORMS, actual=repr(item))
    return items


def _is_plain(target: Target) -> bool:
    return isinstance(target, str) and target != ALL_LINEAR and not set(target) & set("*?[")


def _matcher(target: Target, not_linear: set[int]) -> Matcher:
    """``target`` as a test of (name, module)."""
    if isinstance(target, type):
        return lambda name, module: isinstance(module, target)
    if isinstance(target, re.Pattern):
        return lambda name, module: target.fullmatch(name) is not None
    if not isinstance(target, str):
        return target
    if target == ALL_LINEAR:
        return lambda name, module: looks_linear(module) and id(module) not in not_linear
    if _is_plain(target):
        return lambda name, module: name == target or name.endswith(f".{target}")
    return lambda name, module: fnmatch.fnmatchcase(name, target)


def _no_match(
    target: Target,
    tree: Tree,
    candidates: Mapping[int, str | None],
    hits: Hits,
    refused: Mapping[int, str],
) -> TargetError:
    """Why ``target`` gives nothing to adapt: what it matches instead, or the nearest names."""
    names = [entry.name for entry in tree.entries if candidates.get(id(entry.module), "") is None]
    if refused:
        key, why = next(iter(refused.items()))
        rule = f"matches no layer that can be adapted; {named(tree.first[key])} {why}"
        return TargetError(rule)
    if hits.modules:
        kinds = ", ".join(sorted({type(module).__name__ for module in hits.modules.values()}))
        held: list[str] = []
        for key, module in hits.modules.items():
            for parameter, tensor in module._parameters.items():
                held += [joined(tree.first[key], parameter)] if has_two_axes(tensor) else []
        own = f"; their Parameters are {', '.join(map(repr, held[:5]))}" if held else ""
        rule = "matches no torch.nn.Linear and no layer of a registered type"
        do = "miss.register(type, host), for a type of your own"
        return TargetError(rule, expected=_nearest(target, names), actual=kinds + own, do=do)
    if hits.left:
        return _only_parameters(target, list(hits.left))
    if target == ALL_LINEAR and names:
        rule = "matches nothing: it leaves out the output head and what trainable names"
        return TargetError(rule, actual=f"linear layers: {', '.join(map(repr, names[:5]))}")
    others = [e.module for e in tree.entries if candidates.get(id(e.module)) is not None]
    if not names and others:
        kinds = ", ".join(sorted({type(module).__name__ for module in others}))
        kinds = f"linear layers that cannot be adapted: {kinds}"
        return TargetError("matches nothing", actual=kinds)
    return _unknown_name(target, names)


def _only_parameters(target: Target, left: list[str]) -> TargetError:
    """The error of a target that only Parameters end in, and no module."""
    longer = dict.fromkeys(".".join(full.split(".")[-2:]) for full in left)
    rule = "matches no module; it is the last part of the names of Parameters"
    do = f"write {' or '.join(map(repr, list(longer)[:5]))} to mean the Parameter"
    return TargetError(rule, actual=", ".join(left[:5]), do=do)


def _unknown_name(target: Target, names: list[str], shown: str = "") -> TargetError:
    """The error of a target that no name fits; ``shown`` is the target if the place lacks it."""
    expected = _nearest(target, names) or "a model with a torch.nn.Linear or a registered type"
    if isinstance(target, str) and set(target) & set("(|\\$"):
        rule = f"{shown}matches nothing; a string is no regular expression"
        return TargetError(rule, expected=expected, do=f"re.compile({target!r})")
    return TargetError(f"{shown}matches nothing", expected=expected)


def _shown(target: Target) -> str:
    return target.__name__ if isinstance(target, type) else repr(target)


def _nearest(target: Target, names: list[str]) -> str | None:
    """A hint for a mistyped target: the nearest names or endings of names; else some names."""
    pattern = target.pattern if isinstance(target, re.Pattern) else target
    near: list[str] = []
    if isinstance(pattern, str):
        depth = pattern.count(".") + 1
        endings = [".".join(name.split(".")[-depth:]) for name in names]
        choices = dict.fromkeys([ALL_LINEAR, *endings, *names])
        near = difflib.get_close_matches(pattern, choices, n=3)
    if near:
        return f"a name in the model: did you mean {' or '.join(map(repr, near))}?"
    return f"a name in the model, such as {', '.join(map(repr, names[:5]))}" if names else None
