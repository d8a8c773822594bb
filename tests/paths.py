"""The two paths of a linear layer, the fast one and the plain one: chosen, counted, compared."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn

from miss import fused
from miss.layers.linear import FAST


@contextmanager
def plain_path() -> Iterator[None]:
    """Inside, the fast path applies to nothing."""
    with mock.patch.object(fused, "fits", return_value=False):
        yield


def both_paths(call: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What ``call`` gives on the fast path and on the plain one."""
    fast = call()
    with plain_path():
        return fast, call()


@contextmanager
def counted() -> Iterator[mock.Mock]:
    """Counts the calls that take the fast path, of both forms."""
    calls = mock.Mock()

    def counting(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: (calls(), real(*args))[1]

    with mock.patch.dict(FAST, {form: counting(real) for form, real in FAST.items()}):
        yield calls


def results(layer: nn.Linear, x: Tensor, seed: int = 0) -> list[Tensor]:
    """The output and the gradients of all that asks for one."""
    y = layer(x)
    tensors = [tensor for tensor in (x, layer.miss_D, layer.bias) if tensor is not None]
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return [y, *(torch.autograd.grad(y, wanted, g) if wanted else ())]
