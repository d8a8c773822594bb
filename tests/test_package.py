import pathlib
import re
import subprocess
import sys

import miss

ROOT = pathlib.Path(__file__).parent.parent


def test_import_needs_torch_and_einops_only():
    code = (
        "import sys, torch, einops; before = set(sys.modules); "
        "import miss; print(sorted(set(sys.modules) - before))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert all(name.split(".")[0] == "miss" for name in re.findall(r"'([^']+)'", loaded)), loaded


def test_public_names_exist_and_have_docstrings():
    assert sorted(miss.__all__) == miss.__all__
    for name in miss.__all__:
        assert getattr(miss, name).__doc__, name


def test_imports_run_downward():
    order = [
        "errors",
        "functional",
        "fused",
        "adaptable",
        "adapted",
        "linear",
        "targets",
        "merging",
        "inject",
        "adapter",
    ]
    order += ["files", "fitting", "checkpoint", "interop/directory", "interop/lora", "interop/peft"]
    rooms = {
        str(path.relative_to(ROOT / "miss").with_suffix(""))
        for path in (ROOT / "miss").rglob("*.py")
    }
    assert rooms == {*order, "__init__", "interop/__init__"}
    for position, room in enumerate(order):
        source = (ROOT / "miss" / f"{room}.py").read_text()
        used = re.findall(r"^from miss(?:\.([\w.]+))? import (.*)", source, re.MULTILINE)
        names = {home.replace(".", "/") for home, _ in used if home not in ("", "interop")}
        names |= {
            f"{home}/{name}".lstrip("/")
            for home, names in used
            if home in ("", "interop")
            for name in names.split(", ")
        }
        assert {name.split(" as ")[0] for name in names} <= set(order[:position]), room
