"""The forms of MiSS, which say how one axis of a weight is shared, and the settings of a layer.

A form is a class that is never instantiated. It knows no layer types: a weight is a Parameter with
an axis "out" and an axis "in". D has the shape of the Parameter, except that one of the two axes is
cut to the rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from miss import functional
from miss.checks import is_int, is_real
from miss.errors import ShapeError

__all__ = ["METHODS", "Form", "LayerConfig", "MiSS", "MiSSe", "MiSSeAlternating", "MiSSeMini"]
__all__ += ["variant"]

Axes: TypeAlias = tuple[int, int]  # where a Parameter has "out" and where it has "in"


class Form(ABC):
    """How one axis of a weight is shared; everything that differs between the forms is here."""

    name: ClassVar[str]  #: as `inject` takes it, and files hold it
    prefix: ClassVar[str]  #: of the names of the adapted classes
    axis: ClassVar[int]  #: 0 if the axis "out" is shared, 1 if "in" is
    alternate: ClassVar[bool] = False  #: whether the signs of the blocks of "in" alternate
    peft: ClassVar[bool | str | None]  #: PEFT's ``init_weights`` for the form; None if it has none

    @staticmethod
    @abstractmethod
    def owner(size: int, rank: int) -> Tensor:
        """For each of ``size`` positions of the shared axis, its place in D; int64, ``(size)``."""

    @staticmethod
    def sign(size: int, rank: int) -> Tensor | None:
        """The sign of each of ``size`` positions, 1 or -1, int64, ``(size)``; None if all are 1."""
        return None

    @classmethod
    @abstractmethod
    def expand(cls, d: Tensor, size: int, axis: int) -> Tensor:
        """``d`` with its ``axis`` of length rank expanded to ``size``: the dense delta of ``d``."""

    @staticmethod
    @abstractmethod
    def add(
        x: Tensor, y: Tensor, d: Tensor, scale: float, product: functional.Product, rank: int
    ) -> Tensor:
        """``y`` plus the delta's product with ``x``, without the dense delta; features come last.

        ``product(x, d)`` is the base layer's operation with ``d`` as its weight and no bias.
        ``rank`` is the length of the shared axis of ``d``, which may lie anywhere.
        """

    @classmethod
    def factors(cls, d: Tensor, config: "LayerConfig") -> tuple[Tensor, Tensor]:
        """LoRA's A ``(r, in)`` and B ``(out, r)``: ``B A`` is the delta of ``d``, as (out, in).

        The axes of a kernel follow. The factor that is no D has a kernel of one element.
        """
        d = cls.whole(d, config).movedim(config.axes, (0, 1))
        one = torch.eye(config.rank, dtype=d.dtype, device=d.device)
        frozen = cls.expand(one, config.size, cls.axis)
        frozen = frozen.reshape(*frozen.shape, *(1 for _ in d.shape[2:]))
        a, b = (frozen, d) if cls.axis == 1 else (d, frozen)
        if config.blank is not None:
            a = a.index_fill(1, torch.tensor(config.blank, device=a.device), 0)
        return a, b

    @classmethod
    def d_shape(cls, config: "LayerConfig") -> tuple[int, ...]:
        """The shape of D: that of the Parameter with the shared axis cut to the rank."""
        shape = list(config.shape)
        shape[config.shared] = config.rank
        return tuple(shape)

    @classmethod
    def whole(cls, d: Tensor, config: "LayerConfig") -> Tensor:
        """``d`` as the other functions take it: only the shared axis is cut."""
        return d

    @classmethod
    def delta(cls, d: Tensor, config: "LayerConfig") -> Tensor:
        """The dense delta of ``d`` at scale 1, in the shape of the Parameter."""
        return _blanked(cls.expand(cls.whole(d, config), config.size, config.shared), config)

    @classmethod
    def window(cls, d: Tensor, config: "LayerConfig", rows: slice) -> Tensor:
        """`delta` at some positions of the Parameter's first axis; ``d`` comes from `whole`."""
        if config.shared == 0:
            owner, sign = cls.owner(config.size, config.rank), cls.sign(config.size, config.rank)
            found = d[owner[rows].to(d.device)].movedim(0, -1)
            found = found if sign is None else found * sign[rows].to(d)
            found = found.movedim(-1, 0)
        else:
            found = cls.expand(d[rows], config.size, config.shared)
        return _blanked(found, config, rows.start)

    @classmethod
    def at(cls, d: Tensor, config: "LayerConfig", positions: Tensor) -> Tensor:
        """`delta` at flat positions of the Parameter."""
        d = cls.whole(d, config)
        index = list(torch.unravel_index(positions.to(d.device), config.shape))
        shared, inner = index[config.shared], index[config.axes[1]]
        index[config.shared] = cls.owner(config.size, config.rank).to(d.device)[shared]
        sign = cls.sign(config.size, config.rank)
        found = d[tuple(index)] if sign is None else d[tuple(index)] * sign.to(d)[shared]
        return found if config.blank is None else found.masked_fill(inner == config.blank, 0)


class MiSSe(Form):
    """Blocks of the input share D: position ``c`` of "in" has the place ``c mod rank`` (Eq. 6)."""

    name, prefix, axis = "misse", "MiSSe", 1
    peft: ClassVar[bool | str | None] = True

    @staticmethod
    def owner(size: int, rank: int) -> Tensor:
        return torch.arange(size) % rank

    @classmethod
    def expand(cls, d: Tensor, size: int, axis: int) -> Tensor:
        d = d.movedim(axis, -1)
        return functional.expand_blocks(d, size, cls.alternate).movedim(-1, axis)

    add = staticmethod(functional.add_misse)


class MiSS(Form):
    """Shards of the output share D: position ``o`` of "out" has the place of its shard (Eq. 2)."""

    name, prefix, axis = "miss", "MiSS", 0
    peft = None

    @staticmethod
    def owner(size: int, rank: int) -> Tensor:
        return functional.expand_shards(torch.arange(rank), size)

    @classmethod
    def expand(cls, d: Tensor, size: int, axis: int) -> Tensor:
        return functional.expand_shards(d.movedim(axis, 0), size).movedim(0, axis)

    add = staticmethod(functional.add_miss)


class MiSSeAlternating(MiSSe):
    """MiSSe in which block ``c // rank`` of the input enters with the sign ``(-1)^(c // rank)``.

    It is this project's addition to the method. A mean that all inputs share cancels exactly if the
    blocks are even in number and full; else at most one block's mean is left.
    """

    alternate, peft = True, None

    @staticmethod
    def sign(size: int, rank: int) -> Tensor | None:
        return 1 - 2 * (torch.arange(size) // rank % 2)

    add = staticmethod(partial(functional.add_misse, alternate=True))


class MiSSeMini(MiSSe):
    """PEFT's mini form: MiSSe whose D has fewer rows, which repeat in turn along "out".

    It is the only form that cuts two axes, so its `LayerConfig` has ``rows``.
    """

    peft = "mini"

    @classmethod
    def d_shape(cls, config: "LayerConfig") -> tuple[int, ...]:
        return (config.rows or config.shape[0], config.rank)

    @classmethod
    def whole(cls, d: Tensor, config: "LayerConfig") -> Tensor:
        return functional.cycle_rows(d, config.shape[0])


METHODS: dict[str, type[Form]] = {form.name: form for form in (MiSSe, MiSS)}


def variant(form: type[Form], *, alternate: bool = False, rows: int | None = None) -> type[Form]:
    """A form with alternating signs, or, if D has ``rows`` of its own, the mini form.

    Raises:
        ShapeError: ``alternate`` is no bool, or the form has no such variant.
    """
    if not isinstance(alternate, bool):
        raise ShapeError("alternate must be True or False", actual=f"alternate={alternate!r}")
    if alternate and form is not MiSSe:
        rule = "only MiSSe sums blocks of the input, whose signs can alternate"
        expected, actual = "MiSSe, or alternate=False", f"{form.prefix} with alternate=True"
        raise ShapeError(rule, expected=expected, actual=actual)
    if alternate:
        return MiSSeAlternating
    return MiSSeMini if form is MiSSe and rows is not None else form


@dataclass(frozen=True)
class LayerConfig:
    """The settings of one adapted Parameter.

    Args:
        form: how D is shared.
        rank: the length of D's shared axis, from 1 to that of the Parameter.
        shape: the Parameter's.
        axes: where the Parameter has "out" and where it has "in".
        scale: factor of the delta; finite.
        dropout: probability, in ``[0, 1)``, of zeroing an input of the adapter in training mode.
        rows: the rows of D in PEFT's mini form, a divisor of the outputs; else None.
        blank: a position of the axis "in" at which the delta is zero, such as the ``padding_idx``
            of an embedding; else None.

    Raises:
        ShapeError: a setting is outside its rule.
    """

    form: type[Form]
    rank: int
    shape: tuple[int, ...]
    axes: Axes = (0, 1)
    scale: float = 1.0
    dropout: float = 0.0
    rows: int | None = None
    blank: int | None = None
    d_shape: tuple[int, ...] = field(init=False)  #: the shape of D

    def __post_init__(self) -> None:
        put = object.__setattr__  # the only way in a frozen dataclass
        put(self, "shape", tuple(self.shape))
        rank, limit = self.rank, self.size
        if not is_int(rank) or not 1 <= rank <= limit:
            features = ("out_features", "in_features")[self.form.axis]
            rule = f"rank of {self.form.prefix} must be an int from 1 to {features}"
            out, in_ = (self.shape[axis] for axis in self.axes)
            actual = f"rank={rank!r}, in_features={in_}, out_features={out}"
            raise ShapeError(rule, expected=f"1 <= rank <= {limit}", actual=actual)
        if not is_real(self.scale):
            rule = "scale must be a number"
            raise ShapeError(rule, expected="a finite number", actual=f"scale={self.scale!r}")
        if not is_real(self.dropout) or not 0 <= self.dropout < 1:
            rule, actual = "dropout must be a probability", f"dropout={self.dropout!r}"
            raise ShapeError(rule, expected="0 <= dropout < 1", actual=actual)
        rows = self.rows
        if rows is not None and (not is_int(rows) or rows < 1 or self.shape[0] % rows):
            rule, expected = "rows must divide out_features", f"a divisor of {self.shape[0]}"
            raise ShapeError(rule, expected=expected, actual=f"rows={rows!r}")
        if (rows is not None) != (self.form is MiSSeMini):
            raise ShapeError("rows belong to the mini form alone", actual=f"rows={rows!r}")
        put(self, "rank", int(rank))
        put(self, "scale", float(self.scale))
        put(self, "dropout", float(self.dropout))
        put(self, "d_shape", self.form.d_shape(self))

    @property
    def shared(self) -> int:
        """The shared axis of the Parameter."""
        return self.axes[self.form.axis]

    @property
    def size(self) -> int:
        """The length of the shared axis, a bound on the rank."""
        return self.shape[self.shared]

    def fields(self) -> dict[str, Any]:
        """What a file says of the settings; `from_fields` reads it."""
        fields = {"method": self.form.name, "rank": self.rank, "scale": self.scale}
        fields |= {"dropout": self.dropout, "shape": list(self.shape)}
        fields |= {"alternate": True} if self.form.alternate else {}
        fields |= {} if self.rows is None else {"rows": self.rows}
        return fields if self.blank is None else fields | {"blank": self.blank}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], axes: Axes) -> "LayerConfig":
        """The settings that a file describes; else a ShapeError, TypeError or KeyError."""
        rest = dict(fields)
        shape, form = rest.pop("shape"), METHODS[rest.pop("method")]
        form = variant(form, alternate=rest.pop("alternate", False), rows=rest.get("rows"))
        if not isinstance(shape, list) or not all(type(size) is int for size in shape):
            raise TypeError("the shape must be a list of ints")
        if len(shape) <= max(axes):
            raise TypeError("the shape has too few axes")
        rank, scale, dropout = (rest.pop(key) for key in ("rank", "scale", "dropout"))
        return cls(form, rank, tuple(shape), axes, scale, dropout, **rest)


def _blanked(delta: Tensor, config: LayerConfig, start: int = 0) -> Tensor:
    """Rows of a delta, the first of which is ``start``, with zeros at the ``blank`` of "in"."""
    axis = config.axes[1]
    place = -1 if config.blank is None else config.blank - (0 if axis else start)
    if not 0 <= place < delta.shape[axis]:
        return delta
    return delta.index_fill(axis, torch.tensor(place, device=delta.device), 0)
