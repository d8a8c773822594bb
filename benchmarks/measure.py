"""What the benchmarks measure with.

Bytes are counted exactly. Times of competitors are interleaved in one process.
"""

import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that a forward of ``module`` saves for backward, without its parameters and buffers."""
    held = (*module.parameters(), *module.buffers())
    own = {tensor.untyped_storage().data_ptr() for tensor in held}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x)
    return sum(size for storage, size in saved.items() if storage not in own)


def peak_bytes(step: Callable[[], object], clear: Iterable[Tensor] = ()) -> int:
    """The most bytes that ``step`` holds at one time beyond what was there before.

    The gradients of ``clear`` are let go before it. The bytes are counted from the events of the
    CPU's allocator, in their order.
    """
    for tensor in clear:
        tensor.grad = None
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def interleaved(
    steps: Mapping[str, Callable[[], object]], rounds: int, repeats: int = 1
) -> dict[str, list[float]]:
    """Seconds per call of each step in each round.

    A round starts from another step each time, and repeats each on end.
    """
    names, times = list(steps), {name: [] for name in steps}
    for turn in range(-2, rounds):  # two rounds to warm up
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            for _ in range(repeats):
                steps[name]()
            if turn >= 0:
                times[name].append((time.perf_counter() - start) / repeats)
    return times


def ratios(times: Mapping[str, list[float]], base: str) -> dict[str, dict[str, Any]]:
    """Of each step to ``base``: ``min``, the ratio of the minima.

    ``median`` and ``quartiles`` are those of the ratios within one round. ``ms`` is the step's own
    median.
    """
    result = {}
    for name, own in times.items():
        pairs = [mine / other for mine, other in zip(own, times[base])]
        low, median, high = statistics.quantiles(pairs, n=4, method="inclusive")
        minimum = min(own) / min(times[base])
        result[name] = {
            "min": minimum,
            "median": median,
            "quartiles": [low, high],
            "ms": 1e3 * statistics.median(own),
        }
    return result


def environment() -> dict[str, object]:
    """Where and with what a benchmark ran."""
    names = ("torch", "einops", "peft", "loralib", "transformers", "scipy", "reasoning_gym")
    names += ("bitsandbytes",)
    return {
        "commit": commit(Path(__file__).parent),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names if any(distributions(name=name))},
    }


def commit(folder: Path) -> str | None:
    """The commit of the checkout that ``folder`` is in, or None."""
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    described = subprocess.run(git, capture_output=True, text=True)
    return described.stdout.strip() or None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    for line in lines:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def require_extras(script: str, extras: Mapping[str, Sequence[str]]) -> None:
    """Exit with the commands to run if a package that only ``script`` needs is missing.

    ``extras`` has by command what it installs.
    """
    missing, commands = [], []
    for command, names in extras.items():
        lacking = [name for name in names if not importlib.util.find_spec(name)]
        if lacking:
            missing += lacking
            commands.append(command)
    if missing:
        sys.exit(f"{script} needs {', '.join(missing)}; run: {' && '.join(commands)}")
