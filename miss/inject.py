"""`inject` puts adapters into a model, in place, and `eject` takes them out."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from miss.checks import check_adapter_dtype
from miss.errors import ShapeError, StateError, at, named, replaced_error
from miss.forms import METHODS, variant
from miss.heads import made_anew
from miss.layers import AdaptedLayer, class_of, d_names
from miss.layers.forwards import refuse_replaced
from miss.layers.swap import Adapter, swap_, swap_back_
from miss.matching import Targets
from miss.merging import bake_, check_mergeable, check_restorable, guard, places, restore_
from miss.parents import place_hooks, refuse_offloaded, remove_hooks
from miss.plan import candidates, planned
from miss.targets import select
from miss.trained import (
    KEPT,
    keep_,
    not_in_all_linear,
    trainable_of,
    unadapted_head,
    warn_of_frozen,
    warn_of_half,
)
from miss.tree import Tree

__all__ = ["SKIPPED", "adopt_all_", "eject", "inject"]

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
    alternate: bool = False,
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
        alternate: with ``"misse"``, every other block of the input enters with a minus sign.
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
            (``BertForSequenceClassification`` and the like), which are trained if that model holds
            an adapter. A later call freezes only those of the layers that it adapts, and nothing
            that an earlier call trains. False freezes nothing.

    Returns:
        ``model`` itself.

    Raises:
        TargetError: a target matches nothing, or names what cannot be adapted.
        ShapeError: ``rank``, ``method``, ``alternate``, ``scale``, ``dropout`` or
            ``adapter_dtype`` is outside its rule.
        StateError: a match is adapted already, or accelerate offloads its weights;
            DistributedDataParallel or FSDP wraps the model; a Parameter of ``trainable`` has no
            floating dtype.

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
        form = variant(METHODS[method], alternate=alternate)
        check_adapter_dtype(adapter_dtype)
        besides = trainable_of(tree, trainable)
        spared = not_in_all_linear(tree, besides)
        found = select(tree, targets, candidates(tree), exclude=exclude, not_in_all_linear=spared)
        refuse_offloaded(tree, (site.module for site in found.adapt))
        plan = planned(found.adapt, form, rank, scale, dropout, adapter_dtype)
        layers = [*tree.adapted.values(), *(adapter.layer for adapter in plan)]
        trained = besides.parameters | (unadapted_head(tree, layers) if freeze else {})
        warn_of_half(trained)
        anew = made_anew(tree)
        warn_of_frozen(tree, anew, trained.values(), layers, freeze and _is_first(tree))
        adopt_all_(tree, plan, trained.values(), anew.values(), freeze)
        for module, reason in found.skipped:
            module.__dict__[SKIPPED] = reason
        return model


def adopt_all_(
    tree: Tree,
    plan: list[Adapter],
    trained: Iterable[Tensor],
    anew: Iterable[Tensor],
    freeze: bool,
) -> None:
    """Set flags, classes and hooks: the part of `inject` that changes the model and cannot fail.

    Args:
        tree: the model.
        plan: the adapters to put in.
        trained: what else is trained.
        anew: what `made_anew` gives.
        freeze: whether to freeze all else, or after the first call all else in the layers of
            ``plan``.
    """
    if freeze:
        _freeze(tree, [tree.model] if _is_first(tree) else [adapter.layer for adapter in plan])
    written = list(trained)
    for tensor in written:
        tensor.requires_grad = True
    initialised = set(map(id, anew))
    for adapter in plan if initialised else ():
        written += [p for p in adapter.layer.parameters(recurse=False) if id(p) in initialised]
    keep_(tree, written)
    tree.root.__dict__[INJECTED] = True
    for adapter in plan:
        swap_(adapter)
    place_hooks(tree)


def _freeze(tree: Tree, modules: Iterable[nn.Module]) -> None:
    """Freeze the Parameters of ``modules``, except each D and what an earlier call trains."""
    kept: set[int] = set()
    for layer in tree.adapted.values():
        kept |= {id(layer._parameters.get(key)) for key in d_names(layer)}
    for module in tree.unique:
        for key in module.__dict__.get(KEPT, ()):
            parameter = module._parameters.get(key)
            if parameter is not None and parameter.requires_grad:
                kept.add(id(parameter))
    for module in modules:
        for parameter in module.parameters():
            if id(parameter) not in kept:
                parameter.requires_grad = False  # a lazy parameter has no requires_grad_()


def _is_first(tree: Tree) -> bool:
    """Whether no adapter of an earlier call on this model is left."""
    return INJECTED not in tree.root.__dict__ or not tree.adapted


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
        StateError: the class, the forward or the D of an adapted layer was replaced after
            injection; accelerate offloads it; the model is sharded, or wrapped by
            DistributedDataParallel; a layer cannot be merged (with ``merge``) or unmerged (without
            it). Nothing is ejected then.

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
                refuse_replaced(layer)
        refuse_offloaded(tree, adapted.values(), "its hook keeps D, and would look for it")
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
            for note in (SKIPPED, INJECTED, KEPT):
                module.__dict__.pop(note, None)
        return model


def _check_class(layer: AdaptedLayer) -> None:
    """Raise a `StateError` unless `swap_back_` can restore what the layer was."""
    own = type(layer)
    if own is not class_of(layer.miss_type, layer.miss_host, layer.miss_form):
        expected = class_of(layer.miss_type, layer.miss_host, layer.miss_form).__name__
        rule = "its class was replaced after injection (a parametrization or fully_shard does this)"
        rule += ", so eject cannot restore it"
        raise StateError(rule, expected=expected, actual=own.__name__)
    for key in d_names(layer):
        if key not in layer._parameters:
            raise replaced_error(key)
