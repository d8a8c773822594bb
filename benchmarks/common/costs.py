"""What the methods cost on one model: parameters, initialisation, step time and peak memory, measured side by side."""

import itertools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from common.methods import fit, trained
from measure import interleaved, peak_bytes, ratios


def costs(
    builds: Mapping[str, Callable[[], nn.Module]], ranks: Mapping[str, int | None], batch: tuple[Any, ...], base: str, rounds: int
) -> dict[str, dict[str, Any]]:
    """Of each method: ``trainable`` parameters, ``rank``, ``start_ms`` (the build, which includes a copy of the base), ``step``
    (see `measure.ratios`, to ``base``) and ``peak``, the bytes that a step holds beyond model, gradients and optimizer state.

    A build gives the adapted model. Everything is timed in this process on the threads it has, the methods taking turns.
    """
    starts = interleaved(builds, max(3, rounds // 3))
    models = {name: build() for name, build in builds.items()}

    def stepper(name: str) -> Callable[[], object]:
        steps = fit(models[name], name, ranks[name], itertools.repeat(batch), lr=1e-4, schedule=lambda step: 1.0)
        return lambda: next(steps)

    steps = {name: stepper(name) for name in models}
    times = ratios(interleaved(steps, rounds), base)
    return {
        name: {
            "trainable": sum(parameter.numel() for parameter in trained(model)),
            "rank": ranks[name],
            "start_ms": 1e3 * statistics.median(starts[name]),
            "step": times[name],
            "peak": peak_bytes(steps[name]),
            "threads": torch.get_num_threads(),
        }
        for name, model in models.items()
    }
