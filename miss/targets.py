"""From ``targets`` to modules: which layers of a model a user means. Nothing here changes a model."""

import difflib
import fnmatch
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from torch import nn

from miss.errors import TargetError, explain

__all__ = [
    "Selection",
    "Target",
    "Targets",
    "instances",
    "joined",
    "resolve",
    "select",
    "unwrapped",
    "walk",
]

Target: TypeAlias = "str | re.Pattern[str] | type[nn.Module] | Callable[[str, nn.Module], bool]"
Targets: TypeAlias = "Target | Iterable[Target]"
M = TypeVar("M", bound=nn.Module)
Matcher: TypeAlias = Callable[[str, nn.Module], bool]

ALL_LINEAR = "all-linear"
MOST_NAMES = (
    1000  # of one module; modules that refer to each other in circles have names without end
)


@dataclass(frozen=True)
class Selection:
    """What `select` found: modules to adapt, by name; layers matched but passed over, with the reason; ``trainable`` modules."""

    adapt: list[tuple[str, nn.Linear]]
    skipped: list[tuple[nn.Module, str]]
    trainable: list[nn.Module]


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every ``(name, module)`` of a model, parents first; a module with several names comes once for each, of the first 1,000.

    Names leave out the wrappers of `torch.compile`, data parallelism and activation checkpointing, recognised by type; a
    wrapper and what it wraps have the same name.
    """
    found: list[tuple[str, nn.Module]] = []
    _walk(model, "", set(), Counter(), _wrappers(), found)
    yield from found


def instances(model: nn.Module, kind: type[M]) -> dict[str, M]:
    """The modules of a type, each once, under its first name in the order of `walk`; of a wrapper and its module, the module."""
    found: dict[int, tuple[str, M]] = {}
    for name, module in walk(model):
        if isinstance(module, kind):
            found.setdefault(id(module), (name, module))
    return dict(found.values())


def joined(name: str, key: str) -> str:
    """The name of what the module ``name`` holds under ``key``; the model itself is ``""``."""
    return f"{name}.{key}" if name else key


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside the wrappers that `walk` leaves out of names."""
    wrappers = _wrappers()
    while (key := _wrapped_child(model, wrappers)) is not None:
        model = getattr(model, key)
    return model


def select(
    model: nn.Module,
    targets: Targets,
    layers: Mapping[int, str | None],
    *,
    exclude: Targets = (),
    trainable: Targets = (),
) -> Selection:
    """Resolve ``targets`` in ``model``.

    Args:
        model: the tree to search, itself included under the name ``""``.
        targets: one target or an iterable of them. A `str` without wildcards matches a whole dotted name or its last
            components; one with ``*``, ``?`` or ``[`` is a glob over the whole name; ``"all-linear"`` is every `nn.Linear`
            but the output head and ``trainable``. A compiled pattern must match the whole name. A module type matches its
            instances, and a callable decides from ``(name, module)``.
        layers: for each module that looks like a linear layer, by `id`: why it cannot be adapted, or None where it can.
        exclude, trainable: the same forms; they stand for the modules that they match and all that these contain.

    Returns:
        The selection, sorted by name, each module once under its first name.

    Raises:
        TargetError: a target, ``exclude`` or ``trainable`` is malformed or matches nothing; a plain string matches a layer
            that cannot be adapted; nothing is left to adapt.
    """
    tree = list(walk(model))
    head = _output_head(model)
    trained = _subtrees(tree, trainable, "trainable", head)
    excluded = _subtrees(tree, exclude, "exclude", head)
    first = {id(module): name for name, module in reversed(tree)}
    adapt: dict[int, nn.Linear] = {}
    skipped: dict[int, tuple[nn.Module, str]] = {}
    wanted = _listed(targets, "targets")
    if not wanted:
        raise TargetError(
            explain(
                "targets", "must name at least one module", expected=_FORMS, actual=repr(targets)
            )
        )
    for target in wanted:
        matches = _matcher(target, head | set(trained))
        hits = {id(module): module for name, module in tree if matches(name, module)}
        refused = {key: reason for key in hits if (reason := layers.get(key)) is not None}
        usable = {
            key: module
            for key, module in hits.items()
            if isinstance(module, nn.Linear) and key in layers and key not in refused
        }
        meant = [key for key in refused if key not in excluded]
        if meant and _is_plain(target):
            where = first[meant[0]] or type(hits[meant[0]]).__name__
            raise TargetError(explain(where, f"{refused[meant[0]]} (target {target!r})"))
        if not usable:
            raise TargetError(_no_match(target, tree, layers, hits, refused))
        adapt.update((key, module) for key, module in usable.items() if key not in excluded)
        skipped.update((key, (hits[key], refused[key])) for key in meant)
    if not adapt:
        rule = "nothing is left to adapt: exclude covers all that targets match"
        raise TargetError(
            explain("exclude", rule, actual=f"targets={targets!r}, exclude={exclude!r}")
        )
    return Selection(
        adapt=sorted(
            ((first[key], linear) for key, linear in adapt.items()), key=lambda pair: pair[0]
        ),
        skipped=list(skipped.values()),
        trainable=list(trained.values()),
    )


def resolve(model: nn.Module, targets: Targets, argument: str) -> list[nn.Module]:
    """The modules that ``targets`` match, in the forms of `select`, and all that these contain.

    Raises:
        TargetError: one is malformed or matches nothing; the message names the ``argument``.
    """
    return list(_subtrees(list(walk(model)), targets, argument, _output_head(model)).values())


_FORMS = "a str, compiled pattern, module type, callable(name, module), or an iterable of these"


def _walk(
    module: nn.Module,
    name: str,
    above: set[int],
    visits: Counter[int],
    wrappers: dict[type, str],
    found: list[tuple[str, nn.Module]],
) -> None:
    visits[id(module)] += 1
    if visits[id(module)] > MOST_NAMES:
        return
    found.append(
        (name, module)
    )  # a list, as nested generators would pass each module up through every level
    wrapped = _wrapped_child(module, wrappers)
    above.add(id(module))
    for key, child in module._modules.items():
        if child is not None and id(child) not in above:
            _walk(
                child, name if key == wrapped else joined(name, key), above, visits, wrappers, found
            )
    above.remove(id(module))


def _wrappers() -> dict[type, str]:
    """The transparent wrappers, and the attribute under which each keeps the module that it wraps."""
    kinds: dict[type, str] = {
        nn.DataParallel: "module",
        nn.parallel.DistributedDataParallel: "module",
    }
    # Types that are costly to import; where their module was never loaded there is no instance of them.
    for home, kind, key in (
        ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
        (
            "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
            "ActivationWrapper",
            "_checkpoint_wrapped_module",
        ),
    ):
        if home in sys.modules:
            kinds[getattr(sys.modules[home], kind)] = key
    return kinds


def _wrapped_child(module: nn.Module, wrappers: dict[type, str]) -> str | None:
    """The attribute under which a transparent wrapper keeps its module; None for any other module."""
    if not isinstance(module, tuple(wrappers)):
        return None
    return next(key for kind, key in wrappers.items() if isinstance(module, kind))


def _listed(targets: Targets, argument: str) -> list[Target]:
    """``targets`` as a list, every item of a form that we know."""
    items: list[Any] = [targets]
    if isinstance(targets, Iterable) and not isinstance(targets, str) and not callable(targets):
        items = list(targets)
    for item in items:
        known = isinstance(item, str) or (
            isinstance(item, re.Pattern) and isinstance(item.pattern, str)
        )
        if isinstance(item, type):
            known = issubclass(item, nn.Module)
        elif callable(item):
            known = not isinstance(item, nn.Module)
        if not known:
            raise TargetError(
                explain(argument, "unknown form of target", expected=_FORMS, actual=repr(item))
            )
    return items


def _is_plain(target: Target) -> bool:
    return isinstance(target, str) and target != ALL_LINEAR and not set(target) & set("*?[")


def _matcher(target: Target, not_linear: set[int]) -> Matcher:
    """``target`` as a test of (name, module). ``not_linear`` is what ``"all-linear"`` leaves out, by id."""
    if isinstance(target, type):
        return lambda name, module: isinstance(module, target)
    if isinstance(target, re.Pattern):
        return lambda name, module: target.fullmatch(name) is not None
    if not isinstance(target, str):
        return target
    if target == ALL_LINEAR:
        return lambda name, module: isinstance(module, nn.Linear) and id(module) not in not_linear
    if _is_plain(target):
        return lambda name, module: name == target or name.endswith(f".{target}")
    return lambda name, module: fnmatch.fnmatchcase(name, target)


def _output_head(model: nn.Module) -> set[int]:
    """The module that ``model.get_output_embeddings()`` names, by id; empty where the model has no such method or head."""
    ask = getattr(unwrapped(model), "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    return {id(head)} if isinstance(head, nn.Module) else set()


def _subtrees(
    tree: list[tuple[str, nn.Module]], targets: Targets, argument: str, not_linear: set[int]
) -> dict[int, nn.Module]:
    """The modules that ``exclude`` or ``trainable`` stands for, by id: what it matches and everything inside."""
    found: dict[int, nn.Module] = {}
    for target in _listed(targets, argument):
        matches = _matcher(target, not_linear)
        hits = [module for name, module in tree if matches(name, module)]
        if not hits:
            do = _nearest(target, [name for name, _ in tree if name])
            raise TargetError(explain(argument, f"{_shown(target)} matches nothing", do=do))
        found.update((id(inner), inner) for module in hits for inner in module.modules())
    return found


def _no_match(
    target: Target,
    tree: list[tuple[str, nn.Module]],
    layers: Mapping[int, str | None],
    hits: dict[int, nn.Module],
    refused: dict[int, str],
) -> str:
    """Why ``target`` gives no layer to adapt: what it did match, or the names that come nearest."""
    where, names = (
        f"target {_shown(target)}",
        [name for name, module in tree if layers.get(id(module), "") is None],
    )
    if refused:
        key, reason = next(iter(refused.items()))
        first = next(name for name, module in tree if id(module) == key)
        return explain(
            where, f"matches no layer that can be adapted; {first or 'the model'} {reason}"
        )
    if hits:
        kinds = ", ".join(sorted({type(module).__name__ for module in hits.values()}))
        return explain(
            where, "matches no torch.nn.Linear", actual=kinds, do=_nearest(target, names)
        )
    others = {type(module).__name__ for _, module in tree if layers.get(id(module)) is not None}
    actual = (
        f"linear layers that cannot be adapted: {', '.join(sorted(others))}" if others else None
    )
    return explain(where, "matches nothing", actual=actual, do=_nearest(target, names))


def _shown(target: Target) -> str:
    return target.__name__ if isinstance(target, type) else repr(target)


def _nearest(target: Target, names: list[str]) -> str:
    """A hint for a user who mistyped: the names, or endings of names, that come nearest; else the first few."""
    if not names:
        return "the model has no torch.nn.Linear"
    pattern = target.pattern if isinstance(target, re.Pattern) else target
    near: list[str] = []
    if isinstance(pattern, str):
        depth = pattern.count(".") + 1
        endings = [".".join(name.split(".")[-depth:]) for name in names]
        near = difflib.get_close_matches(pattern, dict.fromkeys(endings + names), n=3)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"names here are {', '.join(map(repr, names[:5]))}"
