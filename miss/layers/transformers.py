"""Layers of transformers; nothing of that library is imported."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from miss.layers.host import Host
from miss.layers.linear import LinearHost

__all__ = ["Conv1DHost"]


class Conv1DHost(Host):
    """``Conv1D``, the linear layer of GPT-2: a weight ``(in, out)``, features last."""

    axes: ClassVar = {"weight": (1, 0)}
    lora = LinearHost.lora

    @staticmethod
    def product(layer: Any, x: Tensor, d: Tensor, parameter: str) -> Tensor:
        """``x d``."""
        return torch.matmul(x, d)
