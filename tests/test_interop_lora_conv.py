"""Adapted convolutions as LoRA: PEFT loads the directory, to the same outputs."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from miss import StateError, adapted_modules, inject, interop
from tests.models import perturb
from tests.strategies import OPTIONS, methods


class Pictures(nn.Module):
    """Convolutions of one kind and a linear layer."""

    def __init__(self, dims: int, **options: object) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.first = conv(3, 8, 1)
        self.second = conv(8, 10, 3, **options)
        self.head = nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).tanh()).flatten(2).mean(-1))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 1}, {"padding": "same"}, {"padding_mode": "circular"}],
)
def test_peft_computes_the_same(tmp_path, dims, options):
    torch.manual_seed(0)
    base = Pictures(dims, **options).eval()
    model = inject(copy.deepcopy(base), "second", rank=4, method="miss", scale=0.5)
    inject(model, "first", rank=2, method="miss", scale=0.5)
    inject(model, "head", rank=3, scale=0.5)
    perturb(model)
    interop.lora.save(model, tmp_path, extra=())
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    x = torch.randn(2, 3, *(5,) * dims)
    torch.testing.assert_close(theirs(x), model(x))
    assert not torch.allclose(theirs(x), base(x))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    shapes = [tensors[f"base_model.model.second.lora_{side}.weight"].shape for side in "AB"]
    assert shapes == [(4, 8, *(3,) * dims), (10, 4, *(1,) * dims)]


@methods
def test_a_kernel_of_one_element_has_every_form(tmp_path, method):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(7, 6, 1, stride=2), nn.Conv2d(6, 5, 1, dilation=2)).eval()
    model = inject(copy.deepcopy(base), ["0", "1"], rank=3, scale=2.0, **OPTIONS[method])
    perturb(model)
    interop.lora.save(model, tmp_path, extra=())
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    x = torch.randn(2, 7, 5, 5)
    torch.testing.assert_close(theirs(x), model(x))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name, layer in adapted_modules(model).items():
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"].flatten(1) for side in "AB")
        assert torch.equal(2.0 * (b @ a), layer.delta_weight().flatten(1))


@pytest.mark.parametrize(
    ("method", "options", "why"),
    [
        ("misse", {}, r"second.*MiSSe sums inputs before the kernel"),
        ("alternating", {}, r"second.*MiSSe sums inputs before the kernel"),
        ("miss", {"dilation": 2}, r"second.*dilation=\(2, 2\), which PEFT's LoRA ignores"),
        ("miss", {"padding": 1, "padding_mode": "reflect"}, r"second.*padding_mode='reflect'"),
    ],
)
def test_what_peft_would_not_compute_is_refused(tmp_path, method, options, why):
    model = inject(Pictures(2, **options), ["first", "second"], rank=3, **OPTIONS[method])
    with pytest.raises(StateError, match=f"(?s){why}.*miss.save"):
        interop.lora.save(model, tmp_path / "lora", extra=())
    assert not (tmp_path / "lora").exists()
    with pytest.raises(StateError, match=r"first.*Conv2d.*PEFT's MiSS"):
        interop.peft.save(model, tmp_path / "peft", extra=())
