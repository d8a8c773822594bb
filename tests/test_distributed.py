"""Tensor parallelism with torch's own plans, on two processes of this machine."""

import copy

import torch
import torch.distributed as dist
from torch import nn

from miss import adapter_parameters, inject
from tests.processes import on_two_processes
from tests.strategies import OPTIONS

RANKS = 1, 2, 3, 4, 5, 8  # dividing 12 and not, with an odd number of blocks and an even one


def compare(rank: int) -> None:
    """Adapted, then sharded column- and row-wise: outputs and gradients of D as unsharded."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for options in OPTIONS.values():
        for r in RANKS:
            for dtype, tolerance in ((torch.float64, 1e-12), (torch.float16, 2e-2)):
                torch.manual_seed(0)
                model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)).to(dtype)
                inject(model, ["0", "2"], rank=r, scale=0.5, **options)
                for d in adapter_parameters(model):
                    nn.init.normal_(d, std=0.1)
                plain, x = copy.deepcopy(model), torch.randn(4, 8).to(dtype)
                parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
                y, expected = model(x), plain(x)
                torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
                y.square().mean().backward()
                expected.square().mean().backward()
                close = {"rtol": 4 * tolerance, "atol": 4 * tolerance}
                ds = map(adapter_parameters, (model, plain))
                for sharded, d in zip(*ds, strict=True):
                    torch.testing.assert_close(sharded.grad.full_tensor(), d.grad, **close)


def test_tensor_parallel_equals_one_process():
    on_two_processes(compare)
