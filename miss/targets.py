"""Resolve ``targets`` to the modules and Parameters of a model. Nothing is changed."""

import warnings
from collections.abc import Callable, Container, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from miss import matching
from miss.errors import TargetError, at, named
from miss.layers import base_parameters, looks_linear, parameters_of, path_of
from miss.matching import ALL_LINEAR, FORMS, Hits, Target, Targets
from miss.tensors import has_two_axes
from miss.tree import Tree, joined

__all__ = ["Chosen", "Selection", "Site", "chosen", "select"]


class Site(NamedTuple):
    """A Parameter to adapt: its module's first name, the module, and the Parameter's name in it."""

    name: str
    module: nn.Module
    parameter: str


class Selection(NamedTuple):
    """What `select` found: what to adapt, and what was passed over and why."""

    adapt: list[Site]
    skipped: list[tuple[nn.Module, str]]


class Chosen(NamedTuple):
    """What `chosen` found, by full first names: modules, and Parameters without D's.

    The Parameters of the modules are among them.
    """

    modules: dict[str, nn.Module]
    parameters: dict[str, Tensor]


def select(
    tree: Tree,
    targets: Targets,
    candidates: Mapping[int, str | None],
    *,
    exclude: Targets = (),
    not_in_all_linear: Container[int],
) -> Selection:
    """Resolve ``targets``, sorted by name; `miss.inject` says what each form of target matches.

    Args:
        tree: the model.
        targets: one target or an iterable of them.
        candidates: by id, why a module that looks adaptable cannot be adapted; None if it can.
        exclude: in the forms of ``targets``; a module stands for all that it contains.
        not_in_all_linear: the ids of modules that ``"all-linear"`` leaves out.

    Raises:
        TargetError: a target is malformed or matches nothing; a plain string matches what cannot be
            adapted; nothing is left to adapt.
    """
    excluded, excluded_parameters = _excluded(tree, exclude)

    def left_out(key: int, parameter: str) -> bool:
        return key in excluded or (key, parameter) in excluded_parameters

    adapt: dict[tuple[int, str], Site] = {}
    skipped: dict[int, tuple[nn.Module, str]] = {}
    wanted = matching.listed(targets, "targets")
    if not wanted:
        with at("targets"):
            raise TargetError("must name at least one module", expected=FORMS, actual=repr(targets))
    for target in wanted:
        hits = matching.hits(tree, target, not_in_all_linear)
        refused = {key: why for key in hits.modules if (why := candidates.get(key)) is not None}
        meant = [key for key in refused if key not in excluded]
        if meant and matching.is_plain(target):
            with at(named(tree.first[meant[0]])):
                raise TargetError(f"{refused[meant[0]]} (target {target!r})")
        sites = _sites(tree, target, hits, candidates, left_out)
        if not sites:
            with at(f"target {matching.shown(target)}"):
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
    return Selection(sites, list(skipped.values()))


def chosen(tree: Tree, targets: Targets, argument: str) -> Chosen:
    """The modules that ``targets`` match, all that these contain, and the Parameters they match.

    Here a string or glob matches the name of a module or of a Parameter, whatever its axes.

    Raises:
        TargetError: a target is malformed or matches nothing; it names the ``argument``.
    """
    tops: list[nn.Module] = []
    found: dict[str, Tensor] = {}
    wanted = matching.listed(targets, argument)
    own, aliases = _parameters(tree) if wanted else ({}, {})
    for target in wanted:
        hits = matching.hits(tree, target, tree.output_head)
        matched: dict[str, Tensor] = {}
        if isinstance(target, str) and target != ALL_LINEAR:
            for name, first in aliases.items():
                if matching.fits(target, name):
                    matched[first] = own[first]
        if not hits.modules and not matched:
            names = [entry.name for entry in tree.entries if entry.name]
            with at(argument):
                shown = f"{matching.shown(target)} "
                raise matching.unknown_name(target, [*names, *own], shown)
        tops += hits.modules.values()
        found |= matched
    modules = {tree.first[key]: module for key, module in tree.inside(tops).items()}
    for name, module in modules.items():
        for key, parameter in base_parameters(module).items():
            found[joined(name, key)] = parameter
    return Chosen(modules, found)


def _parameters(tree: Tree) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every Parameter except D under its module's first name, and that name by each full name."""
    found: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, module, _ in tree.entries:
        for key, parameter in base_parameters(module).items():
            first = joined(tree.first[id(module)], key)
            found[first] = parameter
            aliases[joined(name, key)] = first
    return found, aliases


def _excluded(tree: Tree, exclude: Targets) -> tuple[set[int], set[tuple[int, str]]]:
    """The modules and the Parameters that ``exclude`` stands for."""
    tops: list[nn.Module] = []
    names = [entry.name for entry in tree.entries if entry.name]
    parameters: set[tuple[int, str]] = set()
    for target in matching.listed(exclude, "exclude"):
        hits = matching.hits(tree, target, tree.output_head)
        if not hits.modules and not hits.parameters:
            with at("exclude"):
                if hits.left:
                    raise matching.only_parameters(target, list(hits.left))
                raise matching.unknown_name(target, names, f"{matching.shown(target)} ")
        tops += hits.modules.values()
        parameters |= set(hits.parameters)
    return set(tree.inside(tops)), parameters


def _sites(
    tree: Tree,
    target: Target,
    hits: Hits,
    candidates: Mapping[int, str | None],
    left_out: Callable[[int, str], bool],
) -> list[Site]:
    """The Parameters to adapt among what a target matches, even those that are left out.

    Raises:
        TargetError: a Parameter that it matches cannot be adapted, and is not left out or is all
            that it matches.
    """
    sites: list[Site] = []
    refused: list[TargetError] = []
    refused_but_left_out: list[TargetError] = []
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
        (refused_but_left_out if left_out(key, parameter) else refused).append(error)
    if not sites:
        refused += refused_but_left_out
    if refused:
        raise refused[0]
    return sites


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
        inside = tree.inside(hits.modules.values())
        if any(candidates.get(key, "") is None for key in inside):
            return _container(target, tree, hits.modules, names)
        return _no_layer(target, tree, hits.modules, names)
    if hits.left:
        return matching.only_parameters(target, list(hits.left))
    linear = [entry.name for entry in tree.entries if looks_linear(entry.module)]
    linear = [name for name in linear if name in names]
    if target == ALL_LINEAR and linear:
        rule = "matches nothing: it leaves out heads and what trainable names"
        actual = f"linear layers: {', '.join(map(repr, linear[:5]))}"
        return TargetError(rule, actual=actual, do="name one of these in targets")
    others = [e.module for e in tree.entries if candidates.get(id(e.module)) is not None]
    if not names and others:
        first = others[0]
        actual = f"{named(tree.first[id(first)])} {candidates[id(first)]}"
        return TargetError("matches nothing; no linear layer can be adapted", actual=actual)
    if target == ALL_LINEAR:
        rule, do = "matches nothing: the model has no linear layer", "name layers of other types"
        if not names:
            do += ", which miss.register(type, host) makes adaptable"
        return TargetError(rule, expected=matching.nearest("", names) or None, do=do)
    _, aliases = _parameters(tree)
    if matching.is_plain(target) and any(matching.fits(str(target), name) for name in aliases):
        rule = "matches a Parameter that is no matrix, and only matrices are adapted"
        return TargetError(rule, do=f"trainable={target!r} trains it")
    weights: list[str] = []
    for of_one_name in tree.weights.values():
        weights += [full for full, module, _ in of_one_name if not looks_linear(module)]
    return matching.unknown_name(target, names, weights=weights)


def _no_layer(
    target: Target, tree: Tree, modules: Mapping[int, nn.Module], names: list[str]
) -> TargetError:
    """The error of a target that matches modules, in which there is nothing to adapt."""
    held: list[str] = []
    for key, module in modules.items():
        for parameter, tensor in module._parameters.items():
            if has_two_axes(tensor):
                held.append(joined(tree.first[key], parameter))
    rule, actual = "matches no layer of a type that can be adapted", _kinds(modules)
    if held:
        actual += f"; their Parameters are {', '.join(map(repr, held[:5]))}"
    do = "miss.register(type, host), for a type of your own"
    if isinstance(target, str):
        do += f"; trainable={target!r} trains it whole"
    return TargetError(rule, expected=matching.nearest(target, names), actual=actual, do=do)


def _container(
    target: Target, tree: Tree, modules: Mapping[int, nn.Module], names: list[str]
) -> TargetError:
    """The error of a target that matches modules that hold layers."""
    rule, do = "matches modules that hold layers, and no layer", ""
    if isinstance(target, str) and matching.is_plain(target):
        name = tree.first[next(iter(modules))]
        inside = f"{name}.*" if name == target else f"*.{target}.*"
        do = f"{inside if name else '*'!r} adapts those inside"
    expected = matching.nearest(target, names)
    return TargetError(rule, expected=expected, actual=_kinds(modules), do=do)


def _kinds(modules: Mapping[int, nn.Module]) -> str:
    """The types of modules, for a message."""
    return ", ".join(sorted({type(module).__name__ for module in modules.values()}))
