"""The errors that `miss` raises; `except MissError` catches them all.

Each class also derives from the built-in that a caller would expect, so `except ValueError` and the
like keep working.
"""

from collections.abc import Sequence

__all__ = ["CheckpointError", "MissError", "ShapeError", "StateError", "TargetError"]
__all__ += ["at", "brief", "merged_error", "named", "no_adapter_error", "replaced_error", "some"]


class MissError(Exception):
    """Base class of every error of this package.

    Its text has up to four lines: place and rule, what was expected, what was found, what to do.
    The code that raises it gives all of these except the place, which `at` adds.
    """

    def __init__(
        self, rule: str, *, expected: object = None, actual: object = None, do: str = ""
    ) -> None:
        super().__init__(rule)
        self.rule, self.expected, self.actual, self.do = rule, expected, actual, do
        self.where = ""

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.rule}" if self.where else self.rule]
        if self.expected is not None:
            lines.append(f"  expected: {self.expected}")
        if self.actual is not None:
            lines.append(f"  actual:   {self.actual}")
        if self.do:
            lines.append(f"  do:       {self.do}")
        return "\n".join(lines)


class ShapeError(MissError, ValueError):
    """A rank, size or other setting of a layer that is outside its rule."""


class TargetError(MissError, LookupError):
    """A target that matches nothing, or a module that cannot be adapted."""


class StateError(MissError, RuntimeError):
    """A call that does not fit the state that the model is in."""


class CheckpointError(MissError, ValueError):
    """An adapter file or state dict that is damaged or does not fit the model."""


class at:  # noqa: N801  # it reads as a word: with at("encoder.0")
    """A context that gives a `MissError` that leaves it its place: a module, a file or a function.

    The innermost place stays.

    >>> with at("encoder.0"):
    ...     raise ShapeError("rank must be positive", actual=0)
    Traceback (most recent call last):
    miss.errors.ShapeError: encoder.0: rank must be positive
      actual:   0
    """

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, MissError):
            error.where = error.where or self.where


def brief(value: object) -> str:
    """The type and the start of the ``repr`` of a wrong argument, on one line."""
    kind, text = type(value).__name__, " ".join(repr(value).split())
    text = text if len(text) <= 60 else f"{text:.57}..."
    return text if value is None or text.startswith(kind) else f"{kind} {text}"


def named(name: str) -> str:
    """The name of a module for messages and tables; ``"(model)"`` for the root's empty name."""
    return name or "(model)"


def some(names: Sequence[str]) -> str:
    """Up to five names for a message, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def merged_error(why: str) -> StateError:
    """The error of a call that a merged layer refuses; ``why`` says what would go wrong."""
    return StateError(f"is merged: {why}", do="miss.unmerge(model) first")


def replaced_error(parameter: str) -> StateError:
    """The error of an adapted layer whose D, the Parameter of this name, has been replaced."""
    rule = f"its {parameter} is no parameter of its own any more (pruned, parametrized?)"
    return StateError(rule, do="remove what replaced it")


def no_adapter_error() -> StateError:
    """The error of a function that needs adapters, for a model without any."""
    return StateError("the model has no adapter", do="miss.inject(model, targets) first")
