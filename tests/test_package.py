"""The package as a whole: what it loads, its public names, its rooms and their size."""

import ast
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

import miss
from tests.installed import ENVIRONMENT, ROOT

# From the ground up. A room imports only rooms that stand above it in this list.
ORDER = ["errors", "tensors", "checks", "functional", "gradients", "fused", "gradients_conv"]
ORDER += ["fused_conv", "around", "forms"]
ORDER += ["layers/host", "layers/loading", "layers/base", "layers/forwards", "layers/swap"]
ORDER += ["layers/names", "layers/linear", "layers/conv", "layers/embedding"]
ORDER += ["layers/bitsandbytes", "layers/transformers", "layers/made", "layers/quantised"]
ORDER += ["layers/example", "layers/__init__"]
ORDER += ["tree", "heads", "matching", "targets", "trained", "parents", "merging", "plan", "inject"]
ORDER += ["adapters", "summary", "verify", "files", "records", "state", "extra", "fingerprint"]
ORDER += ["state_dicts", "checkpoint"]
ORDER += ["interop/peft_files", "interop/lora", "interop/peft_config", "interop/peft"]
ORDER += ["interop/transformers", "interop/__init__", "__init__"]
SOURCES = sorted((ROOT / "miss").rglob("*.py"))


def test_import_needs_torch_and_einops_only():
    code = (
        "import sys, torch, einops; before = set(sys.modules); "
        "import miss; print(sorted(set(sys.modules) - before))"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    loaded = re.findall(r"'([^']+)'", run.stdout)
    assert "miss" in loaded
    assert all(name.split(".")[0] == "miss" for name in loaded), loaded


def test_public_names_exist_and_have_docstrings():
    assert sorted(miss.__all__) == miss.__all__
    for name in miss.__all__:
        assert getattr(miss, name).__doc__, name


def room_of(path: pathlib.Path) -> str:
    return path.relative_to(ROOT / "miss").with_suffix("").as_posix()


def statements(block: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that an import of the module runs: all but what is inside of functions."""
    for statement in block:
        yield statement
        if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for field in ("body", "orelse", "finalbody"):
                yield from statements(getattr(statement, field, []))
            for handler in getattr(statement, "handlers", []):
                yield from statements(handler.body)


def imported(source: str, room: str, rooms: set[str]) -> set[str]:
    """The rooms that a module imports; a package is its ``__init__``."""
    paths: list[list[str]] = []  # dotted names that are a room, or lie in one
    for statement in statements(ast.parse(source).body):
        if isinstance(statement, ast.Import):
            paths += [alias.name.split(".") for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            home = statement.module.split(".") if statement.module else []
            if statement.level:
                home = ["miss", *room.split("/")][: -statement.level] + home
            paths += [[*home, alias.name] for alias in statement.names]
    found = set()
    for top, *inner in paths:
        if top == "miss":
            names = ["/".join(inner), "/".join([*inner, "__init__"])]
            names += ["/".join(inner[:-1]), "/".join([*inner[:-1], "__init__"])]
            found.add(next(name for name in names if name in rooms))
    return found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("from miss.errors import at, named", {"errors"}),
        ("from miss.gradients import (\n    rows_of,\n    times as t,\n)", {"gradients"}),
        ("from miss import files, fused as fast", {"files", "fused"}),
        ("from miss import MiSSeLinear", {"__init__"}),
        ("from miss.layers import AdaptedLayer, loading", {"layers/__init__", "layers/loading"}),
        ("from miss.layers.base import AdaptedLayer", {"layers/base"}),
        ("from miss import layers, interop", {"layers/__init__", "interop/__init__"}),
        ("from miss.interop import lora, peft", {"interop/lora", "interop/peft"}),
        ("import torch, miss.state as state, os", {"state"}),
        ("import miss", {"__init__"}),
        ("import missing\nfrom torch.nn import miss", set()),
        ("from . import host\nfrom ..tree import Tree", {"layers/host", "tree"}),
        ("if True:\n    import miss.tree\nelse:\n    from miss import state", {"tree", "state"}),
        ("try:\n    pass\nexcept ImportError:\n    import miss.tree", {"tree"}),
        ("class A:\n    from miss import tree", {"tree"}),
        ("def f():\n    from miss import tree", set()),
    ],
)
def test_every_form_of_import_is_understood(line: str, expected: set[str]):
    assert imported(line, "layers/base", set(ORDER)) == expected


def test_imports_run_downward():
    assert sorted(ORDER) == sorted(map(room_of, SOURCES))
    for position, room in enumerate(ORDER):
        used = imported((ROOT / "miss" / f"{room}.py").read_text(), room, set(ORDER))
        assert used <= set(ORDER[:position]), room


@pytest.mark.parametrize("path", SOURCES, ids=room_of)
def test_files_are_short(path: pathlib.Path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 300, f"{len(lines)} lines"
