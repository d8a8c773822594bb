"""Write the figures and the tables of ``docs/experiments.md`` anew from ``benchmarks/results``.

One command does all of them. Each table stands in the page between ``<!-- NAME -->`` and
``<!-- end -->``.
"""

import re
from pathlib import Path
from typing import Any

import digits_vit
import gradient_norm
import math_word_problems
import no_free_lunch
import pareto
import word_frequency
import word_valence
from common import methods, plots
from common.runs import RESULTS, read
from measure import require_extras

PAGE = Path(__file__).parent.parent / "docs" / "experiments.md"
SCRIPTS: dict[str, Any] = {
    "no_free_lunch": no_free_lunch,
    "gradient_norm": gradient_norm,
    "word_valence": word_valence,
    "word_frequency": word_frequency,
    "math_word_problems": math_word_problems,
    "digits_vit": digits_vit,
    "pareto": pareto,
}


def sources(name: str) -> list[Path]:
    """The result files that a script's tables and figures show."""
    names = pareto.EXPERIMENTS if name == "pareto" else [name]
    return [RESULTS / f"{each}.json" for each in names]


def load(name: str) -> dict[str, Any]:
    """What `report` and `figures` of a script take."""
    return pareto.load() if name == "pareto" else read(*sources(name))


def filled(page: str, name: str, text: str) -> str:
    """The page with the table of one script replaced."""
    return re.sub(
        rf"(<!-- {name} -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{text}\n{found[2]}",
        page,
        flags=re.DOTALL,
    )


def main() -> None:
    """Write everything."""
    require_extras("publish", methods.EXTRAS)
    page = PAGE.read_text()
    for name, script in SCRIPTS.items():
        result = load(name)
        page = filled(page, name, script.report(result))
        for figure_name, figure in script.figures(result).items():
            plots.save(figure, figure_name, sources(name))
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
