"""A diffusion model's UNet, with its convolutions and attention adapted."""

import copy
import pathlib

import pytest
import torch
from torch import nn

from miss import adapted_modules, adapter_parameters, eject, inject, load, merge, save, unmerge
from tests.strategies import OPTIONS, methods

REASON = "needs the extra `test-heavy`, which the README's command leaves out"
pytestmark = [  # of diffusers
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
diffusers = pytest.importorskip("diffusers", reason=REASON)


def unet() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


@methods
def test_a_unet_lives_with_adapted_convolutions(method: str, tmp_path: pathlib.Path):
    base = unet()
    model = inject(copy.deepcopy(base), [nn.Conv2d, nn.Linear], rank=4, **OPTIONS[method])
    layers = [m for m in base.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(adapted_modules(model)) == len(layers) > 60
    noise, steps, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 7]), torch.randn(2, 5, 12)

    def predicted(model: nn.Module) -> torch.Tensor:
        return model(noise, steps, text).sample

    assert torch.equal(predicted(model), predicted(base))
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        predicted(model.train()).square().mean().backward()
        optimizer.step()
    assert all(d.grad is not None for d in adapter_parameters(model))
    with torch.no_grad():
        trained = predicted(model.eval())
        assert not torch.allclose(trained, predicted(base))
        save(model, tmp_path / "unet.safetensors")
        assert torch.equal(predicted(load(unet(), tmp_path / "unet.safetensors")), trained)
        merge(model)
        torch.testing.assert_close(predicted(model), trained, rtol=1e-4, atol=1e-4)
        unmerge(model)
        assert torch.equal(predicted(model), trained)
    eject(model)
    for one, other in zip(model.parameters(), base.parameters(), strict=True):
        assert torch.equal(one, other)
