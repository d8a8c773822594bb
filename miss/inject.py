"""`inject` puts adapters into a model, in place, and `eject` takes them out."""

from collections.abc import Callable, Iterable
from numbers import Integral
from typing import TypeVar

import torch
from torch import Tensor, nn

from miss.errors import ShapeError, StateError, TargetError, at, merged_error, named
from miss.forms import METHODS, check_adapter_dtype
from miss.layers import (
    AdaptedLayer,
    class_of,
    host_of,
    looks_linear,
    path_of,
    refusal,
)
from miss.layers.host import d_name
from miss.layers.swap import Adapter, largest_rank, new_adapter, swap_, swap_back_
from miss.matching import Targets
from miss.merging import bake_, check_mergeable, check_restorable, guard, places, restore_
from miss.parents import place_hooks, read_weights, remove_hooks
from miss.targets import Site, select
from miss.trained import besides, not_linear, unadapted_head, warn_of_frozen, warn_of_half
from miss.tree import Tree, joined

__all__ = ["SKIPPED", "adopt_all_", "candidates", "eject", "inject"]

Model = TypeVar("Model", bound=nn.Module)

# Attribute of a module that a target matched and `inject` passed over: the reason, for `summary`.
SKIPPED = "_miss_skipped"
# Attribute of a model that `inject` was called on: a later call freezes less.
INJECTED = "_miss_injected"


def inject(
    model: Model,
    targets: Targets,
    *,
    rank: int | Callable[[str, nn.Module], int] = 64,
    method: str = "misse",
    scale: float | Callable[[str, nn.Module], float] = 1.0,
    dropout: float = 0.0,
    adapter_dtype: torch.dtype | None = None,
    exclude: Targets = (),
    trainable: Targets = (),
    freeze: bool = True,
) -> Model:
    """Adapt the layers that ``targets`` names, in place: each gets another class and a zero D.

    An `nn.Linear` becomes a `MiSSeLinear` or a `MiSSLinear`; `register` adds layer types of your
    own. Until D is trained, the model computes what it did before. Layers keep their identity,
    parameters, hooks, attributes, device, dtype and mode. Every key of the base `state_dict` stays,
    and each adapted layer gains ``miss_D``. On an error the model is unchanged.

    Args:
        model: any module; a lone layer can be adapted too.
        targets: what to adapt. A `str` matches a whole dotted name or its last components
            (``"q_proj"``, ``"self_attn.q_proj"``). A `str` with ``*``, ``?`` or ``[`` is a glob
            over the whole name. ``"all-linear"`` is every linear layer, except the output head that
            ``model.get_output_embeddings()`` returns, task heads, and ``trainable``. A target can
            also be a compiled pattern, which must match the whole name, a module type, a
            ``callable(name, module) -> bool``, or an iterable of these. A `str` may also name a
            Parameter of two or more axes, by its whole name or at least by its module's name and
            its own (``"fc.weight"``). The only weight of a layer stands for the layer; one of
            several weights is adapted alone.
        rank: from 1 to each layer's ``in_features`` (``"misse"``) or ``out_features`` (``"miss"``):
            a number, or a ``callable(name, module) -> int``. For one Parameter of a layer that has
            several, the name is the Parameter's.
        method: ``"misse"`` (input blocks share D) or ``"miss"`` (output shards share D).
        scale: factor of the delta: a number, or a ``callable(name, module) -> float``.
        dropout: probability, in ``[0, 1)``, of zeroing an input of the adapter in training mode.
        adapter_dtype: dtype of D; by default the weight's, or float32 if that is half precision.
        exclude: what not to adapt, in the forms of ``targets``. A module stands for all that it
            contains. ``exclude`` wins over ``targets``.
        trainable: what else is trained, such as a new head: modules and Parameters, in the forms of
            ``targets``; a `str` matches the names of both (``"*.bias"``). A module stands for all
            that it contains. Their ``requires_grad`` flags go on, in a later call too.
        freeze: the first call on a model freezes every Parameter outside adapters and
            ``trainable``, except the heads that transformers' task classes add to a base model
            (``BertForSequenceClassification`` and the like), which are trained. A later call
            freezes only those of the layers that it adapts. False freezes nothing.

    Returns:
        ``model`` itself.

    Raises:
        TargetError: a target matches nothing, or names what cannot be adapted.
        ShapeError: ``rank``, ``method``, ``scale``, ``dropout`` or ``adapter_dtype`` is outside its
            rule.
        StateError: a match is adapted already; DistributedDataParallel or FSDP wraps the model; a
            Parameter of ``trainable`` has no floating dtype.

    A `UserWarning` names Parameters that are trained in half precision, and those that
    ``from_pretrained`` made anew and that stay frozen.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> inject(model, "0", rank=4)[0]
    MiSSeLinear(in_features=8, out_features=16, bias=True, rank=4, scale=1.0, dropout=0.0)
    """
    with at("inject"):
        tree = Tree(model)
        tree.refuse_wrapped()
        if not isinstance(method, str) or method not in METHODS:
            expected, actual = " or ".join(map(repr, METHODS)), f"method={method!r}"
            do = "leave it out: 'misse' is the default, which PEFT calls MiSS (once Bone)"
            raise ShapeError("unknown method", expected=expected, actual=actual, do=do)
        check_adapter_dtype(adapter_dtype)
        beside = besides(tree, trainable)
        left_out = not_linear(tree, beside)
        found = select(tree, targets, candidates(tree), exclude=exclude, not_linear=left_out)
        plan = _planned(found.adapt, method, rank, scale, dropout, adapter_dtype)
        layers = [*tree.adapted.values(), *(adapter.layer for adapter in plan)]
        trained = beside.parameters | (unadapted_head(tree, layers) if freeze else {})
        warn_of_half(trained)
        first = INJECTED not in tree.root.__dict__
        warn_of_frozen(tree, trained.values(), layers, freeze and first)
        adopt_all_(tree, plan, trained.values(), freeze)
        for module, reason in found.skipped:
            module.__dict__[SKIPPED] = reason
        return model


def _planned(
    sites: list[Site],
    method: str,
    rank: int | Callable[[str, nn.Module], int],
    scale: float | Callable[[str, nn.Module], float],
    dropout: float,
    adapter_dtype: torch.dtype | None,
) -> list[Adapter]:
    """The adapters of the sites, allocated; layers too small for their rank are named at once."""
    plan: list[Adapter] = []
    small: list[tuple[str, int, ShapeError]] = []
    for site in sites:
        with at(named(site.name)):
            _check_unadapted(site, method)
            cls = _class_for(site.module, method)
            alone = len(cls.miss_host.axes) == 1
            name = site.name if alone else joined(site.name, site.parameter)
            own_rank = rank(name, site.module) if callable(rank) else rank
            own_scale = scale(name, site.module) if callable(scale) else scale
            try:
                adapter = new_adapter(
                    site.module,
                    site.parameter,
                    cls,
                    own_rank,
                    scale=own_scale,
                    dropout=dropout,
                    adapter_dtype=adapter_dtype,
                )
            except ShapeError as error:
                limit = largest_rank(site.module, site.parameter, cls)
                if not isinstance(own_rank, Integral):
                    error.do = "give an int, or rank=lambda name, module: an int"
                    raise
                if own_rank <= limit:
                    raise
                small.append((named(name), limit, error))
                continue
        plan.append(adapter)
    if small:
        raise _too_small(small)
    return plan


def _too_small(small: list[tuple[str, int, ShapeError]]) -> ShapeError:
    """The error of the first layer that is too small for its rank; it names the others too."""
    name, _, error = small[0]
    others = [f"{other} (at most {limit})" for other, limit, _ in small[1:]]
    if others:
        error.actual = f"{error.actual}; too small as well: {', '.join(others)}"
    error.do = "give a smaller rank, exclude these layers, or pass rank=lambda name, module: ..."
    error.where = name
    return error


def candidates(tree: Tree) -> dict[int, str | None]:
    """By id, why each module that looks linear or has a host cannot be adapted; None if it can."""
    read = read_weights(tree)
    reasons = {}
    for module in tree.unique:
        if host_of(module) is not None or looks_linear(module) or id(module) in read:
            reasons[id(module)] = read.get(id(module)) or refusal(module)
    return reasons


def adopt_all_(tree: Tree, plan: list[Adapter], trained: Iterable[Tensor], freeze: bool) -> None:
    """Set flags, classes and hooks: the part of `inject` that changes the model and cannot fail."""
    if freeze:
        kept: set[int] = set()
        for layer in tree.adapted.values():
            kept |= {id(layer._parameters.get(d_name(p))) for p in layer.miss_configs}
        later = INJECTED in tree.root.__dict__
        for module in [adapter.layer for adapter in plan] if later else [tree.model]:
            for parameter in module.parameters():
                if id(parameter) not in kept:
                    parameter.requires_grad = False  # a lazy parameter has no requires_grad_()
    for tensor in trained:
        tensor.requires_grad = True
    tree.root.__dict__[INJECTED] = True
    for adapter in plan:
        swap_(adapter)
    place_hooks(tree)


def eject(model: Model, *, merge: bool = False) -> Model:
    """Take the adapters out, in place: each adapted layer is of its own type again.

    Each layer keeps the parameters that it had before injection. ``requires_grad`` flags stay as
    they are. A model without adapters is left alone.

    Args:
        model: a model, or a part of one.
        merge: leave each delta in its weight, as `merge` does, except that no copy of the base
            weight is kept. So if memory runs out on the way, some deltas stay in their weights. If
            False, the weights are the base's again, even when the model is merged.

    Returns:
        ``model`` itself.

    Raises:
        StateError: the class or the D of an adapted layer was replaced after injection; the model
            is sharded, or wrapped by DistributedDataParallel; a layer cannot be merged (with
            ``merge``) or unmerged (without it). Nothing is ejected then.

    >>> model = nn.Sequential(nn.Linear(8, 2))
    >>> eject(inject(model, "0", rank=4))[0]
    Linear(in_features=8, out_features=2, bias=True)
    """
    with at("eject"):
        tree = Tree(model)
        tree.refuse_sharded()
        tree.refuse_wrapped()
        adapted = tree.adapted
        for name, layer in adapted.items():
            with at(named(name)):
                _check_class(layer)
        found = places(adapted)
        (check_mergeable if merge else check_restorable)(tree, found)
        for place in found.values():
            if (place.base is not None) != merge:
                (bake_ if merge else restore_)(place)
        for layer in adapted.values():
            swap_back_(layer)
        guard(tree)
        remove_hooks(tree)
        for module in tree.unique:
            module.__dict__.pop(SKIPPED, None)
            module.__dict__.pop(INJECTED, None)
        return model


def _check_unadapted(site: Site, method: str) -> None:
    """Raise a `StateError` if a Parameter, or its layer in another form, is adapted already."""
    layer = site.module
    if not isinstance(layer, AdaptedLayer):
        return
    if site.parameter in layer.miss_configs:
        do = "miss.eject(model), or leave it out with exclude"
        raise StateError("is adapted already", do=do)
    if layer.miss_form.name != method:
        rule, actual = "is adapted in another form; a layer has one", f"method={method!r}"
        raise StateError(rule, expected=f"method={layer.miss_form.name!r}", actual=actual)
    if layer.miss_merged:
        raise merged_error("another of its Parameters cannot be adapted")


def _class_for(module: nn.Module, method: str) -> type[AdaptedLayer]:
    """The class that adapts a module, or the one that it has already."""
    if isinstance(module, AdaptedLayer):
        return type(module)
    host = host_of(module)
    if host is None:
        rule = f"no host adapts a {path_of(type(module))}"
        raise TargetError(rule, do="miss.register(type, host)")
    return class_of(type(module), host, METHODS[method])


def _check_class(layer: AdaptedLayer) -> None:
    """Raise a `StateError` unless `swap_back_` can restore what the layer was."""
    own = type(layer)
    if own is not class_of(layer.miss_type, layer.miss_host, layer.miss_form):
        expected = class_of(layer.miss_type, layer.miss_host, layer.miss_form).__name__
        rule = "its class was replaced after injection (a parametrization or fully_shard does this)"
        rule += ", so eject cannot restore it"
        raise StateError(rule, expected=expected, actual=own.__name__)
    for key in map(d_name, layer.miss_configs):
        if key not in layer._parameters:
            rule = f"its {key} is no parameter of its own any more (pruned, parametrized?)"
            raise StateError(rule, do="remove what replaced it")
