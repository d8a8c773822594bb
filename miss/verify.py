"""`verify` runs a model once and checks that every adapter takes part."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from miss.errors import StateError, at, merged_error, named
from miss.layers import AdaptedLayer
from miss.layers.host import d_name
from miss.merging import places
from miss.tensors import is_lazy, same
from miss.tree import Tree

__all__ = ["verify"]


def verify(model: nn.Module, *args: Any, backward: bool = False, **kwargs: Any) -> None:
    """Run ``model(*args, **kwargs)`` once and check that every adapter took part.

    The run is without gradients, in the model's current mode, and eager even when the model is
    compiled. Buffers (running statistics) and torch's random generators are restored afterwards,
    even when the run fails.

    Args:
        model: an adapted model.
        args, kwargs: an example input.
        backward: also check that the sum of all floating outputs, nested ones included, gives every
            D a gradient. A D without one stops DistributedDataParallel at the second step.
            Afterwards the Parameters have the gradients that they had.

    Raises:
        StateError: the model has no adapter; no input is given and the model needs one; some
            adapters were not called, or got no gradient: the message names each; or, with
            ``backward``, the model is merged.

    >>> from miss import inject
    >>> model = inject(nn.Sequential(nn.Linear(8, 2)), "0", rank=4)
    >>> verify(model, torch.randn(1, 8), backward=True)
    """
    with at("verify"):
        _verify(Tree(model), args, kwargs, backward)


def _verify(tree: Tree, args: tuple[Any, ...], kwargs: dict[str, Any], backward: bool) -> None:
    adapted, model = tree.require_adapted(), tree.model
    if not args and not kwargs:
        try:
            inspect.signature(tree.root.forward).bind()
        except TypeError as error:
            do = "miss.verify(model, *inputs), with what model(*inputs) takes"
            raise StateError("needs an example input", actual=error, do=do) from None
    if backward and any(layer.miss_merged for layer in adapted.values()):
        raise merged_error("D gets no gradient")
    called: set[str] = set()
    without: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(backward))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_random_state_kept(model))
        stack.enter_context(_buffers_kept(model))
        for name, layer in adapted.items():
            stack.enter_context(_calls_recorded(layer, name, called))
        if backward:
            stack.enter_context(_gradients_kept(model))
        output = model(*args, **kwargs)
        if backward:
            _backward(output)
            for name, place in places(adapted).items():
                if place.layer.get_parameter(d_name(place.parameter)).grad is None:
                    without.append(named(name))
    missed = [named(name) for name in adapted if name not in called]
    if missed:
        rule = f"{len(missed)} of {len(adapted)} adapters were not called"
        do = "leave them out with exclude; call the layer where its weight is read; or give an "
        do += "input that reaches them"
        raise StateError(rule, actual=", ".join(missed), do=do)
    if without:
        rule = f"{len(without)} D got no gradient from the sum of the floating outputs"
        do = "leave them out with exclude; or look for a detach, a no_grad, a requires_grad flag, "
        do += "or hooks of accelerate that offload D"
        raise StateError(rule, actual=", ".join(without), do=do)


def _backward(output: Any) -> None:
    """The backward of the sum of all floating tensors in an output."""
    total = torch.zeros(())
    for tensor in _floating(output):
        total = total + tensor.sum().to("cpu", torch.float32)
    if total.requires_grad:
        total.backward()  # type: ignore[no-untyped-call]  # torch: untyped


def _floating(output: Any) -> Iterator[Tensor]:
    """The floating tensors in an output: itself, or in mappings, sequences and dataclasses."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _floating(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _floating(value)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from _floating(getattr(output, field.name))


@contextmanager
def _gradients_kept(model: nn.Module) -> Iterator[None]:
    """Inside, no Parameter has a gradient at first; afterwards each has the one that it had."""
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in kept:
            parameter.grad = grad


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
