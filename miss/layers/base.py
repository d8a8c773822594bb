"""`AdaptedLayer`, what an adapted layer is.

A layer is adapted in place: its class becomes one that has `AdaptedLayer` before the layer's own
type. That type's ``forward`` computes the base's output; the mixin adds the delta.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from miss.errors import ShapeError, StateError, TargetError, at, merged_error
from miss.forms import Form, LayerConfig
from miss.layers import loading
from miss.layers.host import Depth, Host, base_name, d_name, named_input
from miss.tensors import is_dtensor, is_managed

__all__ = ["AdaptedLayer"]

if TYPE_CHECKING:  # what it is mixed into
    _Mixin = nn.Module
else:
    _Mixin = object


class AdaptedLayer(_Mixin):
    """What every adapted layer has; a mixin before the layer's own type.

    It defines only names that begin with ``miss_``, ``forward``, and torch's own hooks, so that it
    hides nothing of the layer. A layer has one form. Each adapted Parameter has a D and a
    `LayerConfig`.

    Attributes:
        miss_form: how D is shared.
        miss_host: what the base layer is.
        miss_type: the layer's own type, which it has again when it is ejected.
    """

    miss_form: ClassVar[type[Form]]
    miss_host: ClassVar[type[Host]]
    miss_type: ClassVar[type[nn.Module]]
    _miss_configs: Mapping[str, LayerConfig] = {}
    _miss_depth: Depth = Depth()
    _is_hf_initialized = loading.InitializedMark()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        types = [base for base in cls.__mro__ if issubclass(base, nn.Module)]
        # Once, where the layer's own type joins the mixin, so that a subclass may override it; and
        # only if that type has the method, because the mixin adds no name of the layer's kind.
        mixed_in = types[:1] == [cls] and not issubclass(types[1], AdaptedLayer)
        if mixed_in and hasattr(cls, "reset_parameters"):
            cls.reset_parameters = _reset_parameters

    @property
    def miss_configs(self) -> dict[str, LayerConfig]:
        """The settings of each adapted Parameter, by its name."""
        return dict(self._miss_configs)

    @property
    def miss_rank(self) -> int:
        """The length of D's shared axis, a bound on the rank of the delta.

        Raises:
            StateError: the layer has several D's; `miss_configs` has the settings of each.
        """
        return self._miss_only().rank

    @property
    def miss_scale(self) -> float:
        """The factor of the delta; it can be assigned.

        Raises:
            StateError: the layer has several D's; `miss_configs` has the settings of each.
            ShapeError: what is assigned is not a finite number.
        """
        return self._miss_only().scale

    @miss_scale.setter
    def miss_scale(self, scale: float) -> None:
        self._miss_change(scale=scale)

    @property
    def miss_dropout(self) -> float:
        """The probability of zeroing an input of the adapter in training; it can be assigned.

        Raises:
            StateError: the layer has several D's; `miss_configs` has the settings of each.
            ShapeError: what is assigned is not in ``[0, 1)``.
        """
        return self._miss_only().dropout

    @miss_dropout.setter
    def miss_dropout(self, dropout: float) -> None:
        self._miss_change(dropout=dropout)

    @property
    def miss_alternate(self) -> bool:
        """Whether the signs of the blocks of the input alternate."""
        return any(config.form.alternate for config in self._miss_configs.values())

    @property
    def miss_merged(self) -> bool:
        """Whether the Parameters hold the sum of base and delta (see `miss.merge`)."""
        return any(base_name(parameter) in self._buffers for parameter in self._miss_configs)

    def miss_delta_weight(self, parameter: str = "weight") -> Tensor:
        """``scale * expand(D)``, dense and differentiable: what the adapter adds to a Parameter.

        Args:
            parameter: its name.

        Shape:
            That of the Parameter, in the dtype of its D.

        Raises:
            TargetError: the Parameter is not adapted.
        """
        config = self._miss_configs.get(parameter)
        if config is None:
            with at(type(self).__name__):
                expected = ", ".join(self._miss_configs)
                rule = "the Parameter is not adapted"
                raise TargetError(rule, expected=expected, actual=repr(parameter))
        return config.scale * config.form.delta(getattr(self, d_name(parameter)), config)

    def miss_reset_adapter(self) -> None:
        """Set each D to zero, in place: the layer computes what its base does.

        Raises:
            StateError: the layer is merged, or FSDP holds a transient copy of D.
        """
        for parameter in self._miss_configs:
            if is_managed(self) and not is_dtensor(getattr(self, d_name(parameter))):
                with at(type(self).__name__):
                    rule = "a reset would be lost: FSDP holds D, and this is a transient copy"
                    raise StateError(rule, do="model.reshard() first")
        self._miss_zero()

    def miss_delta(self, x: Tensor, y: Tensor) -> Tensor:
        """``y``, the base layer's output for the input ``x``, plus the deltas' products with ``x``.

        A delta enters a forward only here and on a host's fast path. If this method is replaced, on
        an object or in a subclass, the fast path is not taken.

        Shape:
            That of ``y``.

        Raises:
            StateError: ``y`` is no tensor: a host describes layers that return one.
        """
        if not isinstance(y, Tensor):
            with at(type(self).__name__):
                rule = "a layer that a host describes returns one tensor"
                raise StateError(rule, actual=type(y).__name__)
        for parameter, config in self._miss_configs.items():
            y = self.miss_host.add(self, x, y, parameter, config)
        return y

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output plus the delta's, in the dtype that the base layer gives.

        No weight is changed.

        Raises:
            StateError: the layer is merged, in training mode and with gradients on, so that D would
                get no gradient.
            ShapeError: the Parameter or D has been replaced by one of another shape.
        """
        if self._buffers and self.miss_merged:
            return self._miss_merged_forward(args, kwargs)
        if self._miss_depth.count:
            return super().forward(*args, **kwargs)
        x = args[0] if args else named_input(self, kwargs)
        if len(args) + len(kwargs) == 1 and self._miss_seam_is_ours():
            y = self.miss_host.fast(self, x)
            if y is not None:
                return y
        self._miss_check_shapes()
        return self.miss_delta(x, super().forward(*args, **kwargs))

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        texts = [super().extra_repr()]
        for parameter, config in self._miss_configs.items():
            texts += [f"{parameter}:"] if len(self._miss_configs) > 1 else []
            texts.append(f"rank={config.rank}, scale={config.scale}, dropout={config.dropout}")
            texts += ["alternate=True"] if config.form.alternate else []
        return ", ".join(text for text in texts if text)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """As in `nn.Module`; zero a D that ``to_empty`` or a move off meta left uninitialised."""
        names = [d_name(parameter) for parameter in self._miss_configs]
        was_meta = {name for name in names if getattr(self, name).is_meta}
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]  # torch: untyped
        # `to_empty` is known by its code object, not only by meta tensors: it visits a module with
        # two names twice, and the second time D is not on meta any more.
        emptied = getattr(fn, "__code__", None) in nn.Module.to_empty.__code__.co_consts
        for name in names:
            d = getattr(self, name)
            if (name in was_meta or emptied) and not d.is_meta:
                with torch.no_grad():
                    d.zero_()
        loading.settle(self)
        return self

    def _load_from_state_dict(self, state: Any, prefix: str, about: Any, *args: Any) -> None:
        """As in `nn.Module`, after a check of what the state means; see `miss.layers.loading`."""
        with loading.checked(self):
            super()._load_from_state_dict(state, prefix, about, *args)
        for parameter in self._miss_configs:
            weight, d = getattr(self, parameter), getattr(self, d_name(parameter))
            if d.is_meta and not weight.is_meta:  # a base checkpoint moved the weight off meta
                zeros = torch.zeros_like(d, device=weight.device)
                self._parameters[d_name(parameter)] = nn.Parameter(zeros, d.requires_grad)
        loading.settle(self)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """As in `nn.Module`; while merged, that of the merged plain layer, as the metadata says."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.miss_merged:
            for parameter in self._miss_configs:
                destination.pop(prefix + d_name(parameter), None)
        if hasattr(destination, "_metadata"):
            about = loading.metadata(self, self.miss_merged)
            destination._metadata.setdefault(prefix[:-1], {})[loading.KEY] = about

    def _miss_zero(self) -> None:
        if self.miss_merged:
            with at(type(self).__name__):
                raise merged_error("a reset would leave the delta in the weight")
        with torch.no_grad():
            for parameter in self._miss_configs:
                getattr(self, d_name(parameter)).zero_()

    def _miss_only(self) -> LayerConfig:
        """The settings of a layer that has one D; a `StateError` if it has several."""
        if len(self._miss_configs) != 1:
            with at(type(self).__name__):
                rule = "has several D's, each with settings of its own"
                raise StateError(rule, do="ask miss_configs, a dict by the Parameter's name")
        return next(iter(self._miss_configs.values()))

    def _miss_change(self, **settings: Any) -> None:
        with at(type(self).__name__):
            changed = replace(self._miss_only(), **settings)
        self.__dict__["_miss_configs"] = dict.fromkeys(self._miss_configs, changed)

    def _miss_merged_forward(self, args: Any, kwargs: Any) -> Any:
        if self.training and torch.is_grad_enabled():
            with at(type(self).__name__):
                raise merged_error("a training forward would give miss_D no gradient")
        if self._miss_depth.count:
            bases: Any = {p: self._buffers[base_name(p)] for p in self._miss_configs}
            return self.miss_host.with_weights(self, bases, args, kwargs)
        return super().forward(*args, **kwargs)

    def _miss_check_shapes(self) -> None:
        """Raise a `ShapeError` if a Parameter or its D was replaced by one of another shape."""
        for parameter, config in self._miss_configs.items():
            sizes = self.miss_host.sizes(self, parameter)
            d_shape = getattr(self, d_name(parameter)).shape
            if sizes != config.shape or d_shape != config.d_shape:
                with at(type(self).__name__):
                    rule = f"{parameter} or its D has another shape than when it was adapted"
                    expected, actual = (config.shape, config.d_shape), (sizes, tuple(d_shape))
                    do = "miss.eject(model) before a layer is resized, and inject again after"
                    raise ShapeError(rule, expected=expected, actual=actual, do=do)

    def _miss_seam_is_ours(self) -> bool:
        ours = type(self).miss_delta is AdaptedLayer.miss_delta
        return ours and "miss_delta" not in self.__dict__


def _reset_parameters(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Initialise the layer as its own type does, and each D to zero.

    Raises:
        StateError: the layer is merged.
    """
    self._miss_zero()
    return super(AdaptedLayer, self).reset_parameters(*args, **kwargs)
