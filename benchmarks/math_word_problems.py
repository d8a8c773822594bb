"""SmolLM2-135M learns to solve word problems: the paper's Figure 5 and Table 7 at a size for a CPU.

Two tasks of `reasoning_gym`, procedural and with checkable answers: ``gsm_symbolic`` (the GSM8K templates with new names and
numbers, answered in steps) and ``chain_sum`` (sums of two or three numbers of one or two digits). Problems held out are not among
those trained on, but those of gsm_symbolic have the same templates. The base is in bf16, adapters are in fp32, all linear layers
are adapted, and methods train as many parameters as MiSSe at ranks 8 to 128, or as few less as whole ranks allow.

Each method's learning rate at each rank is the best of a sweep on validation loss with seed 0, which goes on until the best has
a worse one on either side, or the ladder of rates ends. Test loss is reported for other seeds, and for some of them, at rank 64,
the share of the test problems that is solved exactly.
"""

import copy
import functools
import itertools
import math
import os
import re
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common import methods, plots
from common.costs import costs
from common.methods import (
    DORA,
    LORA,
    MISS,
    MISSE,
    PISSA,
    Output,
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
from model_cost import load_base, smollm2

RANK, RANKS = 64, (8, 16, 32, 64, 128)
METHODS = (LORA, PISSA, DORA, MISS, MISSE)
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FIRST = {
    LORA: 1e-3,
    PISSA: 1e-4,
    DORA: 1e-3,
    MISS: 3e-4,
    MISSE: 3e-4,
}  # the sweep starts with it and its neighbours
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Task(NamedTuple):
    """One task: its size, the ranks it is run at, the seeds of which test problems are solved, `reasoning_gym`'s own settings.

    ``batch`` and ``held_out`` count problems, ``longest`` the tokens of an answer.
    """

    batch: int
    steps: int
    held_out: int
    longest: int
    ranks: tuple[int, ...]
    solving: tuple[int, ...]
    settings: dict[str, int]


SUMS = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
TASKS = {
    "gsm_symbolic": Task(
        batch=2, steps=30, held_out=24, longest=150, ranks=RANKS, solving=(1,), settings={}
    ),
    "chain_sum": Task(
        batch=8, steps=30, held_out=64, longest=8, ranks=(RANK,), solving=(1, 2, 3), settings=SUMS
    ),
}
SWEEP_SEED = 0
# Seeds of the problems, further apart than any set is long: `reasoning_gym` draws problem i of a set from seed + i.
VALIDATION, TEST, TRAIN, APART = 10_000_000, 20_000_000, 30_000_000, 100_000


class Problem(NamedTuple):
    """Tokens of the question, tokens of the worked answer, and the number that is right."""

    question: list[int]
    worked: list[int]
    answer: float


class Model(nn.Module):
    """A language model, with the loss of the answers alone."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, tokens: Tensor, mask: Tensor, answers: Tensor) -> Output:
        """Mean cross entropy of the answers' tokens, from tokens, attention mask and ``answers`` (batch, length), a mask too."""
        kept = answers[:, 1:].bool()
        hidden = self.language_model.model(tokens, attention_mask=mask).last_hidden_state[:, :-1][
            kept
        ]
        logits = self.language_model.lm_head(hidden).float()
        return Output(nn.functional.cross_entropy(logits, tokens[:, 1:][kept]), logits)


@functools.cache
def tokenizer() -> Any:
    """SmolLM2's."""
    from transformers import AutoTokenizer

    file = smollm2()
    return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


@functools.cache
def base() -> nn.Module:
    """SmolLM2-135M-Instruct in bf16."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of reading the file
    return load_base().to(torch.bfloat16)


@functools.cache
def problems(task: str, count: int, seed: int) -> list[Problem]:
    """Problems of a task, the same for the same seed."""
    import reasoning_gym

    rows = []
    for row in reasoning_gym.create_dataset(task, size=count, seed=seed, **TASKS[task].settings):
        worked = row["metadata"].get("answer_cot", f"#### {row['answer']}")
        end = tokenizer().eos_token
        question, answer = (
            tokenizer()(text)["input_ids"] for text in (f"{row['question']}\n", f"{worked}{end}")
        )
        rows.append(Problem(question, answer, float(row["answer"])))
    return rows


def fresh(task: str, count: int, seed: int, seen: list[Problem]) -> list[Problem]:
    """Problems of a task that are not among those ``seen``."""
    known = [row.question for row in seen]
    return [row for row in problems(task, 2 * count, seed) if row.question not in known][:count]


def collate(rows: list[Problem]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, attention mask and answer mask, padded on the right."""
    width = max(len(question) + len(answer) for question, answer, _ in rows)
    parts: list[list[list[int]]] = [[], [], []]
    for question, answer, _ in rows:
        pad = width - len(question) - len(answer)
        parts[0].append(question + answer + [0] * pad)
        parts[1].append([1] * (len(question) + len(answer)) + [0] * pad)
        parts[2].append([0] * len(question) + [1] * len(answer) + [0] * pad)
    return torch.tensor(parts[0]), torch.tensor(parts[1]), torch.tensor(parts[2])


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: list[Problem]) -> float:
    """Mean cross entropy over all tokens of all answers."""
    model.eval()
    rows = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
    total = tokens = 0.0
    for start in range(0, len(rows), 8):
        batch = collate(rows[start : start + 8])
        count = batch[2].sum().item()
        total, tokens = total + model(*batch).loss.item() * count, tokens + count
    return total / tokens


@torch.no_grad()
def accuracy(model: Model, rows: list[Problem], longest: int) -> float:
    """Share of the problems whose greedily decoded answer ends with the right number after ``####``."""
    model.eval()
    width = max(len(question) for question, _, _ in rows)
    pads = [width - len(question) for question, _, _ in rows]
    tokens = torch.tensor([[0] * pad + question for pad, (question, _, _) in zip(pads, rows)])
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
    end = tokenizer().eos_token_id
    decoded = model.language_model.generate(
        input_ids=tokens,
        attention_mask=mask,
        max_new_tokens=longest,
        do_sample=False,
        pad_token_id=end,
    )
    texts = tokenizer().batch_decode(decoded[:, width:], skip_special_tokens=True)
    return sum(final(text) == answer for text, (_, _, answer) in zip(texts, rows)) / len(rows)


def final(text: str) -> float | None:
    """The number after the last ``####``."""
    found = re.findall(r"####\s*(-?[\d,]*\.?\d+)", text)
    return float(found[-1].replace(",", "")) if found else None


def schedule(steps: int) -> Any:
    """Cosine to zero, without warm-up, as in the paper's Table 10."""
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def work(job: Run) -> Run:
    """One run: adapt, train, and the loss on validation problems to sweep with, else on test problems. Some solve them too."""
    task, steps = TASKS[job["task"]], job["steps"]
    validation = fresh(job["task"], job["held_out"], VALIDATION, [])
    test = fresh(job["task"], job["held_out"], TEST, validation)
    rows = fresh(job["task"], steps * task.batch, TRAIN + APART * job["seed"], validation + test)
    torch.manual_seed(job["seed"])
    model = Model(copy.deepcopy(base()))
    wrapped = adapt(model, job["method"], job["rank"], TARGETS, steps=steps)
    parts = [collate(rows[start : start + task.batch]) for start in range(0, len(rows), task.batch)]
    start = time.perf_counter()
    losses = list(
        fit(wrapped, job["method"], job["rank"], parts, lr=job["lr"], schedule=schedule(steps))
    )
    result: Run = {
        "trainable": sum(parameter.numel() for parameter in trained(model)),
        "losses": [round(loss, 4) for loss in losses],
        "tokens": sum(int(mask.sum()) for _, mask, _ in parts),
    }
    if job["seed"] == SWEEP_SEED:
        result["validation_loss"] = held_out_loss(wrapped, validation)
    else:
        result["test_loss"] = held_out_loss(wrapped, test)
    if job["seed"] in task.solving and job["rank"] == ranks(RANK)[job["method"]]:
        result["test_accuracy"] = accuracy(model, test, task.longest)
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
    """The settings of some runs; ``short`` ones have a tenth of the steps and of the problems held out."""
    part = 10 if short else 1
    size = {"steps": TASKS[task].steps // part, "held_out": TASKS[task].held_out // part}
    return [
        {"task": task, "method": method, "rank": rank, "lr": lr, "seed": seed, **size}
        for seed in seeds
        for lr in rates
    ]


@functools.cache
def ranks(rank: int) -> dict[str, int | None]:
    """The ranks at which the methods train as much as MiSSe at ``rank``."""
    linears = targeted(base(), TARGETS).values()
    budget = rank * sum(linear.out_features for linear in linears)
    return {method: equal_rank(method, budget, linears) for method in METHODS}


def swept(result: Mapping[str, Any], task: str, method: str, rank: int | None) -> list[Run]:
    """The runs of a method at a rank that its learning rate is chosen with."""
    runs = select(result["runs"], task=task, method=method, rank=rank, seed=SWEEP_SEED)
    if len({run["lr"] for run in runs}) < len(runs):
        raise ValueError(
            f"two runs of one rate: {runs[0]}; keep runs of other settings in a file of their own"
        )
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
    """By method, the runs that no choice was made with, at its best rate and the rank that trains as much as MiSSe's ``size``.

    Of an interrupted benchmark those of the seeds that all methods have.
    """
    of_method = {}
    for method in result["costs"]:
        cell = {"task": task, "method": method, "rank": result["ranks"][str(size)][method]}
        sweep = swept(result, **cell)
        at_best = select(result["runs"], **cell, lr=chosen(sweep)) if sweep else []
        of_method[method] = [run for run in at_best if run["seed"] != SWEEP_SEED]
    common = set.intersection(*({run["seed"] for run in runs} for runs in of_method.values()))
    return {
        method: [run for run in runs if run["seed"] in common] for method, runs in of_method.items()
    }


def complete(result: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The tasks and ranks that all methods have reported runs of."""
    every = itertools.product(TASKS, map(int, result["ranks"]))
    return [(task, size) for task, size in every if all(final_runs(result, task, size).values())]


def held_out_losses(result: Mapping[str, Any], task: str, size: int) -> dict[str, dict[int, float]]:
    """Test loss, by method and seed."""
    return {
        method: by_seed(runs, "test_loss")
        for method, runs in final_runs(result, task, size).items()
    }


def quality(result: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """Test loss on gsm_symbolic at rank 64, by method and seed."""
    return held_out_losses(result, "gsm_symbolic", RANK)


def solved(runs: list[Run]) -> str:
    """The share of problems solved, in per cent, and the number of runs that solved them."""
    shares = [100 * run["test_accuracy"] for run in runs if "test_accuracy" in run]
    return f"{Estimate.of(shares).text(1)} ({len(shares)})" if shares else ""


def first_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Of gsm_symbolic, to measure the costs with."""
    return collate(problems("gsm_symbolic", TASKS["gsm_symbolic"].batch, TRAIN))


def measure(compared: Sequence[str], rounds: int) -> dict[str, Any]:
    """Initialisation, step time and peak memory of each method, on a batch of gsm_symbolic."""

    def build(method: str, model: nn.Module, steps: int) -> nn.Module:
        return adapt(model, method, ranks(RANK)[method], TARGETS)

    builds = {method: functools.partial(build, method) for method in compared}
    return costs(
        Model(base()),
        builds,
        ranks(RANK),
        first_batch(),
        LORA,
        rounds=rounds,
        threads=os.cpu_count() or 1,
    )


def beside(theirs: Mapping[int, float], ours: Mapping[int, float]) -> Estimate:
    """The difference of two methods, seed by seed, for seeds draw different problems."""
    return Estimate.of([theirs[seed] - ours[seed] for seed in ours])


def report(result: Mapping[str, Any]) -> str:
    """The table, in Markdown. Holm's correction is for the methods of one task and rank."""
    rows = []
    for task, size in complete(result):
        loss = held_out_losses(result, task, size)
        p = holm({method: paired(loss[MISSE], loss[method]) for method in loss if method != MISSE})
        for method, runs in final_runs(result, task, size).items():
            rank = runs[0]["rank"]
            rate = rate_text(runs[0]["lr"], swept(result, task, method, rank))
            cells = [
                task,
                size,
                method,
                rank,
                runs[0]["trainable"],
                rate,
                Estimate.of(list(loss[method].values())).text(3),
            ]
            cells += (
                ["", ""]
                if method == MISSE
                else [beside(loss[method], loss[MISSE]).text(3), f"{p[method]:.2g}"]
            )
            rows.append([*cells, solved(runs)])
    head = [
        "task",
        "MiSSe's rank",
        "method",
        "rank",
        "trained",
        "best rate",
        "test loss",
        "less MiSSe's",
        "p",
    ]
    return table([*head, "solved, % (seeds)"], rows)


def figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """By name: the paper's Figure 5, training loss against tokens and time, and for Table 7 the test loss against parameters."""
    tasks = [task for task, size in complete(result) if size == RANK]
    figure, axes = plots.panels(len(tasks), 2, width=4)
    for task, (by_tokens, by_time) in zip(tasks, zip(axes[::2], axes[1::2])):
        for method, runs in final_runs(result, task, RANK).items():
            values = list(zip(*(smooth(run["losses"]) for run in runs)))
            tokens = sum(run["tokens"] for run in runs) / len(runs) / len(values)
            # Estimated from the step time of one batch of gsm_symbolic, for each token alike.
            second = result["costs"][method]["step"]["ms"] / 1e3 / result["batch_tokens"]
            for axis, unit in ((by_tokens, tokens), (by_time, tokens * second)):
                plots.band(axis, [unit * (step + 1) for step in range(len(values))], values, method)
        for axis, label in (
            (by_tokens, "training tokens"),
            (by_time, "estimated time of the steps, s"),
        ):
            axis.set(title=task, xlabel=label, ylabel="training loss (running mean)", yscale="log")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS)
    )
    return {"math_word_problems": figure, "math_word_problems_ranks": by_rank(result)}


def by_rank(result: Mapping[str, Any]) -> Any:
    """Means of the test loss on gsm_symbolic against trained parameters, and beside MiSSe's with intervals."""
    figure, (whole, difference) = plots.panels(1, 2, width=4)
    sizes = [
        (size, held_out_losses(result, task, size))
        for task, size in complete(result)
        if task == "gsm_symbolic"
    ]
    for method in result["costs"]:
        trained_at = [
            final_runs(result, "gsm_symbolic", size)[method][0]["trainable"] for size, _ in sizes
        ]
        whole.plot(
            trained_at,
            [statistics.fmean(loss[method].values()) for _, loss in sizes],
            **plots.look(method),
        )
        means, halves = zip(*(beside(loss[method], loss[MISSE]) for _, loss in sizes))
        difference.errorbar(trained_at, means, halves, **plots.look(method, capsize=2))
    whole.set(xlabel="trained parameters", ylabel="test loss, mean over seeds", xscale="log")
    difference.set(xlabel="trained parameters", ylabel="test loss less MiSSe's", xscale="log")
    figure.legend(
        *whole.get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS)
    )
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
    sizes: Sequence[int] = RANKS,
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
        result.update(
            done, runs=result["runs"] + [run for run in done["runs"] if run not in result["runs"]]
        )

    placed = [(task, size) for task in TASKS for size in sizes if size in TASKS[task].ranks]
    cells = [(task, method, ranks(size)[method]) for task, size in placed for method in compared]
    while wanted := [
        job
        for cell in cells
        for job in jobs(*cell, untried(swept(result, *cell), cell[1]), [SWEEP_SEED], short=short)
    ]:
        add(wanted)
    best = {cell: chosen(swept(result, *cell)) for cell in cells}
    final = [
        job for cell in cells for job in jobs(*cell, [best[cell]], range(1, 1 + seeds), short=short)
    ]
    add(sorted(final, key=lambda job: job["seed"]))
    return result


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run everything, and print the tables."""
    args = get_parser(__doc__, seeds=3).parse_args(argv)
    require_extras("math_word_problems", methods.EXTRAS | methods.SMOLLM2)
    few = {"compared": (LORA, MISSE), "sizes": (RANK,), "short": True} if args.quick else {}
    result = run(1 if args.quick else args.seeds, args.json, args.workers, **few)
    print(report(result))
    return result


if __name__ == "__main__":
    main()
