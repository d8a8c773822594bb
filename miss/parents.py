"""Parents that bypass or offload their children: which are refused, and hooks for the others."""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from miss.errors import named
from miss.layers.forwards import offloaded_error, offloads
from miss.tree import Tree

__all__ = ["keep_padding", "keep_slow_path", "place_hooks", "read_weights", "refuse_offloaded"]
__all__ += ["remove_hooks"]


def read_weights(tree: Tree) -> dict[int, str]:
    """By id, each module that its parent reads without a call or adapts itself, and the reason."""
    reasons = {}
    for name, module, _ in tree.entries:
        if isinstance(module, nn.MultiheadAttention):
            parent = f"its parent {named(name)!r} ({type(module).__name__})"
            reasons[id(module.out_proj)] = (
                f"is read as a weight by {parent} and never called, so that an adapter on it would "
                "do nothing: exclude it, or use an attention module that calls its projections"
            )
    tuner = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", ())
    tops = [module for module in tree.unique if isinstance(module, tuner)]
    for key in tree.inside(tops):
        do = "merge that with PEFT's merge_and_unload, or unload it, first"
        reasons[key] = f"is a part of a PEFT adapter: {do}"
    return reasons


def refuse_offloaded(
    tree: Tree, layers: Iterable[nn.Module], why: str = "D would not be trained"
) -> None:
    """Raise a `StateError` that names each of ``layers`` whose weights accelerate offloads."""
    offloaded = tree.inside(module for module in tree.unique if offloads(module, below=True))
    names = []
    for key, layer in {id(layer): layer for layer in layers}.items():
        if key in offloaded or offloads(layer):
            names.append(named(tree.first[key]))
    if names:
        error = offloaded_error(why)
        error.where, error.actual = names[0], ", ".join(names)
        raise error


def place_hooks(tree: Tree) -> None:
    """Keep torch's encoder layers that hold an adapter on the path that calls their children."""
    holding = tree.holding(tree.adapted.values())
    for module in tree.unique:
        if id(module) not in holding:
            continue
        hooks, pre_hooks = module._forward_hooks.values(), module._forward_pre_hooks.values()
        if isinstance(module, nn.TransformerEncoderLayer) and keep_slow_path not in hooks:
            module.register_forward_hook(keep_slow_path)
        if isinstance(module, nn.TransformerEncoder) and keep_padding not in pre_hooks:
            module.register_forward_pre_hook(keep_padding, with_kwargs=True)


def remove_hooks(tree: Tree) -> None:
    """Take off what `place_hooks` placed."""
    for module in tree.unique:
        for key, hook in list(module._forward_hooks.items()):
            if hook is keep_slow_path:
                del module._forward_hooks[key]
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is keep_padding:
                del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]


def keep_slow_path(module: nn.Module, args: Any, output: Any) -> None:
    """Do nothing: with any forward hook `nn.TransformerEncoderLayer` leaves its fused path.

    That path reads ``linear1.weight`` and ``linear2.weight`` and never calls these layers.
    """


def keep_padding(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward pre-hook that keeps `nn.TransformerEncoder` from nested tensors under gradients.

    In eval mode with a padding mask, that class passes on nested tensors, for which attention has
    no gradient, unless its input or a weight of its first layer requires grad. The base weights
    are frozen, so the hook makes the input require grad.
    """
    padded = (args[2] if len(args) > 2 else kwargs.get("src_key_padding_mask")) is not None
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())
    if module.training or not padded or not trained or torch.compiler.is_compiling():
        return None
    src = args[0] if args else kwargs["src"]
    src = src if src.requires_grad else src.detach().requires_grad_()
    return ((src, *args[1:]), kwargs) if args else (args, kwargs | {"src": src})
