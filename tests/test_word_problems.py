"""The word problems, on a language model that is small enough for every run."""

import itertools
import random
import sys
import types

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import math_word_problems as problems
from common import word_problems as words
from common.methods import LORA, MISSE
from tests.experiments import check_figures


class Letters:
    """A tokenizer of single characters."""

    eos_token, eos_token_id = "~", ord("~")

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [min(ord(letter), 127) for letter in text]}

    def batch_decode(self, rows: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        return ["".join(chr(token) for token in row).split("~")[0] for row in rows.tolist()]


def create_dataset(task: str, size: int, seed: int, **settings: int) -> list[dict]:
    """What `reasoning_gym` gives, in little."""
    rows = []
    for place in range(size):
        rng = random.Random(seed + place)  # as it does: sets of neighbouring seeds overlap
        a, b = rng.randint(0, 999), rng.randint(0, 999)
        worked = {"answer_cot": f"#### {a + b}"} if task == "gsm_symbolic" else {}
        rows.append({"question": f"{a} + {b}", "answer": str(a + b), "metadata": worked})
    return rows


@pytest.fixture
def small_language_model(monkeypatch: pytest.MonkeyPatch) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 128, "vocab_size": 128}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"bos_token_id": 1, "eos_token_id": ord("~")}
    model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **tokens, **sizes))
    gym = types.SimpleNamespace(create_dataset=create_dataset)
    for function in (words.problems, problems.ranks):
        function.cache_clear()
    monkeypatch.setattr(words, "base", lambda: model)
    monkeypatch.setattr(words, "tokenizer", Letters)
    monkeypatch.setitem(sys.modules, "reasoning_gym", gym)
    return model


def test_word_problems(small_language_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch):
    of_task = {
        "gsm_symbolic": {"ranks": (8, 16), "solving": (1,)},
        "chain_sum": {"ranks": (8,), "solving": (1, 2)},
    }
    tasks = {}
    for name, task in words.TASKS.items():
        small = task._replace(batch=2, steps=30, held_out=40, longest=3)
        tasks[name] = small._replace(**of_task[name])
    monkeypatch.setattr(words, "TASKS", tasks)
    monkeypatch.setattr(words, "RANK", 8)
    result = problems.run(2, None, 0, compared=(LORA, MISSE), sizes=(8, 16), short=True)
    for function in (words.problems, problems.ranks):
        function.cache_clear()
    assert all(len(run["losses"]) == 3 for run in result["runs"])
    seeds_solving = {("gsm_symbolic", 8): [1], ("gsm_symbolic", 16): [], ("chain_sum", 8): [1, 2]}
    for (task, rank), seeds in seeds_solving.items():
        final = problems.final_runs(result, task, rank)
        for method, mine in final.items():
            sweep = problems.swept(result, task, method, mine[0]["rank"])
            assert not problems.untried(sweep, method)
            assert all("test_loss" not in run for run in sweep)
            best = problems.chosen(sweep)
            assert sorted((run["seed"], run["lr"]) for run in mine) == [(1, best), (2, best)]
            assert all("validation_loss" not in run for run in mine)
        solved = [run["seed"] for run in final[MISSE] if "test_accuracy" in run]
        assert sorted(solved) == seeds
    assert problems.complete(result) == list(seeds_solving)
    rows = [line[2:-2].split(" | ") for line in problems.report(result).splitlines()[2:]]
    assert [(row[0], row[1], row[-1][-3:]) for row in rows if row[2] == MISSE] == [
        ("gsm_symbolic", "8", "(1)"),
        ("gsm_symbolic", "16", ""),
        ("chain_sum", "8", "(2)"),
    ]
    check_figures(problems, result)


@pytest.mark.parametrize(
    ("losses", "wanted"),
    [
        ({}, [3e-4, 1e-3, 3e-3]),
        ({3e-4: 2.0, 1e-3: 1.0, 3e-3: 2.0}, []),
        ({3e-4: 2.0, 1e-3: 1.0, 3e-3: 0.5}, [1e-2]),
        ({1e-5: 1.0, 3e-5: 2.0}, []),  # the ladder ends
        ({1e-3: 1.0, 3e-3: None}, [3e-4]),  # diverged
        ({3e-4: None, 1e-3: None, 3e-3: None}, [1e-4]),
    ],
)
def test_the_sweep_goes_on_to_the_neighbours_of_the_best(
    losses: dict[float, float | None], wanted: list[float]
):
    sweep = [{"lr": rate, "validation_loss": loss} for rate, loss in losses.items()]
    assert problems.untried(sweep, LORA) == wanted


def test_reported_runs_are_those_at_the_best_rate_of_seeds_that_all_have():
    settings = {"task": "gsm_symbolic", "rank": 8}
    rows = [settings | {"method": MISSE, "lr": 3e-4, "seed": 2, "test_loss": 9.0}]  # not the best
    for method, seeds in ((LORA, (1, 2, 3)), (MISSE, (1, 2))):
        own = settings | {"method": method, "lr": 1e-3}
        rows.append(own | {"seed": 0, "validation_loss": 1.0})
        rows += [own | {"seed": seed, "test_loss": float(seed)} for seed in seeds]
    ranks = {"8": {LORA: 8, MISSE: 8}, "16": {LORA: 16, MISSE: 16}}
    result = {"runs": rows, "costs": {LORA: {}, MISSE: {}}, "ranks": ranks}
    losses = {1: 1.0, 2: 2.0}
    assert problems.held_out_losses(result, "gsm_symbolic", 8) == {LORA: losses, MISSE: losses}
    assert problems.complete(result) == [("gsm_symbolic", 8)]
    with pytest.raises(ValueError, match="two runs of one rate"):
        problems.complete(result | {"runs": [*rows, rows[1]]})


def test_loss_is_of_the_answers_alone_whatever_the_padding(small_language_model: LlamaForCausalLM):
    model = words.Model(small_language_model).eval()
    rows = [words.Problem([65, 66, 67], [68, 69], 1.0), words.Problem([70], [71, 72, 73], 1.0)]
    total = 0.0
    for question, worked, _ in rows:
        logits = small_language_model(torch.tensor([question + worked])).logits
        of_answer, tokens = logits[0, len(question) - 1 : -1], torch.tensor(worked)
        total += nn.functional.cross_entropy(of_answer, tokens, reduction="sum").item()
    assert words.held_out_loss(model, rows) == pytest.approx(total / 5, rel=1e-5)
    assert model(*words.collate(rows)).loss.item() == pytest.approx(total / 5, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "number"),
    [("so\n#### 1,200", 1200.0), ("#### 3\n#### -4.5", -4.5), ("12", None), ("#### x", None)],
)
def test_the_final_answer(text: str, number: float | None):
    assert words.final(text) == number


def test_problems_held_out_are_not_trained_on(small_language_model: LlamaForCausalLM):
    def questions(rows: list[words.Problem]) -> set[tuple[int, ...]]:
        return {tuple(row.question) for row in rows}

    seeds = (words.VALIDATION, words.TEST, words.TRAIN, words.TRAIN + words.APART)
    for task in words.TASKS:
        sets = [questions(words.problems(task, 600, seed)) for seed in seeds]
        for a, b in itertools.combinations(sets, 2):
            assert len(a & b) < 10  # by chance; shifted sets share all
        seen = words.problems(task, 10, words.TRAIN)
        assert not questions(words.fresh(task, 50, words.TRAIN, seen)) & questions(seen)


@pytest.mark.parametrize("seed", [problems.SWEEP_SEED, 1])
def test_a_run_keeps_its_problems_apart(
    seed: int, small_language_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
):
    """Every draw gives the same problems here.

    Still none is trained on that is validated or tested with.
    """
    trained_on, scored = set(), set()

    def same(task: str, count: int, seed: int) -> list[words.Problem]:
        return [words.Problem([place], [66], 0.0) for place in range(count)]

    def train(
        model: object, method: str, rank: int, batches: list, **others: object
    ) -> list[float]:
        for tokens, _, _ in batches:
            trained_on.update(tokens[:, 0].tolist())
        return [0.0]

    def score(model: nn.Module, rows: list[words.Problem]) -> float:
        scored.update(row.question[0] for row in rows)
        return 0.0

    monkeypatch.setattr(words, "problems", same)
    monkeypatch.setattr(problems, "fit", train)
    monkeypatch.setattr(words, "held_out_loss", score)
    monkeypatch.setattr(words, "accuracy", lambda model, rows, longest: score(model, rows))
    job = {"task": "gsm_symbolic", "method": MISSE, "rank": 4, "lr": 1e-3}
    problems.work({**job, "seed": seed, "steps": 10, "held_out": 4})
    assert scored == (set(range(4)) if seed == problems.SWEEP_SEED else set(range(4, 8)))
    assert trained_on == set(range(8, 28))


def test_accuracy_reads_the_decoded_answer(
    small_language_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
):
    def answer(input_ids: torch.Tensor, **settings: object) -> torch.Tensor:
        tokens = torch.tensor([list(map(ord, "#### 7~"))] * len(input_ids))
        return torch.cat([input_ids, tokens], 1)

    monkeypatch.setattr(small_language_model, "generate", answer)
    rows = [words.Problem([65] * (place + 1), [66], float(place + 6)) for place in range(4)]
    assert words.accuracy(words.Model(small_language_model), rows, 7) == 0.25
