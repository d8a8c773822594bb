"""MiniLM learns how good or bad a word is, over several seeds.

Methods, learning rates, ranks and scales are compared. The model is all-MiniLM-L6-v2 under a new
linear head, the data are the human ratings (-4 to 4) of the VADER lexicon, the measures are
Pearson's r and the mean squared error on held-out words. All methods adapt all linear layers of the
encoder, at equal numbers of trainable parameters (VeRA, which cannot, at its default rank). Each is
reported at the learning rate that is best for it on the validation words.

A second part asks whether one learning rate serves all ranks, under the paper's scale of 1 and
under the scale that gives the frozen 0/1 factor rows (MiSSe) or columns (MiSS) of unit norm. It
also asks what MiSSe reaches if each input has a random sign, drawn once, so that inputs of one sign
do not add up in its sums.
"""

import copy
import functools
import math
import random
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
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
    LORA_FA,
    MISS,
    MISSE,
    ORTHONORMAL,
    PISSA,
    RSLORA,
    SIGNED,
    VERA,
    Output,
    adapt,
    equal_rank,
)
from common.runs import (
    Estimate,
    Run,
    best_rate,
    by_rate,
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
from quickstart import BATCH, TARGETS, Rater, Split, load_encoder, load_splits, pearson

RANK, EPOCHS = 16, 1
PAPER = None
OWN = (PAPER, None)  # scale, and rate of the head
RATES = {
    FULL: (3e-5, 1e-4, 3e-4, 1e-3),
    LORA: (3e-4, 1e-3, 3e-3, 1e-2),
    RSLORA: (3e-4, 1e-3, 3e-3, 1e-2),
    PISSA: (3e-4, 1e-3, 3e-3, 1e-2),
    DORA: (3e-4, 1e-3, 3e-3, 1e-2),
    LORA_FA: (3e-4, 1e-3, 3e-3, 1e-2),
    ADALORA: (1e-3, 3e-3, 1e-2, 3e-2),
    VERA: (1e-2, 3e-2, 1e-1, 3e-1),
    MISS: (1e-4, 3e-4, 1e-3, 3e-3),
    MISSE: (1e-4, 3e-4, 1e-3, 3e-3),
    ALTERNATING: (1e-4, 3e-4, 1e-3, 3e-3),
}
# The second part, at equal numbers of parameters. The head has the adapter's rate, or its own: a
# scale moves the former along.
HEAD = 3e-3
STUDY = (
    (MISSE, PAPER, None, (4, 16, 64), (1e-4, 3e-4, 1e-3, 3e-3)),
    (MISSE, ORTHONORMAL, None, (4, 16, 64), (3e-4, 1e-3, 3e-3, 1e-2)),
    (LORA, PAPER, None, (2, 8, 32), (3e-4, 1e-3, 3e-3, 1e-2)),
    (MISS, PAPER, None, (4, 16, 64), (1e-4, 3e-4, 1e-3, 3e-3)),
    (MISS, ORTHONORMAL, None, (4, 16, 64), (3e-4, 1e-3, 3e-3, 1e-2)),
    (MISSE, PAPER, HEAD, (4, 16, 64), (1e-4, 3e-4, 1e-3)),
    (MISSE, ORTHONORMAL, HEAD, (4, 16, 64), (1e-3, 3e-3, 1e-2)),
    (ALTERNATING, PAPER, None, (4, 16, 64), (1e-4, 3e-4, 1e-3, 3e-3)),
    (SIGNED, PAPER, None, (4, 16, 64), (1e-4, 3e-4, 1e-3, 3e-3)),
)
STUDY_SEEDS = 3  # of the rows that ask for the scale; forms at their own scale have all


class Model(Rater):
    """The rater, with its loss: mean squared error."""

    def forward(self, words: list[str], ratings: Tensor) -> Output:
        """Loss and predicted ratings, (words)."""
        predictions = super().forward(words)
        return Output(nn.functional.mse_loss(predictions, ratings), predictions)


@functools.cache
def material(words: int | None) -> tuple[tuple[nn.Module, Any], tuple[Split, Split, Split]]:
    """Encoder and tokenizer, and the three splits."""
    return load_encoder(), load_splits(words)


def batches(
    split: Split, lengths: list[int], epochs: int, seed: int
) -> Iterator[tuple[list[str], Tensor]]:
    """Batches of words of similar length, in random order."""
    rng = random.Random(seed)
    for _ in range(epochs):
        rows = sorted(range(len(lengths)), key=lambda row: (lengths[row], rng.random()))
        parts = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        rng.shuffle(parts)
        for part in parts:
            yield [split.words[row] for row in part], split.ratings[part]


@torch.no_grad()
def score(model: nn.Module, split: Split) -> tuple[float, float]:
    """Pearson's r and mean squared error on a split."""
    model.eval()
    rows = sorted(range(len(split.words)), key=lambda row: len(split.words[row]))
    parts = [rows[i : i + 4 * BATCH] for i in range(0, len(rows), 4 * BATCH)]
    scored = []
    for part in parts:
        words = [split.words[row] for row in part]
        scored.append(model(words, split.ratings[part]).predictions)
    predictions, ratings = torch.cat(scored), split.ratings[rows]
    return pearson(predictions, ratings), nn.functional.mse_loss(predictions, ratings).item()


def work(job: Run) -> Run:
    """One run: adapt, train, score."""
    return rated(job, *material(job["words"]))


def rated(job: Run, base: tuple[nn.Module, Any], splits: tuple[Split, Split, Split]) -> Run:
    """One run on words of any ratings: encoder and tokenizer ``base`` are adapted, then scored."""
    (encoder, tokenizer), (train, validation, test) = base, splits
    lengths = [len(ids) for ids in tokenizer(train.words)["input_ids"]]
    torch.manual_seed(job["seed"])
    model = Model(copy.deepcopy(encoder), tokenizer)
    method, rank = job["method"], job["rank"]
    steps = job["epochs"] * math.ceil(len(lengths) / BATCH)
    start = time.perf_counter()
    model = adapt(model, method, rank, TARGETS, scale=job["scale"], head="head", steps=steps)
    trainable = sum(parameter.numel() for parameter in methods.trained(model))
    data = batches(train, lengths, job["epochs"], job["seed"])
    head = (model.get_submodule("head"), job["head_lr"]) if job["head_lr"] else None

    def schedule(step: int) -> float:
        return 1 - step / steps

    for _ in methods.fit(model, method, rank, data, lr=job["lr"], schedule=schedule, head=head):
        pass
    result: Run = {"trainable": trainable}
    for name, split in (("validation", validation), ("test", test)):
        result[f"{name}_r"], result[f"{name}_mse"] = score(model, split)
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def equal_ranks(encoder: nn.Module, rank: int, compared: Iterable[str]) -> dict[str, int | None]:
    """The ranks at which the methods train as much as MiSSe at ``rank``."""
    linears = methods.targeted(encoder, TARGETS).values()
    budget = sum(rank * linear.out_features for linear in linears)
    return {method: equal_rank(method, budget, linears) for method in compared}


def jobs(seeds: int, study_seeds: int, words: int | None, epochs: int) -> list[Run]:
    """The settings of every run, the comparison first."""
    size = {"words": words, "epochs": epochs}
    comparison: list[tuple[Any, ...]] = []
    [(encoder, _), _] = material(words)
    for method, rank in equal_ranks(encoder, RANK, RATES).items():
        comparison.append((method, rank, PAPER, None, RATES[method]))
    study: list[tuple[Any, ...]] = []
    for method, scale, head, ranks, rates in STUDY:
        study += [(method, rank, scale, head, rates) for rank in ranks]
    wanted: list[Run] = []
    for seed in range(seeds):
        for method, rank, scale, head, rates in comparison + study:
            if seed >= study_seeds and (scale, head) != OWN:
                continue
            setting = {"method": method, "rank": rank, "scale": scale, "head_lr": head}
            for lr in rates:
                job = {**setting, "lr": lr, "seed": seed, **size}
                if job not in wanted:
                    wanted.append(job)
    return wanted


def measure(rounds: int, words: int | None) -> dict[str, Any]:
    """Initialisation, step time and peak memory of each method, on a batch of 64 words.

    The methods train equal numbers of parameters.
    """
    (encoder, tokenizer), (train, _, _) = material(words)
    ranks = equal_ranks(encoder, RANK, RATES)

    def build(method: str, model: nn.Module, steps: int) -> nn.Module:
        return adapt(model, method, ranks[method], TARGETS, head="head", steps=steps)

    builds = {method: functools.partial(build, method) for method in RATES}
    batch = train.words[:BATCH], train.ratings[:BATCH]
    return costs(Model(encoder, tokenizer), builds, ranks, batch, LORA, rounds=rounds)


def at_best(runs: list[Run], metric: str, **settings: Any) -> tuple[float, dict[int, float]]:
    """The learning rate of some runs that is best on validation words; a metric there, by seed."""
    mine = select(runs, **settings)
    rate = best_rate(mine, "validation_r", largest=True)
    return rate, by_seed(select(mine, lr=rate), metric)


def comparison(result: Mapping[str, Any]) -> dict[str, list[Run]]:
    """The runs at equal numbers of parameters, by method."""
    return {
        name: select(result["runs"], method=name, rank=cost["rank"], scale=PAPER, head_lr=None)
        for name, cost in result["costs"].items()
    }


def quality(result: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """Test r at the best learning rate, by method and seed."""
    return {method: at_best(mine, "test_r")[1] for method, mine in comparison(result).items()}


def report(result: Mapping[str, Any]) -> str:
    """The tables, in Markdown."""
    runs = result["runs"]
    scores = quality(result)
    others = [method for method in scores if method != MISSE]
    p = holm({method: paired(scores[MISSE], scores[method]) for method in others})
    rows = []
    for method, mine in comparison(result).items():
        rate, errors = at_best(mine, "test_mse")
        score = Estimate.of(list(scores[method].values())).text(4)
        error = Estimate.of(list(errors.values())).text(3)
        against = f"{p[method]:.2g}" if method in p else ""
        cells = [method, mine[0]["rank"] or "-", mine[0]["trainable"], rate_text(rate, mine)]
        rows.append([*cells, score, error, against])
    head = ["method", "rank", "trained", "best rate", "test r", "test mean squared error"]
    return table([*head, "p against MiSSe"], rows) + "\n\n" + report_study(runs)


def report_study(runs: list[Run]) -> str:
    """How far one learning rate serves all ranks.

    The best rate and r of each rank, and what the best common rate costs. Forms at their own scale
    and rate have a test against MiSSe at as many parameters; Holm's correction is for each of its
    ranks.
    """
    rows, p = [], against_misse(runs)
    for method, scale, head, ranks, rates in STUDY:
        of_study = select(runs, method=method, scale=scale, head_lr=head)
        own = {rank: select(of_study, rank=rank) for rank in ranks}
        lost = {rank: shortfall(own[rank]) for rank in ranks}
        shared = [rate for rate in rates if all(rate in of_rank for of_rank in lost.values())]
        worst = {rate: max(of_rank[rate] for of_rank in lost.values()) for rate in shared}
        common = min(worst, key=lambda rate: worst[rate])
        for rank in ranks:
            rate, values = at_best(own[rank], "test_r")
            kind = [method, scale or "own", f"{head:g}" if head else "same", rank]
            score = Estimate.of(list(values.values())).text(4)
            tested = (scale, head) == OWN and (method, rank) in p
            cells = [score, f"{p[method, rank]:.2g}" if tested else ""]
            shared_rate = [f"{common:g}", f"{lost[rank][common]:.4f}"]
            rows.append([*kind, rate_text(rate, own[rank]), *cells, *shared_rate])
    titles = ["method", "scale", "head's rate", "rank", "best rate", "test r", "p against MiSSe"]
    return table([*titles, "best common rate", "validation r lost there"], rows)


def against_misse(runs: list[Run]) -> dict[tuple[str, int], float]:
    """By method and rank: p against MiSSe, of what stands in `STUDY` at its own scale and rate."""
    plain = {method: ranks for method, scale, head, ranks, _ in STUDY if (scale, head) == OWN}
    result = {}
    for place in range(len(plain.get(MISSE, ()))):
        scores = {
            method: at_best(
                runs, "test_r", method=method, scale=PAPER, head_lr=None, rank=of[place]
            )
            for method, of in plain.items()
        }
        ours = scores.pop(MISSE)[1]
        p = holm({method: paired(ours, theirs) for method, (_, theirs) in scores.items()})
        result |= {(method, plain[method][place]): value for method, value in p.items()}
    return result


def shortfall(runs: list[Run]) -> dict[float, float]:
    """By learning rate, how much mean validation r is below that of the best rate."""
    rates = by_rate(runs, "validation_r")
    means = {rate: statistics.fmean(values) for rate, values in rates.items()}
    return {rate: max(means.values()) - mean for rate, mean in means.items()}


def figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """Sensitivity to the learning rate, of the methods and of the scales, by name."""
    figure, [axis] = plots.panels(1, 1, width=6.5, height=4)
    for method, mine in comparison(result).items():
        sensitivity(axis, mine, method)
    axis.set(xlabel="learning rate", ylabel="Pearson r on held-out words", xscale="log")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper")
    scales, axes = plots.panels(3, 3, width=2.4, height=2.5, sharey=True)
    looks = [{"alpha": alpha, "marker": marker} for alpha, marker in zip((1.0, 0.7, 0.4), "os^")]
    for axis, (method, scale, head, ranks, _) in zip(axes, STUDY):
        for look, rank in zip(looks, ranks):
            mine = select(result["runs"], method=method, scale=scale, head_lr=head, rank=rank)
            sensitivity(axis, mine, method, label=f"rank {rank}", **look)
        kind = f"scale {scale or 'own'}" + (f", head at {head:g}" if head else "")
        axis.set(title=f"{method}\n{kind}", xlabel="learning rate", ylabel="Pearson r")
        axis.set_xscale("log")
        axis.legend(loc="lower right")
    for axis in axes[len(STUDY) :]:
        axis.remove()
    return {"word_valence": figure, "word_valence_scale": scales}


def sensitivity(axis: Any, runs: list[Run], method: str, **others: Any) -> None:
    """Test r against the learning rate, up to the rate at which training fails.

    Training fails where the mean of r is below 0.7.
    """
    rates = by_rate(runs, "test_r")
    kept = [rate for rate in rates if statistics.fmean(rates[rate]) > 0.7]
    plots.band(axis, kept, [rates[rate] for rate in kept], method, **others)
    axis.set_ylim(0.72, 0.9)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run what is left to run, measure the costs, and print the tables."""
    args = get_parser(__doc__, seeds=5).parse_args(argv)
    require_extras("word_valence", methods.EXTRAS | methods.MINILM)
    words, seeds, rounds = (300, 2, 2) if args.quick else (None, args.seeds, 40)
    wanted = jobs(seeds, min(seeds, STUDY_SEEDS), words, EPOCHS)
    result = run_all(wanted, work, args.json, args.workers)
    result["costs"] = measure(rounds, words)
    write(args.json, result)
    print(report(result))
    return result


if __name__ == "__main__":
    main()
