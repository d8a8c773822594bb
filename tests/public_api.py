"""The public names of `miss` and their signatures.

``python -m tests.public_api`` writes them to ``public_api.txt``.
"""

import inspect
import pathlib
import types

import miss
from miss.forms import LayerConfig
from miss.layers.names import ShortName, TorchLayer
from miss.state_dicts import IncompatibleKeys
from miss.summary import LayerSummary

SNAPSHOT = pathlib.Path(__file__).parent / "public_api.txt"
# Beside the names in `__all__`: the base class of the package's own layers, and what public
# functions and attributes return.
BESIDE = (IncompatibleKeys, LayerConfig, LayerSummary, TorchLayer)
# Methods that the rest of the package uses, and nobody else should.
INTERNAL = {"extra_repr", "fields", "from_fields"}


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
            for key in vars(value):
                member = getattr(value, key)
                known = inspect.isroutine(member) or isinstance(member, property)
                if known and not key.startswith("_") and key not in INTERNAL:
                    found[f"{name}.{key}"] = member
    return dict(sorted(found.items()))


def signature(value: object) -> str:
    """What a caller relies on, behind the name."""
    if isinstance(value, types.ModuleType):
        return ": module"
    if isinstance(value, property):
        returns = inspect.signature(value.fget).return_annotation
        assigned = ", can be assigned" if value.fset else ""
        return f": property -> {inspect.formatannotation(returns)}{assigned}"
    if inspect.isclass(value) and issubclass(value, Exception):
        return f": exception, {', '.join(base.__name__ for base in value.__bases__)}"
    return str(inspect.signature(value))


def short_names() -> dict[str, str]:
    """The short names of the package's own layers, which are descriptors: what each stands for."""
    found = {}
    for name, value in vars(TorchLayer).items():
        if isinstance(value, ShortName):
            assigned = ", can be assigned" if value.settable else ""
            home = f"{TorchLayer.__module__}.{TorchLayer.__qualname__}"
            found[f"{home}.{name}"] = f": short for miss_{name}{assigned}"
    return found


def snapshot() -> str:
    """One line for each public name."""
    lines = {name: signature(value) for name, value in public().items()} | short_names()
    return "".join(f"{name}{lines[name]}\n" for name in sorted(lines))


if __name__ == "__main__":
    SNAPSHOT.write_text(snapshot())
