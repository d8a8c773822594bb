"""Adapters as tensors: taken out of a model, put back, added up."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from miss import (
    CheckpointError,
    StateError,
    adapter_parameters,
    adapter_state_dict,
    combine,
    disabled,
    inject,
    load_adapter_state_dict,
    merge,
)
from tests.models import adapted_decoder, perturb, snapshot
from tests.strategies import DTYPES, Case, cases


def test_state_dicts_are_copies_and_go_back():
    model = adapted_decoder()
    one = adapter_state_dict(model)
    kept = {key: d.clone() for key, d in one.items()}
    parameters = list(map(id, adapter_parameters(model)))
    perturb(model)
    assert all(torch.equal(one[key], kept[key]) for key in kept)
    assert load_adapter_state_dict(model, one) == ([], [])
    assert list(map(id, adapter_parameters(model))) == parameters
    assert all(torch.equal(d, kept[key]) for key, d in adapter_state_dict(model).items())
    with disabled(model), torch.inference_mode():
        load_adapter_state_dict(model, {key: nn.Parameter(d) for key, d in one.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layers.0.mlp.0.miss_D"), r"1 missing: layers\.0\.mlp\.0\.miss_D"),
        (lambda s: s.update(other=torch.zeros(1)), "1 unexpected: other"),
        (
            lambda s: s.update({"layers.0.mlp.0.miss_D": torch.zeros(2, 2)}),
            r"another shape\n  expected: \(16, 2\)",
        ),
        (
            lambda s: s.update({"layers.0.mlp.0.miss_D": torch.ones(16, 2).double() + 2**-40}),
            r"another dtype, and its values would be rounded\n.*\n.*float64\n  do:",
        ),
        (
            lambda s: s["layers.0.mlp.0.miss_D"].fill_(float("nan")),
            "layers.0.mlp.0.miss_D has elements that are not finite",
        ),
        (lambda s: s.update({"layers.0.mlp.0.miss_D": torch.zeros(0, 2)}), "no elements"),
        (
            lambda s: s.update({"layers.0.mlp.0.miss_D": torch.zeros(16, 2, device="meta")}),
            "not an ordinary tensor",
        ),
        (
            lambda s: s.update({"layers.0.mlp.0.miss_D": torch.zeros(16, 2).to_sparse()}),
            "not an ordinary tensor",
        ),
        (
            lambda s: s.update({"layers.0.mlp.0.miss_D": [[0.0, 0.0]] * 16}),
            "layers.0.mlp.0.miss_D is not a tensor",
        ),
        (lambda s: s.update({3: torch.zeros(1)}), "1 unexpected: 3"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message: str):
    model = adapted_decoder()
    state = {key: torch.zeros_like(d) for key, d in adapter_state_dict(model).items()}
    change(state)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=message):
        load_adapter_state_dict(model, state)
    assert snapshot(model) == before


def test_not_strict_leaves_the_rest_alone_and_says_so():
    model = adapted_decoder()
    key, *others = adapter_state_dict(model)
    kept = adapter_state_dict(model)
    result = load_adapter_state_dict(
        model, {key: torch.zeros_like(kept[key]), "other": torch.ones(1)}, strict=False
    )
    assert (result.missing_keys, result.unexpected_keys) == (others, ["other"])
    assert not adapter_state_dict(model)[key].any()
    after = adapter_state_dict(model)
    assert all(torch.equal(after[key], kept[key]) for key in others)
    merge(model)
    with pytest.raises(StateError, match="is merged"):
        load_adapter_state_dict(model, kept)


@given(
    case=cases(),
    dtype=st.sampled_from(DTYPES),
    weights=st.lists(st.floats(-4, 4), min_size=1, max_size=4),
)
def test_combining_adapters_combines_their_deltas(
    case: Case, dtype: torch.dtype, weights: list[float]
):
    layers = []
    for n in range(len(weights)):
        layers.append(replace(case, seed=case.seed + n).layer(torch.float64, dtype))
    states = [adapter_state_dict(layer) for layer in layers]
    total = combine(zip(states, weights))
    exact = sum(w * layer.miss_D.detach().double() for layer, w in zip(layers, weights))
    size = sum(abs(w) * layer.miss_D.detach().double().abs() for layer, w in zip(layers, weights))
    info = torch.finfo(dtype)
    bound = info.eps / 2 * exact.abs() + 8 * torch.finfo(torch.float64).eps * size + info.tiny
    assert total["miss_D"].dtype == dtype
    assert ((total["miss_D"].double() - exact).abs() <= bound).all()
    assert all(torch.equal(state["miss_D"], layer.miss_D) for state, layer in zip(states, layers))
    assert torch.equal(combine([(states[0], 1)])["miss_D"], states[0]["miss_D"])


def test_keys_and_order_of_a_sum_are_those_of_the_first_adapter():
    one, other = {"b": torch.ones(2), 3: torch.zeros(2)}, {3: torch.ones(2), "b": torch.ones(2)}
    total = combine([(one, 1.0), (other, 0.5)])
    assert list(total) == ["b", 3]
    assert torch.equal(total[3], torch.full((2,), 0.5))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "at least one"),
        ([{"a": torch.ones(2)}], "needs .* pairs"),
        ({"a": torch.ones(2)}, "needs .* pairs"),
        ([(torch.ones(2), 1.0)], "needs .* pairs"),
        (
            [({"a": torch.ones(2)}, 1.0), ({"b": torch.ones(2)}, 1.0)],
            "adapter 1: .*adapter 0\n.*1 missing: a; 1 unexpected: b",
        ),
        (
            [({"a": torch.ones(2)}, 1.0), ({"a": torch.ones(3)}, 1.0)],
            r"adapter 1: a has another shape\n.*\(2,\).*\n.*\(3,\)",
        ),
        ([({"a": torch.ones(2)}, 1.0), ({"a": torch.ones(2).half()}, 1.0)], r"float32\n.*float16"),
        ([({"a": torch.ones(2)}, float("nan"))], "finite number\n  actual:   nan"),
        ([({"a": torch.ones(2)}, True)], "finite number"),
        ([({"a": torch.ones(2)}, "1")], "finite number"),
        (
            [({"a": torch.tensor([float("inf")])}, 1.0)],
            "adapter 0: a has elements that are not finite",
        ),
        ([({"a": torch.tensor([3e38])}, 2.0)], "the sum: a has elements that are not finite"),
        ([({"a": torch.ones(0)}, 1.0)], "no elements"),
    ],
)
def test_what_cannot_be_combined(pairs, message: str):
    with pytest.raises(CheckpointError, match=message):
        combine(pairs)


def test_a_state_of_the_adapters_themselves_swaps_them():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    perturb(inject(model, ["0", "1"], rank=2))
    first, second = (layer.miss_D.detach().clone() for layer in model)
    load_adapter_state_dict(model, {"0.miss_D": model[1].miss_D, "1.miss_D": model[0].miss_D})
    assert torch.equal(model[0].miss_D, second)
    assert torch.equal(model[1].miss_D, first)
