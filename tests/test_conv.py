"""Convolutions: the battery for each kind, the fast path against the plain one, and real models."""

import copy
import itertools
import pathlib
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import miss
from measure import peak_bytes, saved_bytes
from miss import (
    MiSSConv1d,
    MiSSConv2d,
    MiSSConv3d,
    MiSSeConv1d,
    MiSSeConv2d,
    MiSSeConv3d,
    ShapeError,
    StateError,
    TargetError,
    adapted_modules,
    adapter_parameters,
    eject,
    fused_conv,
    inject,
    load,
    merge,
    save,
    unmerge,
    verify,
)
from tests.battery import Battery
from tests.models import perturb
from tests.strategies import OPTIONS, methods, tolerance

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def convolution(layer: nn.Module, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """A convolution by its definition: for each position of the kernel, a matrix."""
    kernel, dilation = weight.shape[2:], layer.dilation
    spans = [step * (size - 1) for step, size in zip(dilation, kernel)]
    if layer.padding == "same":
        pads = [(span // 2, span - span // 2) for span in spans]
    else:
        pads = [(size, size) for size in layer.padding]
    mode = {"zeros": "constant"}.get(layer.padding_mode, layer.padding_mode)
    x = F.pad(x, [side for pair in reversed(pads) for side in pair], mode=mode)
    y = bias.reshape(-1, *(1 for _ in kernel))
    for position in itertools.product(*map(range, kernel)):
        seen = x
        for axis, place in enumerate(position):
            start, length = place * dilation[axis], x.shape[2 + axis] - spans[axis]
            seen = seen.narrow(2 + axis, start, length)
            seen = seen.index_select(2 + axis, torch.arange(0, length, layer.stride[axis]))
        y = y + torch.einsum("oi,bi...->bo...", weight[(..., *position)], seen)
    return y


class Convolutions(Battery):
    SPACE: tuple[int, ...] = (5, 4)
    CONV: dict[str, object] = {"kernel_size": 3, "stride": 2, "padding": 1}  # noqa: RUF012

    def layer(self, dtype: torch.dtype) -> nn.Module:
        out, in_ = self.SIZES
        return CONVS[len(self.SPACE)](in_, out, **self.CONV, dtype=dtype)

    def input(self, dtype: torch.dtype) -> Tensor:
        return torch.randn(2, self.SIZES[1], *self.SPACE).to(dtype)

    def output(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return convolution(self.layer(torch.float64), weights["weight"], weights["bias"], x)

    def bound(self, layer: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
        terms = 2 * layer.weight.numel()
        return tolerance(dtype, self.exact(layer, x, size=True), terms)


class TestConv1d(Convolutions):
    SPACE = (6,)


class TestConv2d(Convolutions):
    pass


class TestPointwiseConv2d(Convolutions):
    CONV = {"kernel_size": 1}  # noqa: RUF012


class TestCircularConv2d(Convolutions):
    CONV = {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}  # noqa: RUF012


class TestDilatedConv2dOfTheSameSize(Convolutions):
    CONV = {"kernel_size": (3, 2), "padding": "same", "dilation": (1, 2)}  # noqa: RUF012


class TestConv3d(Convolutions):
    SPACE = (3, 2, 4)
    CONV = {"kernel_size": (2, 1, 3), "padding": (0, 1, 1)}  # noqa: RUF012
