"""The benchmark on handwritten digits: its data, its equal budgets, its runs, its reports."""

import copy

import pytest
import torch
from torch import nn

import digits_vit as vit
from common.methods import FULL, LORA, MISS, MISSE, VERA, adapt, trained
from miss import adapted_modules, inject

TINY = {"epochs": 1, "size": 100}


def job(method: str, share: float = 1.0, seed: int = 0) -> dict[str, object]:
    rank = vit.ranks()[method, share]
    return {"method": method, "rank": rank, "budget": share, "lr": 1e-2, "seed": seed, **TINY}


def test_parts_hold_every_handwritten_image_once():
    from sklearn.datasets import load_digits

    parts = vit.handwritten()
    assert [len(labels) for _, labels in parts.values()] == [997, 300, 500]
    together = torch.cat([images for images, _ in parts.values()]).flatten(1)
    everything = torch.from_numpy(load_digits().data).float() / 16
    assert sorted(together.tolist()) == sorted(everything.tolist())
    # So an image in two parts would have been seen.
    assert len(everything.unique(dim=0)) == len(everything)


def test_a_seed_draws_as_many_of_each_class():
    labels = vit.handwritten()["pool"][1]
    rows = vit.chosen(labels, 3)
    assert labels[rows].bincount().tolist() == [20] * 10
    assert len(rows.unique()) == vit.TRAIN
    assert set(rows.tolist()) != set(vit.chosen(labels, 4).tolist())


def test_printed_digits_look_like_their_labels():
    images, labels = vit.rendered(400, 0)
    assert labels.bincount().tolist() == [40] * 10
    assert images.shape == (400, 8, 8)
    assert images.min() == 0
    assert 0.9 < images.max() <= 1
    assert torch.equal(images, vit.rendered(400, 0)[0])
    others, truth = vit.rendered(200, 1)
    means = torch.stack([images[labels == digit].mean(0) for digit in range(10)])
    nearest = torch.cdist(others.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == truth).float().mean() > 0.6  # 0.1 is chance


def test_budgets_are_equal():
    base = vit.Transformer()
    head = sum(parameter.numel() for parameter in base.head.parameters())
    counts = {}
    for (method, share), rank in vit.ranks().items():
        model = adapt(copy.deepcopy(base), method, rank, vit.TARGETS, head="head", steps=20)
        counts[method, share] = sum(parameter.numel() for parameter in trained(model)) - head
    budget = counts[MISSE, 1.0]
    assert counts[LORA, 1.0] == counts[MISS, 1.0] == budget
    assert 2 * counts[MISS, 0.5] == 2 * counts[MISSE, 0.5] == budget
    for (method, share), count in counts.items():
        if method not in (FULL, VERA) and share == 1:
            assert 0.85 * budget < count <= budget
    assert counts[VERA, 1.0] < budget < counts[FULL, 1.0]


def test_every_projection_is_adapted():
    model = inject(vit.Transformer(), vit.TARGETS, rank=4)
    layers = adapted_modules(model)
    assert len(layers) == vit.DEPTH * len(vit.TARGETS)
    for layer in layers.values():
        nn.init.normal_(layer.miss_D, std=0.1)
    model(*vit.rendered(20, 0)).loss.backward()
    assert all(layer.miss_D.grad.abs().max() > 0 for layer in layers.values())


def test_the_base_does_not_depend_on_threads():
    first = vit.pretrained(TINY["size"]).state_dict()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    second = vit.pretrained.__wrapped__(TINY["size"]).state_dict()
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("method", [MISSE, LORA])
def test_a_run_learns_and_leaves_the_base(method: str):
    before = copy.deepcopy(vit.pretrained(TINY["size"]).state_dict())
    result = vit.work(job(method) | {"epochs": 16})
    after = vit.pretrained(TINY["size"]).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert result.keys() == {"trainable", "validation_accuracy", "test_accuracy", "seconds"}
    base = vit.base_accuracy(TINY["size"])["real"]
    assert all(base + 0.1 < result[f"{name}_accuracy"] <= 1 for name in ("validation", "test"))


def test_a_seed_gives_the_same_run_again():
    first, again, other = (vit.work(job(MISSE, seed=seed)) for seed in (0, 0, 1))
    assert first["test_accuracy"] == again["test_accuracy"] != other["test_accuracy"]


@pytest.fixture
def result() -> dict[str, object]:
    """Runs made up so that validation prefers each method's second rate, the test its first."""
    runs = []
    for run in vit.jobs(3, 1, 100):
        place = vit.RATES[run["method"]].index(run["lr"])
        worse = (0.02 if run["budget"] == 1 else 0.01) * run["seed"]
        test = (0.9 if place == 0 else 0.8) - worse
        scores = {"validation_accuracy": 0.7 + 0.1 * (place == 1), "test_accuracy": test}
        runs.append({**run, "trainable": 1000, **scores})
    prices = {method: {"step": {"ms": 12.34}} for method in vit.RATES}
    return {"runs": runs, "base": {"rendered": 0.98, "real": 0.55}, "costs": prices}


def test_the_rate_is_chosen_by_validation(result: dict[str, object]):
    text = vit.report(result)
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(vit.SETTINGS)
    rate = vit.RATES[MISSE][1]
    assert f"| MiSSe | 1 | 16 | 1000 | 12.3 | {rate:g} | 80.0 ± 0.0 | 78.0 ± 5.0 |  |" in rows
    assert "98.0% of unseen printed digits, 55.0% of the handwritten" in text
    assert "MiSS at 0.5 of the budget, less LoRA at all of it: 1.00 ± 2.48 points." in text


def test_figures_show_every_setting(result: dict[str, object]):
    from matplotlib import pyplot

    [(name, figure)] = vit.figures(result).items()
    assert name == "digits_vit"
    sizes, rates = figure.axes
    assert len(sizes.containers) == len(vit.SETTINGS) == len(figure.legends[0].get_texts())
    assert len(rates.lines) == len(vit.RATES)
    assert all(axis.get_xscale() == "log" and "%" in axis.get_ylabel() for axis in (sizes, rates))
    figure.canvas.draw()
    pyplot.close(figure)


def test_jobs_have_the_same_keys_and_none_twice():
    jobs = vit.jobs(2, 1, 100)
    assert len({tuple(run) for run in jobs}) == 1
    assert len({tuple(run.values()) for run in jobs}) == len(jobs)
    assert len(jobs) == 2 * sum(len(vit.RATES[method]) for method, _ in vit.SETTINGS)
