"""The wheel holds the package, and it is what these tests import."""

import importlib.metadata
import json
import pathlib
import shutil
import subprocess
import sys
import zipfile

import miss
from tests.installed import ENVIRONMENT, ROOT

BUILD = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"


def test_every_file_of_the_package_is_in_the_wheel(tmp_path: pathlib.Path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "miss", source / "miss")
    command = [sys.executable, "-c", BUILD, str(tmp_path)]
    build = subprocess.run(command, cwd=source, capture_output=True, text=True, env=ENVIRONMENT)
    assert build.returncode == 0, build.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [path for path in (ROOT / "miss").rglob("*") if path.suffix in (".py", ".typed")]
    assert packed == {path.relative_to(ROOT).as_posix() for path in files}
    assert {"miss/py.typed", "miss/layers/__init__.py", "miss/interop/__init__.py"} <= packed


def test_the_package_under_test_is_the_installed_one():
    about = importlib.metadata.distribution("miss-torch").read_text("direct_url.json") or "{}"
    editable = json.loads(about).get("dir_info", {}).get("editable", False)
    assert (pathlib.Path(miss.__file__).parent == ROOT / "miss") == editable
    code = "import miss; print(miss.__file__)"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert run.stdout.strip() == miss.__file__, run.stderr
