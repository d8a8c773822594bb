"""Quantised layers of libraries that are not needed here: which are refused, and what is said."""

import pytest
import torch
from torch import nn

from miss import StateError, TargetError, adapted_modules, inject, merge, summary
from tests.models import snapshot


def foreign(module: str, name: str) -> type[nn.Module]:
    """A type with the import path of another library's; it computes nothing."""
    body = {"__module__": module, "forward": lambda self, x: x, "in_features": 4}
    return type(name, (nn.Module,), body)


REFUSED = [
    ("hqq.core.quantize", "HQQLinear", "HQQ", "BitsAndBytesConfig"),
    ("gptqmodel.nn_modules.qlinear.torch", "TorchQuantLinear", "GPTQ", "BitsAndBytesConfig"),
    ("auto_gptq.nn_modules.qlinear.qlinear_cuda", "QuantLinear", "GPTQ", "TorchAoConfig"),
    ("awq.modules.linear.gemm", "WQLinear_GEMM", "AWQ", "BitsAndBytesConfig"),
    ("torch.ao.nn.quantized.modules.linear", "Linear", "torch.ao", "then quantise"),
]


@pytest.mark.parametrize(("module", "name", "library", "do"), REFUSED, ids=lambda v: v)
def test_layers_that_cannot_be_adapted_are_named_with_what_to_do(module, name, library, do):
    model = nn.ModuleDict({"full": nn.Linear(4, 4), "packed": foreign(module, name)()})
    before = snapshot(model)
    rule = rf"(?s)packed.* is a {module}\.{name}, a quantised layer of {library}.*{do}"
    for targets in ("packed", ["full", "packed"]):
        with pytest.raises(TargetError, match=rule):
            inject(model, targets, rank=2)
    assert snapshot(model) == before
    inject(model, "all-linear", rank=2)
    assert list(adapted_modules(model)) == ["full"]
    assert f"quantised layer of {library}" in str(summary(model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch.ao
def test_dynamic_quantisation_of_torch():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    made = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    kind = type(made[0])
    assert kind.__module__ == "torch.ao.nn.quantized.dynamic.modules.linear"
    for targets in ("0", "all-linear", nn.Module):
        with pytest.raises(TargetError, match=r"(?s)quantised layer of torch.ao.*eject.*merge"):
            inject(made, targets, rank=2)
    inject(model, "0", rank=2)  # as the message says: adapt, then quantise


def test_a_name_that_only_looks_like_a_library_is_no_quantised_layer():
    for module in ("awq_of_mine", "mine.awq", "torch.ao.nn.other"):
        model = nn.ModuleDict({"layer": foreign(module, "QuantLinear")()})
        with pytest.raises(TargetError) as caught:
            inject(model, "layer", rank=2)
        assert "quantised" not in str(caught.value)


def test_a_weight_of_whole_numbers_is_not_merged():
    model = inject(nn.Sequential(nn.Linear(4, 4)), "0", rank=2)
    weight = model[0].weight
    model[0]._parameters["weight"] = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(StateError, match=r"quantised \(torch.int8\): load the base in half"):
        merge(model)
