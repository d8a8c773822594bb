"""What is trained besides adapters, in PEFT's formats; PEFT is the referee."""

import copy
import json
import pathlib

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from miss import StateError, inject, interop, load, save
from tests.models import perturb, snapshot, switched_on

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
        given = load_file(tmp_path / "adapter_model.safetensors")
        by_default = load_file(tmp_path / "default" / "adapter_model.safetensors")
        assert set(by_default) <= set(given)
        fresh = copy.deepcopy(base).requires_grad_(False)
        ours = interop.peft.load(fresh, tmp_path)
        torch.testing.assert_close(ours(X), model(X), rtol=1e-5, atol=1e-5)
        whole: set[str] = set()
        for name in modules or ():
            whole |= {f"{name}.weight", f"{name}.bias"}
        assert switched_on(ours) == switched_on(model) | whole


@pytest.mark.parametrize("save_", WRITERS.values())
@pytest.mark.parametrize(
    ("targets", "trainable", "message"),
    [
        ("body.*", "shift", r"\(model\): PEFT cannot .* it holds adapters\n.*\n  do: .*extra=\(\)"),
        (
            ["body.0", "pre_head"],
            "head",
            r"pre_head: .* it holds adapters\n.*\['head'\], in one of which its name ends\n",
        ),
    ],
)
def test_what_peft_cannot_hold(tmp_path: pathlib.Path, save_, targets, trainable, message: str):
    model = trained(Rater(), targets, trainable=trainable)
    with pytest.raises(StateError, match=message):
        save_(model, tmp_path / "a", extra=trainable)
    assert not (tmp_path / "a").exists()


def test_what_peft_cannot_wrap(tmp_path: pathlib.Path):
    model = Rater()
    model.gains = nn.ParameterList([nn.Parameter(torch.ones(2, 2))])
    model.again = model.norm
    model.twin = nn.Linear(6, 3)
    model.twin.weight = model.head.weight
    inject(model, "body.*", rank=2, trainable=["gains", "norm", "head", "twin"])
    for extra, message in (
        ("gains", "gains: PEFT cannot .* it is a ParameterList"),
        ("norm", "norm: PEFT cannot .* under two names"),
        (
            "head",
            r"head\.weight: is tied to .*\n.*twin\.weight\n  do: .*'head\.weight', 'twin\.weight'",
        ),
    ):
        with pytest.raises(StateError, match=message):
            interop.peft.save(model, tmp_path / "a", extra=extra)
    assert not (tmp_path / "a").exists()
    interop.peft.save(model, tmp_path, extra=["head", "twin"])


def test_a_container_is_saved_with_its_buffers(tmp_path: pathlib.Path):
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.bn = nn.Linear(6, 2), nn.BatchNorm1d(6, affine=False)
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.bn(x) - self.mean)

    base = nn.Sequential(nn.Linear(6, 6), Head()).eval()
    model = trained(copy.deepcopy(base), "0", trainable="1")
    model[1].mean += 1
    model[1].bn.running_mean += 1
    interop.peft.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["1"]
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(theirs(X), model(X), rtol=1e-5, atol=1e-5)
    save(model, tmp_path / "a.pt")
    assert torch.equal(load(copy.deepcopy(base), tmp_path / "a.pt").eval()(X), model(X))


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
