"""What both writers of PEFT directories share, and LoRA.

PEFT loads what `miss` wrote, to the same logits.
"""

import copy
import json
import pathlib

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from miss import MiSSLinear, adapted_modules, adapter_parameters, inject, interop, merge, unmerge
from miss.interop.peft_files import base_config
from miss.tree import Tree
from tests.models import perturb
from tests.strategies import OPTIONS
from tests.test_interop import REAL, Classifier, base_and_targets, output


@pytest.mark.parametrize("name", sorted(REAL))
def test_peft_loads_our_lora(tmp_path: pathlib.Path, name: str):
    base, targets, inputs = base_and_targets(name)
    model = inject(copy.deepcopy(base), targets[::3], rank=5, scale=0.5)
    inject(model, targets[1::3], rank=3, method="miss", scale=2.0)
    inject(model, targets[2::3], rank=4, alternate=True, scale=-1.5)
    for d in adapter_parameters(model):
        nn.init.normal_(d, std=0.1)
    for merged in (False, True):
        if merged:
            merge(model)
        interop.lora.save(model, tmp_path, extra=())
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        unmerge(model)
        torch.testing.assert_close(output(theirs, inputs), output(model, inputs))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (5, 5.0)
    assert (config["bias"], config["rank_pattern"]) == ("none", {})
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {len(t) for key, t in tensors.items() if "lora_A" in key} == {5}


@pytest.mark.parametrize(("method", "scale"), [("misse", 1.0), ("miss", 3.0), ("alternating", 2.0)])
def test_lora_factors_are_the_delta_exactly(tmp_path: pathlib.Path, method: str, scale: float):
    model = inject(Classifier(), ["body.*", "head.1"], rank=3, **OPTIONS[method], scale=scale)
    perturb(model)
    interop.lora.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert (config["r"], config["lora_alpha"]) == (3, 3 * scale)
    assert config["target_modules"] == ["body.down", "body.other", "body.up", "head.1"]
    for name, layer in adapted_modules(model).items():
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        assert torch.equal(config["lora_alpha"] / config["r"] * (b @ a), layer.delta_weight())
        frozen = b if isinstance(layer, MiSSLinear) else a
        assert {*frozen.unique().tolist()} == {0.0, 1.0} | ({-1.0} if layer.alternate else set())


def test_targets_are_leaf_names_where_these_say_enough():
    tree = Tree(Classifier())
    assert base_config(tree, ["body.up", "body.down"])["target_modules"] == ["down", "up"]
    whole = base_config(tree, ["layers.1", "body.up"])["target_modules"]
    assert whole == ["body.up", "layers.1"]  # head.1 would match too


@pytest.mark.parametrize("write", [interop.peft.save, interop.lora.save])
def test_a_name_that_is_the_end_of_another(tmp_path: pathlib.Path, write):
    for inner in (nn.Linear(4, 4), nn.ReLU()):
        base = nn.Sequential(nn.Linear(4, 4), nn.Sequential(inner, nn.Linear(4, 4)))
        model = inject(copy.deepcopy(base), lambda name, module: name == "0", rank=2)
        perturb(model)
        write(model, tmp_path)
        x = torch.randn(3, 4)
        torch.testing.assert_close(
            peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(x), model(x)
        )
        if write is interop.peft.save:
            assert torch.equal(interop.peft.load(copy.deepcopy(base), tmp_path)(x), model(x))
