"""What cannot go between PEFT and this package is refused, either way, and nothing is changed."""

import copy
import pathlib
import re

import peft
import pytest
import torch
from torch import Tensor, nn

from miss import (
    CheckpointError,
    StateError,
    TargetError,
    adapted_modules,
    inject,
    interop,
    merge,
    summary,
)
from tests.models import snapshot
from tests.test_interop import Classifier, base_and_targets, edit, peft_and_ours, trained_by_peft

UP = "base_model.model.body.up.miss_block"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: (d / "adapter_config.json").unlink(),
            r"has no adapter_config\.json",
        ),
        (
            lambda d: (d / "adapter_model.safetensors").unlink(),
            r"has no adapter_model\.safetensors",
        ),
        (
            lambda d: (d / "adapter_config.json").write_text("{"),
            r"adapter_config\.json: cannot be read",
        ),
        (
            lambda d: (d / "adapter_config.json").write_bytes(b"\xff"),
            r"adapter_config\.json: cannot be read",
        ),
        (lambda d: (d / "adapter_config.json").write_text("[]"), "is not a JSON object"),
        (
            lambda d: (d / "adapter_model.safetensors").write_bytes(b"123"),
            r"adapter_model\.safetensors: cannot be read",
        ),
        (
            edit(lambda c, t: c.update(peft_type="LORA")),
            "unknown peft_type\n  expected: MISS or BONE\n  actual:   'LORA'",
        ),
        (edit(lambda c, t: c.update(peft_type=["MISS"])), "unknown peft_type"),
        (
            edit(lambda c, t: c.update(init_weights="bat")),
            "'bat', whose delta depends on the base weight",
        ),
        (edit(lambda c, t: c.update(init_weights="new")), "init_weights names a form"),
        (edit(lambda c, t: c.update(bias="all")), "biases were trained too"),
        (edit(lambda c, t: c.update(r="4")), "r must be a positive int"),
        (
            edit(lambda c, t: c.update(modules_to_save="head")),
            "modules_to_save must be a list of names",
        ),
        (
            edit(lambda c, t: c.update(modules_to_save=[["head"]])),
            "modules_to_save must be a list of names",
        ),
        (
            edit(lambda c, t: [t.pop(key) for key in list(t) if "miss_block" in key]),
            "holds no adapter",
        ),
        (
            edit(lambda c, t: c.update(init_weights="mini", mini_r=0)),
            "mini_r must be a positive int",
        ),
        (
            edit(
                lambda c, t: (
                    c.update(init_weights="mini", mini_r=4),
                    t.update({UP: torch.ones(4, 4)}),
                )
            ),  # 6 outputs
            "body.up.miss_block does not fit r, mini_r",
        ),
        (
            edit(lambda c, t: c.update(init_weights="mini", mini_r=2)),
            r"miss_block does not fit r, mini_r",
        ),
        (edit(lambda c, t: c.update(miss_dropout=2)), "dropout must be a probability"),
        (edit(lambda c, t: c.update(target_modules="(")), "configuration of targets is damaged"),
        (edit(lambda c, t: c.update(target_modules=3)), "target_modules must be"),
        (edit(lambda c, t: c.update(target_modules=None)), "target_modules must be"),
        (edit(lambda c, t: c.update(target_modules=[0])), "target_modules must be"),
        (
            edit(lambda c, t: c.update(target_modules="a{99999999999}")),
            "configuration of targets is damaged",
        ),
        (edit(lambda c, t: c.update(layers_to_transform="x")), "layers_to_transform must be"),
        (
            edit(lambda c, t: t.update({UP: torch.ones(4, 6, dtype=torch.int32)})),
            "body.up.miss_block has a dtype",
        ),
        (
            edit(lambda c, t: t.update({UP: torch.ones(4, 6, dtype=torch.complex64)})),
            "body.up.miss_block has a dtype",
        ),
        (
            edit(lambda c, t: t.update({UP.replace("block", "D"): torch.ones(6, 4)})),
            "the key body.up.miss_D is unexpected",
        ),
        (
            edit(lambda c, t: c.update(target_modules=["up", "down", "other"])),
            r"1 missing: body\.other\.miss_block",
        ),
        (
            edit(lambda c, t: c.update(modules_to_save=["tail"])),
            "modules_to_save: the model has no module 'tail'",
        ),
        (
            edit(lambda c, t: c.update(modules_to_save=["head", "other"])),
            r"2 missing: body\.other\.weight",
        ),
        (
            edit(lambda c, t: t.update({"base_model.model.tail.weight": torch.ones(1)})),
            r"1 unexpected: tail\.weight",
        ),
        (
            edit(lambda c, t: t.update({"tail.weight": torch.ones(1)})),
            "key 'tail.weight' is not of PEFT",
        ),
        (
            edit(lambda c, t: t.update({UP.replace("up", "left"): torch.ones(4, 6)})),
            "the model has no module 'body.left'",
        ),
        (
            edit(lambda c, t: t.update({UP.replace(".up", ""): torch.ones(4, 6)})),
            "body.miss_block: the module is a ModuleDict",
        ),
        (
            edit(lambda c, t: t.update({UP: torch.ones(4, 7)})),
            r"body.up.miss_block .*\n  expected: \(4, 6\)\n  actual:   \(4, 7\)",
        ),
        (
            edit(lambda c, t: (c.update(r=11), t.update({UP: torch.ones(11, 6)}))),
            "body.down.miss_block does not fit r",
        ),
        (edit(lambda c, t: t.update({UP: torch.ones(2, 3, 4)})), "body.up.miss_block does not fit"),
        (edit(lambda c, t: t[UP].fill_(torch.nan)), "body.up.* has elements that are not finite"),
        (
            edit(lambda c, t: t.update({"base_model.model.head.1.bias": torch.ones(4)})),
            "head.1.bias has another shape",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    tmp_path: pathlib.Path, damage, message: str
):
    base, _ = trained_by_peft(tmp_path, target_modules=["up", "down"], modules_to_save=["head"])
    damage(tmp_path)
    adapted = inject(copy.deepcopy(base), ["up", "down"], rank=4)
    for model in (copy.deepcopy(base), adapted):
        before = snapshot(model)
        with pytest.raises(CheckpointError, match=message) as error:
            interop.peft.load(model, tmp_path)
        assert str(tmp_path) in str(error.value)
        assert snapshot(model) == before


def test_what_peft_has_no_form_for_is_refused(tmp_path: pathlib.Path):
    for model, message in (
        (
            inject(Classifier(), "up", rank=2, method="miss"),
            r"body\.up: is a MiSSLinear.*\n.*miss\.interop\.lora\.save",
        ),
        (
            inject(Classifier(), "up", rank=2, alternate=True),
            r"MiSSeLinear with alternating signs, a form that PEFT does.*\n.*miss\.interop\.lora",
        ),
        (
            inject(inject(Classifier(), "up", rank=2), "down", rank=3),
            r"one rank, mini_r and dropout.*\n.*\(2, 1, 0\.0\)",
        ),
        (inject(nn.Linear(3, 3), "", rank=2), "a lone layer has no module path"),
        (Classifier(), "the model has no adapter"),
    ):
        with pytest.raises(StateError, match=message):
            interop.peft.save(model, tmp_path / "a")
    for model in (Classifier(), inject(nn.Linear(3, 3), "", rank=2)):
        with pytest.raises(StateError):
            interop.lora.save(model, tmp_path / "a")
    model = inject(Classifier(), "up", rank=2)
    model.body["up"].miss_D.data.fill_(torch.inf)
    for write in (interop.peft.save, interop.lora.save):
        with pytest.raises(CheckpointError, match=r"body\.up\..* not finite"):
            write(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    nn.init.zeros_(model.body["up"].miss_D)
    for write in (interop.peft.save, interop.lora.save):
        with pytest.raises(CheckpointError, match="cannot be written"):
            write(model, tmp_path / "file")
    merge(model)
    interop.peft.save(model, tmp_path / "a")
    with pytest.raises(StateError, match="is merged"):
        interop.peft.load(model, tmp_path / "a")


class Aliased(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def test_a_layer_of_two_names_is_refused_since_peft_adapts_one(tmp_path: pathlib.Path):
    base = Aliased()
    with pytest.raises(
        CheckpointError, match=r"a\.miss_block: the model holds this layer under two names"
    ):
        peft_and_ours(tmp_path, base, peft.MissConfig(r=2, target_modules=["a"]))
    model = inject(base, "a", rank=2)
    for write in (interop.peft.save, interop.lora.save):
        with pytest.raises(StateError, match="a: is held under two names"):
            write(model, tmp_path)


@pytest.mark.parametrize("config", [peft.LoraConfig, peft.MissConfig])
def test_parts_of_a_peft_model_are_refused(config):
    base, *_ = base_and_targets("llama")
    model = peft.get_peft_model(base, config(r=2, target_modules=["q_proj", "v_proj"]))
    before = snapshot(model)
    for target in ("q_proj", "*.q_proj", re.compile(r".*q_proj\..*")):
        with pytest.raises(TargetError, match=r"is a part of a PEFT adapter: .*merge_and_unload"):
            inject(model, target, rank=2)
    assert snapshot(model) == before
    inject(model, "all-linear", rank=2)
    assert not any("q_proj" in name or "v_proj" in name for name in adapted_modules(model))
    assert all("PEFT" in reason for reason in summary(model).skipped.values())
    unloaded = model.merge_and_unload()
    inject(unloaded, ["q_proj", "v_proj"], rank=2)
