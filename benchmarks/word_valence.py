"""MiniLM learns how good or bad a word is: methods, learning rates, ranks, scales, over several seeds.

The model is all-MiniLM-L6-v2 under a new linear head, the data are the human ratings (-4 to 4) of the VADER lexicon, the
measures are Pearson's r and the mean squared error on held-out words. All methods adapt all linear layers of the encoder, at
equal numbers of trainable parameters (VeRA, which cannot, at its default rank), and each is reported at the learning rate that
is best for it on the validation words. A second part asks whether one learning rate serves all ranks, under the paper's scale of
1 and under the scale that gives the frozen 0/1 factor rows (MiSSe) or columns (MiSS) of unit norm.
"""

import copy
import functools
import math
import random
import time
from collections.abc import Iterator
from typing import Any

import torch
from common import methods
from common.methods import (
    ADALORA,
    DORA,
    FULL,
    LORA,
    LORA_FA,
    MISS,
    MISSE,
    ORTHONORMAL,
    PISSA,
    RSLORA,
    VERA,
    Output,
    adapt,
    equal_rank,
)
from common.runs import Run, get_parser, run_all
from quickstart import BATCH, TARGETS, Rater, Split, load_encoder, load_splits, pearson
from quickstart import EXTRAS as QUICKSTART
from torch import Tensor, nn

from measure import require_extras

EXTRAS = methods.EXTRAS | QUICKSTART
RANK, EPOCHS = 16, 1
PAPER = None
RATES = {
    FULL: (3e-5, 1e-4, 3e-4, 1e-3),
    LORA: (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    RSLORA: (3e-4, 1e-3, 3e-3, 1e-2),
    PISSA: (3e-4, 1e-3, 3e-3, 1e-2),
    DORA: (1e-3, 3e-3, 1e-2, 3e-2),
    LORA_FA: (1e-3, 3e-3, 1e-2, 3e-2),
    ADALORA: (1e-3, 3e-3, 1e-2, 3e-2),
    VERA: (3e-3, 1e-2, 3e-2, 1e-1),
    MISS: (1e-4, 3e-4, 1e-3, 3e-3),
    MISSE: (1e-4, 3e-4, 1e-3, 3e-3),
}
# The second part: ranks at equal numbers of parameters, and rates wide enough to hold the best of each.
STUDY = (
    (MISSE, PAPER, (4, 16, 64), (1e-4, 3e-4, 1e-3, 3e-3)),
    (MISSE, ORTHONORMAL, (4, 16, 64), (1e-3, 3e-3, 1e-2, 3e-2)),
    (LORA, PAPER, (2, 8, 32), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    (MISS, PAPER, (4, 16, 64), (1e-4, 3e-4, 1e-3, 3e-3)),
    (MISS, ORTHONORMAL, (4, 16, 64), (3e-4, 1e-3, 3e-3, 1e-2)),
)
STUDY_SEEDS = 3


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


def batches(split: Split, lengths: list[int], epochs: int, seed: int) -> Iterator[tuple[list[str], Tensor]]:
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
    predictions = torch.cat([model([split.words[row] for row in part], split.ratings[part]).predictions for part in parts])
    ratings = split.ratings[rows]
    return pearson(predictions, ratings), nn.functional.mse_loss(predictions, ratings).item()


def work(job: Run) -> Run:
    """One run: adapt, train, score."""
    (encoder, tokenizer), (train, validation, test) = material(job["words"])
    lengths = [len(ids) for ids in tokenizer(train.words)["input_ids"]]
    torch.manual_seed(job["seed"])
    model = Model(copy.deepcopy(encoder), tokenizer)
    method, rank = job["method"], job["rank"]
    steps = job["epochs"] * math.ceil(len(lengths) / BATCH)
    start = time.perf_counter()
    model = adapt(model, method, rank, TARGETS, scale=job["scale"], head="head", steps=steps)
    trainable = sum(parameter.numel() for parameter in methods.trained(model))
    data = batches(train, lengths, job["epochs"], job["seed"])
    curve = list(methods.fit(model, method, rank, data, lr=job["lr"], schedule=lambda step: 1 - step / steps))
    tail = curve[-max(1, steps // 10) :]
    result = {"trainable": trainable, "train_mse": sum(tail) / len(tail)}
    for name, split in (("validation", validation), ("test", test)):
        result[f"{name}_r"], result[f"{name}_mse"] = score(model, split)
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def jobs(seeds: int, study_seeds: int, words: int | None, epochs: int) -> list[Run]:
    """The settings of every run, the comparison first."""
    encoder = material(words)[0][0]
    linears = [module for name, module in encoder.named_modules() if isinstance(module, nn.Linear) and name.endswith(TARGETS)]
    budget = sum(RANK * linear.out_features for linear in linears)
    size = {"words": words, "epochs": epochs}
    comparison = [(method, equal_rank(method, budget, linears), PAPER, rates) for method, rates in RATES.items()]
    study = [(method, rank, scale, rates) for method, scale, ranks, rates in STUDY for rank in ranks]
    wanted = [
        {"method": method, "rank": rank, "scale": scale, "lr": lr, "seed": seed, **size}
        for seed in range(seeds)
        for method, rank, scale, rates in comparison + (study if seed < study_seeds else [])
        for lr in rates
    ]
    return [job for place, job in enumerate(wanted) if job not in wanted[:place]]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run what is left to run, and print the tables."""
    args = get_parser(__doc__, seeds=5).parse_args(argv)
    require_extras("word_valence", EXTRAS)
    result = run_all(jobs(args.seeds, STUDY_SEEDS, None, EPOCHS), work, args.json, args.workers)
    return result


if __name__ == "__main__":
    main()
