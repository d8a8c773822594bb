"""MiSS adapters as LoRA adapters, exactly: one factor of each is a frozen matrix of 0, 1 and -1."""

import math
import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from miss import files
from miss.errors import StateError, at, some
from miss.extra import extra_tensors
from miss.functional import scaled
from miss.interop import peft_files
from miss.layers.linear import LinearHost
from miss.matching import Targets
from miss.merging import Place, places
from miss.tree import Tree

__all__ = ["save"]


def save(
    model: nn.Module, directory: str | os.PathLike[str], extra: "Targets | None" = None
) -> None:
    """Write the adapters as a LoRA directory that PEFT and vLLM load.

    The files are ``adapter_config.json`` and ``adapter_model.safetensors``. MiSSe becomes ``B = D``
    and ``A[j, c] = 1 if c mod r == j else 0``, with the signs of the blocks if they alternate. MiSS
    becomes ``A = D`` and ``B[o, k] = 1`` if output ``o`` lies in shard ``k``, else 0. So nothing is
    decomposed and nothing is lost. vLLM needs one rank for all modules, so if ranks differ, the
    factors are padded with zeros to the largest. ``lora_alpha`` is ``scale * r``. If scales differ,
    it is ``r``, and each D is multiplied by its scale in fp32 and rounded once.

    Args:
        model: an adapted model; not changed.
        directory: made if it is missing; the two files in it are replaced.
        extra: what is written besides adapters, as ``modules_to_save``: modules and Parameters as
            in `miss.save`, or ``()`` for nothing. Most readers of LoRA, such as vLLM, refuse
            ``modules_to_save``, so None raises if anything is trained besides adapters.

    Raises:
        StateError: MiSSe adapts a convolution with a kernel of several elements, which has no such
            factors; a convolution has a dilation or a padding mode that PEFT's LoRA ignores; the
            model has no adapter, something shards it, or it is itself an adapted layer, which has
            no module path; an adapted layer has two names, of which PEFT would adapt one, or is of
            a type that PEFT's LoRA does not adapt; something is trained besides adapters, and
            ``extra`` is None.
        CheckpointError: a D is not finite, or the files cannot be written.
        ImportError: safetensors is absent; the extra ``files`` installs it.

    A `UserWarning` names running statistics that are not written.
    """
    with at("save"):
        tree = Tree(model)
        folder = files.as_path(directory)
        adapted = peft_files.adapted(tree, lora=True)
        found = places(adapted)
        _refuse_other_layers(found)
        modules, besides = peft_files.saved_modules(tree, adapted, extra_tensors(tree, extra))
        if extra is None and besides:
            rule = "more than adapters is to be saved, and most readers of LoRA refuse that"
            do = "extra=() leaves it out; extra=[...] writes these modules, for PEFT; miss.save "
            do += "writes all"
            raise StateError(rule, actual=some(sorted(besides)), do=do)
    rank = max(place.config.rank for place in found.values())
    scales = {place.config.scale for place in found.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    tensors: dict[str, Tensor] = {f"{peft_files.PREFIX}{k}": t for k, t in besides.items()}
    for name, place in found.items():
        config = place.config
        d = scaled(place.d, 1 if config.scale == scale else config.scale, place.d.dtype)
        a, b = config.form.factors(d, config)
        names = place.layer.miss_host.lora or ()
        for key, factor, axis in zip(names, (a, b), (0, 1)):
            full = f"{peft_files.PREFIX}{name}.{key}"
            tensors[full] = _padded(factor, axis, rank)
    config_json = peft_files.base_config(tree, found) | {
        "modules_to_save": modules or None,
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "fan_in_fan_out": any(map(_is_transposed, found.values())),
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    with at(folder):
        peft_files.write(folder, config_json, tensors)


def _padded(factor: Tensor, axis: int, rank: int) -> Tensor:
    """A factor with zeros at the end of its ``axis``, up to ``rank``."""
    shape = list(factor.shape)
    shape[axis] = rank - shape[axis]
    return torch.cat([factor, factor.new_zeros(shape)], dim=axis)


def _refuse_other_layers(found: Mapping[str, Place]) -> None:
    for name, place in found.items():
        if (reason := place.layer.miss_host.lora_refusal(place.layer)) is not None:
            with at(name):
                raise StateError(reason, do="miss.save")
        if place.config.form.axis == 1 and math.prod(place.config.shape[2:]) > 1:
            with at(name):
                rule = "MiSSe sums inputs before the kernel, which no LoRA of a convolution does"
                actual = f"a kernel of {tuple(place.config.shape[2:])}"
                raise StateError(rule, expected="1 x 1, or MiSS", actual=actual, do="miss.save")


def _is_transposed(place: Place) -> bool:
    """Whether a linear layer keeps its weight as (in, out), which PEFT calls fan_in_fan_out."""
    return place.config.axes == (1, 0) and place.layer.miss_host.lora == LinearHost.lora
