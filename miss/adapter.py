"""What one does with an adapted model: list its adapters, sum it up, check that they take part, switch them off for a while."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from miss.adapted import AdaptedLinear
from miss.errors import StateError, explain
from miss.inject import SKIPPED
from miss.linear import method_of
from miss.targets import instances, walk

__all__ = [
    "LayerSummary",
    "Summary",
    "adapted_modules",
    "adapter_parameters",
    "disabled",
    "summary",
    "verify",
]

_COUNT = threading.Lock()  # guards the depth counters of `disabled`


def adapted_modules(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted layers of a model, each once, under its first name (``""`` for the model itself).

    >>> from miss import inject
    >>> adapted_modules(inject(nn.Sequential(nn.Linear(8, 2)), "0", rank=4))
    {'0': MiSSeLinear(in_features=8, out_features=2, bias=True, rank=4, scale=1.0, dropout=0.0)}
    """
    return instances(model, AdaptedLinear)


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The ``miss_D`` of each adapted layer, in the order of `adapted_modules`, for an optimizer."""
    return (layer.miss_D for layer in adapted_modules(model).values())


@dataclass(frozen=True)
class LayerSummary:
    """One adapted layer: ``shape`` is the weight's, ``(out_features, in_features)``; ``trainable`` counts parameters."""

    name: str
    shape: tuple[int, int]
    method: str
    rank: int
    trainable: int


@dataclass(frozen=True)
class Summary:
    """What `summary` counted; ``str()`` is a table of it. Numbers are of parameters, one in several places counted once."""

    layers: tuple[LayerSummary, ...]  #: the adapted layers, in the order of `adapted_modules`
    total: int  #: all parameters, adapters included
    trainable: int  #: those with requires_grad
    adapter: int  #: those of all miss_D
    adapted_base: int  #: weights and biases of the adapted layers
    other_trainable: dict[
        str, int
    ]  #: module that holds trainable parameters beside adapters -> how many
    skipped: dict[str, str]  #: layer that a target matched and that could not be adapted -> why

    @property
    def percent(self) -> float:
        """Trainable parameters in per cent of all."""
        return 100 * self.trainable / max(1, self.total)

    @property
    def share(self) -> float:
        """The part of the base model's parameters that sits in adapted layers, from 0 to 1."""
        return self.adapted_base / max(1, self.total - self.adapter)

    def __str__(self) -> str:
        rows = [("name", "shape", "method", "rank", "trainable")]
        for layer in self.layers:
            shape = f"{layer.shape[0]} x {layer.shape[1]}"
            rows.append(
                (
                    layer.name or "(model)",
                    shape,
                    layer.method,
                    str(layer.rank),
                    f"{layer.trainable:,}",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows)]
        pads = (str.ljust, str.rjust, str.ljust, str.rjust, str.rjust)
        rows.insert(
            1, ("-" * widths[0], "-" * widths[1], "-" * widths[2], "-" * widths[3], "-" * widths[4])
        )
        lines = [
            "  ".join(pad(cell, width) for pad, cell, width in zip(pads, row, widths))
            for row in rows
        ]
        share = f"{self.trainable:,} of {self.total:,} parameters ({self.percent:.3f} %)"
        lines += [
            "",
            f"trainable: {share}, {self.adapter:,} of them in {len(self.layers)} adapter(s)",
            f"adapted layers hold {100 * self.share:.1f} % of the base model's {self.total - self.adapter:,} parameters",
        ]
        lines += [
            f"also trainable: {name or '(model)'} ({count:,})"
            for name, count in self.other_trainable.items()
        ]
        lines += [f"skipped: {name or '(model)'} {reason}" for name, reason in self.skipped.items()]
        return "\n".join(line.rstrip() for line in lines)


def summary(model: nn.Module) -> Summary:
    """Count what is adapted, what is trainable and what was passed over; ``print(summary(model))`` shows a table.

    >>> from miss import inject
    >>> print(summary(inject(nn.Sequential(nn.Linear(8, 2)), "0", rank=4)))
    name  shape  method  rank  trainable
    ----  -----  ------  ----  ---------
    0     2 x 8  misse      4          8
    <BLANKLINE>
    trainable: 8 of 26 parameters (30.769 %), 8 of them in 1 adapter(s)
    adapted layers hold 100.0 % of the base model's 18 parameters
    """
    adapted = adapted_modules(model)
    own = {id(layer.miss_D) for layer in adapted.values()}
    base = {
        id(p): _numel(p)
        for layer in adapted.values()
        for p in layer.parameters()
        if id(p) not in own
    }
    sizes = {id(p): _numel(p) for p in model.parameters()}
    others: dict[str, int] = {}
    skipped: dict[str, str] = {}
    seen = set(own)
    for name, module in walk(model):
        new = {
            id(p): _numel(p)
            for p in module.parameters(recurse=False)
            if p.requires_grad and id(p) not in seen
        }
        if new:
            others[name] = sum(new.values())
        seen.update(new)
        if SKIPPED in module.__dict__:
            skipped.setdefault(name, module.__dict__[SKIPPED])
    return Summary(
        layers=tuple(_layer_summary(name, layer) for name, layer in adapted.items()),
        total=sum(sizes.values()),
        trainable=sum(_numel(p) for p in model.parameters() if p.requires_grad),
        adapter=sum(sizes[key] for key in own),
        adapted_base=sum(base.values()),
        other_trainable=others,
        skipped=skipped,
    )


def verify(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Run ``model(*args, **kwargs)`` once and check that every adapter took part.

    The run is without gradients, in the mode that the model is in, and eager also where it is compiled. Buffers (running
    statistics) and torch's random generators are as before afterwards, also where the run fails.

    Args:
        model: an adapted model.
        args, kwargs: an example input.

    Raises:
        StateError: the model has no adapter, or some were not called, each of which is named.

    >>> from miss import inject
    >>> model = inject(nn.Sequential(nn.Linear(8, 2)), "0", rank=4)
    >>> verify(model, torch.randn(1, 8))
    """
    adapted = adapted_modules(model)
    if not adapted:
        raise StateError(explain("verify", "the model has no adapter", do="inject first"))
    called: set[str] = set()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_random_state_kept(model))
        stack.enter_context(_buffers_kept(model))
        for name, layer in adapted.items():
            stack.enter_context(_calls_recorded(layer, name, called))
        model(*args, **kwargs)
    missed = [name or "the model" for name in adapted if name not in called]
    if missed:
        rule = f"{len(missed)} of {len(adapted)} adapters were not called"
        do = "leave them out with exclude, or call the layer where its weight is read; an input may also not reach them"
        raise StateError(explain("verify", rule, actual=", ".join(missed), do=do))


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what its base does, in every thread; contexts nest and overlap.

    No weight is touched: the forward of each layer leaves its delta out, and uses the kept base weight while merged. Run the
    backward of an activation-checkpointed forward inside too, since it computes the forward once more.

    >>> from miss import inject
    >>> model = inject(nn.Sequential(nn.Linear(8, 2)), "0", rank=4)
    >>> with disabled(model):
    ...     base = model(torch.ones(1, 8))
    """
    layers = list(adapted_modules(model).values())
    _count(layers, 1)
    try:
        yield
    finally:
        _count(layers, -1)


def _count(layers: list[AdaptedLinear], step: int) -> None:
    with _COUNT:
        for layer in layers:
            if isinstance(layer, AdaptedLinear):  # not ejected meanwhile
                layer._disabled = max(0, layer._disabled + step)


def _numel(parameter: Tensor) -> int:
    return 0 if _is_lazy(parameter) else parameter.numel()


def _is_lazy(tensor: Tensor) -> bool:
    return isinstance(
        tensor, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)
    )


def _layer_summary(name: str, layer: AdaptedLinear) -> LayerSummary:
    trainable = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    return LayerSummary(
        name, (layer.out_features, layer.in_features), method_of(layer), layer.rank, trainable
    )


@contextmanager
def _calls_recorded(layer: AdaptedLinear, name: str, called: set[str]) -> Iterator[None]:
    """Inside, a call of the layer's forward, also one past its hooks, puts ``name`` into ``called``."""
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
    kept = [
        (m, dict(m._buffers)) for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)
    ]
    contents = [
        (b, b.clone())
        for b in model.buffers()
        if b.layout == torch.strided and not b.is_meta and not _is_lazy(b)
    ]
    try:
        yield
    finally:
        for module, buffers in kept:
            if {name: id(b) for name, b in module._buffers.items()} != {
                name: id(b) for name, b in buffers.items()
            }:
                module._buffers.clear()
                module._buffers.update(buffers)
        for buffer, content in contents:
            same = (buffer == content) | (
                (buffer != buffer) & (content != content)
            )  # NaN is the same as NaN
            if not same.all():
                with torch.inference_mode(buffer.is_inference()):
                    buffer.copy_(content)
