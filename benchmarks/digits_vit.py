"""A small vision transformer that knows printed digits learns handwritten ones.

It compares methods and learning rates, and some methods at half the parameters.

The base is trained here, on digits rendered in the DejaVu fonts: shifted, turned, blurred, noisy,
8 x 8 pixels. It is adapted to the handwritten digits of scikit-learn, of the same size, with 20
training images a class. All methods adapt all linear layers of the blocks and train the head, at
equal numbers of adapter parameters (VeRA, which cannot, at one rank). Each is reported at the
learning rate that is best for it on validation images. MiSSe, MiSS and LoRA run at half that number
too, where the paper's Table 6 has MiSS equal to LoRA.

Seeds draw training images, batches and adapters, but not VeRA's frozen matrices. Base, validation
and test images are fixed, so that the intervals do not tell of another base or of other test
images.
"""

import copy
import functools
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
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
    PISSA,
    RSLORA,
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

SIDE, CANVAS, FONT_SIZES, PATCH, WIDTH, DEPTH, HEADS, CLASSES = 8, 64, (64, 92), 2, 64, 4, 4, 10
SIZE, BASE_EPOCHS, BASE_BATCH, BASE_RATE, BASE_SEED = 6000, 15, 100, 3e-3, 0
TEST, VALIDATION, TRAIN, BATCH, EPOCHS = 997, 300, 200, 50, 30
RANK, VERA_RANK = 16, 64
TARGETS = ("q", "k", "v", "o", "up", "down")
RATES = {
    FULL: (3e-4, 1e-3, 3e-3, 1e-2),
    LORA: (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    **dict.fromkeys((RSLORA, PISSA), (1e-3, 3e-3, 1e-2, 3e-2)),
    **dict.fromkeys((DORA, LORA_FA, ADALORA), (3e-3, 1e-2, 3e-2, 1e-1)),
    VERA: (3e-2, 1e-1, 3e-1, 1.0),
    **dict.fromkeys((MISS, MISSE, ALTERNATING), (1e-3, 3e-3, 1e-2, 3e-2)),
}
SETTINGS = [*((method, 1.0) for method in RATES), (LORA, 0.5), (MISS, 0.5), (MISSE, 0.5)]
SETTINGS.append((ALTERNATING, 0.5))
Images = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual.

    The projections are linear layers that adapters can wrap.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, tokens, width) to the same shape."""
        y = self.before_attention(x)
        projected = (self.q(y), self.k(y), self.v(y))
        q, k, v = (rearrange(part, "b t (h c) -> b h t c", h=HEADS) for part in projected)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(rearrange(attended, "b h t c -> b t (h c)"))
        return x + self.down(nn.functional.gelu(self.up(self.before_mlp(x))))


class Transformer(nn.Module):
    """16 patches of 2 x 2 pixels, four blocks, the mean of the tokens, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(PATCH**2, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn((SIDE // PATCH) ** 2, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor, labels: Tensor) -> Output:
        """Cross entropy and logits of images (b, 8, 8)."""
        patches = rearrange(images, "b (y p) (x s) -> b (y x) (p s)", p=PATCH, s=PATCH)
        tokens = self.blocks(self.patches(patches) + self.positions)
        logits = self.head(self.norm(tokens).mean(1))
        return Output(nn.functional.cross_entropy(logits, labels), logits)


def rendered(count: int, seed: int) -> Images:
    """Printed digits, (count, 8, 8), 0 for paper and 1 for ink, and what they are.

    There are as many of each class, in turn.
    """
    import matplotlib
    import numpy
    from PIL import Image, ImageDraw, ImageFilter, ImageFont

    rng = numpy.random.RandomState(seed)
    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf").glob("DejaVu*.ttf")
    files = sorted(path for path in fonts if "Display" not in path.stem)

    @functools.cache
    def load(file: Path, size: int) -> ImageFont.FreeTypeFont:
        return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)

    images = []
    for place in range(count):
        font = load(files[rng.randint(len(files))], int(rng.randint(*FONT_SIZES)))
        image = Image.new("L", (CANVAS, CANVAS))
        centre, thickness = tuple(CANVAS / 2 + rng.uniform(-5, 5, 2)), int(rng.randint(3))
        ImageDraw.Draw(image).text(
            centre, str(place % CLASSES), 255, font, anchor="mm", stroke_width=thickness
        )
        image = image.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR)
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 3)))
        image = image.resize((SIDE, SIDE), Image.Resampling.BOX)
        images.append(numpy.asarray(image, dtype=numpy.float32) / 255)
    noisy = rng.uniform(0.7, 1.1, (count, 1, 1)) * numpy.stack(images)
    noisy = noisy + rng.normal(0, 0.05, (count, SIDE, SIDE))
    return torch.from_numpy(noisy).float().clip(0, 1), torch.arange(count) % CLASSES


@functools.cache
def handwritten() -> dict[str, Images]:
    """Handwritten digits, in parts.

    One part is to test, one to validate. From the pool seeds draw their training images.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).float() / 16, torch.from_numpy(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(BASE_SEED))
    rows = order.split([TEST, VALIDATION, len(labels) - TEST - VALIDATION])
    names = ("test", "validation", "pool")
    return {name: (images[row], labels[row]) for name, row in zip(names, rows)}


def chosen(labels: Tensor, seed: int) -> Tensor:
    """The rows of the pool that a seed trains on, as many of each class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    of_class = [order[labels[order] == digit] for digit in range(CLASSES)]
    return torch.cat([rows[: TRAIN // CLASSES] for rows in of_class])


def train(
    model: nn.Module,
    method: str,
    rank: int | None,
    images: Images,
    size: int,
    epochs: int,
    lr: float,
    seed: int,
) -> None:
    """Train in batches of ``size`` in random order, while the rate falls to zero."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[Tensor] = []
    for _ in range(epochs):
        parts += torch.randperm(len(images[1]), generator=generator).split(size)
    batches = ((images[0][part], images[1][part]) for part in parts)

    def schedule(step: int) -> float:
        return 1 - step / len(parts)

    for _ in methods.fit(model, method, rank, batches, lr=lr, schedule=schedule):
        pass


@functools.cache
def pretrained(size: int) -> nn.Module:
    """The base, trained on ``size`` printed digits, by one thread: the same in every process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(BASE_SEED)
    model = Transformer()
    images = rendered(size, BASE_SEED)
    train(model, FULL, None, images, BASE_BATCH, BASE_EPOCHS, BASE_RATE, BASE_SEED)
    torch.set_num_threads(threads)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """The share of images that the model names rightly."""
    model.eval()
    return (model(*images).predictions.argmax(1) == images[1]).double().mean().item()


def base_accuracy(size: int) -> dict[str, float]:
    """Of the base before any adaptation.

    On printed digits that it has not seen, and on the handwritten test images.
    """
    images = {"rendered": rendered(1000, BASE_SEED + 1), "real": handwritten()["test"]}
    return {name: accuracy(pretrained(size), of_name) for name, of_name in images.items()}


def work(job: Run) -> Run:
    """One run: adapt, train, score."""
    base, digits = pretrained(job["size"]), handwritten()
    images, labels = digits["pool"]
    rows = chosen(labels, job["seed"])
    torch.manual_seed(job["seed"])
    start = time.perf_counter()
    method, rank, epochs = job["method"], job["rank"], job["epochs"]
    steps = epochs * math.ceil(TRAIN / BATCH)
    model = adapt(copy.deepcopy(base), method, rank, TARGETS, head="head", steps=steps)
    trainable = sum(parameter.numel() for parameter in methods.trained(model))
    train(model, method, rank, (images[rows], labels[rows]), BATCH, epochs, job["lr"], job["seed"])
    scores = {f"{name}_accuracy": accuracy(model, digits[name]) for name in ("validation", "test")}
    return {"trainable": trainable, **scores, "seconds": round(time.perf_counter() - start, 2)}


def ranks() -> dict[tuple[str, float], int | None]:
    """The rank of each method and share of the budget."""
    linears = methods.targeted(Transformer(), TARGETS).values()
    budget = sum(RANK * linear.out_features for linear in linears)
    return {
        (method, share): equal_rank(method, int(share * budget), linears, vera=VERA_RANK)
        for method, share in SETTINGS
    }


def jobs(seeds: int, epochs: int, size: int) -> list[Run]:
    """The settings of every run."""
    wanted: list[Run] = []
    for seed in range(seeds):
        common = {"seed": seed, "epochs": epochs, "size": size}
        for (method, share), rank in ranks().items():
            setting = {"method": method, "rank": rank, "budget": share}
            wanted += [{**setting, "lr": lr, **common} for lr in RATES[method]]
    return wanted


def measure(rounds: int) -> dict[str, Any]:
    """Initialisation, step time and memory of each method at the full budget."""
    images, labels = handwritten()["pool"]
    full = {method: rank for (method, share), rank in ranks().items() if share == 1}

    def build(method: str, rank: int | None, model: nn.Module, steps: int) -> nn.Module:
        return adapt(model, method, rank, TARGETS, head="head", steps=steps)

    builds = {method: functools.partial(build, method, rank) for method, rank in full.items()}
    return costs(Transformer(), builds, full, (images[:BATCH], labels[:BATCH]), LORA, rounds=rounds)


def at_best(runs: list[Run]) -> dict[tuple[str, float], list[Run]]:
    """Of each method and share of the budget the runs at the best learning rate.

    That is the one with the best mean validation accuracy.
    """
    best = {}
    for method, share in SETTINGS:
        own = select(runs, method=method, budget=share)
        rate = best_rate(own, "validation_accuracy", largest=True)
        best[method, share] = select(own, lr=rate)
    return best


def quality(result: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """Test accuracy in per cent, by method and seed.

    It is that at the best learning rate and the whole budget.
    """
    scores = {}
    for (method, share), runs in at_best(result["runs"]).items():
        if share == 1:
            scores[method] = {run["seed"]: 100 * run["test_accuracy"] for run in runs}
    return scores


def report(result: Mapping[str, Any]) -> str:
    """The table, in Markdown, and what lies beside it.

    That is the base, and half the budget against LoRA's whole.
    """
    best, base, ours, rows = at_best(result["runs"]), result["base"], (MISSE, 1.0), []
    test = {key: by_seed(runs, "test_accuracy") for key, runs in best.items()}
    p = holm({str(key): paired(test[ours], test[key]) for key in best if key != ours})
    for (method, share), runs in best.items():
        step = f"{result['costs'][method]['step']['ms']:.1f}" if share == 1 else ""
        sizes = [f"{share:g}", runs[0]["rank"] or "-", runs[0]["trainable"], step]
        rate = rate_text(runs[0]["lr"], select(result["runs"], method=method, budget=share))
        validation = Estimate.of([100 * run["validation_accuracy"] for run in runs]).text(1)
        tested = Estimate.of([100 * run["test_accuracy"] for run in runs]).text(1)
        against = f"{p[str((method, share))]:.2g}" if (method, share) != ours else ""
        rows.append([method, *sizes, rate, validation, tested, against])
    head = ["method", "budget", "rank", "trained", "step, ms", "best rate"]
    lines = [table([*head, "validation, %", "test, %", "p against MiSSe"], rows)]
    lines.append(
        f"Base: {base['rendered']:.1%} of unseen printed digits, "
        f"{base['real']:.1%} of the handwritten test images."
    )
    for method, share in [key for key in best if key[1] < 1]:
        whole = test[LORA, 1.0]
        gaps = [100 * (value - whole[seed]) for seed, value in test[method, share].items()]
        lines.append(
            f"{method} at {share:g} of the budget, less LoRA at all of it: "
            f"{Estimate.of(gaps).text(2)} points."
        )
    return "\n\n".join(lines)


def figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy against parameters and against learning rate, by name."""
    figure, (sizes, rates) = plots.panels(1, 2, height=3.6)
    best = at_best(result["runs"])
    trainable = {key: runs[0]["trainable"] for key, runs in best.items()}
    counts = dict(sorted(trainable.items(), key=lambda item: item[1]))
    for (method, share), runs in best.items():
        near = [key for key in counts if 0.8 < counts[key] / counts[method, share] < 1.25]
        x = counts[method, share] * 1.07 ** (near.index((method, share)) - (len(near) - 1) / 2)
        others = {"linestyle": ""}
        if share < 1:
            others |= {"markerfacecolor": "white", "label": f"{method}, half the budget"}
        mean, half = Estimate.of([100 * run["test_accuracy"] for run in runs])
        sizes.errorbar(x, mean, half, capsize=2, **plots.look(method, **others))
        if share == 1:
            swept = by_rate(select(result["runs"], method=method, budget=share), "test_accuracy")
            of_rate = [[100 * value for value in values] for values in swept.values()]
            plots.band(rates, list(swept), of_rate, method)
    sizes.set(xlabel="trained parameters (points a little apart)", ylabel="test accuracy, %")
    rates.set(xlabel="learning rate", ylabel="test accuracy, % (cut at 60)", ylim=(60, None))
    sizes.set_xscale("log")
    rates.set_xscale("log")
    handles = sizes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False)
    return {"digits_vit": figure}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run what is left to run, measure the costs, and print the table."""
    args = get_parser(__doc__, seeds=10).parse_args(argv)
    require_extras("digits_vit", methods.EXTRAS)
    seeds, epochs, size, rounds = (2, 1, 300, 3) if args.quick else (args.seeds, EPOCHS, SIZE, 100)
    result = run_all(jobs(seeds, epochs, size), work, args.json, args.workers)
    result |= {"base": base_accuracy(size), "costs": measure(rounds)}
    write(args.json, result)
    print(report(result))
    return result


if __name__ == "__main__":
    main()
