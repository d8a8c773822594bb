"""What a `state_dict` says of an adapted layer, and what is checked when one is loaded."""

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from miss.errors import StateError, at
from miss.forms import Form, LayerConfig
from miss.layers.host import d_name
from miss.tensors import is_data, positions, same

__all__ = ["KEY", "UNSET", "InitializedMark", "about_of", "check_form", "checked", "metadata"]
__all__ += ["settle"]

KEY = "miss"  # of a module's entry in `_metadata`
# Attribute of a layer whose D was made on meta and has no values yet: its frozen Parameters.
UNSET = "_miss_unset"


class InitializedMark:
    """The attribute with which transformers 5 marks a layer, or a Parameter, as initialised.

    Its ``from_pretrained`` builds the model on meta. It marks the Parameters that it finds in the
    checkpoint, gives the others uninitialised memory, and asks ``_init_weights`` of the model to
    fill them, which does not know D. All of them require grad. Finally it marks each module. When
    a layer is marked, each of its D's that was made on meta and has no mark becomes zero, and the
    Parameters that were frozen are frozen again.
    """

    name = "_is_hf_initialized"

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        if layer is None:
            return self
        if self.name not in layer.__dict__:
            raise AttributeError(self.name)
        return layer.__dict__[self.name]

    def __set__(self, layer: Any, value: Any) -> None:
        layer.__dict__[self.name] = value
        if not value or UNSET not in layer.__dict__:
            return
        if "transformers.initialization" not in sys.modules:  # transformers 4 marks no Parameter
            return
        for parameter in layer.miss_configs:
            d = getattr(layer, d_name(parameter))
            if not d.is_meta and not getattr(d, self.name, False):
                with torch.no_grad():
                    d.zero_()
        for key in layer.__dict__[UNSET]:
            layer._parameters[key].requires_grad_(False)
        settle(layer)

    def __delete__(self, layer: Any) -> None:
        if self.name not in layer.__dict__:
            raise AttributeError(self.name)
        del layer.__dict__[self.name]


def settle(layer: Any) -> None:
    """Take `UNSET` off a layer of which no D is on meta any more."""
    unset = UNSET in layer.__dict__
    if unset and not any(getattr(layer, d_name(p)).is_meta for p in layer.miss_configs):
        del layer.__dict__[UNSET]


def metadata(layer: Any, merged: bool) -> dict[str, Any]:
    """What the ``_metadata`` of a state says of an adapted layer under ``"miss"``."""
    return {"form": layer.miss_form.name, "alternate": layer.miss_alternate, "merged": merged}


def about_of(state: Mapping[str, Tensor], key: str) -> dict[str, Any]:
    """What a state's ``_metadata`` says of the layer of a D; empty if it is unknown."""
    layers = getattr(state, "_metadata", None) or {}
    return dict(layers.get(str(key).rpartition(".")[0], {}).get(KEY, {}))


def check_form(form: type[Form], about: Mapping[str, Any]) -> None:
    """Raise a `StateError` if a D comes from another form than ``form``; absent fields pass."""
    own = {"form": form.name, "alternate": form.alternate}
    theirs = {key: about.get(key, value) for key, value in own.items()}
    if theirs != own:
        raise StateError("D comes from another form or sign", expected=own, actual=theirs)


@contextmanager
def checked(layer: Any) -> Iterator[None]:
    """Check what is loaded into an adapted layer, once its own hooks have renamed their keys."""
    hooks = layer._load_state_dict_pre_hooks
    hooks[KEY] = partial(_check_layer, layer)  # the last one
    try:
        yield
    finally:
        del hooks[KEY]


def _check_layer(layer: Any, state: Mapping[str, Any], prefix: str, about: Any, *_: Any) -> None:
    for parameter, config in layer._miss_configs.items():
        names = parameter, d_name(parameter)
        own = [layer._parameters.get(name) for name in names]
        new = [state.get(prefix + name) for name in names]
        with at(prefix[:-1] or type(layer).__name__):
            _check(config, own, new, (about or {}).get(KEY) or {})


def _check(
    config: LayerConfig,
    own: Sequence[Tensor | None],
    incoming: Sequence[Any],
    about: Mapping[str, Any],
) -> None:
    """Check what is to be loaded into an adapted Parameter against what is there.

    Args:
        config: the Parameter's settings.
        own: its base and its D.
        incoming: the same of the state; None if the state has no such key.
        about: the state's metadata of the layer.

    Raises:
        StateError: the weight is merged, as its mark or its values show, so that the delta would
            count twice; or D is of another form.

    A `UserWarning` says if a base other than the present one is loaded under a D that is not zero
    and is not loaded with it.
    """
    (weight, d), (new, new_d) = own, incoming
    if new is not None and about.get("merged", False):
        raise _merged()
    if new_d is not None:
        check_form(config.form, about)
    if weight is None or d is None or new is None:
        return
    in_effect = d if new_d is None else new_d
    comparable = all(isinstance(t, Tensor) and is_data(t) for t in (weight, d, new, in_effect))
    if not comparable or new.shape != weight.shape or in_effect.shape != config.d_shape:
        return
    if weight.shape != config.shape or not in_effect.any():
        return
    if _looks_merged(config, weight, in_effect, new):
        raise _merged()
    if new_d is None and not same(new.to(weight.device, weight.dtype), weight):
        text = "another base weight is loaded under a D that was trained on the present one"
        warnings.warn(f"{text}; load adapters with miss.load", UserWarning, stacklevel=6)


def _looks_merged(config: LayerConfig, weight: Tensor, d: Tensor, new: Tensor) -> bool:
    """Whether at 64 positions ``new`` is ``weight`` plus the delta of ``d``, and not ``weight``."""
    with torch.no_grad():
        places = positions(weight.numel()).to(weight.device)
        index = torch.unravel_index(places, weight.shape)
        before = weight[index]
        after = new[tuple(i.to(new.device) for i in index)].to(weight.device, weight.dtype)
        wide = torch.promote_types(torch.promote_types(weight.dtype, d.dtype), torch.float32)
        scaled = config.scale * d.to(weight.device, wide)
        total = (before.to(wide) + config.form.at(scaled, config, places)).to(weight.dtype)
    return same(after, total) and not same(after, before)


def _merged() -> StateError:
    do = "save adapter_state_dict(model), which works merged or not, or unmerge before state_dict()"
    rule = "the incoming weight is a merged one, and the adapter would be added to it again"
    return StateError(rule, do=do)
