"""The documentation holds what it says.

Its code runs, its links lead somewhere, and the site builds without a warning.
"""

import html.parser
import pathlib
import re
import subprocess
import sys
import textwrap
import types
import zlib

import pytest
import torch

import miss
from tests.installed import ENVIRONMENT, ROOT
from tests.public_api import public

FILES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
PAGES = {str(path.relative_to(ROOT)): path for path in FILES}
FENCE = re.compile(r"^( *)(```+|~~~+)(.*)\n((?:.*\n)*?)^\1\2 *$", re.MULTILINE)
PYTHON = "python"
HEAVY = ("docs/how-to/quantised.md",)  # run by tests/test_quantised_heavy.py
NOT_RUN = ("sh", "text", "json", "toml", "bibtex")  # beside the directives of MyST


def fences(page: str) -> list[tuple[int, str, str]]:
    """The fenced blocks of a page: the line of the fence, what stands behind it, the content."""
    text, found = PAGES[page].read_text(), []
    for each in FENCE.finditer(text):
        line = text.count("\n", 0, each.start()) + 1
        found.append((line, each[3].strip(), textwrap.dedent(each[4])))
    return found


def has_code(page: str) -> bool:
    return any(kind == PYTHON for _, kind, _ in fences(page))


@pytest.mark.parametrize("page", [page for page in PAGES if has_code(page) and page not in HEAVY])
def test_code_of_a_page_runs_as_shown(
    page: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    # What a page registers is forgotten after it.
    monkeypatch.setattr(miss.layers, "_HOSTS", dict(miss.layers._HOSTS))
    # One for all blocks; in sys.modules, so that pickle finds the classes of the page.
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    torch.manual_seed(0)
    for line, kind, code in fences(page):
        if kind == PYTHON:
            compiled = compile("\n" * line + code, str(PAGES[page]), "exec", dont_inherit=True)
            exec(compiled, module.__dict__)
    printed = without_numbers(capsys.readouterr().out)
    for line, kind, text in fences(page):
        assert kind != "text" or without_numbers(text) in printed, f"line {line}: not printed"


def without_numbers(text: str) -> str:
    return re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "0", text)


@pytest.mark.parametrize("page", PAGES)
def test_no_code_of_a_page_goes_unrun(page: str):
    text, blocks = PAGES[page].read_text(), fences(page)
    marks = re.findall(r"^ *(?:```|~~~)", text, re.MULTILINE)
    assert len(marks) == 2 * len(blocks), "a fence is not closed"
    for line, kind, _ in blocks:
        directive = kind.startswith("{") and not kind.startswith("{code")
        known = kind in (PYTHON, *NOT_RUN) or directive
        assert known, f"{page}, line {line}: ```{kind} is neither run nor known not to be code"


@pytest.mark.parametrize("page", PAGES)
def test_the_tests_that_a_page_names_exist(page: str):
    for file, name in re.findall(r"`(tests/\w+\.py)::(\w+)`", PAGES[page].read_text()):
        assert f"def {name}" in (ROOT / file).read_text(), f"{file}::{name}"


def test_the_contributing_page_lists_the_rooms_of_the_package():
    page = (ROOT / "docs" / "contributing.md").read_text()
    table = page.partition("| room | what is in it |")[2].partition("\n\n")[0]
    listed = re.findall(r"^\| `([\w/]+)` \|", table, re.MULTILINE)
    files = [path.relative_to(ROOT / "miss") for path in (ROOT / "miss").rglob("*.py")]
    rooms = {str(path.with_suffix("")).removesuffix("/__init__") for path in files}
    assert sorted(listed) == sorted(rooms - {"__init__", "interop"})


def test_links_of_the_readme_lead_somewhere():
    """Those of the other pages are checked by the build."""
    targets = re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text())
    for target in targets:
        if not re.match(r"https?:", target):
            name, _, anchor = target.partition("#")
            path = ROOT / name if name else ROOT / "README.md"
            assert path.exists(), target
            assert not anchor or anchor in anchors(path.read_text()), target


def anchors(markdown: str) -> set[str]:
    """The anchors that GitHub and MyST give to headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", markdown), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


class Sources(html.parser.HTMLParser):
    """What a browser loads by itself for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key in ("src", "srcset", "data", "poster") or (tag == "link" and key == "href"):
                self.found.append(value or "")


def test_the_site_builds_without_a_warning_and_needs_no_other_host(tmp_path: pathlib.Path):
    site = tmp_path / "site"
    strict = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q"]
    strict += ["-b", "html", "docs", str(site)]
    build = subprocess.run(strict, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
    assert build.returncode == 0, build.stderr

    _, _, _, _, content = (site / "objects.inv").read_bytes().split(b"\n", 4)
    documented = {line.split()[0] for line in zlib.decompress(content).decode().splitlines()}
    assert not set(public()) - documented, "public, but on no page of docs/reference"

    loaded: dict[str, str] = {}
    for path in site.rglob("*.html"):
        parser = Sources()
        parser.feed(path.read_text())
        loaded |= dict.fromkeys(parser.found, path.name)
    for path in site.rglob("*.css"):
        css = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
        named = re.findall(r"(?:url\(|@import)\s*['\"]?([^'\")\s]+)", css)
        loaded |= dict.fromkeys(named, path.name)
    elsewhere = [source for source in loaded if re.match(r"\w+:(?!image/)|//", source)]
    assert {source: loaded[source] for source in elsewhere} == {}
    assert "tex-svg.js" in " ".join(loaded)
