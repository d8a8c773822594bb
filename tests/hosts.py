"""Layer types of the tests' own, and their hosts. Importing this registers nothing."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miss import Host


class FakeQuantLinear(nn.Linear):
    """Rounds its weight to multiples of a step, as quantisation-aware training does."""

    def __init__(self, in_features: int, out_features: int, **options: object):
        super().__init__(in_features, out_features, **options)
        self.register_buffer("scale", torch.tensor(2.0**-6, dtype=self.weight.dtype))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, torch.round(self.weight / self.scale) * self.scale, self.bias)


class FakeQuantHost(Host):
    """A delta is not rounded, unless it is merged."""

    @staticmethod
    def product(layer: nn.Module, x: Tensor, d: Tensor, parameter: str) -> Tensor:
        return F.linear(x, d)


class Mixer(nn.Module):
    """Mixes channels of ``(..., channels, time)``, now and one step ago, by two weights."""

    def __init__(self, channels: int, out_channels: int, dtype: torch.dtype | None = None):
        super().__init__()
        self.now = nn.Parameter(torch.randn(out_channels, channels, dtype=dtype))
        self.past_weight = nn.Parameter(torch.randn(channels, out_channels, dtype=dtype))
        self.rank = "a user's own attribute"

    def forward(self, signal: Tensor) -> Tensor:
        return self.now @ signal + self.past_weight.mT @ signal.roll(1, -1)


class MixerHost(Host):
    """Two Parameters, and features on the axis before the last."""

    axes = {"now": (0, 1), "past_weight": (1, 0)}  # noqa: RUF012  # as a user writes it
    features = -2

    @staticmethod
    def product(layer: nn.Module, x: Tensor, d: Tensor, parameter: str) -> Tensor:
        return d @ x if parameter == "now" else d.mT @ x.roll(1, -1)
