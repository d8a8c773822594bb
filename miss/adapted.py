"""`AdaptedLinear`: `torch.nn.Linear` with a frozen weight and one trainable matrix, ``miss_D``; the base of both forms."""

from numbers import Integral
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miss import functional, fused
from miss.adaptable import check_settings, looks_linear, refusal
from miss.errors import ShapeError, StateError, TargetError, explain, is_merged

__all__ = ["OUR_NAMES", "AdaptedLinear"]

Self = TypeVar("Self", bound="AdaptedLinear")


class AdaptedLinear(nn.Linear):
    """What the two forms share: the parameter, its life, and the forward around it. Use one of the subclasses."""

    miss_D: nn.Parameter
    miss_base: Tensor  # while merged: a copy of the base weight, in a non-persistent buffer
    # Class-level defaults, so that objects pickled by an older version load.
    scale: float = 1.0
    dropout: float = 0.0
    _disabled: int = 0  # how many `disabled` contexts this layer is in
    # What makes a form: the axis of the weight along which D is shared, and `rank` long instead; its delta; its two forwards.
    shared_axis: ClassVar[int]
    expand: ClassVar["staticmethod[[Tensor, int], Tensor]"]
    add_delta: ClassVar["staticmethod[[Tensor, Tensor, Tensor, float], Tensor]"]
    fused: ClassVar["staticmethod[[Tensor, Tensor, Tensor | None, Tensor, float], Tensor]"]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        scale: float = 1.0,
        dropout: float = 0.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        name = type(self).__name__
        scale, dropout = check_settings(
            name, scale=scale, dropout=dropout, adapter_dtype=adapter_dtype
        )
        rank = self.check_rank(name, rank, in_features, out_features)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.requires_grad_(False)
        self._attach(self.new_adapter(self, rank, adapter_dtype), scale, dropout)

    @classmethod
    def adopt_(
        cls: type[Self],
        linear: nn.Linear,
        rank: int,
        *,
        scale: float = 1.0,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> Self:
        """Turn ``linear`` itself into this class: same object, parameters, hooks and flags, and a zero ``miss_D``.

        Args are those of the constructor; no ``requires_grad`` flag is touched. Returns ``linear``.

        Raises:
            TargetError: ``linear`` is of another type.
            StateError: it is adapted already, or in a state that would bypass the adapter.
            ShapeError: a number is outside its rule.

        >>> from miss import MiSSeLinear
        >>> linear = nn.Linear(6, 4)
        >>> MiSSeLinear.adopt_(linear, rank=2) is linear
        True
        >>> linear
        MiSSeLinear(in_features=6, out_features=4, bias=True, rank=2, scale=1.0, dropout=0.0)
        """
        name = type(linear).__name__
        if isinstance(linear, AdaptedLinear):
            raise StateError(explain(name, "is adapted already", do="eject it first"))
        reason = refusal(linear, OUR_NAMES) if looks_linear(linear) else "is not a torch.nn.Linear"
        if reason is not None:
            error = StateError if type(linear) is nn.Linear else TargetError
            raise error(explain(name, reason))
        scale, dropout = check_settings(
            name, scale=scale, dropout=dropout, adapter_dtype=adapter_dtype
        )
        rank = cls.check_rank(name, rank, linear.in_features, linear.out_features)
        return cls.swap_(linear, cls.new_adapter(linear, rank, adapter_dtype), scale, dropout)

    @classmethod
    def new_adapter(
        cls,
        linear: nn.Linear,
        rank: int,
        adapter_dtype: torch.dtype | None,
        rows: int | None = None,
    ) -> nn.Parameter:
        """A zero D for ``linear``, on the device of its weight; MiSSe may have fewer ``rows``. ``linear`` is not changed."""
        default = (
            linear.weight.dtype
            if linear.weight.dtype in (torch.float64, torch.float32)
            else torch.float32
        )
        shape = cls.adapter_shape(linear.out_features, linear.in_features, rank, rows)
        with torch.inference_mode(False):
            return nn.Parameter(
                torch.zeros(shape, device=linear.weight.device, dtype=adapter_dtype or default)
            )

    @classmethod
    def adapter_shape(
        cls, out_features: int, in_features: int, rank: int, rows: int | None = None
    ) -> tuple[int, int]:
        """The shape of D."""
        shape = [out_features, in_features]
        shape[cls.shared_axis] = rank
        return rows or shape[0], shape[1]

    @classmethod
    def swap_(
        cls: type[Self], linear: nn.Linear, d: nn.Parameter, scale: float, dropout: float
    ) -> Self:
        """The swap alone, for a ``linear``, a ``d`` and numbers that have been checked."""
        linear.__class__ = cls
        assert isinstance(linear, cls)  # tells the type checker
        linear._attach(d, scale, dropout)
        return linear

    def swap_back_(self) -> None:
        """Become a plain `nn.Linear` again, for a layer that has been checked; ``miss_D`` goes, no flag is touched."""
        del self.miss_D
        if self.merged:
            del self.miss_base
        for name in ("scale", "dropout", "_disabled"):
            self.__dict__.pop(name, None)
        self.__class__ = nn.Linear  # type: ignore[assignment]  # the way back of `swap_`

    def _attach(self, d: nn.Parameter, scale: float, dropout: float) -> None:
        self.scale, self.dropout = scale, dropout
        self.register_parameter("miss_D", d)

    @classmethod
    def check_rank(cls, name: str, rank: int, in_features: int, out_features: int) -> int:
        """``rank`` as an int, or a `ShapeError` that names the module, the rule and the numbers."""
        limit = (out_features, in_features)[cls.shared_axis]
        if isinstance(rank, bool) or not isinstance(rank, Integral) or not 1 <= rank <= limit:
            rule = f"rank of {cls.__name__} must be an int from 1 to {('out_features', 'in_features')[cls.shared_axis]}"
            size = f"{cls.__name__}(in_features={in_features}, out_features={out_features})"
            raise ShapeError(
                explain(
                    name, rule, expected=f"1 <= rank <= {limit}", actual=f"rank={rank!r} for {size}"
                )
            )
        return int(rank)

    @property
    def rank(self) -> int:
        """Length of ``miss_D`` along the shared axis, a bound on the rank of the delta."""
        return self.miss_D.shape[self.shared_axis]

    @property
    def merged(self) -> bool:
        """Whether ``weight`` holds the sum of the base weight and the delta (see `miss.merge`)."""
        return "miss_base" in self._buffers

    def delta_weight(self) -> Tensor:
        """``scale * expand(D)``, dense and differentiable: what the adapter adds to ``weight``.

        Shape:
            ``(out_features, in_features)``, in the dtype of ``miss_D``.
        """
        return self.scale * self.dense(self.miss_D)

    def dense(self, d: Tensor) -> Tensor:
        """``expand(d)`` for a ``d`` of the shape of ``miss_D``: ``(out_features, in_features)``."""
        wide = self.expand(d, (self.out_features, self.in_features)[self.shared_axis])
        return functional.cycle_rows(wide, self.out_features)

    def forward(self, input: Tensor) -> Tensor:
        """The base layer's output plus the delta's, in the dtype that the base layer gives; no weight is changed.

        Shape:
            ``(..., in_features) -> (..., out_features)``

        Raises:
            StateError: the layer is merged, in training mode, and gradients are on: ``miss_D`` would get none.
        """
        if (
            input.is_nested
        ):  # what nn.TransformerEncoder passes on in eval mode under a padding mask
            return torch.nested.as_nested_tensor(
                [self.forward(row) for row in input.unbind()], layout=input.layout
            )
        if self.merged:
            if self.training and torch.is_grad_enabled():
                raise is_merged(
                    type(self).__name__, "a training forward would give miss_D no gradient"
                )
            return F.linear(input, self.miss_base if self._disabled else self.weight, self.bias)
        weight, bias, d = self.weight, self.bias, self.miss_D
        dropping = self.training and self.dropout > 0
        if not self._disabled and not dropping and fused.fits(input, weight, bias, d):
            return self.fused(input, weight, bias, d, self.scale)
        y = F.linear(input, weight, bias)
        x = F.dropout(input, self.dropout) if dropping else input
        return y if self._disabled else self.add_delta(x, y, d, self.scale)

    def reset_adapter(self) -> None:
        """Set ``miss_D`` to zero, in place: the layer computes what its base does.

        Raises:
            StateError: the layer is merged.
        """
        if self.merged:
            raise is_merged(type(self).__name__, "a reset would leave the delta in the weight")
        with torch.no_grad():
            self.miss_D.zero_()

    def reset_parameters(self) -> None:
        """Initialise ``weight`` and ``bias`` as `nn.Linear` does, and ``miss_D`` to zero.

        Raises:
            StateError: the layer is merged.
        """
        if "miss_D" in self._parameters:  # not yet in the constructor of nn.Linear
            self.reset_adapter()
        super().reset_parameters()

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return (
            f"{super().extra_repr()}, rank={self.rank}, scale={self.scale}, dropout={self.dropout}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As `nn.Module`, but what `to_empty` or a move off the meta device leaves uninitialised in ``miss_D`` is zero."""
        was_meta = self.miss_D.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch gives it no types
        # The code object, since a module with two names is visited twice, and only the first time comes from meta.
        emptied = getattr(fn, "__code__", None) in nn.Module.to_empty.__code__.co_consts
        if (was_meta or emptied) and not self.miss_D.is_meta:
            with torch.no_grad():
                self.miss_D.zero_()
        return self

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """As `nn.Module`, but ``miss_D`` does not stay on the meta device where a base checkpoint moves the weight off it."""
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.miss_D.is_meta and not self.weight.is_meta:
            zeros = torch.zeros_like(self.miss_D, device=self.weight.device)
            self.miss_D = nn.Parameter(zeros, requires_grad=self.miss_D.requires_grad)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """As `nn.Module`, but ``weight`` is the base weight also while merged."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[f"{prefix}weight"] = self.miss_base

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles made inside `disabled` are outside of it."""
        return {name: value for name, value in self.__dict__.items() if name != "_disabled"}


# The names that a module must not have as attributes of its own, since ours would hide them or be hidden.
OUR_NAMES = (set(dir(AdaptedLinear)) | set(AdaptedLinear.__annotations__)) - set(dir(nn.Linear))
