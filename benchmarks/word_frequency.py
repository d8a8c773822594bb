"""MiniLM learns how frequent a word is: a task that no choice in this project was made with.

Model, training and measures are those of ``word_valence``. The data are the Zipf frequencies (the
logarithm of the occurrences in a billion words) of `wordfreq`, for words that the VADER lexicon
lacks, less their mean and over their deviation. LoRA and three forms of MiSS are compared at equal
numbers of trained parameters, at two sizes. Each method's learning rate at each size is the best of
its own sweep on validation words, with two seeds. Test words are only reported on, with other
seeds.
"""

import functools
import itertools
import random
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import word_valence as valence
from common import methods, plots
from common.methods import ALTERNATING, LORA, MISS, MISSE
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
from quickstart import Rater, Split, frozen_baseline

COMMON = 20_000  # words are drawn from this many of the most frequent ones
SPLIT_SEED, TRAIN, VALIDATION, TEST = 0, 1_920, 400, 1_000
EPOCHS, SWEEP_SEEDS = 2, (0, 1)
RANKS = (4, 16)  # of MiSSe
RATES = {method: valence.RATES[method] for method in (LORA, MISS, MISSE, ALTERNATING)}


@functools.cache
def material(part: int) -> tuple[tuple[Any, Any], tuple[Split, Split, Split]]:
    """Encoder and tokenizer; words to train, to validate and to test with.

    The sizes are those above over ``part``. Inflections of one word may fall into two of the sets.
    """
    import wordfreq

    base, lexicon = valence.material(None)
    known = {word for split in lexicon for word in split.words}
    frequent = wordfreq.top_n_list("en", COMMON)
    words = [word for word in frequent if re.fullmatch("[a-z]{3,}", word) and word not in known]
    random.Random(SPLIT_SEED).shuffle(words)
    sizes = TRAIN // part, VALIDATION // part, TEST // part
    ratings = [wordfreq.zipf_frequency(word, "en") for word in words]
    mean, deviation = statistics.fmean(ratings[: sizes[0]]), statistics.stdev(ratings[: sizes[0]])
    pairs = iter([(word, (rating - mean) / deviation) for word, rating in zip(words, ratings)])
    train, validation, test = (Split.of([next(pairs) for _ in range(size)]) for size in sizes)
    return base, (train, validation, test)


def work(job: Run) -> Run:
    """One run: adapt, train, score."""
    return valence.rated(job, *material(job["part"]))


def jobs(seeds: Iterable[int], part: int) -> list[Run]:
    """The settings of a sweep; ``size`` is the rank of MiSSe that trains as much."""
    [(encoder, _), _] = material(part)
    common = {"scale": None, "head_lr": None, "epochs": EPOCHS, "part": part}
    wanted: list[Run] = []
    for seed, size in itertools.product(seeds, RANKS):
        for method, rank in valence.equal_ranks(encoder, size, RATES).items():
            setting = {"size": size, "method": method, "rank": rank, "seed": seed}
            wanted += [{**setting, "lr": lr, **common} for lr in RATES[method]]
    return wanted


def swept(runs: list[Run], size: int, method: str) -> list[Run]:
    """The runs that a method's learning rate is chosen with."""
    own = select(runs, size=size, method=method)
    return [run for run in own if run["seed"] in SWEEP_SEEDS]


def chosen(runs: list[Run], size: int, method: str) -> float:
    """The best learning rate of a method's sweep."""
    return best_rate(swept(runs, size, method), "validation_r", largest=True)


def final(runs: list[Run], size: int, method: str) -> list[Run]:
    """The runs at the best rate that no choice was made with."""
    own = select(runs, size=size, method=method, lr=chosen(runs, size, method))
    return [run for run in own if run["seed"] not in SWEEP_SEEDS]


def frozen(part: int) -> float:
    """Test r of the best linear head on the frozen encoder."""
    (encoder, tokenizer), splits = material(part)
    return frozen_baseline(Rater(encoder, tokenizer), *splits)


def report(result: Mapping[str, Any]) -> str:
    """The table, in Markdown. Holm's correction is for the methods of one size."""
    rows = []
    for size in RANKS:
        runs = {method: final(result["runs"], size, method) for method in RATES}
        score = {method: by_seed(own, "test_r") for method, own in runs.items()}
        others = [method for method in RATES if method != MISSE]
        p = holm({method: paired(score[MISSE], score[method]) for method in others})
        for method, own in runs.items():
            rate = rate_text(own[0]["lr"], swept(result["runs"], size, method))
            cells = [size, method, own[0]["rank"], own[0]["trainable"], rate]
            cells.append(Estimate.of(list(score[method].values())).text(4))
            cells.append(Estimate.of([run["test_mse"] for run in own]).text(3))
            against = ["", ""]
            if method in p:
                gaps = [value - score[MISSE][seed] for seed, value in score[method].items()]
                against = [Estimate.of(gaps).text(4), f"{p[method]:.2g}"]
            rows.append([*cells, *against])
    head = ["MiSSe's rank", "method", "rank", "trained", "best rate", "test r"]
    head += ["test mean squared error", "r less MiSSe's", "p"]
    best = f"The best linear head on the frozen encoder has a test r of {result['frozen']:.4f}."
    return f"{table(head, rows)}\n\n{best}"


def figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """By name: validation r of the sweeps, and test r at the best rates."""
    figure, axes = plots.panels(2, len(RANKS), sharey=True)
    for size, sweep, tested in zip(RANKS, axes, axes[len(RANKS) :]):
        for place, method in enumerate(RATES):
            rates = by_rate(swept(result["runs"], size, method), "validation_r")
            means = [statistics.fmean(values) for values in rates.values()]
            sweep.plot(list(rates), means, **plots.look(method))
            mean, half = Estimate.of([run["test_r"] for run in final(result["runs"], size, method)])
            tested.errorbar(place, mean, half, **plots.look(method, capsize=2))
        sweep.set(title=f"as much as MiSSe of rank {size}", xlabel="learning rate", xscale="log")
        sweep.set(ylabel="Pearson r, validation", ylim=(0.6, None))
        tested.set(xlabel="method, at its best rate", ylabel="Pearson r, test", xticks=[])
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(RATES))
    return {"word_frequency": figure}


def run(seeds: int, part: int, path: Path | None, workers: int) -> dict[str, Any]:
    """Sweep the rates, then run what is left to run at the best ones, with ``seeds`` others."""
    sweep = run_all(jobs(SWEEP_SEEDS, part), work, path, workers)
    others = range(len(SWEEP_SEEDS), len(SWEEP_SEEDS) + seeds)
    wanted = []
    for job in jobs(others, part):
        if job["lr"] == chosen(sweep["runs"], job["size"], job["method"]):
            wanted.append(job)
    result = run_all(wanted, work, path, workers)
    further = [each for each in result["runs"] if each not in sweep["runs"]]
    return result | {"runs": sweep["runs"] + further}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run what is left to run, and print the table."""
    args = get_parser(__doc__, seeds=5).parse_args(argv)
    require_extras("word_frequency", methods.EXTRAS | methods.MINILM)
    seeds, part = (2, 20) if args.quick else (args.seeds, 1)
    result = run(seeds, part, args.json, args.workers)
    result["frozen"] = frozen(part)
    write(args.json, result)
    print(report(result))
    return result


if __name__ == "__main__":
    main()
