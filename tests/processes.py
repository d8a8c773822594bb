"""A function on two processes of this machine, with a deadline."""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

PROCESSES = 2


def on_two_processes(function: Callable[..., None], *args: Any, deadline: float = 120.0) -> None:
    """Run ``function(rank, *args)`` on two processes that gloo connects.

    ``function`` is of the top level of a module. Where it fails, the traceback of the process that
    failed first is raised, as a `ProcessRaisedException`, and the other process is ended; after
    ``deadline`` seconds both are ended.
    """
    end = time.monotonic() + deadline
    with tempfile.TemporaryDirectory() as folder:
        started = torch.multiprocessing.start_processes(
            _one, (function, f"{folder}/store", args), PROCESSES, join=False, daemon=True
        )
        try:
            while not started.join(timeout=max(0.0, end - time.monotonic()), grace_period=5):
                if time.monotonic() >= end:
                    raise TimeoutError(f"{function.__name__} took more than {deadline:.0f} s")
        finally:
            for process in started.processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _one(rank: int, function: Callable[..., None], store: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting = f"file://{store}"
    patience = timedelta(seconds=60)
    dist.init_process_group("gloo", meeting, timeout=patience, world_size=PROCESSES, rank=rank)
    function(rank, *args)
    dist.barrier()  # neither leaves while the other still talks to it
    dist.destroy_process_group()
