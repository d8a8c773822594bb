"""`verify` runs a model once and checks that every adapter takes part."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from miss.errors import StateError, at, named
from miss.layers import AdaptedLayer
from miss.tensors import is_lazy, same
from miss.tree import Tree

__all__ = ["verify"]


def verify(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Run ``model(*args, **kwargs)`` once and check that every adapter took part.

    The run is without gradients, in the model's current mode, and eager even when the model is
    compiled. Buffers (running statistics) and torch's random generators are restored afterwards,
    even when the run fails.

    Args:
        model: an adapted model.
        args, kwargs: an example input.

    Raises:
        StateError: the model has no adapter, or some were not called; the message names each.

    >>> from miss import inject
    >>> model = inject(nn.Sequential(nn.Linear(8, 2)), "0", rank=4)
    >>> verify(model, torch.randn(1, 8))
    """
    with at("verify"):
        _verify(Tree(model), args, kwargs)


def _verify(tree: Tree, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    adapted, model = tree.require_adapted(), tree.model
    called: set[str] = set()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_random_state_kept(model))
        stack.enter_context(_buffers_kept(model))
        for name, layer in adapted.items():
            stack.enter_context(_calls_recorded(layer, name, called))
        model(*args, **kwargs)
    missed = [named(name) for name in adapted if name not in called]
    if missed:
        rule = f"{len(missed)} of {len(adapted)} adapters were not called"
        do = "leave them out with exclude; call the layer where its weight is read; or give an "
        do += "input that reaches them"
        raise StateError(rule, actual=", ".join(missed), do=do)


@contextmanager
def _calls_recorded(layer: AdaptedLayer, name: str, called: set[str]) -> Iterator[None]:
    """Put ``name`` into ``called`` when the layer's forward runs, even when its hooks do not."""
    before = layer.__dict__.get("forward")
    forward: Callable[..., Any] = layer.forward

    def recorded(*args: Any, **kwargs: Any) -> Any:
        called.add(name)
        return forward(*args, **kwargs)

    layer.__dict__["forward"] = recorded
    try:
        yield
    finally:
        del layer.__dict__["forward"]
        if before is not None:
            layer.__dict__["forward"] = before


@contextmanager
def _random_state_kept(model: nn.Module) -> Iterator[None]:
    """Restore the generators of the CPU and of each accelerator that the model is on."""
    devices: dict[str, set[int]] = {}
    for parameter in model.parameters():
        if parameter.device.type not in ("cpu", "meta"):
            devices.setdefault(parameter.device.type, set()).add(parameter.device.index or 0)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))  # the CPU's
        for kind, indices in devices.items():
            stack.enter_context(torch.random.fork_rng(devices=sorted(indices), device_type=kind))
        yield


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore each module's buffers: the same tensors, with the contents that they had."""
    kept, contents = [], []
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            kept.append((module, dict(module._buffers)))
    for buffer in model.buffers():
        if buffer.layout == torch.strided and not buffer.is_meta and not is_lazy(buffer):
            contents.append((buffer, buffer.clone()))
    try:
        yield
    finally:
        for module, buffers in kept:
            now = {name: id(buffer) for name, buffer in module._buffers.items()}
            if now != {name: id(buffer) for name, buffer in buffers.items()}:
                module._buffers.clear()
                module._buffers.update(buffers)
        for buffer, content in contents:
            if not same(buffer, content):
                with torch.inference_mode(buffer.is_inference()):
                    buffer.copy_(content)
