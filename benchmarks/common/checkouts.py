"""The package of several checkouts: all in one process, or each in fresh ones."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

IMPORT = """
import json, os, sys, time
import torch, einops
for checkout in sys.argv[1:]:
    if not os.fork():
        sys.path.insert(0, checkout)
        before = set(sys.modules)
        start = time.perf_counter()
        import miss
        seconds = time.perf_counter() - start
        found = [miss.__file__, seconds, sorted(set(sys.modules) - before)]
        print(json.dumps(found), flush=True)
        os._exit(0)
    os.wait()
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
    """One for each, in this order, each in a process of its own."""
    command = [sys.executable, "-c", IMPORT, *map(str, checkouts)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = []
    for checkout, line in zip(checkouts, done.stdout.splitlines(), strict=True):
        file, seconds, modules = json.loads(line)
        assert Path(file).is_relative_to(checkout / "miss"), file
        added = [name for name in modules if name.split(".")[0] != "miss"]
        result.append(Import(seconds, added))
    return result
