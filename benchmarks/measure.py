"""What the benchmarks measure with: bytes counted exactly, times of competitors interleaved in one process."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that a forward of ``module`` saves for backward, parameters and buffers of the module left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x)
    return sum(size for storage, size in saved.items() if storage not in own)


def peak_bytes(step: Callable[[], object]) -> int:
    """The most that ``step`` holds at one time beyond what was there before: from the CPU allocator's events, in their order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
