"""What the experiments share, and each script on settings that are small enough for every run."""

import copy
import json
import math
import pathlib
import random
import sys
import types

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import gradient_norm
import math_word_problems as problems
import no_free_lunch
import pareto
import publish
import word_valence
from common import methods, runs
from common.costs import costs
from common.methods import (
    COUNTS,
    FULL,
    LORA,
    LORA_FA,
    MISS,
    MISSE,
    SIGNED,
    VERA,
    Output,
    adapt,
    equal_rank,
    fit,
    trained,
)
from common.runs import Estimate
from miss import functional


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8))
        self.head = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Output:
        predictions = self.head(self.body(x))
        return Output(nn.functional.mse_loss(predictions, y), predictions)


TARGETS = ("body.0", "body.2")
BATCH = torch.randn(6, 12, generator=torch.Generator().manual_seed(0)), torch.ones(6, 1)


@pytest.mark.parametrize("method", [*COUNTS, VERA, FULL])
def test_each_method_trains_what_is_counted_and_learns(method: str):
    torch.manual_seed(0)
    base = Small()
    linears = [base.body[0], base.body[2]]
    budget = 8 * (20 + 8)
    rank = equal_rank(method, budget, linears, vera=4)
    model = adapt(copy.deepcopy(base), method, rank, TARGETS, head="head", steps=30)
    count = (
        sum(parameter.numel() for parameter in trained(model))
        - base.head.weight.numel()
        - base.head.bias.numel()
    )
    if method in COUNTS:
        assert (
            count
            == sum(
                COUNTS[method](rank, linear.in_features, linear.out_features) for linear in linears
            )
            <= budget
        )
        assert (
            count
            + sum(COUNTS[method](1, k, d) - COUNTS[method](0, k, d) for k, d in ((12, 20), (20, 8)))
            > budget
        )
    with torch.no_grad():
        torch.testing.assert_close(model(*BATCH).predictions, base(*BATCH).predictions)
    before = {name: value.clone() for name, value in model.named_parameters()}
    wanted = {name for name, value in model.named_parameters() if value.requires_grad}
    losses = list(
        fit(model, method, rank, [BATCH] * 30, lr=1e-2, schedule=lambda step: 1 - step / 30)
    )
    assert losses[-1] < 0.5 * losses[0]
    moved = {
        name for name, value in model.named_parameters() if not torch.equal(value, before[name])
    }
    assert moved == wanted
    assert {name.rpartition(".")[2] for name in moved if "head" in name} == {"weight", "bias"}
    if method == LORA_FA:
        assert not any("lora_A" in name for name in moved)


def test_orthonormal_scale_gives_the_fixed_factor_unit_rows():
    for method, frozen in ((MISSE, lambda a, b: a), (MISS, lambda a, b: b.T)):
        model = adapt(Small(), method, 4, TARGETS, scale=methods.ORTHONORMAL)
        for layer in (model.body[0], model.body[2]):
            a, b = (
                functional.misse_factors(layer.miss_D, layer.in_features, layer.out_features)
                if method == MISSE
                else (functional.miss_factors(layer.miss_D, layer.out_features))
            )
            torch.testing.assert_close(layer.scale * frozen(a, b).norm(dim=1), torch.ones(4))


def test_random_signs_are_those_of_the_delta():
    torch.manual_seed(0)
    base = Small()
    model = adapt(copy.deepcopy(base), SIGNED, 4, TARGETS)
    layer, old = model.body[0], base.body[0]
    signs = layer.weight[0] / old.weight[0]
    assert set(signs.tolist()) == {-1.0, 1.0}
    nn.init.normal_(layer.miss_D)
    shared, own = functional.misse_factors(layer.miss_D, 12, 20)
    delta = own @ shared * signs
    torch.testing.assert_close(
        layer(BATCH[0]), nn.functional.linear(BATCH[0], old.weight + delta, old.bias)
    )


def test_a_head_has_its_own_rate():
    model = adapt(Small(), MISSE, 4, TARGETS, head="head")
    before = {name: value.clone() for name, value in model.named_parameters()}
    list(fit(model, MISSE, 4, [BATCH], lr=1e-3, schedule=lambda step: 1.0, head=(model.head, 1e-1)))
    # The first step of Adam is the rate itself, whatever the gradient.
    steps = {
        name: (value - before[name]).abs().max().item() for name, value in model.named_parameters()
    }
    assert steps["head.bias"] == pytest.approx(1e-1, rel=1e-3)
    assert steps["body.0.miss_D"] == pytest.approx(1e-3, rel=1e-3)


def test_costs_count_the_memory_of_training():
    base = Small()
    builds = {
        method: lambda model, steps, method=method: adapt(model, method, 4, TARGETS)
        for method in (LORA, MISSE)
    }
    result = costs(base, builds, dict.fromkeys(builds, 4), BATCH, LORA, rounds=3)
    own = sum(value.nbytes for value in base.parameters())
    for cost in result.values():
        adapters = 4 * cost["trainable"]
        assert (
            cost["memory"] > own + 4 * adapters
        )  # weights, D, its two states and its gradient, and something to hold in a step
        assert cost["memory"] < own + 4 * adapters + 20_000
    assert result[LORA]["step"]["median"] == 1.0


def test_statistics():
    assert Estimate.of([1.0, 2.0, 3.0]) == pytest.approx(
        (2.0, 4.302653 / math.sqrt(3))
    )  # t(0.975, 2 degrees of freedom)
    assert Estimate.of([1.0]).text() == "1.000"
    assert Estimate(0.5, 0.25).text(2) == "0.50 ± 0.25"
    # Differences 1, 2, 3: t = 2 / (1 / sqrt(3)), two-sided p with 2 degrees of freedom.
    assert runs.paired({0: 2.0, 1: 4.0, 2: 6.0, 9: 1.0}, {0: 1.0, 1: 2.0, 2: 3.0}) == pytest.approx(
        0.0741799, abs=1e-6
    )
    assert math.isnan(runs.paired({0: 1.0}, {0: 2.0}))
    assert math.isnan(runs.holm({"a": math.nan, "b": 1e-6})["a"])
    assert runs.holm({"a": math.nan, "b": 1e-6, "c": 1e-4})["c"] == 1e-4
    with pytest.raises(ValueError, match="two runs of seed 1"):
        runs.by_seed([{"seed": 1, "r": 1.0, "epochs": 1}, {"seed": 1, "r": 2.0, "epochs": 2}], "r")
    assert runs.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "c": 0.06, "b": 0.06}
    )


def test_the_best_rate_is_none_that_diverged():
    rows = [
        {"lr": lr, "seed": seed, "r": r}
        for lr, of_lr in ((1, [0.5, 0.6]), (2, [0.9, None]), (3, [0.7, 0.1]))
        for seed, r in enumerate(of_lr)
    ]
    assert runs.by_rate(rows, "r") == {1: [0.5, 0.6], 3: [0.7, 0.1]}
    assert runs.best_rate(rows, "r", largest=True) == 1
    assert runs.best_rate(rows, "r", largest=False) == 3


def double(job: dict) -> dict:
    if job["x"] == 3:
        raise ValueError("three")
    return {"y": 2 * job["x"], "none": math.nan, "curve": [1.0, math.inf]}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupted_benchmark_goes_on(tmp_path: pathlib.Path, workers: int):
    path = tmp_path / "result.json"
    with pytest.raises(ValueError, match="three"):
        runs.run_all([{"x": 1}, {"x": 2}, {"x": 3}], double, path, workers)
    kept = runs.read(path)["runs"]
    assert [(run["x"], run["y"], run["none"], run["curve"]) for run in kept] == [
        (1, 2, None, [1, None]),
        (2, 4, None, [1, None]),
    ]
    kept[0]["y"] = "not run again"
    path.write_text(json.dumps({"runs": kept, "note": [1]}))
    result = runs.run_all([{"x": 1}, {"x": 4}], double, path, workers)
    assert [run["y"] for run in result["runs"]] == ["not run again", 4, 8]
    assert runs.read(path) == result
    assert result["note"] == [1]


def test_no_free_lunch(tmp_path: pathlib.Path):
    jobs = [job for job in no_free_lunch.jobs(2, 20, 30) if job["lr"] in (1e-3, 1e-2)]
    result = runs.run_all(jobs, no_free_lunch.work, None, 0)
    base = {
        run["train_curve"][0] for run in result["runs"] if run["seed"] == no_free_lunch.FIRST_SEED
    }
    assert len(base) == 1  # every method starts from the one base
    for run in result["runs"]:
        assert len(run["validation_curve"]) == 3
        assert run["validation_min"] == pytest.approx(min(run["validation_curve"]), rel=1e-3)
    result["costs"] = no_free_lunch.measure(2)
    assert (
        result["costs"][MISS]["trainable"]
        == result["costs"][MISSE]["trainable"]
        == result["costs"][LORA]["trainable"]
        == 512
    )
    assert no_free_lunch.report(result).count("\n") == 1 + len(no_free_lunch.RANKS)
    check_figures(no_free_lunch, result)


def check_figures(script, result: dict) -> None:
    for figure in script.figures(result).values():
        assert all(
            axis.get_xlabel() and axis.get_ylabel()
            for axis in figure.axes
            if not axis.get_shared_y_axes().joined(axis, figure.axes[0]) or axis is figure.axes[0]
        )
        figure.canvas.draw()


@pytest.fixture
def short_words(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(word_valence, "RATES", {LORA: (1e-3,), MISSE: (1e-3,)})
    monkeypatch.setattr(
        word_valence, "STUDY", ((MISSE, methods.ORTHONORMAL, 3e-3, (4,), (1e-3, 1e-2)),)
    )


@pytest.mark.usefixtures("short_words")
def test_word_valence():
    result = runs.run_all(word_valence.jobs(2, 1, 100, 1), word_valence.work, None, 0)
    assert len(result["runs"]) == 2 * 2 + 2
    lora, misse = (
        runs.select(result["runs"], method=method, scale=None) for method in (LORA, MISSE)
    )
    assert lora[0]["trainable"] == misse[0]["trainable"]
    result["costs"] = word_valence.measure(2, 100)
    assert "| MiSSe | 16 |" in word_valence.report(result)
    assert "orthonormal | 0.003 | 4 |" in word_valence.report(result)
    result["runs"] = [
        run | {"test_r": 0.8 + run["seed"] / 100} for run in result["runs"]
    ]  # the figures leave failed rates out
    check_figures(word_valence, result)


def test_batches_hold_every_word_once():
    split = word_valence.Split([str(place) for place in range(150)], torch.arange(150.0))
    seen = list(word_valence.batches(split, [place % 5 for place in range(150)], 2, seed=1))
    assert sorted(rating for _, ratings in seen for rating in ratings.tolist()) == sorted(
        2 * list(map(float, range(150)))
    )
    assert all(words == [str(int(rating)) for rating in ratings] for words, ratings in seen)
    assert all(len({int(word) % 5 for word in words}) <= 3 for words, _ in seen)


class Letters:
    """A tokenizer of single characters."""

    eos_token, eos_token_id = "~", ord("~")

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [min(ord(letter), 127) for letter in text]}

    def batch_decode(self, rows: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        return ["".join(chr(token) for token in row).split("~")[0] for row in rows.tolist()]


def create_dataset(task: str, size: int, seed: int, **settings: int) -> list[dict]:
    """What `reasoning_gym` gives, in little."""
    draws = [
        random.Random(seed + place) for place in range(size)
    ]  # as it does: sets of neighbouring seeds overlap
    pairs = [(rng.randint(0, 999), rng.randint(0, 999)) for rng in draws]
    worked = {"answer_cot": "#### {}"} if task == "gsm_symbolic" else {}
    return [
        {
            "question": f"{a} + {b}",
            "answer": str(a + b),
            "metadata": {key: text.format(a + b) for key, text in worked.items()},
        }
        for a, b in pairs
    ]


@pytest.fixture
def small_language_model(monkeypatch: pytest.MonkeyPatch) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 96,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128, tie_word_embeddings=True, bos_token_id=1, eos_token_id=ord("~"), **sizes
        )
    )
    for function in (problems.problems, problems.ranks):
        function.cache_clear()
    monkeypatch.setattr(problems, "base", lambda: model)
    monkeypatch.setattr(problems, "tokenizer", Letters)
    monkeypatch.setitem(
        sys.modules, "reasoning_gym", types.SimpleNamespace(create_dataset=create_dataset)
    )
    return model


def test_word_problems(small_language_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch):
    of_task = {
        "gsm_symbolic": {"ranks": (8, 16), "solving": (1,)},
        "chain_sum": {"ranks": (8,), "solving": (1, 2)},
    }
    tasks = {
        name: task._replace(batch=2, steps=30, held_out=40, longest=3, **of_task[name])
        for name, task in problems.TASKS.items()
    }
    monkeypatch.setattr(problems, "TASKS", tasks)
    monkeypatch.setattr(problems, "RANK", 8)
    result = problems.run(2, None, 0, compared=(LORA, MISSE), sizes=(8, 16), short=True)
    for function in (problems.problems, problems.ranks):
        function.cache_clear()
    assert all(len(run["losses"]) == 3 for run in result["runs"])
    solved = {("gsm_symbolic", 8, 1), ("chain_sum", 8, 1), ("chain_sum", 8, 2)}
    for task, rank in (("gsm_symbolic", 8), ("gsm_symbolic", 16), ("chain_sum", 8)):
        final = problems.final_runs(result, task, rank)
        for method, mine in final.items():
            sweep = problems.swept(result, task, method, mine[0]["rank"])
            assert not problems.untried(sweep, method)
            assert all("test_loss" not in run for run in sweep)
            assert sorted((run["seed"], run["lr"]) for run in mine) == [
                (seed, problems.chosen(sweep)) for seed in (1, 2)
            ]
            assert all("validation_loss" not in run for run in mine)
        assert {(task, rank, run["seed"]) for run in final[MISSE] if "test_accuracy" in run} == {
            each for each in solved if each[:2] == (task, rank)
        }
    assert problems.complete(result) == [
        ("gsm_symbolic", 8),
        ("gsm_symbolic", 16),
        ("chain_sum", 8),
    ]
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
    runs_of = {
        method: [{"method": method, "lr": 1e-3, "seed": 0, "validation_loss": 1.0}]
        for method in (LORA, MISSE)
    }
    for method, seeds in ((LORA, (1, 2, 3)), (MISSE, (1, 2))):
        runs_of[method] += [
            {"method": method, "lr": 1e-3, "seed": seed, "test_loss": float(seed)} for seed in seeds
        ]
    stale = {"method": MISSE, "lr": 3e-4, "seed": 2, "test_loss": 9.0}
    rows = [settings | run for run in [*runs_of[LORA], *runs_of[MISSE], stale]]
    result = {
        "runs": rows,
        "costs": {LORA: {}, MISSE: {}},
        "ranks": {"8": {LORA: 8, MISSE: 8}, "16": {LORA: 16, MISSE: 16}},
    }
    assert problems.held_out_losses(result, "gsm_symbolic", 8) == {
        method: {1: 1.0, 2: 2.0} for method in (LORA, MISSE)
    }
    assert problems.complete(result) == [("gsm_symbolic", 8)]
    with pytest.raises(ValueError, match="two runs of one rate"):
        problems.complete(result | {"runs": [*rows, rows[0]]})


def test_loss_is_of_the_answers_alone_whatever_the_padding(small_language_model: LlamaForCausalLM):
    model = problems.Model(small_language_model).eval()
    rows = [
        problems.Problem([65, 66, 67], [68, 69], 1.0),
        problems.Problem([70], [71, 72, 73], 1.0),
    ]
    single = []
    for question, worked, _ in rows:
        logits = small_language_model(torch.tensor([question + worked])).logits[
            0, len(question) - 1 : -1
        ]
        single.append(
            nn.functional.cross_entropy(logits, torch.tensor(worked), reduction="sum").item()
        )
    assert problems.held_out_loss(model, rows) == pytest.approx(sum(single) / 5, rel=1e-5)
    assert model(*problems.collate(rows)).loss.item() == pytest.approx(sum(single) / 5, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "number"),
    [("so\n#### 1,200", 1200.0), ("#### 3\n#### -4.5", -4.5), ("12", None), ("#### x", None)],
)
def test_the_final_answer(text: str, number: float | None):
    assert problems.final(text) == number


def test_problems_held_out_are_not_trained_on(small_language_model: LlamaForCausalLM):
    def questions(rows: list[problems.Problem]) -> set[tuple[int, ...]]:
        return {tuple(row.question) for row in rows}

    seeds = (problems.VALIDATION, problems.TEST, problems.TRAIN, problems.TRAIN + problems.APART)
    for task in problems.TASKS:
        sets = [questions(problems.problems(task, 600, seed)) for seed in seeds]
        assert all(
            len(a & b) < 10 for place, a in enumerate(sets) for b in sets[:place]
        )  # by chance; shifted sets share all
        seen = problems.problems(task, 10, problems.TRAIN)
        assert not questions(problems.fresh(task, 50, problems.TRAIN, seen)) & questions(seen)


@pytest.mark.parametrize("seed", [problems.SWEEP_SEED, 1])
def test_a_run_keeps_its_problems_apart(
    seed: int, small_language_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
):
    """Where every draw gives the same problems, none is both trained on, validated with and tested with."""
    trained_on, scored = set(), set()

    def same(task: str, count: int, seed: int) -> list[problems.Problem]:
        return [problems.Problem([place], [66], 0.0) for place in range(count)]

    def train(
        model: nn.Module, method: str, rank: int, batches: list, **settings: object
    ) -> list[float]:
        trained_on.update(row[0].item() for tokens, _, _ in batches for row in tokens)
        return [0.0]

    def score(model: nn.Module, rows: list[problems.Problem]) -> float:
        scored.update(row.question[0] for row in rows)
        return 0.0

    monkeypatch.setattr(problems, "problems", same)
    monkeypatch.setattr(problems, "fit", train)
    monkeypatch.setattr(problems, "held_out_loss", score)
    monkeypatch.setattr(problems, "accuracy", lambda model, rows, longest: score(model, rows))
    problems.work(
        {
            "task": "gsm_symbolic",
            "method": MISSE,
            "rank": 4,
            "lr": 1e-3,
            "seed": seed,
            "steps": 10,
            "held_out": 4,
        }
    )
    assert scored == (set(range(4)) if seed == problems.SWEEP_SEED else set(range(4, 8)))
    assert trained_on == set(range(8, 28))


def test_accuracy_reads_the_decoded_answer(
    small_language_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
):
    def answer(input_ids: torch.Tensor, **settings: object) -> torch.Tensor:
        tokens = torch.tensor([list(map(ord, "#### 7~"))] * len(input_ids))
        return torch.cat([input_ids, tokens], 1)

    monkeypatch.setattr(small_language_model, "generate", answer)
    rows = [problems.Problem([65] * (place + 1), [66], float(place + 6)) for place in range(4)]
    assert problems.accuracy(problems.Model(small_language_model), rows, 7) == 0.25


def test_gradient_norms_are_those_of_the_formulas(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    base = Small()
    monkeypatch.setattr(gradient_norm, "MODELS", {"small": (("0", "2"), 6)})
    monkeypatch.setattr(gradient_norm, "material", lambda name, batches: (base, [BATCH] * batches))
    run = gradient_norm.work({"model": "small", "rank": 4, "batches": 2})
    base.requires_grad_(True)
    base(*BATCH).loss.backward()
    weights = [base.body[0].weight.grad, base.body[2].weight.grad]
    square = sum(weight.square().sum().item() for weight in weights)
    columns = sum(
        sum(weight[:, j::4].sum(1).square().sum().item() for j in range(4)) for weight in weights
    )
    assert run["norms"][FULL][0] == pytest.approx(math.sqrt(square), rel=1e-5)
    assert run["norms"][MISSE][0] == pytest.approx(math.sqrt(columns), rel=1e-5)
    assert run["norms"][MISSE][0] == pytest.approx(
        run["expected"][MISSE][0] * math.sqrt(run["factor_columns"][0]), rel=1e-5
    )
    assert run["norms"][MISS][0] == pytest.approx(
        run["expected"][MISS][0] * math.sqrt(run["factor_rows"][0]), rel=1e-5
    )
    x = BATCH[0]
    first = sum(x[:, j::4].sum(1).square().sum().item() for j in range(4)) / x.square().sum().item()
    with torch.no_grad():
        x = base.body[:2](x)
    second = (
        sum(x[:, j::4].sum(1).square().sum().item() for j in range(4)) / x.square().sum().item()
    )
    assert run["factor_inputs"][0][1] == pytest.approx((first + second) / 2, rel=1e-5)

    monkeypatch.setattr(gradient_norm, "KINDS_RANK", 4)
    [body0, body2] = gradient_norm.kinds("small")
    assert body0[3] * body0[2] + body2[3] * body2[2] == pytest.approx(
        run["factor_columns"][0], rel=1e-5
    )
    assert [body0[4], body2[4]] == pytest.approx([first, second], rel=1e-5)
    shown = {
        "runs": [run | {"model": "small", "rank": 4, "batches": 2}],
        "kinds": {"small": [body0, body2]},
    }
    assert "| small | body.2 | 1 |" in gradient_norm.report(shown)


def test_lora_is_expected_what_it_has_on_average():
    base, draws = Small(), 300
    weights = [base.body[0].weight, base.body[2].weight]
    layers = {"body.0": base.body[0], "body.2": base.body[2]}
    expected = gradient_norm.correlation(base, layers, BATCH, 4)["expected"][LORA] ** 2
    squares = []
    for _ in range(draws):
        model = adapt(copy.deepcopy(base), LORA, 4, TARGETS, scale=1.0)
        squares.append(gradient_norm.first_gradient(model, trained(model), BATCH) ** 2)
    mean, half = Estimate.of(squares)
    assert abs(mean - expected) < 2.5 * half  # about five standard errors
    assert half < 0.1 * expected
    assert all(weight.requires_grad for weight in weights)


def test_the_front_holds_what_nothing_dominates():
    points = {
        "best": (1.0, 1.0, 1.0),
        "cheap": (2.0, 0.5, 1.0),
        "worse": (1.0, 1.0, 1.5),
        "equal": (1.0, 1.0, 1.0),
    }
    assert pareto.front(points) == {"best", "cheap", "equal"}


class Fixed:
    """A script with qualities alone: ``sure`` is the best of every seed, ``lucky`` in one of two."""

    @staticmethod
    def quality(result: dict) -> dict:
        return {"sure": {0: 3.0, 1: 3.0}, "lucky": {0: 4.0, 1: 0.0}, "never": {0: 1.0, 1: 1.0}}


def test_certainty_is_the_share_of_resamplings_on_the_front():
    cost = {"step": {"ms": 1.0}, "memory": 1.0}
    shares = pareto.certainty(
        pareto.Experiment(Fixed, "", 1, 1),
        {"costs": dict.fromkeys(("sure", "lucky", "never"), cost)},
    )
    # Of two seeds, "lucky" is ahead where both draws are seed 0: a quarter.
    assert shares["lucky"] == pytest.approx(0.25, abs=0.05)
    assert shares["sure"] == pytest.approx(1 - shares["lucky"])
    assert shares["never"] == 0


def test_a_table_is_replaced_where_it_stands():
    page = "a\n<!-- x -->\nold\n<!-- end -->\nb\n<!-- y -->\nkept\n<!-- end -->\n"
    assert publish.filled(page, "x", "1\\2") == page.replace("old", "1\\2")
