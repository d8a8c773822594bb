"""SmolLM2-135M learns to solve word problems: the paper's Figure 5 and Table 7 at a size for a CPU.

Two tasks of `reasoning_gym`, procedural and with checkable answers: ``gsm_symbolic`` (the GSM8K
templates with new names and numbers, answered in steps) and ``chain_sum`` (sums of two or three
numbers of one or two digits). Problems held out are not among those trained on, but those of
gsm_symbolic have the same templates. The base is in bf16, adapters are in fp32, all linear layers
are adapted. Methods train as many parameters as MiSSe at ranks 8 to 128, or as few less as whole
ranks allow.

Each method's learning rate at each rank is the best of a sweep on validation loss with seed 0. The
sweep goes on until the best has a worse one on either side, or the ladder of rates ends. Test loss
is reported for other seeds, and for some of them, at rank 64, the share of the test problems that
is solved exactly.
"""

import copy
import functools
import itertools
import math
import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import methods, plots
from common import word_problems as words
from common.costs import costs
from common.methods import (
    ALTERNATING,
    DORA,
    LORA,
    MISS,
    MISSE,
    PISSA,
    adapt,
    equal_rank,
    fit,
    targeted,
    trained,
)
from common.runs import (
    Estimate,
    Run,
    best_rate,
    by_seed,
    get_parser,
    holm,
    paired,
    rate_text,
    read,
    run_all,
    select,
    write,
)
from measure import require_extras, table

METHODS = (LORA, PISSA, DORA, MISS, MISSE, ALTERNATING)
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
# The sweep starts with these and their neighbours.
FIRST = {LORA: 1e-3, PISSA: 1e-4, DORA: 1e-3, MISS: 3e-4, MISSE: 3e-4, ALTERNATING: 3e-4}
SWEEP_SEED = 0


def schedule(steps: int) -> Any:
    """Cosine to zero, without warm-up, as in the paper's Table 10."""
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def work(job: Run) -> Run:
    """One run: adapt, train, and the loss on problems held out.

    They are validation problems in the sweep, else test problems. Some runs solve these too.
    """
    task, steps = words.TASKS[job["task"]], job["steps"]
    validation = words.fresh(job["task"], job["held_out"], words.VALIDATION, [])
    test = words.fresh(job["task"], job["held_out"], words.TEST, validation)
    seed = words.TRAIN + words.APART * job["seed"]
    rows = words.fresh(job["task"], steps * task.batch, seed, validation + test)
    torch.manual_seed(job["seed"])
    model = words.Model(copy.deepcopy(words.base()))
    method, rank, rate = job["method"], job["rank"], job["lr"]
    wrapped = adapt(model, method, rank, words.TARGETS, steps=steps)
    starts = range(0, len(rows), task.batch)
    parts = [words.collate(rows[start : start + task.batch]) for start in starts]
    start = time.perf_counter()
    losses = list(fit(wrapped, method, rank, parts, lr=rate, schedule=schedule(steps)))
    result: Run = {
        "trainable": sum(parameter.numel() for parameter in trained(model)),
        "losses": [round(loss, 4) for loss in losses],
        "tokens": sum(int(mask.sum()) for _, mask, _ in parts),
    }
    if job["seed"] == SWEEP_SEED:
        result["validation_loss"] = words.held_out_loss(wrapped, validation)
    else:
        result["test_loss"] = words.held_out_loss(wrapped, test)
    if job["seed"] in task.solving and rank == ranks(words.RANK)[method]:
        result["test_accuracy"] = words.accuracy(model, test, task.longest)
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def jobs(
    task: str,
    method: str,
    rank: int | None,
    rates: Iterable[float],
    seeds: Iterable[int],
    *,
    short: bool,
) -> list[Run]:
    """The settings of some runs.

    ``short`` ones have a tenth of the steps and of the problems held out.
    """
    part, whole = 10 if short else 1, words.TASKS[task]
    size = {"steps": whole.steps // part, "held_out": whole.held_out // part}
    setting = {"task": task, "method": method, "rank": rank}
    pairs = itertools.product(seeds, rates)
    return [{**setting, "lr": lr, "seed": seed, **size} for seed, lr in pairs]


@functools.cache
def ranks(rank: int) -> dict[str, int | None]:
    """The ranks at which the methods train as much as MiSSe at ``rank``."""
    linears = targeted(words.base(), words.TARGETS).values()
    budget = rank * sum(linear.out_features for linear in linears)
    return {method: equal_rank(method, budget, linears) for method in METHODS}


def swept(result: Mapping[str, Any], task: str, method: str, rank: int | None) -> list[Run]:
    """The runs of a method at a rank that its learning rate is chosen with."""
    runs = select(result["runs"], task=task, method=method, rank=rank, seed=SWEEP_SEED)
    if len({run["lr"] for run in runs}) < len(runs):
        advice = "keep runs of other settings in a file of their own"
        raise ValueError(f"two runs of one rate: {runs[0]}; {advice}")
    return runs


def chosen(runs: list[Run]) -> float:
    """The best learning rate of a sweep."""
    return best_rate(runs, "validation_loss", largest=False)


def untried(runs: list[Run], method: str) -> list[float]:
    """Of the best learning rate of a sweep and its neighbours: those that have no run.

    With no run yet they are the first three, and where all runs diverged the rate below them.
    """
    if not runs:
        place = LADDER.index(FIRST[method])
    elif all(run["validation_loss"] is None for run in runs):
        place = LADDER.index(min(run["lr"] for run in runs))
    else:
        place = LADDER.index(chosen(runs))
    return [rate for rate in LADDER[max(0, place - 1) : place + 2] if not select(runs, lr=rate)]


def final_runs(result: Mapping[str, Any], task: str, size: int) -> dict[str, list[Run]]:
    """By method, the runs that no choice was made with.

    They are those at the method's best rate, and at the rank that trains as much as MiSSe's
    ``size``. Of an interrupted benchmark they are those of the seeds that all methods have.
    """
    of_method = {}
    for method in result["costs"]:
        cell = {"task": task, "method": method, "rank": result["ranks"][str(size)][method]}
        sweep = swept(result, **cell)
        at_best = select(result["runs"], **cell, lr=chosen(sweep)) if sweep else []
        of_method[method] = [run for run in at_best if run["seed"] != SWEEP_SEED]
    common = set.intersection(*({run["seed"] for run in runs} for runs in of_method.values()))
    for method, runs in of_method.items():
        of_method[method] = [run for run in runs if run["seed"] in common]
    return of_method


def complete(result: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The tasks and ranks that all methods have reported runs of."""
    every = itertools.product(words.TASKS, map(int, result["ranks"]))
    return [(task, size) for task, size in every if all(final_runs(result, task, size).values())]


def held_out_losses(result: Mapping[str, Any], task: str, size: int) -> dict[str, dict[int, float]]:
    """Test loss, by method and seed."""
    runs = final_runs(result, task, size)
    return {method: by_seed(own, "test_loss") for method, own in runs.items()}


def quality(result: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """Test loss on gsm_symbolic at rank 64, by method and seed."""
    return held_out_losses(result, "gsm_symbolic", words.RANK)


def solved(runs: list[Run]) -> str:
    """The share of problems solved, in per cent, and the number of runs that solved them."""
    shares = [100 * run["test_accuracy"] for run in runs if "test_accuracy" in run]
    return f"{Estimate.of(shares).text(1)} ({len(shares)})" if shares else ""


def first_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Of gsm_symbolic, to measure the costs with."""
    count = words.TASKS["gsm_symbolic"].batch
    return words.collate(words.problems("gsm_symbolic", count, words.TRAIN))


def measure(compared: Sequence[str], rounds: int) -> dict[str, Any]:
    """Initialisation, step time and peak memory of each method, on a batch of gsm_symbolic."""

    def build(method: str, model: nn.Module, steps: int) -> nn.Module:
        return adapt(model, method, ranks(words.RANK)[method], words.TARGETS)

    builds = {method: functools.partial(build, method) for method in compared}
    model, batch, threads = words.Model(words.base()), first_batch(), os.cpu_count() or 1
    return costs(model, builds, ranks(words.RANK), batch, LORA, rounds=rounds, threads=threads)


def beside(theirs: Mapping[int, float], ours: Mapping[int, float]) -> Estimate:
    """The difference of two methods, seed by seed, for seeds draw different problems."""
    return Estimate.of([theirs[seed] - ours[seed] for seed in ours])


def report(result: Mapping[str, Any]) -> str:
    """The table, in Markdown. Holm's correction is for the methods of one task and rank."""
    rows = []
    for task, size in complete(result):
        loss = held_out_losses(result, task, size)
        others = [method for method in loss if method != MISSE]
        p = holm({method: paired(loss[MISSE], loss[method]) for method in others})
        for method, runs in final_runs(result, task, size).items():
            first, own = runs[0], loss[method]
            rate = rate_text(first["lr"], swept(result, task, method, first["rank"]))
            cells = [task, size, method, first["rank"], first["trainable"], rate]
            against = ["", ""]
            if method != MISSE:
                against = [beside(own, loss[MISSE]).text(3), f"{p[method]:.2g}"]
            score = Estimate.of(list(own.values())).text(3)
            rows.append([*cells, score, *against, solved(runs)])
    head = ["task", "MiSSe's rank", "method", "rank", "trained", "best rate", "test loss"]
    return table([*head, "less MiSSe's", "p", "solved, % (seeds)"], rows)


def figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """By name: the paper's Figure 5, and a figure for its Table 7.

    Figure 5 is training loss against tokens and time. The other is test loss against parameters.
    """
    tasks = [task for task, size in complete(result) if size == words.RANK]
    figure, axes = plots.panels(len(tasks), 2, width=4)
    for task, (by_tokens, by_time) in zip(tasks, zip(axes[::2], axes[1::2])):
        for method, runs in final_runs(result, task, words.RANK).items():
            values = list(zip(*(smooth(run["losses"]) for run in runs)))
            tokens = sum(run["tokens"] for run in runs) / len(runs) / len(values)
            # Estimated from the step time of one batch of gsm_symbolic, for each token alike.
            second = result["costs"][method]["step"]["ms"] / 1e3 / result["batch_tokens"]
            for axis, unit in ((by_tokens, tokens), (by_time, tokens * second)):
                plots.band(axis, [unit * (step + 1) for step in range(len(values))], values, method)
        labels = "training tokens", "estimated time of the steps, s"
        for axis, label in zip((by_tokens, by_time), labels):
            axis.set(title=task, xlabel=label, ylabel="training loss (running mean)", yscale="log")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(METHODS))
    return {"math_word_problems": figure, "math_word_problems_ranks": by_rank(result)}


def by_rank(result: Mapping[str, Any]) -> Any:
    """Test loss on gsm_symbolic against trained parameters.

    On the left are means, on the right differences from MiSSe's with intervals.
    """
    figure, (whole, difference) = plots.panels(1, 2, width=4)
    sizes = [size for task, size in complete(result) if task == "gsm_symbolic"]
    runs = [final_runs(result, "gsm_symbolic", size) for size in sizes]
    losses = [held_out_losses(result, "gsm_symbolic", size) for size in sizes]
    for method in result["costs"]:
        trained_at = [of_size[method][0]["trainable"] for of_size in runs]
        own = [statistics.fmean(of_size[method].values()) for of_size in losses]
        whole.plot(trained_at, own, **plots.look(method))
        means, halves = zip(*(beside(of_size[method], of_size[MISSE]) for of_size in losses))
        difference.errorbar(trained_at, means, halves, **plots.look(method, capsize=2))
    whole.set(xlabel="trained parameters", ylabel="test loss, mean over seeds", xscale="log")
    difference.set(xlabel="trained parameters", ylabel="test loss less MiSSe's", xscale="log")
    handles = whole.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(METHODS))
    return figure


def smooth(losses: list[float], share: float = 0.85) -> list[float]:
    """An exponential running mean, started unbiased."""
    mean, weight, result = 0.0, 0.0, []
    for loss in losses:
        mean, weight = share * mean + (1 - share) * loss, share * weight + (1 - share)
        result.append(mean / weight)
    return result


def run(
    seeds: int,
    path: Path | None,
    workers: int,
    *,
    compared: Sequence[str] = METHODS,
    sizes: Sequence[int] = words.RANKS,
    short: bool = False,
) -> dict[str, Any]:
    """Measure the costs, sweep the rates, and run what is left to run at the best ones."""
    sections = {
        "ranks": {str(rank): ranks(rank) for rank in sizes},
        "batch_tokens": int(first_batch()[1].sum()),
        "costs": measure(compared, 2 if short else 5),
    }
    write(path, read(path) | sections)
    result: dict[str, Any] = sections | {"runs": []}

    def add(wanted: list[Run]) -> None:
        done = run_all(wanted, work, path, workers)
        further = [run for run in done["runs"] if run not in result["runs"]]
        result.update(done, runs=result["runs"] + further)

    cells = []
    for (task, settings), size in itertools.product(words.TASKS.items(), sizes):
        if size in settings.ranks:
            cells += [(task, method, ranks(size)[method]) for method in compared]
    while True:
        wanted = []
        for cell in cells:
            rates = untried(swept(result, *cell), cell[1])
            wanted += jobs(*cell, rates, [SWEEP_SEED], short=short)
        if not wanted:
            break
        add(wanted)
    final = []
    for cell in cells:
        best = chosen(swept(result, *cell))
        final += jobs(*cell, [best], range(1, 1 + seeds), short=short)
    add(sorted(final, key=lambda job: job["seed"]))
    return result


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run everything, and print the tables."""
    args = get_parser(__doc__, seeds=3).parse_args(argv)
    require_extras("math_word_problems", methods.EXTRAS | methods.SMOLLM2)
    few = {"compared": (LORA, MISSE), "sizes": (words.RANK,), "short": True} if args.quick else {}
    result = run(1 if args.quick else args.seeds, args.json, args.workers, **few)
    print(report(result))
    return result


if __name__ == "__main__":
    main()
