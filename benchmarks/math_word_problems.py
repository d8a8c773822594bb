"""SmolLM2-135M learns to solve word problems: the paper's Figure 5 and Table 7 at a size for a CPU.

Two tasks of `reasoning_gym`, procedural and with checkable answers: ``gsm_symbolic`` (the GSM8K templates with new names and
numbers, answered in steps) and ``chain_sum`` (sums of two or three numbers of one or two digits). Problems held out are not among
those trained on, but those of gsm_symbolic have the same templates. The base is in bf16, adapters are in fp32, all
linear layers are adapted, and methods train equally many parameters (those of MiSSe at rank 64). Each method's learning rate is
the best of a sweep on validation loss with seed 0; the loss on test problems is reported for other seeds, and for seed 1 the
share of them that is solved exactly.
"""

import copy
import functools
import math
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common import methods, plots
from common.costs import costs
from common.methods import DORA, LORA, MISS, MISSE, PISSA, Output, adapt, equal_rank, fit, targeted, trained
from common.runs import Estimate, Run, best_rate, by_seed, get_parser, holm, paired, rate_text, read, run_all, select, write
from measure import require_extras, table
from model_cost import load_base, smollm2

RANK, RANKS = 64, (8, 64, 128)
METHODS = (LORA, PISSA, DORA, MISS, MISSE)
RANKED, RANKED_TASK = (LORA, MISSE), "gsm_symbolic"  # at every rank, at the best rate of rank 64, with one seed
RATES = {
    LORA: (3e-4, 1e-3, 3e-3),
    PISSA: (1e-4, 3e-4, 1e-3),
    DORA: (3e-4, 1e-3, 3e-3),
    MISS: (1e-4, 3e-4, 1e-3),
    MISSE: (1e-4, 3e-4, 1e-3),
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Task(NamedTuple):
    """One task: problems in a batch, steps, problems held out, the longest answer in tokens, `reasoning_gym`'s own settings."""

    batch: int
    steps: int
    held_out: int
    longest: int
    settings: dict[str, int]


TASKS = {
    "gsm_symbolic": Task(batch=2, steps=30, held_out=24, longest=150, settings={}),
    "chain_sum": Task(
        batch=8, steps=25, held_out=64, longest=8, settings={"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
    ),
}
SWEEP_SEED, EXACT_SEED = 0, 1
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
        hidden = self.language_model.model(tokens, attention_mask=mask).last_hidden_state[:, :-1][kept]
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
        question, answer = (tokenizer()(text)["input_ids"] for text in (f"{row['question']}\n", f"{worked}{end}"))
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
        input_ids=tokens, attention_mask=mask, max_new_tokens=longest, do_sample=False, pad_token_id=end
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
    """One run: adapt, train, and the losses; the accuracy too where it is asked for."""
    task, steps = TASKS[job["task"]], job["steps"]
    validation = fresh(job["task"], job["held_out"], VALIDATION, [])
    test = fresh(job["task"], job["held_out"], TEST, validation)
    rows = fresh(job["task"], steps * task.batch, TRAIN + APART * job["seed"], validation + test)
    torch.manual_seed(job["seed"])
    model = Model(copy.deepcopy(base()))
    wrapped = adapt(model, job["method"], job["rank"], TARGETS, steps=steps)
    parts = [collate(rows[start : start + task.batch]) for start in range(0, len(rows), task.batch)]
    start = time.perf_counter()
    losses = list(fit(wrapped, job["method"], job["rank"], parts, lr=job["lr"], schedule=schedule(steps)))
    result: Run = {
        "trainable": sum(parameter.numel() for parameter in trained(model)),
        "losses": [round(loss, 4) for loss in losses],
        "tokens": sum(int(mask.sum()) for _, mask, _ in parts),
        "validation_loss": held_out_loss(wrapped, validation),
        "test_loss": held_out_loss(wrapped, test),
    }
    if job["seed"] == EXACT_SEED:
        result["test_accuracy"] = accuracy(model, test, task.longest)
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def jobs(task: str, method: str, rank: int | None, rates: Iterable[float], seeds: Iterable[int], *, short: bool) -> list[Run]:
    """The settings of some runs; ``short`` ones have a tenth of the steps and of the problems held out."""
    part = 10 if short else 1
    size = {"steps": TASKS[task].steps // part, "held_out": TASKS[task].held_out // part}
    return [{"task": task, "method": method, "rank": rank, "lr": lr, "seed": seed, **size} for seed in seeds for lr in rates]


@functools.cache
def ranks(rank: int) -> dict[str, int | None]:
    """The ranks at which the methods train as much as MiSSe at ``rank``."""
    linears = targeted(base(), TARGETS).values()
    budget = rank * sum(linear.out_features for linear in linears)
    return {method: equal_rank(method, budget, linears) for method in METHODS}


def tasks(result: Mapping[str, Any]) -> list[str]:
    """The tasks of which every method has reported runs."""
    return [task for task in TASKS if all(final_runs(result, task, method) for method in result["costs"])]


def final_runs(result: Mapping[str, Any], task: str, method: str) -> list[Run]:
    """The reported runs of a method at rank 64 or its equal."""
    return reported(result, task, method, result["ranks"][str(RANK)][method])


def reported(result: Mapping[str, Any], task: str, method: str, rank: int | None) -> list[Run]:
    """The runs of a method at a rank that no choice was made with."""
    return [run for run in select(result["runs"], task=task, method=method, rank=rank) if run["seed"] != SWEEP_SEED]


def solved(runs: list[Run]) -> str:
    """The share of problems solved, in per cent, of the run that solved them."""
    return ", ".join(f"{100 * run['test_accuracy']:.1f}" for run in runs if "test_accuracy" in run)


def quality(result: Mapping[str, Any], task: str = "gsm_symbolic") -> dict[str, dict[int, float]]:
    """Test loss, by method and seed."""
    return {method: by_seed(final_runs(result, task, method), "test_loss") for method in result["costs"]}


def first_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Of gsm_symbolic, to measure the costs with."""
    return collate(problems("gsm_symbolic", TASKS["gsm_symbolic"].batch, TRAIN))


def measure(compared: Sequence[str], rounds: int) -> dict[str, Any]:
    """Initialisation, step time and peak memory of each method, on a batch of gsm_symbolic."""

    def build(method: str, model: nn.Module, steps: int) -> nn.Module:
        return adapt(model, method, ranks(RANK)[method], TARGETS)

    builds = {method: functools.partial(build, method) for method in compared}
    return costs(Model(base()), builds, ranks(RANK), first_batch(), LORA, rounds=rounds, threads=os.cpu_count() or 1)


def report(result: Mapping[str, Any]) -> str:
    """The tables, in Markdown: the methods, then the ranks."""
    rows, rank_rows = [], []
    for task in tasks(result):
        losses = quality(result, task)
        p = holm({method: paired(losses[MISSE], losses[method]) for method in losses if method != MISSE})
        for method in losses:
            runs = final_runs(result, task, method)
            swept = select(result["runs"], task=task, method=method, seed=SWEEP_SEED)
            cells = [task, method, runs[0]["rank"], runs[0]["trainable"], rate_text(runs[0]["lr"], swept)]
            cells += [Estimate.of(list(losses[method].values())).text(4), f"{p[method]:.2g}" if method in p else ""]
            rows.append([*cells, solved(runs)])
    for method in [method for method in RANKED if method in result["costs"]]:
        for of_rank in result["ranks"].values():
            mine = reported(result, RANKED_TASK, method, of_rank[method])
            if mine:  # an interrupted benchmark has some ranks only
                cells = [method, mine[0]["rank"], mine[0]["trainable"], f"{mine[0]['lr']:g}", len(mine)]
                rank_rows.append([*cells, Estimate.of([run["test_loss"] for run in mine]).text(4)])
    head = ["task", "method", "rank", "trained", "best rate", "test loss", "p against MiSSe", "solved, % (one seed)"]
    ranked = ["method", "rank", "trained", "rate", "seeds", "test loss"]
    return table(head, rows) + "\n\n" + table(ranked, rank_rows)


def figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """The paper's Figure 5, by name: training loss against tokens, and against the time that the steps take one after another."""
    figure, axes = plots.panels(len(tasks(result)), 2, width=4)
    for task, (by_tokens, by_time) in zip(tasks(result), (axes[:2], axes[2:])):
        for method in result["costs"]:
            runs = final_runs(result, task, method)
            curves = [smooth(run["losses"]) for run in runs]
            values = list(zip(*curves))
            tokens = sum(run["tokens"] for run in runs) / len(runs) / len(values)
            # Estimated from the step time of one batch of gsm_symbolic, for each token alike.
            second = result["costs"][method]["step"]["ms"] / 1e3 / result["batch_tokens"]
            for axis, unit in ((by_tokens, tokens), (by_time, tokens * second)):
                plots.band(axis, [unit * (step + 1) for step in range(len(values))], values, method)
        for axis, label in ((by_tokens, "training tokens"), (by_time, "estimated time of the steps, s")):
            axis.set(title=task, xlabel=label, ylabel="training loss (running mean)", yscale="log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS))
    return {"math_word_problems": figure}


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
    """Measure the costs, sweep the rates, and run what is left to run at the best ones, one task after another."""
    at = ranks(RANK)
    sections = {
        "ranks": {str(rank): ranks(rank) for rank in sizes},
        "batch_tokens": int(first_batch()[1].sum()),
        "costs": measure(compared, 2 if short else 5),
    }
    write(path, read(path) | sections)
    result: dict[str, Any] = sections | {"runs": []}

    def add(wanted: list[Run]) -> None:
        done = run_all([job for place, job in enumerate(wanted) if job not in wanted[:place]], work, path, workers)
        result.update(done, runs=result["runs"] + [run for run in done["runs"] if run not in result["runs"]])

    for task in TASKS:
        add([job for method in compared for job in jobs(task, method, at[method], RATES[method], [SWEEP_SEED], short=short)])
        final: list[Run] = []
        further: list[Run] = []
        for method in compared:
            swept = select(result["runs"], task=task, method=method, rank=at[method], seed=SWEEP_SEED)
            rate = best_rate(swept, "validation_loss", largest=False)
            final += jobs(task, method, at[method], [rate], range(1, 1 + seeds), short=short)
            for rank in sizes if task == RANKED_TASK and method in RANKED else ():
                further += jobs(task, method, ranks(rank)[method], [rate], [2], short=short)
        add(sorted(final, key=lambda job: job["seed"]) + further)
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
