"""The benchmarks' own checks, on layers and models that are small enough for every run."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import layer_cost
import model_cost
from layer_cost import BASE, LORA, OURS, PEER, SIGNS, Shape
from measure import interleaved, peak_bytes, ratios
from miss import adapted_modules


@pytest.mark.parametrize(
    "shape", [Shape(96, 80), Shape(100, 70), Shape(96, 80, torch.bfloat16)], ids=str
)
def test_competitors_compute_one_function_and_a_wrong_one_is_found(shape: Shape):
    layers = layer_cost.competitors(shape)
    torch.nn.init.normal_(layers[PEER].miss_block["default"])
    with pytest.raises(AssertionError, match=PEER):
        layer_cost.check(layers, shape)


def test_layer_cost_reports_every_competitor():
    rows = list(layer_cost.steps([Shape(96, 80)], [5], 2))
    [row] = rows
    names = [name for name in row["results"] if name != BASE]
    assert {OURS, SIGNS, PEER, LORA} < set(names)
    assert row["results"][OURS]["saved"] == row["results"][SIGNS]["saved"] == 5 * 64 * 4
    assert row["results"][OURS]["peak"] == row["results"][SIGNS]["peak"]
    assert row["results"][LORA]["saved"] > row["results"][OURS]["saved"]
    assert row["results"][BASE]["peak"] == 5 * (96 + 80) * 4
    text = layer_cost.report("Step", rows, names) + layer_cost.report_bytes(rows, names)
    text += layer_cost.report("Forward", list(layer_cost.forwards([Shape(96, 80)], [1], 2)), names)
    assert text.count(f"| {' | '.join(names)} |") == 3  # the head of each table


def language_model(**settings: object) -> LlamaForCausalLM:
    sizes = {"vocab_size": 97, "hidden_size": 96, "intermediate_size": 128}
    config = LlamaConfig(**sizes, num_attention_heads=2, **settings)
    return LlamaForCausalLM(config).train()


def test_model_cost_on_a_small_model():
    base = language_model(num_hidden_layers=2, tie_word_embeddings=True)
    training = model_cost.training(base, torch.float32, 2)
    trained = {name: row["trainable"] for name, row in training["results"].items()}
    assert trained[OURS] == trained[PEER] == max(trained.values())
    result = {
        "training": [training],
        "starting": model_cost.starting(base, 1),
        "merging": {"float32": model_cost.merging(torch.float32, 1, size=64)},
    }
    text = model_cost.report(result)
    assert all(f"| {name} | {row['rank']} |" in text for name, row in training["results"].items())


def test_a_wrong_adapter_in_a_model_is_found():
    base = language_model(num_hidden_layers=1)
    ways = model_cost.injections(model_cost.equal_ranks(base))
    models = {name: ways[name](copy.deepcopy(base)) for name in (OURS, PEER)}
    adapted_modules(models[OURS])["model.layers.0.mlp.up_proj"].scale = 1.01
    with pytest.raises(AssertionError, match="differ"):
        model_cost.check(models, torch.arange(12).view(2, 6))


def test_peak_counts_what_is_held_at_one_time():
    assert peak_bytes(lambda: torch.ones(1000)) == 4000
    assert peak_bytes(lambda: (torch.ones(1000), torch.ones(500))) == 6000
    assert peak_bytes(lambda: [torch.ones(1000) for _ in range(3)]) == 12000

    def one_after_another() -> None:
        for _ in range(3):
            torch.ones(1000)

    assert peak_bytes(one_after_another) == 4000


def test_rounds_are_paired():
    turns: list[str] = []
    times = interleaved({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, rounds=3)
    assert turns == ["a", "b", "b", "a"] * 2 + ["a", "b"]
    assert {name: len(own) for name, own in times.items()} == {"a": 3, "b": 3}
    result = ratios({"base": [1.0, 2.0, 4.0], "x": [2.0, 2.0, 12.0]}, "base")["x"]
    assert result == {"min": 2.0, "median": 2.0, "quartiles": [1.5, 2.5], "ms": 2000.0}
