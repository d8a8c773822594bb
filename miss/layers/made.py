"""The classes of adapted layers: the package's own, and those made for other types.

A made class has no import path, so its objects pickle by type, host and form.
"""

from typing import Any

from torch import nn

from miss.errors import StateError
from miss.forms import METHODS, Form
from miss.layers import conv, embedding, linear
from miss.layers.base import AdaptedLayer
from miss.layers.host import Host

__all__ = ["class_of", "path_of"]

# The class of each (type, host, form).
_CLASSES: dict[tuple[type[nn.Module], type[Host], type[Form]], type[AdaptedLayer]] = {}
for _class in (*linear.CLASSES, *embedding.CLASSES, *conv.CLASSES):
    _CLASSES[_class.miss_type, _class.miss_host, _class.miss_form] = _class


def class_of(layer_type: type[nn.Module], host: type[Host], form: type[Form]) -> type[AdaptedLayer]:
    """The class of adapted layers of a type, made at the first call."""
    key = layer_type, host, METHODS[form.name]
    if key not in _CLASSES:
        _CLASSES[key] = _make_class(*key)
    return _CLASSES[key]


def path_of(kind: type) -> str:
    """The import path of a type."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _make_class(
    layer_type: type[nn.Module], host: type[Host], form: type[Form]
) -> type[AdaptedLayer]:
    """The class of adapted layers of a registered type. They pickle by type, host and form."""
    doc = f"{layer_type.__name__}, adapted with {form.prefix}."
    body = {"miss_form": form, "miss_host": host, "miss_type": layer_type, "__doc__": doc}
    body |= {"__module__": layer_type.__module__, "__reduce_ex__": _reduce, **host.attributes}
    if hasattr(layer_type, "__deepcopy__"):
        body["__deepcopy__"] = _deepcopy
    name = f"{form.prefix}{layer_type.__name__}"
    meta: Any = type(layer_type)
    made: type[AdaptedLayer] = meta(name, (AdaptedLayer, layer_type), body)
    return made


def _rebuild(
    layer_type: type[nn.Module], host: type[Host], form: type[Form], build: Any, *args: Any
) -> Any:
    """An object of a made class, before its state; the process need not have registered the type.

    ``build(*args)`` gives one of the layer's own type.
    """
    layer = build(*args)
    object.__setattr__(layer, "__class__", class_of(layer_type, host, form))
    return layer


def _reduce(self: AdaptedLayer, protocol: Any) -> Any:
    """Pickle by the import paths of type, host and form, because a made class has none.

    The type may pickle in its own way, as long as ``__dict__`` is its state or in its state.
    """
    reduced: Any = super(AdaptedLayer, self).__reduce_ex__(protocol)
    key, made = (self.miss_type, self.miss_host, self.miss_form), type(self)
    if isinstance(reduced, str) or made is not class_of(*key):  # swapped again, as FSDP does
        return reduced
    build, args, *rest = reduced
    state = rest[0] if rest else {}
    if isinstance(state, dict) and "_miss_configs" not in state:
        raise _lost(self, "__reduce__ or __getstate__")
    own = (self.miss_type if part is made else part for part in (build, *args))
    return (_rebuild, (*key, *own), *rest)


def _deepcopy(self: Any, memo: Any) -> Any:
    """As the type's own ``__deepcopy__``, if that copies the adapter."""
    copied = super(AdaptedLayer, self).__deepcopy__(memo)
    if type(copied) is not type(self) or copied.miss_configs != self.miss_configs:
        raise _lost(self, "__deepcopy__")
    return copied


def _lost(layer: AdaptedLayer, method: str) -> StateError:
    rule = f"cannot be copied: the {method} of {path_of(layer.miss_type)} leaves out the adapter"
    error = StateError(rule, do="let it make an object of type(self), with all of __dict__")
    error.where = type(layer).__name__
    return error
