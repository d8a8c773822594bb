"""MiSS adapters as LoRA adapters, exactly: each form is a LoRA one factor of which is a frozen 0/1 matrix."""

import os

import torch.nn.functional as F
from torch import Tensor, nn

from miss.functional import miss_factors, misse_factors, scaled
from miss.interop import directory as directories
from miss.linear import MiSSeLinear

__all__ = ["save"]


def save(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapters as a LoRA directory that PEFT and vLLM load: ``adapter_config.json``, ``adapter_model.safetensors``.

    MiSSe becomes ``B = D`` and ``A[j, c] = 1 if c mod r == j else 0``, MiSS ``A = D`` and ``B[o, k] = 1`` where output ``o`` lies
    in shard ``k``: no decomposition, no loss. vLLM wants one rank for all modules: where ranks differ, the factors are padded
    with zeros to the largest. ``lora_alpha`` is ``scale * r``; where scales differ it is ``r``, and D is multiplied by its
    scale in fp32 and rounded once. What was trained beside the adapters is not written.

    Args:
        model: an adapted model; not changed.
        directory: made where it is missing; the two files in it are replaced.

    Raises:
        StateError: the model has no adapter, or is itself an adapted layer, for which there is no module path, or an
            adapted layer has two names, of which PEFT would adapt one.
        CheckpointError: a ``miss_D`` is not finite, or the files cannot be written.
        ImportError: safetensors is absent; the extra ``files`` installs it.
    """
    layers = directories.adapted(model)
    rank = max(layer.rank for layer in layers.values())
    scales = {layer.scale for layer in layers.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        d = layer.miss_D.detach()
        d = scaled(d, 1 if layer.scale == scale else layer.scale, d.dtype)
        if isinstance(layer, MiSSeLinear):
            a, b = misse_factors(d, layer.in_features, layer.out_features)
        else:
            a, b = miss_factors(d, layer.out_features)
        key = f"{directories.PREFIX}{name}"
        tensors[f"{key}.lora_A.weight"] = F.pad(a, (0, 0, 0, rank - a.shape[0]))
        tensors[f"{key}.lora_B.weight"] = F.pad(b, (0, rank - b.shape[1]))
    config = directories.base_config(model, layers) | {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    directories.write(directory, config, tensors)
