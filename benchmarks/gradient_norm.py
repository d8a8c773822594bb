"""The paper's Figure 1: the size of the first gradient, for each method and rank, on real models and real batches.

Beside each measured norm stands what is expected. Let M = G^T X be the gradient of the weight (d, k) of a layer, for inputs X and
gradients G of its outputs. At the start, where the trained factor is zero, the first gradients are

    LoRA    dB = M A^T, A random and independent of M    E |dB|^2 = r / (3 k) |M|^2, for any inputs
    MiSSe   dD = M Ac^T, which sums columns of M         |dD|^2 = |M|^2, if the columns within a sum are uncorrelated
    MiSS    dD = Ec^T M, which sums rows of M            |dD|^2 = |M|^2, if the rows within a sum are uncorrelated

So MiSSe's norm is expected to be sqrt(3 k / r) times LoRA's and, at every rank, that of full fine-tuning of the same layers. How
far reality is from that is the factor |M Ac^T|^2 / |M|^2, the correlation that the expectation assumes away (a mean that is not
zero counts too). It is measured here, beside the same factor of the inputs alone, |X Ac^T|^2 / |X|^2. LoRA and PiSSA have
alpha = rank, so that no other factor enters.
"""

import copy
import functools
import math
import re
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import math_word_problems as words
import word_valence as valence
from common import methods, plots
from common.methods import FULL, LORA, MISS, MISSE, PISSA, adapt, targeted, trained
from common.runs import Estimate, Run, get_parser, run_all, select, write
from measure import require_extras, table
from miss.functional import block_sum, shard_sum
from model_cost import load_base

METHODS = (FULL, LORA, PISSA, MISS, MISSE)
RANKS = (8, 16, 32, 64, 128)  # MiSS has no 256: the keys of SmolLM2 have 192 outputs
MINILM, SMOLLM2 = "MiniLM-L6, word ratings", "SmolLM2-135M, word problems"
KINDS_RANK = 16
MODELS = {MINILM: (valence.TARGETS, 64), SMOLLM2: (words.TARGETS, 4)}  # targets, rows in a batch


@functools.cache
def material(name: str, batches: int) -> tuple[nn.Module, list[tuple[Any, ...]]]:
    """A model in fp32 and its first training batches, without padding: words of four tokens, problems cut to the shortest."""
    rows = MODELS[name][1]
    starts = range(0, batches * rows, rows)
    if name == MINILM:
        (encoder, tokenizer), (train, _, _) = valence.material(None)
        torch.manual_seed(0)
        model: nn.Module = valence.Model(encoder, tokenizer)
        lengths = [len(ids) for ids in tokenizer(train.words)["input_ids"]]
        usual = [row for row, length in enumerate(lengths) if length == 4]
        parts = [usual[start : start + rows] for start in starts]
        return model, [([train.words[row] for row in part], train.ratings[part]) for part in parts]
    problems = words.problems("gsm_symbolic", batches * rows, words.TRAIN)
    cuts = [problems[start : start + rows] for start in starts]
    shortest = [min(len(row.question) + len(row.worked) for row in cut) for cut in cuts]
    collated = [
        tuple(part[:, :length] for part in words.collate(cut))
        for cut, length in zip(cuts, shortest)
    ]
    return words.Model(load_base()), collated


def first_gradient(
    model: nn.Module, parameters: list[nn.Parameter], batch: tuple[Any, ...]
) -> float:
    """The norm of the gradient of some parameters together; dropout is off."""
    model.eval()
    gradients = torch.autograd.grad(model(*batch).loss, parameters)
    return math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))


def correlation(
    model: nn.Module, layers: Mapping[str, nn.Linear], batch: tuple[Any, ...], rank: int
) -> Run:
    """What is expected of LoRA, and the factors by which sums of columns, of rows and of inputs exceed uncorrelated ones."""
    inputs = {name: [0.0, 0.0] for name in layers}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            for place, x in enumerate((args[0], block_sum(args[0], rank))):
                inputs[name][place] += x.detach().double().square().sum().item()

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        gradients = torch.autograd.grad(
            model(*batch).loss, [layer.weight for layer in layers.values()]
        )
    finally:
        for handle in hooks:
            handle.remove()
    squares = [
        [
            part.double().square().sum().item()
            for part in (m, block_sum(m, rank), shard_sum(m.T, rank))
        ]
        for m in gradients
    ]
    whole, columns, rows = (sum(square) for square in zip(*squares))
    lora = sum(
        rank / (3 * layer.in_features) * square[0]
        for layer, square in zip(layers.values(), squares)
    )
    own = {name: summed / plain for name, (plain, summed) in inputs.items()}
    return {
        "expected": {
            FULL: math.sqrt(whole),
            LORA: math.sqrt(lora),
            MISS: math.sqrt(whole),
            MISSE: math.sqrt(whole),
        },
        "factor_columns": columns / whole,
        "factor_rows": rows / whole,
        "factor_inputs": torch.tensor(list(own.values()))
        .quantile(torch.tensor([0.25, 0.5, 0.75]))
        .tolist(),
        "layers": {name: (*square[:2], own[name]) for name, square in zip(layers, squares)},
    }


def kinds(name: str) -> list[list[Any]]:
    """By kind of layer, for one batch at `KINDS_RANK`: how many, their share of |M|^2, the factors of columns and of inputs."""
    model, [batch] = material(name, 1)
    layers = targeted(model.eval().requires_grad_(False), MODELS[name][0])
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    groups: dict[str, list[tuple[float, float, float]]] = {}
    for layer, seen in correlation(model, layers, batch, KINDS_RANK)["layers"].items():
        groups.setdefault(re.split(r"\.\d+\.", layer)[-1], []).append(seen)
    whole = sum(plain for seen in groups.values() for plain, _, _ in seen)
    rows = []
    for kind, seen in groups.items():
        plain, summed = (sum(part) for part in list(zip(*seen))[:2])
        rows.append(
            [
                kind,
                len(seen),
                plain / whole,
                summed / plain,
                statistics.fmean(of_input for _, _, of_input in seen),
            ]
        )
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
    result = {
        key: [of_batch[key] for of_batch in seen]
        for key in ("factor_columns", "factor_rows", "factor_inputs")
    }
    return result | {
        "norms": norms,
        "expected": {name: [one["expected"][name] for one in seen] for name in seen[0]["expected"]},
    }


def jobs(batches: int) -> list[Run]:
    """The settings of every run."""
    return [
        {"model": model, "rank": rank, "batches": batches} for model in MODELS for rank in RANKS
    ]


def report(result: Mapping[str, Any]) -> str:
    """The tables, in Markdown."""
    rows = []
    for run in sorted(result["runs"], key=lambda run: (run["model"], run["rank"])):
        ratio = Estimate.of(
            [own / lora for own, lora in zip(run["norms"][MISSE], run["norms"][LORA])]
        )
        expected = Estimate.of(
            [own / lora for own, lora in zip(run["expected"][MISSE], run["expected"][LORA])]
        )
        low, middle, high = (sum(part) / len(part) for part in zip(*run["factor_inputs"]))
        rows.append(
            [
                run["model"],
                run["rank"],
                *(f"{sum(run['norms'][method]) / run['batches']:.3g}" for method in METHODS),
                ratio.text(1),
                expected.text(1),
                Estimate.of(run["factor_columns"]).text(2),
                Estimate.of(run["factor_rows"]).text(2),
                f"{middle:.2f} ({low:.2f} to {high:.2f})",
            ]
        )
    head = [
        "model",
        "rank",
        *METHODS,
        "MiSSe / LoRA",
        "expected",
        "columns",
        "rows",
        "inputs, median layer (quartiles)",
    ]
    of_kinds = [
        [model, kind, count, f"{share:.0%}", f"{columns:.2f}", f"{inputs:.2f}"]
        for model, of_model in result["kinds"].items()
        for kind, count, share, columns, inputs in of_model
    ]
    titles = [
        "model",
        "kind of layer",
        "layers",
        "of the squared gradient",
        "columns",
        "inputs, mean",
    ]
    return (
        table(head, rows)
        + f"\n\nBy kind of layer, rank {KINDS_RANK}, one batch:\n\n"
        + table(titles, of_kinds)
    )


def figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """The paper's Figure 1, by name."""
    figure, axes = plots.panels(1, len(MODELS))
    for axis, model in zip(axes, MODELS):
        runs = sorted(select(result["runs"], model=model), key=lambda run: run["rank"])
        ranks = [run["rank"] for run in runs]
        for method in METHODS:
            plots.band(axis, ranks, [run["norms"][method] for run in runs], method)
        lora = [sum(run["expected"][LORA]) / run["batches"] for run in runs]
        axis.plot(
            ranks,
            lora,
            color="0.4",
            linestyle=(0, (1, 1)),
            linewidth=3,
            alpha=0.6,
            label="LoRA, expected",
        )
        axis.set(
            title=model,
            xlabel="rank",
            ylabel="norm of the first gradient",
            xscale="log",
            yscale="log",
            xticks=ranks,
        )
        axis.set_xticklabels(ranks)
        axis.minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return {"gradient_norm": figure}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run what is left to run, and print the table."""
    args = get_parser(__doc__, seeds=5).parse_args(argv)
    require_extras("gradient_norm", methods.EXTRAS | methods.MINILM | methods.SMOLLM2)
    wanted = [
        job
        for job in jobs(args.seeds)
        if not args.quick or (job["model"] == MINILM and job["rank"] in (8, 64))
    ]
    result = run_all(wanted, work, args.json, args.workers)
    result["kinds"] = {model: kinds(model) for model in ((MINILM,) if args.quick else MODELS)}
    write(args.json, result)
    print(report(result))
    return result


if __name__ == "__main__":
    main()
