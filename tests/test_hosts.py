"""Every host through the battery: the package's own, and two that the tests register."""

import torch
from torch import Tensor, nn

from miss import register
from tests.battery import Battery
from tests.hosts import FakeQuantHost, FakeQuantLinear, Mixer, MixerHost

register(FakeQuantLinear, FakeQuantHost, example=(FakeQuantLinear(6, 4), torch.randn(3, 6)))
register(Mixer, MixerHost, example=(Mixer(5, 4), torch.randn(5, 8)))


class TestLinear(Battery):
    def layer(self, dtype: torch.dtype) -> nn.Linear:
        return nn.Linear(*self.SIZES[::-1], dtype=dtype)

    def input(self, dtype: torch.dtype) -> Tensor:
        return torch.randn(2, 3, self.SIZES[1]).to(dtype)

    def output(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return x @ weights["weight"].mT + weights["bias"]


class TestFakeQuantLinear(TestLinear):
    STEP = 2.0**-6

    def layer(self, dtype: torch.dtype) -> nn.Linear:
        return FakeQuantLinear(*self.SIZES[::-1], dtype=dtype)


class TestMixer(Battery):
    def layer(self, dtype: torch.dtype) -> Mixer:
        return Mixer(*self.SIZES[::-1], dtype=dtype)

    def input(self, dtype: torch.dtype) -> Tensor:
        return torch.randn(2, self.SIZES[1], 4).to(dtype)

    def output(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        now = torch.einsum("oc,bct->bot", weights["now"], x)
        return now + torch.einsum("co,bct->bot", weights["past_weight"], x.roll(1, -1))
