"""The numbers in the documentation are those that the benchmarks wrote."""

import json
import pathlib
import re

import pytest

import conv_cost
import layer_cost
import model_cost
import publish
import quantised_cost
from common import plots

ROOT = pathlib.Path(__file__).parent.parent


def result(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_tables_of_the_performance_page_are_the_results():
    page = (ROOT / "docs" / "performance.md").read_text()
    layers = result("layer_cost")
    for threads in (1, 2):
        assert layer_cost.tables(layers[f"threads={threads}"], threads) in page
    assert layer_cost.overview(layers) in page
    assert model_cost.report(result("model_cost")) in page
    assert conv_cost.tables(result("conv_cost")["step"]) in page
    assert quantised_cost.tables(result("quantised_cost")) in page


@pytest.mark.parametrize("name", publish.SCRIPTS)
def test_tables_of_the_experiments_page_are_the_results(name: str):
    page = publish.PAGE.read_text()
    assert publish.filled(page, name, publish.SCRIPTS[name].report(publish.load(name))) == page
    assert f"<!-- {name} -->" in page


@pytest.mark.parametrize("name", publish.SCRIPTS)
def test_figures_are_of_the_results(name: str):
    figures = [path for path in plots.FIGURES.glob("*.svg") if path.stem.startswith(name)]
    assert figures
    assert all(plots.digest(publish.sources(name)) in path.read_text() for path in figures)


@pytest.mark.parametrize("page", ["README.md", "docs/how-to/choose-a-form.md"])
def test_advice_has_the_figures_of_the_experiments_page(page: str):
    text, head = (ROOT / page).read_text(), "| start with | measured |"
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    advice = "".join(tables if page != "README.md" else [each for each in tables if head in each])
    figures = set(re.findall(r"\d+\.\d+", advice))
    assert figures
    assert figures <= set(re.findall(r"\d+\.\d+", publish.PAGE.read_text()))
