"""Every host through the battery: the package's own, and two that the tests register."""

import torch
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

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


class TestEmbedding(Battery):
    """Inputs are ids: the delta's rows are looked up."""

    FLOATING = False
    FACTOR = 1.0

    def layer(self, dtype: torch.dtype) -> nn.Module:
        return nn.Embedding(*self.SIZES[::-1], padding_idx=self.BLANK, dtype=dtype)

    def input(self, dtype: torch.dtype) -> Tensor:
        return torch.arange(12).reshape(3, 4) % self.SIZES[1]

    def output(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return self.FACTOR * weights["weight"][x]


class TestPaddedEmbedding(TestEmbedding):
    BLANK = 8


class TestScaledEmbedding(TestEmbedding):
    FACTOR, BLANK = 2.5, 0

    def layer(self, dtype: torch.dtype) -> nn.Module:
        return BartScaledWordEmbedding(10, 7, self.BLANK, self.FACTOR).to(dtype)


class TestScaledEmbeddingOfGemma(TestScaledEmbedding):
    def layer(self, dtype: torch.dtype) -> nn.Module:
        return Gemma3TextScaledWordEmbedding(10, 7, self.BLANK, self.FACTOR).to(dtype)


class TestConv1D(TestLinear):
    def layer(self, dtype: torch.dtype) -> nn.Module:
        layer = Conv1D(*self.SIZES).to(dtype)
        nn.init.normal_(layer.bias)
        return layer

    def output(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return x @ weights["weight"] + weights["bias"]


class Subclass(nn.Linear):
    """Adds a method, and inherits the forward."""

    def double_weight(self) -> Tensor:
        return 2 * self.weight


class TestSubclassOfLinear(TestLinear):
    def layer(self, dtype: torch.dtype) -> nn.Linear:
        return Subclass(*self.SIZES[::-1], dtype=dtype)
