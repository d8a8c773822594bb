"""A forward that a layer's object has besides its type's: accelerate's hook, or a user's own.

accelerate's ``add_hook_to_module`` puts a partial at ``forward`` on the object. The partial calls
``_old_forward``, the type's forward bound to the object. ``remove_hook_from_module`` leaves that
bound forward at ``forward``. An adapted layer must find its adapted forward at these places.
"""

from collections.abc import Iterator
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from miss.errors import StateError

__all__ = ["change_class_", "offloaded_error", "offloads", "refuse_replaced", "replaced"]


def change_class_(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Give a layer another class; forwards of the old one that the object holds are bound anew."""
    own, held = type(layer).forward, layer.__dict__
    places = [(held, "forward"), (held, "_old_forward")]
    if _is_hooked(layer):  # ``__wrapped__``, from which signatures are read
        places.append((held["forward"].__dict__, "__wrapped__"))
    bound = [(place, key) for place, key in places if _is_bound(place.get(key), own, layer)]
    object.__setattr__(layer, "__class__", cls)
    for place, key in bound:
        place[key] = MethodType(cls.forward, layer)


def replaced(layer: nn.Module) -> tuple[str, str] | None:
    """What stands in the place of the type's forward on the object, and how to remove it, or None.

    accelerate's hooks and bound forwards of the type do not count.
    """
    held, hooked = layer.__dict__, _is_hooked(layer)
    stored = held.get("_old_forward" if hooked else "forward")
    if "forward" not in held or _is_bound(stored, type(layer).forward, layer):
        return None
    what, do = "an instance-level forward", "del layer.forward"
    if not hooked:
        return what, do
    return f"{what} under accelerate's hook", f"accelerate's remove_hook_from_module, then {do}"


def refuse_replaced(layer: nn.Module) -> None:
    """Raise a `StateError` if the object has a forward of its own: it may call the adapted one."""
    if (found := replaced(layer)) is not None:
        rule = f"has {found[0]}, which may call the adapted forward that eject takes away"
        raise StateError(rule, do=f"remove it ({found[1]}), eject, then set it again")


def offloads(module: nn.Module, *, below: bool = False) -> bool:
    """Whether an accelerate hook on a module keeps its weights elsewhere between two calls.

    Its tensors are then on the meta device, and others take their place during a call. With
    ``below``, the hook must do so with the weights of all modules in this one.
    """
    if "_hf_hook" not in module.__dict__:  # at once, since every module is asked
        return False
    for hook in _hooks(module.__dict__["_hf_hook"]):
        offloading = getattr(hook, "offload", False) is True
        of_all = getattr(hook, "place_submodules", False) is True
        if offloading and (of_all or not below):
            return True
    return False


def offloaded_error(why: str) -> StateError:
    """The error of a call that a layer refuses while accelerate offloads its weights."""
    rule = f"accelerate offloads its weights, which are on meta between two calls: {why}"
    do = "accelerate.hooks.remove_hook_from_submodules(model) first; load a model that was loaded "
    do += "with offload again without it (a device_map that puts nothing on 'disk', nor on 'cpu' "
    do += "besides another device)"
    return StateError(rule, do=do)


def _hooks(hook: Any) -> Iterator[Any]:
    """A hook of accelerate, or those that its ``SequentialHook`` holds."""
    yield hook
    for inner in getattr(hook, "hooks", ()):
        yield from _hooks(inner)


def _is_hooked(layer: nn.Module) -> bool:
    """Whether accelerate's partial is the forward of the object."""
    forward = layer.__dict__.get("forward")
    if not isinstance(forward, partial) or "_hf_hook" not in layer.__dict__:
        return False
    home = getattr(forward.func, "__module__", None)
    return home == "accelerate.hooks" and len(forward.args) == 1 and forward.args[0] is layer


def _is_bound(forward: Any, own: Any, layer: nn.Module) -> bool:
    """Whether ``forward`` is the function ``own`` bound to ``layer``."""
    bound = isinstance(forward, MethodType) and forward.__func__ is own
    return bound and forward.__self__ is layer
