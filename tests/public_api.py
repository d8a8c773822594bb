"""The public names of `miss` and their signatures.

``python -m tests.public_api`` writes them to ``public_api.txt``.
"""

import inspect
import pathlib
import types

import miss
from miss import AdaptedLayer
from miss.summary import LayerSummary
from miss.checkpoint import IncompatibleKeys

SNAPSHOT = pathlib.Path(__file__).parent / "public_api.txt"
# Beside the names in `__all__`: the base class of the layers, and what public functions return.
BESIDE = (AdaptedLayer, IncompatibleKeys, LayerSummary)
# Methods that the rest of the package uses, and nobody else should.
INTERNAL = {
    "adapter_shape",
    "check_rank",
    "dense",
    "extra_repr",
    "new_adapter",
    "swap_",
    "swap_back_",
}
INTERNAL |= {"add_delta", "expand", "fused"}


def public() -> dict[str, object]:
    """Everything public, by the name under which the reference has it.

    Methods are under the class that defines them.
    """
    found: dict[str, object] = {f"{each.__module__}.{each.__qualname__}": each for each in BESIDE}
    rooms = [miss]
    for room in rooms:
        for name in room.__all__:
            found[f"{room.__name__}.{name}"] = value = getattr(room, name)
            if isinstance(value, types.ModuleType):
                rooms.append(value)
    for name, value in list(found.items()):
        if inspect.isclass(value):
            members = [
                (key, getattr(value, key))
                for key in vars(value)
                if not key.startswith("_") and key not in INTERNAL
            ]
            found |= {
                f"{name}.{key}": each
                for key, each in members
                if inspect.isroutine(each) or isinstance(each, property)
            }
    return dict(sorted(found.items()))


def signature(value: object) -> str:
    """What a caller relies on, behind the name."""
    if isinstance(value, types.ModuleType):
        return ": module"
    if isinstance(value, property):
        returns = inspect.signature(value.fget).return_annotation
        return f": property -> {inspect.formatannotation(returns)}"
    if inspect.isclass(value) and issubclass(value, Exception):
        return f": exception, {', '.join(base.__name__ for base in value.__bases__)}"
    return str(inspect.signature(value))


def snapshot() -> str:
    """One line for each public name."""
    return "".join(f"{name}{signature(value)}\n" for name, value in public().items())


if __name__ == "__main__":
    SNAPSHOT.write_text(snapshot())
