"""The paper's Figure 1: the size of the first gradient, for each method and rank.

It is measured on real models and real batches. Beside each measured norm stands what is expected.
Let M = G^T X be the gradient of the weight (d, k) of a layer, for inputs X and gradients G of its
outputs. At the start, where the trained factor is zero, the first gradients are

    LoRA    dB = M A^T, A random and independent of M    E |dB|^2 = r / (3 k) |M|^2
    MiSSe   dD = M Ac^T, which sums columns of M         |dD|^2 = |M|^2
            the same with alternating signs              |dD|^2 = |M|^2
    MiSS    dD = Ec^T M, which sums rows of M            |dD|^2 = |M|^2

That of LoRA holds for any inputs. That of MiSSe holds if the columns within a sum are uncorrelated,
that of MiSS if the rows are.

So MiSSe's norm is expected to be sqrt(3 k / r) times LoRA's and, at every rank, that of full
fine-tuning of the same layers. How far reality is from that is the factor |M Ac^T|^2 / |M|^2, the
correlation that the expectation assumes away (a mean that is not zero counts too). It is measured
here, beside the same factor of the inputs alone, |X Ac^T|^2 / |X|^2. LoRA and PiSSA have
alpha = rank, so that no other factor enters.
"""

import copy
import functools
import itertools
import math
import re
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import word_valence as valence
from common import methods, plots
from common import word_problems as words
from common.methods import ALTERNATING, FULL, LORA, MISS, MISSE, PISSA, adapt, targeted, trained
from common.runs import Estimate, Run, get_parser, run_all, select, write
from measure import require_extras, table
from miss.functional import block_sum, shard_sum
from model_cost import load_base

METHODS = (FULL, LORA, PISSA, MISS, MISSE, ALTERNATING)
RANKS = (8, 16, 32, 64, 128)  # MiSS has no 256: the keys of SmolLM2 have 192 outputs
MINILM, SMOLLM2 = "MiniLM-L6, word ratings", "SmolLM2-135M, word problems"
KINDS_RANK = 16
# By what a factor is called in a run: its column in the table.
FACTORS = {"columns": "columns", "signed_columns": "columns, alternating", "rows": "rows"}
MODELS = {MINILM: (valence.TARGETS, 64), SMOLLM2: (words.TARGETS, 4)}  # targets, rows in a batch


@functools.cache
def material(name: str, batches: int) -> tuple[nn.Module, list[tuple[Any, ...]]]:
    """A model in fp32 and its first training batches, without padding.

    Words are those of four tokens, and problems are cut to the shortest.
    """
    rows = MODELS[name][1]
    starts = range(0, batches * rows, rows)
    if name == MINILM:
        (encoder, tokenizer), (train, _, _) = valence.material(None)
        torch.manual_seed(0)
        model: nn.Module = valence.Model(encoder, tokenizer)
        tokens = tokenizer(train.words)["input_ids"]
        usual = [row for row, ids in enumerate(tokens) if len(ids) == 4]
        parts = [usual[start : start + rows] for start in starts]
        return model, [([train.words[row] for row in part], train.ratings[part]) for part in parts]
    problems = words.problems("gsm_symbolic", batches * rows, words.TRAIN)
    collated = []
    for start in starts:
        batch = problems[start : start + rows]
        shortest = min(len(row.question) + len(row.worked) for row in batch)
        collated.append(tuple(part[:, :shortest] for part in words.collate(batch)))
    return words.Model(load_base()), collated


def square(tensor: Tensor) -> float:
    """The sum of its squares, in float64."""
    return tensor.detach().double().square().sum().item()


def first_gradient(
    model: nn.Module, parameters: list[nn.Parameter], batch: tuple[Any, ...]
) -> float:
    """The norm of the gradient of some parameters together; dropout is off."""
    model.eval()
    gradients = torch.autograd.grad(model(*batch).loss, parameters)
    return math.sqrt(sum(map(square, gradients)))


def correlation(
    model: nn.Module, layers: Mapping[str, nn.Linear], batch: tuple[Any, ...], rank: int
) -> Run:
    """What is expected of each method, and the factors by which sums exceed uncorrelated ones.

    The factors are those of sums of columns, of rows and of inputs; ``signed`` are those of columns
    and of inputs with alternating signs.
    """
    inputs = {name: [0.0, 0.0, 0.0] for name in layers}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums = (block_sum(args[0], rank, alternate) for alternate in (False, True))
            for place, x in enumerate((args[0], *sums)):
                inputs[name][place] += square(x)

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    weights = [layer.weight for layer in layers.values()]
    try:
        gradients = torch.autograd.grad(model(*batch).loss, weights)
    finally:
        for handle in hooks:
            handle.remove()
    own = {name: summed / plain for name, (plain, summed, _) in inputs.items()}
    signed = {name: summed / plain for name, (plain, _, summed) in inputs.items()}
    seen: dict[str, tuple[float, ...]] = {}
    whole = columns = signed_columns = rows = lora = 0.0
    for (name, layer), m in zip(layers.items(), gradients):
        plain, of_columns = square(m), square(block_sum(m, rank))
        of_signed = square(block_sum(m, rank, alternate=True))
        seen[name] = plain, of_columns, of_signed, own[name], signed[name]
        whole, columns, signed_columns = (
            whole + plain,
            columns + of_columns,
            signed_columns + of_signed,
        )
        rows += square(shard_sum(m.T, rank))
        lora += rank / (3 * layer.in_features) * plain
    quartiles = torch.tensor(list(own.values())).quantile(torch.tensor([0.25, 0.5, 0.75]))
    expected = {FULL: whole, LORA: lora, MISS: whole, MISSE: whole, ALTERNATING: whole}
    return {
        "expected": {method: math.sqrt(squared) for method, squared in expected.items()},
        "factor_columns": columns / whole,
        "factor_signed_columns": signed_columns / whole,
        "factor_rows": rows / whole,
        "factor_inputs": quartiles.tolist(),
        "layers": seen,
    }


def kinds(name: str) -> list[list[Any]]:
    """By kind of layer: how many, their share of |M|^2, the factors of columns and of inputs.

    Each factor is that of plain sums, then that of sums with alternating signs. That is for one
    batch at `KINDS_RANK`.
    """
    model, [batch] = material(name, 1)
    layers = targeted(model.eval().requires_grad_(False), MODELS[name][0])
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    groups: dict[str, list[tuple[float, ...]]] = {}
    for layer, seen in correlation(model, layers, batch, KINDS_RANK)["layers"].items():
        groups.setdefault(re.split(r"\.\d+\.", layer)[-1], []).append(seen)
    whole = sum(of_layer[0] for seen in groups.values() for of_layer in seen)
    rows = []
    for kind, seen in groups.items():
        columns = list(zip(*seen))
        plain, summed, signed = map(sum, columns[:3])
        inputs = map(statistics.fmean, columns[3:])
        rows.append([kind, len(seen), plain / whole, summed / plain, signed / plain, *inputs])
    return rows


def work(job: Run) -> Run:
    """The norms of one model at one rank: for each batch one of every method."""
    targets, _ = MODELS[job["model"]]
    base, batches = material(job["model"], job["batches"])
    base.eval().requires_grad_(False)
    layers = targeted(base, targets)
    rank = job["rank"]
    weights = [layer.weight.requires_grad_(True) for layer in layers.values()]
    seen = [correlation(base, layers, batch, rank) for batch in batches]
    norms = {FULL: [first_gradient(base, weights, batch) for batch in batches]}
    base.requires_grad_(False)
    for method in METHODS[1:]:
        torch.manual_seed(0)
        scale = None if method in methods.FORMS else 1.0
        model = adapt(copy.deepcopy(base), method, rank, targets, scale=scale)
        norms[method] = [first_gradient(model, trained(model), batch) for batch in batches]
    factors = [key for key in seen[0] if key.startswith("factor_")]
    result: Run = {key: [of_batch[key] for of_batch in seen] for key in factors}
    expected = [of_batch["expected"] for of_batch in seen]
    of_method = {name: [of_batch[name] for of_batch in expected] for name in expected[0]}
    return result | {"norms": norms, "expected": of_method}


def jobs(batches: int) -> list[Run]:
    """The settings of every run."""
    cells = itertools.product(MODELS, RANKS)
    return [{"model": model, "rank": rank, "batches": batches} for model, rank in cells]


def over_lora(norms: Mapping[str, list[float]]) -> str:
    """MiSSe's norm over LoRA's, batch by batch."""
    return Estimate.of([ours / lora for ours, lora in zip(norms[MISSE], norms[LORA])]).text(1)


def report(result: Mapping[str, Any]) -> str:
    """The tables, in Markdown."""
    rows = []
    for run in sorted(result["runs"], key=lambda run: (run["model"], run["rank"])):
        low, middle, high = (sum(part) / len(part) for part in zip(*run["factor_inputs"]))
        norms = [f"{sum(run['norms'][method]) / run['batches']:.3g}" for method in METHODS]
        ratios = [over_lora(run["norms"]), over_lora(run["expected"])]
        factors = [Estimate.of(run[f"factor_{name}"]).text(2) for name in FACTORS]
        inputs = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        rows.append([run["model"], run["rank"], *norms, *ratios, *factors, inputs])
    head = ["model", "rank", *METHODS, "MiSSe / LoRA", "expected", *FACTORS.values()]
    parts = [table([*head, "inputs, median layer (quartiles)"], rows)]
    parts.append(f"By kind of layer, rank {KINDS_RANK}, one batch:")
    rows = []
    for model, of_model in result["kinds"].items():
        for kind, count, share, *factors in of_model:
            rows.append([model, kind, count, f"{share:.0%}", *(f"{each:.2f}" for each in factors)])
    head = ["model", "kind of layer", "layers", "of the squared gradient", "columns"]
    head += ["columns, alternating", "inputs, mean", "inputs, alternating, mean"]
    parts.append(table(head, rows))
    return "\n\n".join(parts)


def figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """The paper's Figure 1, by name."""
    figure, axes = plots.panels(1, len(MODELS))
    for axis, model in zip(axes, MODELS):
        runs = sorted(select(result["runs"], model=model), key=lambda run: run["rank"])
        ranks = [run["rank"] for run in runs]
        for method in METHODS:
            plots.band(axis, ranks, [run["norms"][method] for run in runs], method)
        lora = [sum(run["expected"][LORA]) / run["batches"] for run in runs]
        dots = {"color": "0.4", "linestyle": (0, (1, 1)), "linewidth": 3, "alpha": 0.6}
        axis.plot(ranks, lora, **dots, label="LoRA, expected")
        axis.set(title=model, xlabel="rank", ylabel="norm of the first gradient")
        axis.set(xscale="log", yscale="log", xticks=ranks)
        axis.set_xticklabels(ranks)
        axis.minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return {"gradient_norm": figure}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run what is left to run, and print the table."""
    args = get_parser(__doc__, seeds=5).parse_args(argv)
    require_extras("gradient_norm", methods.EXTRAS | methods.MINILM | methods.SMOLLM2)
    wanted, models = jobs(args.seeds), list(MODELS)
    if args.quick:
        wanted = [job for job in wanted if job["model"] == MINILM and job["rank"] in (8, 64)]
        models = [MINILM]
    result = run_all(wanted, work, args.json, args.workers)
    result["kinds"] = {model: kinds(model) for model in models}
    write(args.json, result)
    print(report(result))
    return result


if __name__ == "__main__":
    main()
