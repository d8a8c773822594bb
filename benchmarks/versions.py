"""What this version of the package costs beside another: two checkouts, their calls interleaved.

Each checkout's `miss` is imported by itself into this process. Layers of the two share the memory
of base and D, and are asserted to compute the same before they are timed. Ratios are this
checkout's time over the other's: of a step (forward and backward, with the gradient of the input),
of a forward without gradients, of `inject` on the 210 linear layers of SmolLM2-135M, and of
`import miss`, from bytecode, in fresh processes that have imported torch and einops. Bytes are
counted. Times of two threads need a machine that is otherwise idle.
"""

import argparse
import functools
import gc
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import measure
from common.checkouts import Modules, fresh_imports, load, standing
from layer_cost import RANK, Shape, step, tensors

THIS, OTHER, METHODS = "this", "other", ("misse", "miss")
EXTRAS = {'pip install "miss-torch[benchmark]"': ("transformers",)}
SIZES, DTYPES = ((576, 1536), (1000, 1500), (1024, 4096)), (torch.float32, torch.bfloat16)
Row = dict[str, Any]


class Settings(NamedTuple):
    """How much is measured: each time of a layer for ``seconds``, the others in rounds."""

    shapes: tuple[Shape, ...] = tuple(Shape(*size, dtype) for size in SIZES for dtype in DTYPES)
    tokens: tuple[int, ...] = (1, 128, 512)
    threads: tuple[int, ...] = (1, 2)
    seconds: float = 1.2
    blocks: int = 30  # of seven linear layers, in the model
    injections: int = 60
    imports: int = 20


QUICK = Settings(Settings().shapes[:4], (1, 128), (1,), seconds=0.5, injections=30, imports=6)


def pair(versions: Mapping[str, Modules], shape: Shape, method: str) -> dict[str, Any]:
    """A layer adapted by each version, over the same memory for weight, bias and a random D."""
    base = nn.Linear(shape.in_features, shape.out_features, dtype=shape.dtype)
    layers: dict[str, Any] = {}
    for name, modules in versions.items():
        twin = nn.Linear(shape.in_features, shape.out_features, device="meta", dtype=shape.dtype)
        twin.weight, twin.bias = base.weight, base.bias
        with standing(modules):
            inject = modules["miss"].inject
            [layers[name]] = inject(nn.Sequential(twin), "0", rank=RANK, method=method)
        form = type(layers[name])
        assert getattr(modules[form.__module__], form.__name__) is form  # no other version's
    d = 0.01 * torch.randn_like(layers[THIS].miss_D)
    for layer in layers.values():
        assert (layer.miss_D.shape, layer.miss_D.dtype) == (d.shape, d.dtype)
        layer.miss_D.data = d
    return layers


def check(layers: Mapping[str, Any], x: Tensor, dy: Tensor) -> None:
    """Outputs and gradients of the two are equal but for rounding."""
    found = []
    for layer in layers.values():
        step(layer, x, dy)()
        found.append([layer(x).detach(), x.grad, layer.miss_D.grad])
    for ours, theirs in zip(*found):
        allowed = torch.finfo(x.dtype).eps ** 0.5 * theirs.abs().max()
        assert (ours - theirs).abs().max() <= allowed, f"the versions differ at {layer}"


def summarised(times: Mapping[str, list[float]]) -> Row:
    """The median and the quartiles of the ratios within the rounds, and the ratio of medians.

    Where the machine's speed changes during a measurement, the first varies far less.
    """
    found = measure.ratios(times, OTHER)
    ms = {name: row["ms"] for name, row in found.items()}
    return found[THIS] | {"of_medians": ms[THIS] / ms[OTHER], "ms": ms, "rounds": len(times[THIS])}


def order(turn: int) -> tuple[str, str]:
    """ABBA."""
    return (OTHER, THIS) if turn % 2 else (THIS, OTHER)


def in_turn(once: Callable[[str], float], rounds: int, seconds: float = math.inf) -> Row:
    """Times each version, by its name, in at most so many rounds, after two to warm up.

    It stops when ``seconds`` are over and 8 rounds done.
    """
    times: dict[str, list[float]] = {THIS: [], OTHER: []}
    end = time.perf_counter() + seconds
    for turn in range(rounds + 2):
        if turn >= 10 and turn % 2 == 0 and time.perf_counter() > end:
            break
        for name in order(turn):
            times[name].append(once(name))
    return summarised({name: own[2:] for name, own in times.items()})


def timed(runs: Mapping[str, Callable[[], object]], seconds: float) -> Row:
    """Times calls, by the version's name, for about these seconds."""

    def once(name: str) -> float:
        run = runs[name]
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    with standing({"miss": None}):  # an import on the way could get the other version's
        return in_turn(once, 2000, seconds)


def layer_costs(versions: Mapping[str, Modules], settings: Settings) -> Iterator[Row]:
    """Step, with what it holds at most and saves for backward, and forward without gradients."""
    for shape, method in itertools.product(settings.shapes, METHODS):
        layers = pair(versions, shape, method)
        for tokens in settings.tokens:
            x, dy = tensors(shape, tokens)
            check(layers, x, dy)
            cell = {"shape": str(shape), "method": method, "tokens": tokens}
            steps = {name: step(layer, x, dy) for name, layer in layers.items()}
            forwards = {name: functools.partial(layer, x) for name, layer in layers.items()}
            counted: Row = {"peak": {}, "saved": {}}
            for name, layer in layers.items():
                held = [x, *layer.parameters()]
                counted["peak"][name] = measure.peak_bytes(steps[name], clear=held)
                counted["saved"][name] = measure.saved_bytes(layer, x)
            yield {"of": "step"} | cell | timed(steps, settings.seconds) | counted
            with torch.no_grad():
                found = timed(forwards, settings.seconds)
            yield {"of": "forward"} | cell | found


def injections(versions: Mapping[str, Modules], settings: Settings) -> Iterator[Row]:
    """Time of `inject` on all linear layers of a model, which `eject` undoes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": settings.blocks}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**size, **heads))
    model.to_empty(device="cpu")

    def once(name: str, method: str) -> float:
        miss = versions[name]["miss"]
        model.requires_grad_(True)
        gc.collect()
        with standing(versions[name]):
            start = time.perf_counter()
            miss.inject(model, "all-linear", rank=RANK, method=method)
            stop = time.perf_counter()
            assert len(miss.adapted_modules(model)) == 7 * settings.blocks
            miss.eject(model)
        return stop - start

    gc.collect()
    gc.freeze()  # the collections before each call are to take no time
    for method in METHODS:
        inject = functools.partial(once, method=method)
        found = in_turn(inject, settings.injections, 8 * settings.seconds)
        yield {"of": "inject", "method": method} | found
    gc.unfreeze()


def imports(checkouts: Mapping[str, Path], rounds: int) -> Row:
    """Time of `import miss`, and what it imports beyond itself, torch and einops."""
    names = [name for turn in range(rounds + 2) for name in order(turn)]
    found = fresh_imports([checkouts[name] for name in names])
    added = {name: each.added for name, each in zip(names, found)}
    seconds = iter([each.seconds for each in found])
    return in_turn(lambda name: next(seconds), rounds) | {"added": added}


def compare(checkouts: Mapping[str, Path], settings: Settings) -> Row:
    """All that is measured of two checkouts."""
    paths = {name: path.resolve() for name, path in checkouts.items()}
    commits = {name: measure.commit(path) for name, path in paths.items()}
    load_before = os.getloadavg()[0]
    result: Row = {"environment": measure.environment(), "commits": commits, "rank": RANK}
    result |= {"imports": imports(paths, settings.imports), "times": []}
    versions = {name: load(path) for name, path in paths.items()}
    for threads in settings.threads:
        torch.set_num_threads(threads)
        for rows in (layer_costs(versions, settings), injections(versions, settings)):
            result["times"] += [{"threads": threads} | row for row in rows]
    return result | {"load": [load_before, os.getloadavg()[0]]}


def geometric(rows: list[Row]) -> list[str]:
    """Geometric means over cells of the median ratio and of its quartiles; least and largest."""
    ratios, lows, highs = zip(*([row["median"], *row["quartiles"]] for row in rows))
    middle, low, high = map(statistics.geometric_mean, (ratios, lows, highs))
    return [f"{middle:.3f} ({low:.3f}, {high:.3f})", f"{min(ratios):.3f}, {max(ratios):.3f}"]


def report(result: Row) -> str:
    """Tables of times and of bytes, and the imports."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in result["times"]:
        for tokens in {row.get("tokens", "all"), "all"}:
            key = (row["threads"], row["of"], row["method"], str(tokens))
            groups.setdefault(key, []).append(row)
    lines = [[*key, len(rows), *geometric(rows)] for key, rows in sorted(groups.items())]
    every = [row for row in result["times"] if row["of"] != "inject"]
    lines.append(["all", "step, forward", "both", "all", len(every), *geometric(every)])
    logs = [math.log(row["median"]) for row in every]
    error = statistics.stdev(logs) / math.sqrt(len(logs))
    head = ["threads", "of", "method", "tokens", "cells", "median (quartiles)", "least, largest"]
    found, of = result["imports"], result["commits"]
    ms = found["ms"]
    parts = [
        f"Times of {of[THIS]} over those of {of[OTHER]}\n\n{measure.table(head, lines)}",
        f"Standard error of the last mean, by the cells' spread: {100 * error:.1f} %. Load of "
        f"the machine: {result['load'][0]:.1f} before and {result['load'][1]:.1f} after",
        f"`import miss`: {ms[THIS]:.1f} / {ms[OTHER]:.1f} ms ({ms[THIS] - ms[OTHER]:+.1f} ms), "
        f"ratio {geometric([found])[0]}",
        *(f"It adds, {name}: {', '.join(own) or 'none'}" for name, own in found["added"].items()),
        report_bytes([row for row in result["times"] if "peak" in row]),
    ]
    return "\n\n".join(parts)


def report_bytes(rows: list[Row]) -> str:
    """In how many cells the bytes are equal, and what they are in the others."""
    cells, kinds = ("threads", "shape", "method", "tokens"), ("peak", "saved")
    apart = [row for row in rows if any(len({*row[kind].values()}) > 1 for kind in kinds)]
    text = f"Peak and saved bytes are equal in {len(rows) - len(apart)} of {len(rows)} cells"
    both = [[" / ".join(map(str, row[kind].values())) for kind in kinds] for row in apart]
    lines = [[*(row[key] for key in cells), *own] for row, own in zip(apart, both)]
    return text + ("\n\n" + measure.table([*cells, *kinds], lines) if apart else "")


def main() -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, help="the checkout to compare with")
    here = Path(__file__).parent.parent
    parser.add_argument("--this", type=Path, default=here, help="by default, where this script is")
    parser.add_argument("--quick", action="store_true", help="few cells, one thread: a minute")
    parser.add_argument("--json", type=Path, help="where to write what was measured")
    args = parser.parse_args()
    measure.require_extras("versions", EXTRAS)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    result = compare({THIS: args.this, OTHER: args.other}, QUICK if args.quick else Settings())
    print(report(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
