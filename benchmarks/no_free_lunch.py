"""The paper's Section 3, "No Free Lunch": a small network adapts to a new function.

What does each method pay, and get? A network learns sin(2 pi x) and is adapted to
sin(2 pi x) + 0.3 cos(3 pi x), with the settings and ranks of the paper's Table 12. Measured are
training and validation loss, time to initialise, and time of a step. It runs once as given, at one
learning rate for all, and once with each method at the rate of a sweep that is best for it on the
validation points, reported on further points. ProLoRA and MoS, which the paper has too, are left
out: no library ships them.
"""

import copy
import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common import methods, plots
from common.costs import costs
from common.methods import (
    ADALORA,
    ALTERNATING,
    DORA,
    FULL,
    LORA,
    MISS,
    MISSE,
    PISSA,
    VERA,
    Output,
    adapt,
    fit,
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
    run_all,
    select,
    write,
)
from measure import require_extras, table

WIDTH, TRAIN, HELD_OUT, NOISE = 64, 50, 100, 0.05
BASE_EPOCHS, EPOCHS, EVERY, GIVEN = 250, 100, 10, 1e-3
FIRST_SEED, SEEDS = 43, 10
RANKS: dict[str, int | None] = {FULL: None, LORA: 2, PISSA: 2, DORA: 1, VERA: 64}
RANKS |= {ADALORA: 2, MISS: 4, MISSE: 4, ALTERNATING: 4}
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
TARGETS = ("hidden.0", "hidden.2")


class Network(nn.Module):
    """1 -> 64 -> 64 -> 64 -> 1 with ReLU.

    The two square layers are adapted, where the ranks give equal numbers of parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(1, WIDTH)
        first, second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.hidden = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, y: Tensor) -> Output:
        """Mean squared error and predictions, x and y of shape (points, 1)."""
        predictions = self.last(self.hidden(self.first(x).relu()))
        return Output(nn.functional.mse_loss(predictions, y), predictions)


def old(x: Tensor) -> Tensor:
    """The function that the base learns."""
    return torch.sin(2 * math.pi * x)


def new(x: Tensor) -> Tensor:
    """The function that it is adapted to."""
    return old(x) + 0.3 * torch.cos(3 * math.pi * x)


@functools.cache
def material(seed: int, epochs: int) -> tuple[nn.Module, dict[str, tuple[Tensor, Tensor]]]:
    """The trained base network of a seed, and the points to adapt to.

    Points to train on are noisy, those to choose and report by are clean.
    """
    torch.manual_seed(seed)
    counts = {"train": TRAIN, "validation": HELD_OUT, "test": HELD_OUT}
    points = {name: torch.rand(count, 1) * 2 - 1 for name, count in counts.items()}
    base = Network()
    x = points["train"]
    batches = [(x, old(x) + NOISE * torch.randn_like(x))] * epochs
    for _ in fit(base, FULL, None, batches, lr=GIVEN, schedule=lambda step: 1.0):
        pass
    data = {name: (x, new(x)) for name, x in points.items()}
    data["train"] = (x, new(x) + NOISE * torch.randn_like(x))
    return base, data


@torch.no_grad()
def loss(model: nn.Module, points: tuple[Tensor, Tensor]) -> float:
    """Mean squared error."""
    return nn.functional.mse_loss(model(*points).predictions, points[1]).item()


def work(job: Run) -> Run:
    """One run: adapt, train, and the losses every ten epochs."""
    base, data = material(job["seed"], job["base_epochs"])
    torch.manual_seed(job["seed"])
    model = adapt(copy.deepcopy(base), job["method"], job["rank"], TARGETS, steps=job["epochs"])
    curves: dict[str, list[float]] = {name: [loss(model, points)] for name, points in data.items()}
    batches = [data["train"]] * job["epochs"]
    method, rank = job["method"], job["rank"]
    run = fit(model, method, rank, batches, lr=job["lr"], schedule=lambda step: 1.0)
    for epoch, _ in enumerate(run, 1):
        if epoch % EVERY == 0:
            for name, points in data.items():
                curves[name].append(loss(model, points))
    best = min(range(len(curves["validation"])), key=lambda place: curves["validation"][place])
    result: Run = {}
    for name in ("train", "validation"):
        result[f"{name}_curve"] = [float(f"{value:.4g}") for value in curves[name]]
    return result | {"validation_min": curves["validation"][best], "test": curves["test"][best]}


def jobs(seeds: int, epochs: int, base_epochs: int) -> list[Run]:
    """The settings of every run."""
    size = {"epochs": epochs, "base_epochs": base_epochs}
    wanted: list[Run] = []
    for (method, rank), lr in itertools.product(RANKS.items(), RATES):
        setting = {"method": method, "rank": rank, "lr": lr}
        wanted += [{**setting, "seed": FIRST_SEED + seed, **size} for seed in range(seeds)]
    return wanted


def measure(rounds: int) -> dict[str, Any]:
    """Initialisation, step time and memory of each method."""
    base, data = material(FIRST_SEED, 1)

    def build(method: str, rank: int | None, model: nn.Module, steps: int) -> nn.Module:
        return adapt(model, method, rank, TARGETS, steps=steps)

    builds = {method: functools.partial(build, method, rank) for method, rank in RANKS.items()}
    return costs(base, builds, RANKS, data["train"], LORA, rounds=rounds)


def best_rates(result: Mapping[str, Any]) -> dict[str, float]:
    """The learning rate of each method with the least validation loss."""
    rates = {}
    for method in RANKS:
        own = select(result["runs"], method=method)
        rates[method] = best_rate(own, "validation_min", largest=False)
    return rates


def quality(result: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """Test loss at the best learning rate, by method and seed."""
    scores = {}
    for method, rate in best_rates(result).items():
        scores[method] = by_seed(select(result["runs"], method=method, lr=rate), "test")
    return scores


def report(result: Mapping[str, Any]) -> str:
    """The tables, in Markdown."""
    rows = []
    runs, prices = result["runs"], result["costs"]
    chosen, swept = best_rates(result), quality(result)
    p = holm({method: paired(swept[MISSE], swept[method]) for method in RANKS if method != MISSE})
    for method, rank in RANKS.items():
        given = select(runs, method=method, lr=GIVEN)
        price = prices[method]
        times = [f"{price['start_ms']:.2f}", f"{price['step']['ms']:.2f}"]
        trained = Estimate.of([run["train_curve"][-1] for run in given]).text(4)
        least = Estimate.of([run["validation_min"] for run in given]).text(4)
        rate = rate_text(chosen[method], select(runs, method=method))
        tested = Estimate.of(list(swept[method].values())).text(4)
        against = f"{p[method]:.2g}" if method in p else ""
        cells = [method, rank or "-", price["trainable"], *times, trained, least]
        rows.append([*cells, rate, tested, against])
    head = ["method", "rank", "trained", "start, ms", "step, ms"]
    head += ["train loss at rate 1e-3", "least validation loss there"]
    return table([*head, "best rate", "test loss, best rate", "p against MiSSe"], rows)


def figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """The paper's Figure 2, by name."""
    figure, (train, validation, start, step) = plots.panels(2, 2)
    for method in RANKS:
        given = select(result["runs"], method=method, lr=GIVEN)
        for axis, name in ((train, "train"), (validation, "validation")):
            values = list(zip(*(run[f"{name}_curve"] for run in given)))
            plots.band(axis, [EVERY * place for place in range(len(values))], values, method)
            axis.set(xlabel="epochs", ylabel=f"{name} loss (MSE)", yscale="log")
        price = result["costs"][method]
        look = plots.look(method, linestyle="")
        start.plot(price["trainable"], price["start_ms"], **look)
        middle = price["step"]["ms"]
        low, high = (middle / price["step"]["median"] * at for at in price["step"]["quartiles"])
        below_above = [[max(0, middle - low)], [max(0, high - middle)]]
        step.errorbar(price["trainable"], middle, below_above, **look)
    for axis, label in ((start, "initialisation, ms"), (step, "training step, ms")):
        axis.set(xlabel="trained parameters", ylabel=label, xscale="log", ylim=(0, None))
    figure.legend(*train.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return {"no_free_lunch": figure}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run what is left to run, measure the costs, and print the table."""
    args = get_parser(__doc__, seeds=SEEDS).parse_args(argv)
    require_extras("no_free_lunch", methods.EXTRAS)
    seeds, rounds = (2, 3) if args.quick else (args.seeds, 200)
    result = run_all(jobs(seeds, EPOCHS, BASE_EPOCHS), work, args.json, args.workers)
    result["costs"] = measure(rounds)
    write(args.json, result)
    print(report(result))
    return result


if __name__ == "__main__":
    main()
