"""What the experiments share, and each script on settings that are small enough for every run."""

import copy
import functools
import itertools
import json
import math
import pathlib
import sys
import types

import pytest
import torch
from torch import nn

import gradient_norm
import no_free_lunch
import pareto
import publish
import word_frequency
import word_valence
from common import methods, runs
from common.costs import costs
from common.methods import (
    ALTERNATING,
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
from miss.forms import MiSSe
from tests.experiments import check_figures


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
    head = sum(parameter.numel() for parameter in base.head.parameters())
    count = sum(parameter.numel() for parameter in trained(model)) - head
    if method in COUNTS:
        of_rank = COUNTS[method]
        shapes = [(linear.in_features, linear.out_features) for linear in linears]
        another_rank = sum(of_rank(1, *shape) - of_rank(0, *shape) for shape in shapes)
        assert count == sum(of_rank(rank, *shape) for shape in shapes)
        assert count <= budget < count + another_rank
    with torch.no_grad():
        torch.testing.assert_close(model(*BATCH).predictions, base(*BATCH).predictions)
    before = {name: value.clone() for name, value in model.named_parameters()}
    wanted = {name for name, value in model.named_parameters() if value.requires_grad}
    batches = [BATCH] * 30
    losses = list(fit(model, method, rank, batches, lr=1e-2, schedule=lambda step: 1 - step / 30))
    assert losses[-1] < 0.5 * losses[0]
    after = dict(model.named_parameters())
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == wanted
    assert {name.rpartition(".")[2] for name in moved if "head" in name} == {"weight", "bias"}
    if method == LORA_FA:
        assert not any("lora_A" in name for name in moved)


def test_orthonormal_scale_gives_the_fixed_factor_unit_rows():
    for method, frozen in ((MISSE, lambda a, b: a), (MISS, lambda a, b: b.T)):
        model = adapt(Small(), method, 4, TARGETS, scale=methods.ORTHONORMAL)
        for layer in (model.body[0], model.body[2]):
            config = layer.miss_configs["weight"]
            a, b = layer.miss_form.factors(layer.miss_D, config)
            torch.testing.assert_close(layer.scale * frozen(a, b).norm(dim=1), torch.ones(4))


def test_random_signs_are_those_of_the_delta():
    torch.manual_seed(0)
    base = Small()
    model = adapt(copy.deepcopy(base), SIGNED, 4, TARGETS)
    layer, old = model.body[0], base.body[0]
    signs = layer.weight[0] / old.weight[0]
    assert set(signs.tolist()) == {-1.0, 1.0}
    nn.init.normal_(layer.miss_D)
    shared, own = MiSSe.factors(layer.miss_D, layer.miss_configs["weight"])
    delta = own @ shared * signs
    expected = nn.functional.linear(BATCH[0], old.weight + delta, old.bias)
    torch.testing.assert_close(layer(BATCH[0]), expected)


def test_a_head_has_its_own_rate():
    model = adapt(Small(), MISSE, 4, TARGETS, head="head")
    before = {name: value.clone() for name, value in model.named_parameters()}
    list(fit(model, MISSE, 4, [BATCH], lr=1e-3, schedule=lambda step: 1.0, head=(model.head, 1e-1)))
    # The first step of Adam is the rate itself, whatever the gradient.
    for name, rate in (("head.bias", 1e-1), ("body.0.miss_D", 1e-3)):
        step = model.get_parameter(name) - before[name]
        assert step.abs().max().item() == pytest.approx(rate, rel=1e-3)


def test_costs_count_the_memory_of_training():
    base = Small()

    def build(method: str, model: nn.Module, steps: int) -> nn.Module:
        return adapt(model, method, 4, TARGETS)

    builds = {method: functools.partial(build, method) for method in (LORA, MISSE)}
    result = costs(base, builds, dict.fromkeys(builds, 4), BATCH, LORA, rounds=3)
    own = sum(value.nbytes for value in base.parameters())
    for cost in result.values():
        adapters = 4 * cost["trainable"]
        # The weights, D, its two states and its gradient, and something to hold in a step.
        assert own + 4 * adapters < cost["memory"] < own + 4 * adapters + 20_000
    assert result[LORA]["step"]["median"] == 1.0


def test_statistics():
    t = 4.302653  # t(0.975, 2 degrees of freedom)
    assert Estimate.of([1.0, 2.0, 3.0]) == pytest.approx((2.0, t / math.sqrt(3)))
    assert Estimate.of([1.0]).text() == "1.000"
    assert Estimate(0.5, 0.25).text(2) == "0.50 ± 0.25"
    # Differences 1, 2, 3: t = 2 / (1 / sqrt(3)), two-sided p with 2 degrees of freedom.
    p = runs.paired({0: 2.0, 1: 4.0, 2: 6.0, 9: 1.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert p == pytest.approx(0.0741799, abs=1e-6)
    assert math.isnan(runs.paired({0: 1.0}, {0: 2.0}))
    assert math.isnan(runs.holm({"a": math.nan, "b": 1e-6})["a"])
    assert runs.holm({"a": math.nan, "b": 1e-6, "c": 1e-4})["c"] == 1e-4
    with pytest.raises(ValueError, match="two runs of seed 1"):
        runs.by_seed([{"seed": 1, "r": 1.0, "epochs": 1}, {"seed": 1, "r": 2.0, "epochs": 2}], "r")
    corrected = {"a": 0.03, "c": 0.06, "b": 0.06}
    assert runs.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(corrected)


def test_the_best_rate_is_none_that_diverged():
    rows = []
    for lr, of_lr in ((1, [0.5, 0.6]), (2, [0.9, None]), (3, [0.7, 0.1])):
        rows += [{"lr": lr, "seed": seed, "r": r} for seed, r in enumerate(of_lr)]
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
    first, second = ([run[key] for key in ("x", "y", "none", "curve")] for run in kept)
    assert first == [1, 2, None, [1, None]]
    assert second == [2, 4, None, [1, None]]
    kept[0]["y"] = "not run again"
    path.write_text(json.dumps({"runs": kept, "note": [1]}))
    result = runs.run_all([{"x": 1}, {"x": 4}], double, path, workers)
    assert [run["y"] for run in result["runs"]] == ["not run again", 4, 8]
    assert runs.read(path) == result
    assert result["note"] == [1]


def test_no_free_lunch(tmp_path: pathlib.Path):
    jobs = [job for job in no_free_lunch.jobs(2, 20, 30) if job["lr"] in (1e-3, 1e-2)]
    result = runs.run_all(jobs, no_free_lunch.work, None, 0)
    of_seed = runs.select(result["runs"], seed=no_free_lunch.FIRST_SEED)
    starts = {run["train_curve"][0] for run in of_seed}
    assert len(starts) == 1  # every method starts from the one base
    for run in result["runs"]:
        assert len(run["validation_curve"]) == 3
        assert run["validation_min"] == pytest.approx(min(run["validation_curve"]), rel=1e-3)
    result["costs"] = no_free_lunch.measure(2)
    trainable = [result["costs"][method]["trainable"] for method in (MISS, MISSE, LORA)]
    assert trainable == [512, 512, 512]
    assert no_free_lunch.report(result).count("\n") == 1 + len(no_free_lunch.RANKS)
    check_figures(no_free_lunch, result)


@pytest.fixture
def short_words(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(word_valence, "RATES", {LORA: (1e-3,), MISSE: (1e-3,)})
    study = (MISSE, methods.ORTHONORMAL, 3e-3, (4,), (1e-3, 1e-2))
    monkeypatch.setattr(word_valence, "STUDY", (study,))


@pytest.mark.usefixtures("short_words")
def test_word_valence():
    result = runs.run_all(word_valence.jobs(2, 1, 100, 1), word_valence.work, None, 0)
    assert len(result["runs"]) == 2 * 2 + 2
    lora = runs.select(result["runs"], method=LORA, scale=None)
    misse = runs.select(result["runs"], method=MISSE, scale=None)
    assert lora[0]["trainable"] == misse[0]["trainable"]
    result["costs"] = word_valence.measure(2, 100)
    assert "| MiSSe | 16 |" in word_valence.report(result)
    assert "orthonormal | 0.003 | 4 |" in word_valence.report(result)
    for run in result["runs"]:
        run["test_r"] = 0.8 + run["seed"] / 100  # the figures leave failed rates out
    check_figures(word_valence, result)


@pytest.fixture
def made_up_frequencies(monkeypatch: pytest.MonkeyPatch):
    """What `wordfreq` gives, in little: a word is the rarer, the longer it is.

    One of the words has been rated in the VADER lexicon, two are no plain words.
    """
    letters = "bcdfghjklmnprstvwz"
    words = []
    for place, (first, last) in enumerate(itertools.product(letters, letters)):
        words.append(first + "a" + last * (1 + place % 4))
    given = types.SimpleNamespace(
        top_n_list=lambda language, count: ["good", "it's", "42", *words],
        zipf_frequency=lambda word, language: 8.0 - len(word),
    )
    monkeypatch.setitem(sys.modules, "wordfreq", given)
    word_frequency.material.cache_clear()
    yield
    word_frequency.material.cache_clear()


@pytest.mark.usefixtures("made_up_frequencies")
def test_word_frequency(monkeypatch: pytest.MonkeyPatch):
    splits = word_frequency.material(40)[1]
    assert [len(split.words) for split in splits] == [48, 10, 25]
    together = {word for split in splits for word in split.words}
    assert len(together) == 83
    assert not together & {"good", "it's", "42"}
    train = splits[0].ratings
    torch.testing.assert_close((train.mean(), train.std()), (torch.tensor(0.0), torch.tensor(1.0)))
    for split in splits:
        lengths = torch.tensor([float(len(word)) for word in split.words])
        assert word_valence.pearson(split.ratings, -lengths) == pytest.approx(1, abs=1e-6)

    monkeypatch.setattr(word_frequency, "RATES", {LORA: (3e-3,), MISSE: (1e-4, 1e-3)})
    result = word_frequency.run(2, 40, None, 0)
    # Two sizes; three rates in all with two seeds, then two methods at their best with two others.
    assert len(result["runs"]) == 2 * (2 * 3 + 2 * 2)
    for size in word_frequency.RANKS:
        counts = {run["trainable"] for run in runs.select(result["runs"], size=size)}
        assert len(counts) == 1
        misse, means = runs.select(result["runs"], size=size, method=MISSE), {}
        for lr in (1e-4, 1e-3):
            sweep = [run for run in runs.select(misse, lr=lr) if run["seed"] < 2]
            means[lr] = sum(run["validation_r"] for run in sweep)
        assert {run["lr"] for run in misse if run["seed"] >= 2} == {max(means, key=means.get)}
    result["frozen"] = word_frequency.frozen(40)
    assert 0 < result["frozen"] <= 1
    for run in result["runs"]:
        seed, misse = run["seed"] - len(word_frequency.SWEEP_SEEDS), run["method"] == MISSE
        run["test_r"] = 0.7 + 0.02 * seed if misse else 0.8 + 0.06 * seed
    # Differences 0.1 and 0.14: t = 6, two-sided p with 1 degree of freedom; t(0.975, 1) = 12.706.
    text = word_frequency.report(result)
    assert text.count("| 0.7100 ± 0.1271 |") == len(word_frequency.RANKS)
    assert text.count("| 0.1200 ± 0.2541 | 0.11 |") == len(word_frequency.RANKS)
    check_figures(word_frequency, result)


def test_batches_hold_every_word_once():
    split = word_valence.Split([str(place) for place in range(150)], torch.arange(150.0))
    seen = list(word_valence.batches(split, [place % 5 for place in range(150)], 2, seed=1))
    ratings = torch.cat([ratings for _, ratings in seen])
    assert ratings.sort().values.tolist() == [place // 2 for place in range(300)]
    assert all(words == [str(int(rating)) for rating in ratings] for words, ratings in seen)
    assert all(len({int(word) % 5 for word in words}) <= 3 for words, _ in seen)


def of_columns(matrix: torch.Tensor) -> float:
    """The squared norm of the sums of columns, at rank 4."""
    return sum(matrix[:, j::4].sum(1).square().sum().item() for j in range(4))


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
    assert run["norms"][FULL][0] == pytest.approx(math.sqrt(square), rel=1e-5)
    columns = sum(map(of_columns, weights))
    assert run["norms"][MISSE][0] == pytest.approx(math.sqrt(columns), rel=1e-5)
    factors = {MISSE: "factor_columns", ALTERNATING: "factor_signed_columns", MISS: "factor_rows"}
    for method, factor in factors.items():
        predicted = run["expected"][method][0] * math.sqrt(run[factor][0])
        assert run["norms"][method][0] == pytest.approx(predicted, rel=1e-5)
    x = BATCH[0]
    first = of_columns(x) / x.square().sum().item()
    with torch.no_grad():
        x = base.body[:2](x)
    second = of_columns(x) / x.square().sum().item()
    assert run["factor_inputs"][0][1] == pytest.approx((first + second) / 2, rel=1e-5)

    monkeypatch.setattr(gradient_norm, "KINDS_RANK", 4)
    [body0, body2] = gradient_norm.kinds("small")
    weighted = body0[3] * body0[2] + body2[3] * body2[2]
    assert weighted == pytest.approx(run["factor_columns"][0], rel=1e-5)
    signed = body0[4] * body0[2] + body2[4] * body2[2]
    assert signed == pytest.approx(run["factor_signed_columns"][0], rel=1e-5)
    assert [body0[5], body2[5]] == pytest.approx([first, second], rel=1e-5)
    shown = {"runs": [run | {"model": "small", "rank": 4, "batches": 2}]}
    shown["kinds"] = {"small": [body0, body2]}
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
    points = {"best": (1.0, 1.0, 1.0), "cheap": (2.0, 0.5, 1.0)}
    points |= {"worse": (1.0, 1.0, 1.5), "equal": (1.0, 1.0, 1.0)}
    assert pareto.front(points) == {"best", "cheap", "equal"}


class Fixed:
    """A script with qualities alone.

    ``sure`` is the best of every seed, ``lucky`` in one of two.
    """

    @staticmethod
    def quality(result: dict) -> dict:
        return {"sure": {0: 3.0, 1: 3.0}, "lucky": {0: 4.0, 1: 0.0}, "never": {0: 1.0, 1: 1.0}}


def test_certainty_is_the_share_of_resamplings_on_the_front():
    cost = {"step": {"ms": 1.0}, "memory": 1.0}
    costs_of = dict.fromkeys(("sure", "lucky", "never"), cost)
    shares = pareto.certainty(pareto.Experiment(Fixed, "", 1, 1), {"costs": costs_of})
    # Of two seeds, "lucky" is ahead where both draws are seed 0: a quarter.
    assert shares["lucky"] == pytest.approx(0.25, abs=0.05)
    assert shares["sure"] == pytest.approx(1 - shares["lucky"])
    assert shares["never"] == 0


def test_a_table_is_replaced_where_it_stands():
    page = "a\n<!-- x -->\nold\n<!-- end -->\nb\n<!-- y -->\nkept\n<!-- end -->\n"
    assert publish.filled(page, "x", "1\\2") == page.replace("old", "1\\2")
