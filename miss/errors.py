"""The errors that `miss` raises; `except MissError` catches them all.

Each class also derives from the built-in that a caller would expect, so `except ValueError` and the like keep working.
"""

__all__ = [
    "CheckpointError",
    "MissError",
    "ShapeError",
    "StateError",
    "TargetError",
    "explain",
    "is_merged",
]


class MissError(Exception):
    """Base class of every error of this package."""


class ShapeError(MissError, ValueError):
    """A rank, size or other setting of a layer that is outside its rule."""


class TargetError(MissError, LookupError):
    """A target that matches nothing, or a module that cannot be adapted."""


class StateError(MissError, RuntimeError):
    """A call that does not fit the state that the model is in."""


class CheckpointError(MissError, ValueError):
    """An adapter file or state dict that is damaged or does not fit the model."""


def explain(
    where: str, rule: str, *, expected: object = None, actual: object = None, do: str = ""
) -> str:
    """The one shape of our messages: where, the rule, expected against actual, what to do."""
    lines = [f"{where}: {rule}"]
    if expected is not None:
        lines.append(f"  expected: {expected}")
    if actual is not None:
        lines.append(f"  actual:   {actual}")
    if do:
        lines.append(f"  do:       {do}")
    return "\n".join(lines)


def is_merged(where: str, why: str) -> StateError:
    """The error of what cannot be done while ``where`` is merged."""
    return StateError(explain(where, f"is merged: {why}", do="miss.unmerge(model) first"))
