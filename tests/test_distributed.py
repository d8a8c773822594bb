"""Tensor parallelism with torch's own plans, on two processes of this machine."""

import copy
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from miss import adapter_parameters, inject


def compare(rank: int, store: str) -> None:
    """Adapted, then sharded column- and row-wise: outputs and gradients of D as unsharded."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for method in ("misse", "miss"):
        for r in (
            1,
            2,
            3,
            4,
            5,
            8,
        ):  # dividing 12 and not, with an odd number of blocks and an even one
            for dtype, tolerance in ((torch.float64, 1e-12), (torch.float16, 2e-2)):
                torch.manual_seed(0)
                model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)).to(dtype)
                inject(model, ["0", "2"], rank=r, method=method, scale=0.5)
                for d in adapter_parameters(model):
                    nn.init.normal_(d, std=0.1)
                plain, x = copy.deepcopy(model), torch.randn(4, 8).to(dtype)
                parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
                y, expected = model(x), plain(x)
                torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
                y.square().mean().backward()
                expected.square().mean().backward()
                for sharded, d in zip(
                    adapter_parameters(model), adapter_parameters(plain), strict=True
                ):
                    torch.testing.assert_close(
                        sharded.grad.full_tensor(), d.grad, rtol=4 * tolerance, atol=4 * tolerance
                    )
    dist.barrier()  # neither leaves while the other still talks to it
    dist.destroy_process_group()


def test_tensor_parallel_equals_one_process():
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(compare, (f"{folder}/store",), nprocs=2)
