"""The paper's Table 8 and Figure 4: what each method reaches beside the time and the memory that a training step takes.

It collects the other experiments' results, as they are in ``benchmarks/results``. A method is on the front if no other is at
least as good in quality, time and memory, and better in one of them. Quality is a mean over few seeds: the share of 2,000
resamplings of the seeds (bootstrap) in which a method is on the front says how certain that is, times and memory as measured.
"""

import random
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import digits_vit
import math_word_problems
import no_free_lunch
import word_valence
from common import methods, plots
from common.runs import RESULTS, Estimate, read
from measure import require_extras, table

RESAMPLINGS = 2_000


class Experiment(NamedTuple):
    """A script with results, what its quality is, with how many digits, and +1 where more is better, -1 where less is."""

    script: Any
    label: str
    digits: int
    sign: int


EXPERIMENTS = {
    "word_valence": Experiment(word_valence, "Pearson r on held-out words", 4, 1),
    "math_word_problems": Experiment(math_word_problems, "loss on held-out problems", 3, -1),
    "digits_vit": Experiment(digits_vit, "accuracy on held-out digits, %", 1, 1),
    "no_free_lunch": Experiment(no_free_lunch, "loss on held-out points", 4, -1),
}


def front(points: Mapping[str, tuple[float, float, float]]) -> set[str]:
    """The names of the points that no other point dominates; less is better in each coordinate."""

    def dominated(name: str) -> bool:
        return any(
            other != points[name] and all(a <= b for a, b in zip(other, points[name]))
            for other in points.values()
        )

    return {name for name in points if not dominated(name)}


def certainty(experiment: Experiment, result: Mapping[str, Any]) -> dict[str, float]:
    """By method, the share of resamplings of the seeds in which it is on the front."""
    qualities, costs = experiment.script.quality(result), result["costs"]
    rng = random.Random(0)
    counts = dict.fromkeys(qualities, 0)
    seeds = sorted(set.intersection(*(set(values) for values in qualities.values())))
    for _ in range(RESAMPLINGS):
        drawn = rng.choices(
            seeds, k=len(seeds)
        )  # the same for all methods, as the seeds are paired
        means = {
            name: statistics.fmean(values[seed] for seed in drawn)
            for name, values in qualities.items()
        }
        for name in front(
            {name: point(experiment, mean, costs[name]) for name, mean in means.items()}
        ):
            counts[name] += 1
    return {name: count / RESAMPLINGS for name, count in counts.items()}


def point(
    experiment: Experiment, quality: float, cost: Mapping[str, Any]
) -> tuple[float, float, float]:
    """Quality, time and memory, turned so that less is better."""
    return -experiment.sign * quality, cost["step"]["ms"], cost["memory"]


def report(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One table for each experiment, in Markdown."""
    parts = []
    for name, experiment in EXPERIMENTS.items():
        result = results[name]
        shares, qualities = certainty(experiment, result), experiment.script.quality(result)
        rows = []
        for method, values in sorted(
            qualities.items(),
            key=lambda item: -experiment.sign * statistics.fmean(item[1].values()),
        ):
            cost = result["costs"][method]
            low, high = cost["step"]["quartiles"]
            time = f"{cost['step']['median']:.2f} ({low:.2f} to {high:.2f})"
            cells = [
                method,
                cost["trainable"],
                Estimate.of(list(values.values())).text(experiment.digits),
                time,
                f"{cost['step']['ms']:.4g}",
            ]
            rows.append(
                [
                    *cells,
                    f"{cost['memory'] / 2**20:.3g}",
                    f"{cost['start_ms']:.3g}",
                    f"{100 * shares[method]:.0f} %",
                ]
            )
        head = [
            "method",
            "trained",
            experiment.label,
            "step / LoRA's (quartiles)",
            "step, ms",
            "memory, MiB",
            "start, ms",
        ]
        parts.append(f"`{name}`:\n\n" + table([*head, "on the front"], rows))
    return "\n\n".join(parts)


def figures(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The paper's Figure 4, by name: quality against step time, and against peak memory."""
    figure, axes = plots.panels(2, len(EXPERIMENTS), width=3.1)
    for column, (name, experiment) in enumerate(EXPERIMENTS.items()):
        result = results[name]
        for method, values in experiment.script.quality(result).items():
            mean, half = Estimate.of(list(values.values()))
            cost = result["costs"][method]
            for axis, x in (
                (axes[column], cost["step"]["ms"]),
                (axes[column + len(EXPERIMENTS)], cost["memory"] / 2**20),
            ):
                axis.errorbar(x, mean, half, **plots.look(method, linestyle="", capsize=2))
        axes[column].set(title=name, xlabel="training step, ms", ylabel=experiment.label)
        axes[column + len(EXPERIMENTS)].set(
            xlabel="memory of training, MiB", ylabel=experiment.label
        )
        if experiment.sign < 0:
            axes[column].invert_yaxis()
            axes[column + len(EXPERIMENTS)].invert_yaxis()
    handles = {
        label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5)
    return {"pareto": figure}


def load() -> dict[str, dict[str, Any]]:
    """The result files that stand in ``benchmarks/results``."""
    return {name: read(RESULTS / f"{name}.json") for name in EXPERIMENTS}


def main() -> None:
    """Print the tables."""
    require_extras("pareto", methods.EXTRAS)
    print(report(load()))


if __name__ == "__main__":
    main()
