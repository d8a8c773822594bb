"""Two checkouts of the package side by side: here this one, and a copy of it."""

import json
import pathlib
import shutil
import sys

import pytest
import torch

from benchmarks import versions
from benchmarks.versions import OTHER, THIS, Settings
from common import checkouts
from layer_cost import Shape

ROOT = pathlib.Path(__file__).parent.parent
SMALL = Settings((Shape(96, 80),), (3,), (1,), seconds=0.0, blocks=1, injections=2, imports=2)


@pytest.fixture
def copy(tmp_path: pathlib.Path) -> pathlib.Path:
    shutil.copytree(ROOT / "miss", tmp_path / "miss")
    return tmp_path


def two_imports(paths: list[pathlib.Path]) -> list[checkouts.Import]:
    found = dict(zip(paths[:2], checkouts.fresh_imports(paths[:2])))
    return [found[path] for path in paths]


def imported() -> dict[str, object]:
    return {name: module for name, module in sys.modules.items() if name.startswith("miss")}


def test_a_copy_costs_the_same_bytes(copy: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(versions, "fresh_imports", two_imports)  # the others would take long
    before = imported()
    result = versions.compare({THIS: ROOT, OTHER: copy}, SMALL)
    assert imported() == before
    kinds = [(row["of"], row["method"]) for row in result["times"]]
    layers = [(of, method) for method in versions.METHODS for of in ("step", "forward")]
    assert kinds == layers + [("inject", method) for method in versions.METHODS]
    for row in result["times"]:
        assert row["of_medians"] == row["ms"][THIS] / row["ms"][OTHER]
        if row["of"] == "step":
            assert row["peak"][THIS] == row["peak"][OTHER] > 3 * (96 + 80) * 4
            assert row["saved"][THIS] == row["saved"][OTHER]
    assert result["times"][0]["saved"][THIS] == 3 * 64 * 4
    assert result["imports"]["added"][THIS] == result["imports"]["added"][OTHER]
    text = versions.report(json.loads(json.dumps(result)))
    assert "equal in 2 of 2 cells" in text
    result["times"][0]["saved"][THIS] += 1
    assert "equal in 1 of 2 cells" in versions.report(result)
    assert "| 769 / 768 |" in versions.report(result)


def test_each_version_runs_its_own_code(copy: pathlib.Path):
    one, two = checkouts.load(ROOT), checkouts.load(copy)
    assert one.keys() == two.keys()
    assert pathlib.Path(two["miss"].__file__) == copy / "miss" / "__init__.py"
    assert all(one[name] is not two[name] for name in one)
    layers = versions.pair({THIS: one, OTHER: two}, Shape(96, 80), "misse")
    assert type(layers[THIS]) is one["miss"].MiSSeLinear
    assert type(layers[OTHER]) is two["miss"].MiSSeLinear


def test_a_version_that_computes_something_else_is_found(copy: pathlib.Path):
    both = {THIS: checkouts.load(ROOT), OTHER: checkouts.load(copy)}
    layers = versions.pair(both, Shape(96, 80), "miss")
    x, dy = torch.randn(3, 96, requires_grad=True), torch.randn(3, 80)
    versions.check(layers, x, dy)
    layers[OTHER].scale = 1.1
    with pytest.raises(AssertionError, match="differ"):
        versions.check(layers, x, dy)
