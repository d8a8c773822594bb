"""What users rely on: names, signatures, and docstrings that say shapes and errors."""

import dis
import importlib
import inspect
import pkgutil
import types
from collections.abc import Iterator

import pytest
from torch import Tensor

import miss
from miss import AdaptedLayer
from miss.layers.names import TorchLayer
from tests.public_api import SNAPSHOT, public, snapshot

# The docstrings of the layers speak for their base classes.
BASES = (AdaptedLayer, TorchLayer)
# Methods of torch's types, and of a host of the user's own, have these names too.
FOREIGN = {"forward", "product"}


def callables() -> dict[str, object]:
    """What is public and has something to say of shapes or errors."""
    found = {}
    for name, value in public().items():
        error = inspect.isclass(value) and issubclass(value, Exception)
        if not isinstance(value, types.ModuleType) and not error and value not in BASES:
            found[name] = value
    return found


CALLABLES = callables()


def test_public_names_and_signatures_are_those_of_the_snapshot():
    advice = (
        "the public API has changed; if it should, "
        "run `python -m tests.public_api` and add a line to docs/changelog.md"
    )
    assert snapshot() == SNAPSHOT.read_text(), advice


def plain(function: object) -> object:
    """The function that a property, a method or a decorator wraps."""
    return inspect.unwrap(getattr(function, "fget", getattr(function, "__func__", function)))


def code_of(function: object) -> Iterator[types.CodeType]:
    """The code of a function, a property or a class's constructor, with what is defined inside.

    Of a dataclass that is its ``__post_init__``; what dataclasses write is left out.
    """
    if inspect.isclass(function):
        function = getattr(function, "__post_init__", function.__init__)
    code = getattr(plain(function), "__code__", None)
    pending = [code] if code and code.co_filename.endswith(".py") else []
    while pending:
        code = pending.pop()
        yield code
        pending += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]


def own_functions() -> Iterator[object]:
    """Every function and method of the package."""
    for info in pkgutil.walk_packages(miss.__path__, "miss."):
        room = importlib.import_module(info.name)
        for value in vars(room).values():
            if getattr(value, "__module__", None) == room.__name__:
                yield from vars(value).values() if inspect.isclass(value) else [value]


def raising_names() -> set[str]:
    """The names of our functions that can raise.

    Each has a raise statement, or uses the name of one that can.
    """
    codes: list[types.CodeType] = []
    for function in own_functions():
        if inspect.isroutine(function):
            codes += code_of(function)
    raising = {code.co_name for code in codes if raises(code)} - FOREIGN
    while True:
        callers = {code.co_name for code in codes if raising & set(code.co_names)}
        more = callers - raising - FOREIGN
        if not more:
            return raising
        raising |= more


def raises(code: types.CodeType) -> bool:
    """Whether it raises an error of its own; a bare ``raise`` passes on another's."""
    return any(step.opname == "RAISE_VARARGS" and step.arg for step in dis.get_instructions(code))


RAISING = raising_names()


@pytest.mark.parametrize("name", CALLABLES)
def test_docstring_says_what_is_raised(name: str):
    """An approximation: a name stands for all functions of that name.

    It may ask for too much, and has not so far.
    """
    value = CALLABLES[name]
    can = any(raises(code) or RAISING & set(code.co_names) for code in code_of(value))
    assert can == ("Raises:" in value.__doc__), f"{name} {'can raise' if can else 'raises nothing'}"


@pytest.mark.parametrize("name", CALLABLES)
def test_docstring_says_shapes(name: str):
    """Of a tensor that is an argument or the result, or goes through a layer.

    A dict of them has the shapes of its layers.
    """
    value = CALLABLES[name]
    annotations = inspect.get_annotations(plain(value)).values()
    if any(annotation in (Tensor, Tensor | None) for annotation in annotations) or hasattr(
        value, "forward"
    ):
        assert "Shape:" in value.__doc__, name
