"""What one adapted convolution costs beside its base and beside PEFT's LoRA of equal rank.

A step is forward and backward with the gradient of the input, in fp32 on one thread. The base is a
frozen 3 x 3 `nn.Conv2d`, and all competitors share its weight. PEFT's LoRA holds the factors of the
output-sharded MiSS, so that the two compute one function; every output is checked before anything
is timed. Times are interleaved in one process. Bytes are counted, not sampled.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layer_cost import BASE, FORM, LORA, OURS, SIGNS, Holder, report, report_bytes, step_results
from measure import environment, require_extras
from miss import MiSSConv2d, MiSSeConv2d
from miss.forms import MiSS

RANK, BATCH = 16, 8
EXTRAS = {'pip install "miss-torch[benchmark]"': ("peft",)}


class Shape(NamedTuple):
    """A convolution to measure: as many outputs as inputs, on a square picture."""

    channels: int
    side: int

    def __str__(self) -> str:
        return f"{self.channels} channels, {self.side} x {self.side}"


SHAPES = [Shape(64, 56), Shape(64, 14), Shape(256, 56), Shape(256, 14)]
QUICK = [Shape(64, 56), Shape(64, 14), Shape(256, 14)]


def competitors(shape: Shape, rank: int = RANK) -> dict[str, nn.Module]:
    """The layers by name, over one base weight, with random adapters."""
    import peft

    sizes = {"kernel_size": 3, "padding": 1}
    base = nn.Conv2d(shape.channels, shape.channels, **sizes).requires_grad_(False)

    def twin() -> nn.Conv2d:
        layer = nn.Conv2d(shape.channels, shape.channels, **sizes, device="meta")
        layer.weight, layer.bias = base.weight, base.bias
        return layer

    layers = {
        BASE: base,
        OURS: MiSSeConv2d.adopt_(twin(), rank),
        SIGNS: MiSSeConv2d.adopt_(twin(), rank, alternate=True),
        FORM: MiSSConv2d.adopt_(twin(), rank),
    }
    for name in (OURS, SIGNS, FORM):
        nn.init.normal_(layers[name].miss_D, std=0.01)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"])
    lora = peft.get_peft_model(Holder(twin()), config).base_model.model.layer
    a, b = MiSS.factors(layers[FORM].miss_D.detach(), layers[FORM].miss_configs["weight"])
    lora.lora_A["default"].weight.data, lora.lora_B["default"].weight.data = a.clone(), b.clone()
    layers[LORA] = lora
    check(layers, shape)
    return layers


def check(layers: dict[str, nn.Module], shape: Shape) -> None:
    """Every output within rounding of the dense convolution in float64.

    That is eight roundings, and those of the sums.
    """
    x = torch.randn(1, shape.channels, 5, 5)
    rounding = torch.finfo(torch.float32).eps * (8 + 9 * shape.channels)
    weight, bias = layers[BASE].weight.double(), layers[BASE].bias.double()
    for name, layer in layers.items():
        if name == BASE:
            continue
        delta = layers[FORM if name == LORA else name].delta_weight().detach().double()
        exact = F.conv2d(x.double(), weight + delta, bias, padding=1)
        size = F.conv2d(x.double().abs(), weight.abs() + delta.abs(), bias.abs(), padding=1)
        equal = (layer(x).double() - exact).abs() <= rounding * size
        assert equal.all(), f"{name} computes something else at {shape}"


def tensors(shape: Shape) -> tuple[Tensor, Tensor]:
    """An input that takes a gradient, and a gradient of the output."""
    sizes = BATCH, shape.channels, shape.side, shape.side
    return torch.randn(sizes, requires_grad=True), torch.randn(sizes)


def steps(shapes: list[Shape], rounds: int) -> Iterator[dict[str, object]]:
    """Time, transient peak and saved bytes of a step, for each competitor."""
    for shape in shapes:
        results = step_results(competitors(shape), *tensors(shape), rounds)
        yield {"shape": str(shape), "pictures": BATCH, "results": results}


def tables(rows: list[dict]) -> str:
    """The tables of time and of bytes."""
    names = [name for name in rows[0]["results"] if name != BASE]
    kind = "Step of a 3 x 3 convolution over the base's, 1 thread: median (minimum)"
    text = report(kind, rows, names, (LORA,), "pictures")
    return text + "\n" + report_bytes(rows, names, "pictures")


def main() -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="three shapes, five rounds")
    parser.add_argument("--rounds", type=int, default=25, help="at least 2")
    parser.add_argument("--json", type=Path, help="where to write what was measured")
    args = parser.parse_args()
    require_extras("conv_cost", EXTRAS)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shapes, rounds = (QUICK, 5) if args.quick else (SHAPES, args.rounds)
    rows = list(steps(shapes, rounds))
    print(tables(rows))
    result = {"environment": environment(), "rank": RANK, "rounds": rounds, "step": rows}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
