"""The table of what is adapted, what is trained, and what was passed over."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from miss.errors import named
from miss.inject import SKIPPED
from miss.layers import looks_linear
from miss.layers.host import d_name
from miss.merging import Place, held, places
from miss.tensors import numel, tied_to
from miss.tree import Tree, joined

__all__ = ["LayerSummary", "Summary", "summary"]


@dataclass(frozen=True)
class LayerSummary:
    """One adapted layer, or one Parameter of a layer that has several D's.

    ``shape`` is the Parameter's: in a linear layer ``(out_features, in_features)``. ``trainable``
    counts D and, once for each layer, what else in the layer requires grad. ``alternate`` says
    whether the blocks of its input alternate in sign.
    """

    name: str
    shape: tuple[int, ...]
    method: str
    rank: int
    trainable: int
    alternate: bool


@dataclass(frozen=True)
class Summary:
    """What `summary` counted; ``str()`` is a table. A parameter in several places counts once."""

    layers: tuple[LayerSummary, ...]  #: the adapted layers, in the order of `adapted_modules`
    total: int  #: all parameters, adapters included
    trainable: int  #: those with requires_grad
    adapter: int  #: those of all D
    adapted_base: int  #: the parameters of the adapted layers, without D
    other_trainable: dict[str, int]  #: module with trainable parameters besides D -> how many
    skipped: dict[str, str]  #: layer that a target matched and that could not be adapted -> why
    #: large frozen weight outside of linear and adapted layers, such as stacked experts or
    #: embeddings -> how many; large is a thousandth of the base model
    unreached: dict[str, int]
    tied: dict[str, str]  #: adapted Parameter -> another name of its weight, where no adapter acts

    @property
    def percent(self) -> float:
        """Trainable parameters as a percentage of all."""
        return 100 * self.trainable / max(1, self.total)

    @property
    def share(self) -> float:
        """The part of the base model's parameters that lies in adapted layers, from 0 to 1."""
        return self.adapted_base / max(1, self.total - self.adapter)

    def __str__(self) -> str:
        rows = [("name", "shape", "method", "rank", "trainable")]
        for layer in self.layers:
            shape, count = " x ".join(map(str, layer.shape)), f"{layer.trainable:,}"
            method = f"{layer.method}, alternating" if layer.alternate else layer.method
            rows.append((named(layer.name), shape, method, str(layer.rank), count))
        widths = [max(map(len, column)) for column in zip(*rows)]
        name, shape, method, rank, trainable = ("-" * width for width in widths)
        rows.insert(1, (name, shape, method, rank, trainable))
        pads = (str.ljust, str.rjust, str.ljust, str.rjust, str.rjust)
        lines = []
        for row in rows:
            lines.append("  ".join(pad(c, width) for pad, c, width in zip(pads, row, widths)))
        part = f"{self.trainable:,} of {self.total:,} parameters ({self.percent:.3f} %)"
        inner = f"{self.adapter:,} of them in {len(self.layers)} adapter(s)"
        base = f"the base model's {self.total - self.adapter:,} parameters"
        lines += ["", f"trainable: {part}, {inner}"]
        lines.append(f"adapted layers hold {100 * self.share:.1f} % of {base}")
        for name, number in self.other_trainable.items():
            lines.append(f"also trainable: {named(name)} ({number:,})")
        for name, reason in self.skipped.items():
            lines.append(f"skipped: {named(name)} {reason}")
        for name, number in self.unreached.items():
            lines.append(f"no adapter reaches: {name} ({number:,})")
        for name, other in self.tied.items():
            lines.append(f"tied: {name} is {other} too, where the adapter does not act")
        return "\n".join(line.rstrip() for line in lines)


def summary(model: nn.Module) -> Summary:
    """Count what is adapted, what is trainable and what was passed over.

    ``print(summary(model))`` shows a table.

    Raises:
        TargetError: ``model`` is not a module.

    >>> from miss import inject
    >>> print(summary(inject(nn.Sequential(nn.Linear(8, 2)), "0", rank=4)))
    name  shape  method  rank  trainable
    ----  -----  ------  ----  ---------
    0     2 x 8  misse      4          8
    <BLANKLINE>
    trainable: 8 of 26 parameters (30.769 %), 8 of them in 1 adapter(s)
    adapted layers hold 100.0 % of the base model's 18 parameters
    """
    tree = Tree(model)
    adapted = tree.adapted
    own: dict[int, Tensor] = {}
    base: dict[int, Tensor] = {}
    for layer in adapted.values():
        ds = [getattr(layer, d_name(parameter)) for parameter in layer.miss_configs]
        own |= {id(d): d for d in ds}
        base |= {id(p): p for p in layer.parameters()}
    every: dict[int, Tensor] = {}
    others: dict[str, int] = {}
    skipped: dict[str, str] = {}
    for name, module in tree.of_type(nn.Module).items():
        held = {id(p): p for p in module._parameters.values() if p is not None}
        new = {key: p for key, p in held.items() if key not in every}
        every |= new
        trained = [p for key, p in new.items() if p.requires_grad and key not in own]
        if trained:
            others[name] = _count(trained)
        if SKIPPED in module.__dict__:
            skipped[name] = module.__dict__[SKIPPED]
    total, adapter = _count(every.values()), _count(own.values())
    return Summary(
        layers=tuple(_layer(name, place) for name, place in places(adapted).items()),
        total=total,
        trainable=_count(p for p in every.values() if p.requires_grad),
        adapter=adapter,
        adapted_base=_count(p for key, p in base.items() if key not in own),
        other_trainable=others,
        skipped=skipped,
        unreached=_unreached(tree, set(base), (total - adapter) / 1000),
        tied=_tied(tree),
    )


def _tied(tree: Tree) -> dict[str, str]:
    """By full name, the adapted Parameters that something else holds too, and its full name."""
    found: dict[str, str] = {}
    holders = held(tree)
    for place in places(tree.adapted).values():
        own = joined(place.name, place.parameter)
        weight = place.layer._parameters.get(place.parameter)
        if weight is not None and (other := tied_to(own, weight, holders)) is not None:
            found[own] = other
    return found


def _unreached(tree: Tree, reached: set[int], least: float) -> dict[str, int]:
    """The frozen weights of at least ``least`` elements that no linear or adapted layer holds."""
    found: dict[str, int] = {}
    for weights in tree.weights.values():
        for name, module, weight in weights:
            large = numel(weight) >= least and not weight.requires_grad
            if large and id(weight) not in reached and not looks_linear(module):
                reached.add(id(weight))
                found[name] = numel(weight)
    return dict(sorted(found.items()))


def _layer(name: str, place: Place) -> LayerSummary:
    layer, config = place.layer, place.config
    d = getattr(layer, d_name(place.parameter))
    counted = [d]
    if place.parameter == next(iter(layer.miss_configs)):
        ds = {id(getattr(layer, d_name(parameter))) for parameter in layer.miss_configs}
        counted += [p for p in layer.parameters() if id(p) not in ds]
    trainable = _count(p for p in counted if p.requires_grad)
    form = config.form
    return LayerSummary(name, config.shape, form.name, config.rank, trainable, form.alternate)


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(map(numel, parameters))
