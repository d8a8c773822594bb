import pathlib
import re
import subprocess
import sys

import pytest

import miss

ROOT = pathlib.Path(__file__).parent.parent


def test_readme_example_runs_as_shown(capsys, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert "misse" in capsys.readouterr().out


def test_import_needs_torch_and_einops_only():
    code = "import sys, torch, einops; before = set(sys.modules); import miss; print(sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert all(name.split(".")[0] == "miss" for name in re.findall(r"'([^']+)'", loaded)), loaded


def test_public_names_exist_and_have_docstrings():
    assert sorted(miss.__all__) == miss.__all__
    for name in miss.__all__:
        assert getattr(miss, name).__doc__, name


def test_imports_run_downward():
    order = ["errors", "functional", "adaptable", "linear", "targets", "merging", "inject", "adapter"]
    order += ["files", "fitting", "checkpoint"]
    assert {path.stem for path in (ROOT / "miss").glob("*.py")} == {*order, "__init__"}
    for position, room in enumerate(order):
        source = (ROOT / "miss" / f"{room}.py").read_text()
        used = re.findall(r"^from miss\.(\w+) import|^from miss import (\w+)", source, re.MULTILINE)
        assert {a or b for a, b in used} <= set(order[:position]), room
