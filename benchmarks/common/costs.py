"""What the methods cost on one model, measured side by side.

Parameters, initialisation, step time and memory.
"""

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from common.methods import fit, trained
from measure import interleaved, peak_bytes, ratios


def costs(
    model: nn.Module,
    builds: Mapping[str, Callable[[nn.Module, int], nn.Module]],
    ranks: Mapping[str, int | None],
    batch: tuple[Any, ...],
    base: str,
    *,
    rounds: int,
    threads: int = 1,
) -> dict[str, dict[str, Any]]:
    """Of each method, on copies of ``model``: what it trains, and what it costs.

    ``trainable`` parameters, ``rank``, ``start_ms`` to adapt the copy, ``step`` (see
    `measure.ratios`, to the method ``base``), and ``memory`` in bytes. Memory is parameters,
    buffers, AdamW's two states, and what a step holds beyond them at one time, gradients included.
    AdaLoRA's importance scores are not counted. A build takes the copy and the length of the
    training, by which AdaLoRA plans. Everything is timed in this process, the methods taking turns.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    # Most of what is timed lies in AdaLoRA's middle part, where it fits its budget.
    steps = 3 * rounds
    starts: dict[str, list[float]] = {name: [] for name in builds}
    models = {}
    for _ in range(max(3, rounds // 10)):
        for name, build in builds.items():
            models[name] = copy.deepcopy(model)
            start = time.perf_counter()
            models[name] = build(models[name], steps)
            starts[name].append(time.perf_counter() - start)

    def stepper(name: str) -> Callable[[], object]:
        forever = itertools.repeat(batch)
        run = fit(models[name], name, ranks[name], forever, lr=1e-4, schedule=lambda step: 1.0)
        return lambda: next(run)

    steppers = {name: stepper(name) for name in models}
    times = ratios(interleaved(steppers, rounds), base)
    result = {}
    for name, adapted in models.items():
        weights = trained(adapted)
        kept = (*adapted.parameters(), *adapted.buffers(), *weights, *weights)
        held = sum(tensor.nbytes for tensor in kept)
        result[name] = {
            "trainable": sum(parameter.numel() for parameter in weights),
            "rank": ranks[name],
            "start_ms": 1e3 * statistics.median(starts[name]),
            "step": times[name],
            "memory": held + peak_bytes(steppers[name], clear=weights),
            "threads": threads,
        }
    torch.set_num_threads(before)
    return result
