"""The paper's Table 8 and Figure 4: what each method reaches, beside what a training step takes.

That is time and memory. The script collects the other experiments' results, as they are in
``benchmarks/results``. A method is on the front if no other is at least as good in quality, time
and memory, and better in one of them. Quality is a mean over few seeds. How certain a place on the
front is, is said by the share of 2,000 resamplings of the seeds (bootstrap) in which the method is
on it, times and memory as measured.
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
    """A script with results, and what its quality is, with how many digits.

    ``sign`` is +1 where more is better, -1 where less is.
    """

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

    def dominated(own: tuple[float, float, float]) -> bool:
        others = [other for other in points.values() if other != own]
        return any(all(a <= b for a, b in zip(other, own)) for other in others)

    return {name for name, own in points.items() if not dominated(own)}


def certainty(experiment: Experiment, result: Mapping[str, Any]) -> dict[str, float]:
    """By method, the share of resamplings of the seeds in which it is on the front."""
    qualities, costs = experiment.script.quality(result), result["costs"]
    rng = random.Random(0)
    counts = dict.fromkeys(qualities, 0)
    seeds = sorted(set.intersection(*(set(values) for values in qualities.values())))
    for _ in range(RESAMPLINGS):
        # The same for all methods, as the seeds are paired.
        drawn = rng.choices(seeds, k=len(seeds))
        points = {}
        for name, values in qualities.items():
            mean = statistics.fmean(values[seed] for seed in drawn)
            points[name] = point(experiment, mean, costs[name])
        for name in front(points):
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
        means = {
            method: experiment.sign * statistics.fmean(values.values())
            for method, values in qualities.items()
        }
        rows = []
        for method in sorted(means, key=lambda method: -means[method]):
            cost, step = result["costs"][method], result["costs"][method]["step"]
            quality = Estimate.of(list(qualities[method].values())).text(experiment.digits)
            low, high = step["quartiles"]
            times = [f"{step['median']:.2f} ({low:.2f} to {high:.2f})", f"{step['ms']:.4g}"]
            others = [f"{cost['memory'] / 2**20:.3g}", f"{cost['start_ms']:.3g}"]
            share = f"{100 * shares[method]:.0f} %"
            rows.append([method, cost["trainable"], quality, *times, *others, share])
        head = ["method", "trained", experiment.label, "step / LoRA's (quartiles)", "step, ms"]
        head += ["memory, MiB", "start, ms", "on the front"]
        parts.append(f"`{name}`:\n\n" + table(head, rows))
    return "\n\n".join(parts)


def figures(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The paper's Figure 4, by name: quality against step time, and against peak memory."""
    figure, axes = plots.panels(2, len(EXPERIMENTS), width=3.1)
    columns = zip(EXPERIMENTS.items(), axes, axes[len(EXPERIMENTS) :])
    for (name, experiment), by_time, by_memory in columns:
        result = results[name]
        for method, values in experiment.script.quality(result).items():
            mean, half = Estimate.of(list(values.values()))
            look = plots.look(method, linestyle="", capsize=2)
            cost = result["costs"][method]
            by_time.errorbar(cost["step"]["ms"], mean, half, **look)
            by_memory.errorbar(cost["memory"] / 2**20, mean, half, **look)
        by_time.set(title=name, xlabel="training step, ms", ylabel=experiment.label)
        by_memory.set(xlabel="memory of training, MiB", ylabel=experiment.label)
        if experiment.sign < 0:
            by_time.invert_yaxis()
            by_memory.invert_yaxis()
    handles = {}
    for axis in axes:
        of_axis, labels = axis.get_legend_handles_labels()
        handles |= dict(zip(labels, of_axis))
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
