"""What one adapted linear layer costs beside its base, and beside those of PEFT and loralib.

A step is forward and backward with the gradient of the input. The base is a frozen `nn.Linear`. All
competitors share one base weight. Except for the output-sharded MiSS and for MiSSe with alternating
signs they compute one function, which is asserted before anything is timed: a LoRA whose A is the
fixed 0/1 matrix of MiSSe has the same output, and the same cost as any other. Times are interleaved
in one process. Bytes are counted, not sampled.
"""

import argparse
import functools
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from measure import environment, interleaved, peak_bytes, ratios, require_extras, saved_bytes, table
from miss import MiSSeLinear, MiSSLinear
from miss.forms import MiSSe

RANK = 64
BASE, OURS, FORM, PEER, LORA = "base", "miss MiSSe", "miss MiSS", "PEFT MiSS", "PEFT LoRA"
LORALIB, SIGNS = "loralib LoRA", "miss MiSSe, alternating"
EXTRAS = {'pip install "miss-torch[benchmark]"': ("loralib", "peft")}


class Shape(NamedTuple):
    """A layer to measure."""

    in_features: int
    out_features: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.in_features} -> {self.out_features} {str(self.dtype).removeprefix('torch.')}"


SHAPES = [Shape(1024, 1024), Shape(1024, 4096), Shape(4096, 1024)]
SHAPES += [Shape(1024, 4096, torch.bfloat16)]
SHAPES += [Shape(4096, 11008), Shape(576, 1536), Shape(1000, 1500)]
QUICK = [Shape(1024, 1024), Shape(1024, 4096, torch.bfloat16), Shape(1000, 1500)]


class Holder(nn.Module):
    """PEFT adapts the layers inside of a model."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer


def competitors(shape: Shape) -> dict[str, nn.Module]:
    """The layers by name, over one base weight.

    Adapters are random, and equal where the method is.
    """
    import loralib
    import peft

    base = nn.Linear(shape.in_features, shape.out_features, dtype=shape.dtype).requires_grad_(False)

    def twin() -> nn.Linear:
        layer = nn.Linear(shape.in_features, shape.out_features, dtype=shape.dtype, device="meta")
        layer.weight, layer.bias = base.weight, base.bias
        return layer

    def wrapped(config: peft.PeftConfig) -> nn.Module:
        return peft.get_peft_model(Holder(twin()), config).base_model.model.layer

    misse, miss = MiSSeLinear.adopt_(twin(), RANK), MiSSLinear.adopt_(twin(), RANK)
    signs = MiSSeLinear.adopt_(twin(), RANK, alternate=True)
    d = nn.init.normal_(misse.miss_D, std=0.01).detach()
    for other in (miss, signs):
        nn.init.normal_(other.miss_D, std=0.01)
    a, b = MiSSe.factors(d, misse.miss_configs["weight"])

    peft_miss = wrapped(peft.MissConfig(r=RANK, target_modules=["layer"]))
    peft_miss.miss_block["default"].data = d.T.contiguous().clone()
    peft_lora = wrapped(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["layer"]))
    peft_lora.lora_A["default"].weight.data = a.clone()
    peft_lora.lora_B["default"].weight.data = b.clone()

    settings = {"r": RANK, "lora_alpha": RANK, "merge_weights": False}
    loralib_lora = loralib.Linear(shape.in_features, shape.out_features, **settings)
    loralib_lora.weight, loralib_lora.bias = base.weight, base.bias
    loralib_lora.lora_A.data = a.to(shape.dtype)  # it does not mix dtypes
    loralib_lora.lora_B.data = b.to(shape.dtype)
    layers = {BASE: base, OURS: misse, SIGNS: signs, FORM: miss}
    layers |= {PEER: peft_miss, LORA: peft_lora, LORALIB: loralib_lora}
    check(layers, shape)
    return layers


def check(layers: dict[str, nn.Module], shape: Shape) -> None:
    """Every output within rounding of the dense product in float64.

    That is eight roundings to the dtype, and those of its sums.
    """
    x = torch.randn(5, shape.in_features, dtype=shape.dtype)
    rounding = 8 * torch.finfo(shape.dtype).eps + torch.finfo(torch.float32).eps * shape.in_features
    weight, bias = layers[BASE].weight.double(), layers[BASE].bias.double()
    for name, layer in layers.items():
        if name == BASE:
            continue
        own = name if name in (FORM, SIGNS) else OURS
        delta = layers[own].delta_weight().detach().double()
        exact = F.linear(x.double(), weight + delta, bias)
        size = F.linear(x.double().abs(), weight.abs() + delta.abs(), bias.abs())
        equal = (layer(x).double() - exact).abs() <= rounding * size
        assert equal.all(), f"{name} computes something else at {shape}"


def tensors(shape: Shape, tokens: int) -> tuple[Tensor, Tensor]:
    """An input that takes a gradient, and a gradient of the output."""
    x = torch.randn(tokens, shape.in_features, dtype=shape.dtype, requires_grad=True)
    return x, torch.randn(tokens, shape.out_features, dtype=shape.dtype)


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Forward and backward from clean gradients."""
    held = [x, *layer.parameters()]

    def run() -> None:
        for tensor in held:
            tensor.grad = None
        layer(x).backward(dy)

    return run


def step_results(
    layers: dict[str, nn.Module], x: Tensor, dy: Tensor, rounds: int
) -> dict[str, dict[str, Any]]:
    """Of each layer: time, transient peak and saved bytes of a step, and bytes of gradients."""
    runs = {name: step(layer, x, dy) for name, layer in layers.items()}
    results = ratios(interleaved(runs, rounds), BASE)
    for name, layer in layers.items():
        results[name]["saved"] = saved_bytes(layer, x)
        results[name]["peak"] = peak_bytes(runs[name], clear=[x, *layer.parameters()])
        trained = [p for p in layer.parameters() if p.requires_grad]
        results[name]["gradients"] = sum(p.nbytes for p in trained)
    return results


def steps(shapes: list[Shape], tokens: list[int], rounds: int) -> Iterator[dict[str, object]]:
    """Time, transient peak and saved bytes of a step, for each competitor."""
    for shape, t in itertools.product(shapes, tokens):
        layers = competitors(shape)
        x, dy = tensors(shape, t)
        yield {"shape": str(shape), "tokens": t, "results": step_results(layers, x, dy, rounds)}


def forwards(shapes: list[Shape], tokens: list[int], rounds: int) -> Iterator[dict[str, object]]:
    """Time of a forward without gradients."""
    for shape, t in itertools.product(shapes, tokens):
        x, layers = torch.randn(t, shape.in_features, dtype=shape.dtype), competitors(shape)
        # Some milliseconds, for small layers too.
        repeats = max(1, int(1e8 / (t * shape.in_features * shape.out_features)))
        runs = {name: functools.partial(layer, x) for name, layer in layers.items()}
        with torch.no_grad():
            times = interleaved(runs, 3 * rounds, repeats)
        yield {"shape": str(shape), "tokens": t, "results": ratios(times, BASE)}


def compiled(shapes: list[Shape], tokens: int, rounds: int) -> Iterator[dict[str, object]]:
    """Time of a step under `torch.compile`, which takes the plain path and fuses it itself."""
    for shape in shapes:
        layers = {name: layer for name, layer in competitors(shape).items() if name != LORALIB}
        x, dy = tensors(shape, tokens)
        torch.compiler.reset()
        runs = {name: step(torch.compile(layer), x, dy) for name, layer in layers.items()}
        results = ratios(interleaved(runs, rounds), BASE)
        yield {"shape": str(shape), "tokens": tokens, "results": results}


def overhead(rows: list[dict], name: str, how: str) -> float:
    """Geometric mean of ``ratio - 1``; one that noise has put below a thousandth counts as that."""
    excess = [max(row["results"][name][how] - 1, 1e-3) for row in rows]
    return math.exp(statistics.fmean(map(math.log, excess)))


def report(
    kind: str,
    rows: list[dict],
    names: list[str],
    peers: tuple[str, ...] = (PEER, LORA),
    size: str = "tokens",
) -> str:
    """A table of ratios to the base, and of geometric means of the overheads.

    A ratio is the median one, and in brackets that of the minima. ``size`` is the key of how long
    an input is.
    """
    lines = []
    for row in rows:
        found = row["results"]
        cells = [f"{found[name]['median']:.3f} ({found[name]['min']:.3f})" for name in names]
        lines.append([row["shape"], row[size], f"{found[BASE]['ms']:.2f}", *cells])
    for how in ("median", "min"):
        means = {name: overhead(rows, name, how) for name in names}
        cells = [f"{mean:.3f}" for mean in means.values()]
        lines.append([f"overhead, geometric mean of {how}s", "", "", *cells])
        shares = []
        for mean in means.values():
            shares.append(" / ".join(f"{mean / means[peer]:.2f}" for peer in peers))
        lines.append([f"share of that of {' / '.join(peers)}", "", "", *shares])
    return f"\n{kind}\n\n" + table(["layer", size, "base, ms", *names], lines)


def report_bytes(rows: list[dict], names: list[str], size: str = "tokens") -> str:
    """A table of peaks in units of the base's, and of saved bytes.

    The adapter's own gradient is left out of its peak.
    """
    lines = []
    for row in rows:
        peak = row["results"][BASE]["peak"]
        cells = []
        for name in names:
            found = row["results"][name]
            ratio = (found["peak"] - found["gradients"]) / peak
            cells.append(f"{ratio:.2f}, {found['saved'] / 2**20:.2f}")
        lines.append([row["shape"], row[size], f"{peak / 2**20:.2f}", *cells])
    title = "\nPeak of a step over the base's, and saved for backward in MiB\n\n"
    return title + table(["layer", size, "base, MiB", *names], lines)


def tables(found: dict, threads: int) -> str:
    """All tables of one number of threads."""
    names = [name for name in found["step"][0]["results"] if name != BASE]
    how = f"{threads} thread{'s' * (threads > 1)}: median (minimum)"
    forward = f"Forward without gradients over the base's, {how}"
    parts = [report(f"Step over the base's, {how}", found["step"], names)]
    parts.append(report_bytes(found["step"], names))
    parts.append(report(forward, found["forward"], names))
    if found["compiled"]:
        kind = f"Compiled step over the compiled base's, {how}"
        parts.append(report(kind, found["compiled"], [name for name in names if name != LORALIB]))
    return "\n".join(parts)


def overview(result: dict) -> str:
    """Overheads as shares of the peers', and where a layer is slower.

    An overhead is the geometric mean over all layers and lengths.
    """
    pairs = list(itertools.product((OURS, FORM), (PEER, LORA)))
    lines = []
    counts = [key for key in result if key.startswith("threads=")]
    for key, kind, how in itertools.product(counts, ("step", "forward"), ("median", "min")):
        rows = result[key][kind]
        means = {name: overhead(rows, name, how) for name in (OURS, FORM, PEER, LORA)}
        shares = [f"{means[name] / means[peer]:.2f}" for name, peer in pairs]
        slower = sum(row["results"][OURS][how] > row["results"][PEER][how] for row in rows)
        threads = key.removeprefix("threads=")
        lines.append([threads, kind, how, *shares, f"{slower} of {len(rows)}"])
    compared = [f"{name} / {peer}" for name, peer in pairs]
    return table(["threads", "of", "by", *compared, f"{OURS} slower than {PEER}"], lines)


def main() -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="three layers, two lengths, five rounds, one thread: under a minute",
    )
    parser.add_argument("--rounds", type=int, default=15, help="at least 2")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="where to write what was measured")
    args = parser.parse_args()
    require_extras("layer_cost", EXTRAS)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)  # now, not after an hour
    shapes, tokens, rounds, threads = SHAPES, [128, 512, 2048], args.rounds, args.threads
    if args.quick:
        shapes, tokens, rounds, threads = QUICK, [128, 512], 5, [1]
    torch.manual_seed(0)
    result: dict[str, object] = {"environment": environment(), "rank": RANK, "rounds": rounds}
    for count in threads:
        torch.set_num_threads(count)
        found = {
            "step": list(steps(shapes, tokens, rounds)),
            "forward": list(forwards(shapes, [1, 16, 256], rounds)),
            "compiled": [] if args.quick else list(compiled(shapes[:2], 512, rounds)),
        }
        result[f"threads={count}"] = found
        print(tables(found, count), flush=True)
    print(
        "\nOverhead, geometric mean over layers and lengths, as a share of a peer's\n\n"
        + overview(result)
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
