"""`inject` puts adapters into a model, in place, and `eject` takes them out."""

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from miss import targets as targeting
from miss.adaptable import check_settings, looks_linear, refusal
from miss.adapted import OUR_NAMES, AdaptedLinear
from miss.errors import ShapeError, StateError, TargetError, explain
from miss.linear import METHODS
from miss.merging import bake_, check_mergeable, check_restorable, guard, restore_
from miss.targets import Targets

__all__ = ["SKIPPED", "Adapter", "adopt_all_", "eject", "inject", "linear_layers"]

Model = TypeVar("Model", bound=nn.Module)

# Attribute of a layer that a target matched and `inject` passed over: the reason, for `summary`.
SKIPPED = "_miss_skipped"
# Attribute of a model that `inject` was called on: a later call freezes less.
INJECTED = "_miss_injected"


class Adapter(NamedTuple):
    """An adapter that has been checked and allocated, for `adopt_all_` to put into its layer."""

    linear: nn.Linear
    form: type[AdaptedLinear]
    d: nn.Parameter
    scale: float
    dropout: float


def inject(
    model: Model,
    targets: Targets,
    *,
    rank: int = 64,
    method: str = "misse",
    scale: float = 1.0,
    dropout: float = 0.0,
    adapter_dtype: torch.dtype | None = None,
    exclude: Targets = (),
    trainable: Targets = (),
    freeze: bool = True,
) -> Model:
    """Adapt the linear layers that ``targets`` names, in place: each becomes a `MiSSeLinear` or `MiSSLinear` with a zero D.

    The model computes what it did before until D is trained. Layers keep their identity, parameters, hooks, device, dtype
    and mode; every key of the base `state_dict` stays, and each adapted layer gains ``miss_D``. Where an error is raised the
    model is exactly as it was.

    Args:
        model: any module; a lone `nn.Linear` can be adapted too.
        targets: what to adapt. A `str` matches a whole dotted name or its last components (``"q_proj"``,
            ``"self_attn.q_proj"``); one with ``*``, ``?`` or ``[`` is a glob over the whole name; ``"all-linear"`` is every
            `nn.Linear` but the output head that ``model.get_output_embeddings()`` names and the modules in ``trainable``.
            Also a compiled pattern (it matches the whole name), a module type, a ``callable(name, module) -> bool``, or an
            iterable of these.
        rank: from 1 to ``in_features`` (``"misse"``) or ``out_features`` (``"miss"``) of each layer.
        method: ``"misse"`` (input blocks share D) or ``"miss"`` (output shards share D).
        scale: factor of the delta.
        dropout: probability, in ``[0, 1)``, of zeroing an input of the adapter in training mode.
        adapter_dtype: dtype of ``miss_D``; by default the weight's, or float32 where that is half precision.
        exclude: what not to adapt: modules in the forms of ``targets``, with all that they contain. It wins over ``targets``.
        trainable: modules, in the same forms, with all that they contain, that are not to be frozen, such as a new head.
            Their flags stay as they are.
        freeze: the first call on a model freezes every parameter outside adapters and ``trainable``; a later call only
            those of the layers that it adapts. False touches no flag.

    Returns:
        ``model`` itself.

    Raises:
        TargetError: a target matches nothing, or by its name a layer that cannot be adapted.
        ShapeError: ``rank``, ``method``, ``scale``, ``dropout`` or ``adapter_dtype`` is outside its rule.
        StateError: a matched layer is adapted already.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> inject(model, "0", rank=4)[0]
    MiSSeLinear(in_features=8, out_features=16, bias=True, rank=4, scale=1.0, dropout=0.0)
    """
    if not isinstance(model, nn.Module):
        raise TargetError(
            explain(
                "model", "must be a module", expected="torch.nn.Module", actual=type(model).__name__
            )
        )
    if not isinstance(method, str) or method not in METHODS:
        expected = " or ".join(map(repr, METHODS))
        raise ShapeError(
            explain("inject", "unknown method", expected=expected, actual=f"method={method!r}")
        )
    form = METHODS[method]
    scale, dropout = check_settings(
        "inject", scale=scale, dropout=dropout, adapter_dtype=adapter_dtype
    )
    selection = targeting.select(
        model, targets, linear_layers(model), exclude=exclude, trainable=trainable
    )
    for name, linear in selection.adapt:
        if isinstance(linear, AdaptedLinear):
            do = "eject(model), or leave it out with exclude"
            raise StateError(explain(name or type(linear).__name__, "is adapted already", do=do))
    plan: list[Adapter] = []
    for name, linear in selection.adapt:
        checked = form.check_rank(
            name or type(linear).__name__, rank, linear.in_features, linear.out_features
        )
        plan.append(
            Adapter(linear, form, form.new_adapter(linear, checked, adapter_dtype), scale, dropout)
        )
    adopt_all_(model, plan, selection.trainable, freeze)
    for module, reason in selection.skipped:
        module.__dict__[SKIPPED] = reason
    return model


def adopt_all_(
    model: nn.Module, plan: list[Adapter], trainable: Iterable[nn.Module], freeze: bool
) -> None:
    """The part of `inject` that changes the model, and does not fail: freeze, swap the classes, place the hooks."""
    root = targeting.unwrapped(model)
    if freeze:
        kept = {id(p) for module in trainable for p in module._parameters.values()}
        kept |= {id(layer.miss_D) for layer in targeting.instances(model, AdaptedLinear).values()}
        scope: list[nn.Module] = (
            [adapter.linear for adapter in plan] if INJECTED in root.__dict__ else [model]
        )
        for module in scope:
            for parameter in module.parameters():
                if id(parameter) not in kept:
                    parameter.requires_grad = (
                        False  # not requires_grad_(), which a lazy parameter does not have
                    )
    root.__dict__[INJECTED] = True
    for linear, form, d, scale, dropout in plan:
        form.swap_(linear, d, scale, dropout)
    for layer in _holders(model, nn.TransformerEncoderLayer):
        if keep_slow_path not in layer._forward_hooks.values():
            layer.register_forward_hook(keep_slow_path)
    for encoder in _holders(model, nn.TransformerEncoder):
        if keep_padding not in encoder._forward_pre_hooks.values():
            encoder.register_forward_pre_hook(keep_padding, with_kwargs=True)


def eject(model: Model, *, merge: bool = False) -> Model:
    """Take the adapters out, in place: each adapted layer is a plain `nn.Linear` again, with the parameters that it had.

    ``requires_grad`` flags stay as they are. A model without adapters is left alone.

    Args:
        model: a model, or a part of one.
        merge: leave each delta in its weight, as `merge` does, but keep no copy of the base weight, so that running out of
            memory on the way leaves some layers done. Otherwise the weights are the base's again, also where the model is merged.

    Returns:
        ``model`` itself.

    Raises:
        StateError: the class of an adapted layer has been swapped since (``fully_shard`` does), or, with ``merge``, a layer
            cannot be merged, or, without, one cannot be unmerged; nothing is ejected then.

    >>> model = nn.Sequential(nn.Linear(8, 2))
    >>> eject(inject(model, "0", rank=4))[0]
    Linear(in_features=8, out_features=2, bias=True)
    """
    adapted = targeting.instances(model, AdaptedLinear)
    for name, layer in adapted.items():
        if type(layer) not in METHODS.values():
            kinds = " or ".join(kind.__name__ for kind in METHODS.values())
            rule = "its class has been swapped since it was adapted, so that eject does not know the way back"
            raise StateError(
                explain(
                    name or type(layer).__name__, rule, expected=kinds, actual=type(layer).__name__
                )
            )
    if merge:
        check_mergeable(model, adapted)
    else:
        check_restorable(model, adapted)
    for layer in adapted.values():
        if layer.merged != merge:
            (bake_ if merge else restore_)(layer)
        layer.swap_back_()
    guard(model)
    for module in model.modules():
        module.__dict__.pop(SKIPPED, None)
        module.__dict__.pop(INJECTED, None)
        for key in [key for key, hook in module._forward_hooks.items() if hook is keep_slow_path]:
            del module._forward_hooks[key]
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is keep_padding]:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
    return model


def keep_slow_path(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook that does nothing; its presence alone keeps `nn.TransformerEncoderLayer` off its fused path.

    That path reads ``linear1.weight`` and ``linear2.weight`` and never calls the layers.
    """


def keep_padding(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward pre-hook that keeps `nn.TransformerEncoder` from nested tensors where gradients are wanted.

    In eval mode, under a padding mask, that class looks for a parameter that requires grad, sees that the base is frozen, and
    passes nested tensors on, for which attention has no gradient. An input that requires grad is the sign that it looks for.
    """
    padded = (args[2] if len(args) > 2 else kwargs.get("src_key_padding_mask")) is not None
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())
    if module.training or not padded or not trained or torch.compiler.is_compiling():
        return None
    src = args[0] if args else kwargs["src"]
    src = src if src.requires_grad else src.detach().requires_grad_()
    return ((src, *args[1:]), kwargs) if args else (args, kwargs | {"src": src})


def _holders(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    """The modules of a type that hold an adapter somewhere inside."""
    found = [module for module in model.modules() if isinstance(module, kind)]
    return [
        module
        for module in found
        if any(isinstance(inner, AdaptedLinear) for inner in module.modules())
    ]


def linear_layers(model: nn.Module) -> dict[int, str | None]:
    """For each module that looks like a linear layer, by id: why it cannot be adapted, or None."""
    reasons = {
        id(m): None if isinstance(m, AdaptedLinear) else refusal(m, OUR_NAMES)
        for m in model.modules()
        if looks_linear(m)
    }
    for name, module in targeting.walk(model):
        if isinstance(module, nn.MultiheadAttention):
            reasons[id(module.out_proj)] = (
                f"is read as a weight by its parent {name or 'model'!r} ({type(module).__name__}) and never called, so "
                "that an adapter on it would do nothing: exclude it, or use an attention module that calls its projections"
            )
    return reasons
