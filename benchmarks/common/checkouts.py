"""The package of several checkouts: all in one process, or each in fresh ones."""

import compileall
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

IMPORT = """
import json, sys, time
import torch, einops
sys.path.insert(0, sys.argv[1])
before = set(sys.modules)
start = time.perf_counter()
import miss
seconds = time.perf_counter() - start
print(json.dumps([miss.__file__, seconds, sorted(set(sys.modules) - before)]))
"""
Modules = dict[str, Any]


class Import(NamedTuple):
    """One `import miss` in a process that has imported torch and einops."""

    seconds: float
    added: list[str]  # modules beyond its own


@contextmanager
def standing(modules: Modules) -> Iterator[None]:
    """For imports, `miss` is these modules alone; what is imported of it meanwhile joins them."""

    def taken() -> Modules:
        names = [name for name in sys.modules if name.split(".")[0] == "miss"]
        return {name: sys.modules.pop(name) for name in names}

    kept = taken()
    sys.modules.update(modules)
    try:
        yield
    finally:
        modules.update(taken())
        sys.modules.update(kept)


def load(checkout: Path) -> Modules:
    """The package of a checkout, and of no other."""
    modules: Modules = {}
    sys.path.insert(0, str(checkout))
    try:
        with standing(modules):
            importlib.import_module("miss")
    finally:
        sys.path.remove(str(checkout))
    for module in modules.values():
        assert Path(module.__file__).is_relative_to(checkout / "miss"), module
    return modules


def fresh_imports(checkouts: Sequence[Path]) -> list[Import]:
    """One for each, in this order, in processes of their own; from bytecode, as pip installs."""
    result = []
    with tempfile.TemporaryDirectory() as folder:
        copies = {}
        for number, checkout in enumerate(dict.fromkeys(checkouts)):
            copies[checkout] = Path(folder).resolve() / str(number)
            shutil.copytree(checkout / "miss", copies[checkout] / "miss")
            compileall.compile_dir(copies[checkout], quiet=2)
        for checkout in checkouts:
            command = [sys.executable, "-c", IMPORT, str(copies[checkout])]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            file, seconds, modules = json.loads(done.stdout)
            assert Path(file).is_relative_to(copies[checkout]), file
            added = [name for name in modules if name.split(".")[0] != "miss"]
            result.append(Import(seconds, added))
    return result
