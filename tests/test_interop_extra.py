"""What is trained besides adapters, in PEFT's formats; PEFT is the referee."""

import copy
import json
import pathlib

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from miss import StateError, inject, interop
from tests.models import snapshot
from tests.test_inject import perturb

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


class Rater(nn.Module):
    """A body and a head of two layers, one of whose names ends in the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 6))
        self.norm = nn.BatchNorm1d(6)
        self.pre_head = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.pre_head(self.norm(self.body(x))))) + self.shift


def trained(model: nn.Module, targets: object, **options: object) -> nn.Module:
    """``model``, adapted; all that requires grad has other values than in the base."""
    inject(model, targets, rank=2, **options)
    perturb(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model.eval()


WRITERS = {"peft": interop.peft.save, "lora": interop.lora.save}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    ("targets", "options", "modules"),
    [
        ("body.*", {"trainable": "pre_head"}, ["pre_head"]),
        ("body.*", {"trainable": ["head", "pre_head"]}, ["pre_head", "head"]),
        ("body.3", {"trainable": "*.1.bias"}, ["body.1"]),
        ("body.3", {"trainable": "body.0.weight"}, ["body.0"]),
        (["body.3", "head"], {"trainable": ["head", "body.0"]}, ["body.0"]),
        (["body.3", "head"], {"trainable": "head.bias"}, None),
    ],
)
def test_peft_reads_what_is_trained_besides(
    tmp_path: pathlib.Path, writer: str, targets: object, options: dict, modules: object
):
    base = Rater().eval()
    model = trained(copy.deepcopy(base), targets, **options)
    before = snapshot(model)
    WRITERS[writer](model, tmp_path, extra=options["trainable"])
    assert snapshot(model) == before
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == modules
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(theirs(X), model(X), rtol=1e-5, atol=1e-5)
    if writer == "peft":
        with pytest.warns(UserWarning, match="running statistics are not written.*running_mean"):
            interop.peft.save(model, tmp_path / "default")
        one, two = (
            load_file(f / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "default")
        )
        assert set(two) <= set(one)
        fresh = copy.deepcopy(base).requires_grad_(False)
        ours = interop.peft.load(fresh, tmp_path)
        torch.testing.assert_close(ours(X), model(X), rtol=1e-5, atol=1e-5)
        named = [key for name in modules or () for key in (f"{name}.weight", f"{name}.bias")]
        flags = {key for key, p in ours.named_parameters() if p.requires_grad}
        assert {key for key in flags if not key.endswith("miss_D")} == set(named)


@pytest.mark.parametrize("save_", WRITERS.values())
@pytest.mark.parametrize(
    ("targets", "trainable", "message"),
    [
        ("body.*", "shift", r"shift: PEFT saves whole modules .*\n.*\(model\)\n  do: .*extra=\(\)"),
        (["body.0", "pre_head"], "head", r"pre_head: holds adapters.*ends of names\n.*\['head'\]"),
    ],
)
def test_what_peft_cannot_hold(tmp_path: pathlib.Path, save_, targets, trainable, message: str):
    model = trained(Rater(), targets, trainable=trainable)
    with pytest.raises(StateError, match=message):
        save_(model, tmp_path / "a", extra=trainable)
    assert not (tmp_path / "a").exists()


@pytest.mark.filterwarnings("ignore:running statistics")
def test_a_lora_directory_is_told_what_to_leave_out(tmp_path: pathlib.Path):
    base = Rater().eval()
    model = trained(copy.deepcopy(base), "body.*", trainable="pre_head")
    message = r"more than adapters.*\n  actual: .*pre_head.bias, .*\n  do: .*extra=\(\)"
    with pytest.raises(StateError, match=message):
        interop.lora.save(model, tmp_path)
    interop.lora.save(model, tmp_path, extra=())
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    model.pre_head.load_state_dict(base.pre_head.state_dict())
    torch.testing.assert_close(theirs(X), model(X), rtol=1e-5, atol=1e-5)
