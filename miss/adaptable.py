"""What can be adapted, and within which settings."""

import sys
from collections.abc import Set
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from miss import functional
from miss.errors import ShapeError, explain

__all__ = ["ADAPTER_DTYPES", "check_settings", "is_real", "looks_linear", "refusal", "unwritable"]

ADAPTER_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_settings(
    name: str, *, scale: float, dropout: float, adapter_dtype: torch.dtype | None
) -> tuple[float, float]:
    """``scale`` and ``dropout`` as floats, or a `ShapeError` that names the argument and its rule."""
    if not is_real(scale):
        raise ShapeError(
            explain(
                name,
                "scale must be a number",
                expected="a finite number",
                actual=f"scale={scale!r}",
            )
        )
    if not is_real(dropout) or not 0 <= dropout < 1:
        rule = "dropout must be a probability"
        raise ShapeError(
            explain(name, rule, expected="0 <= dropout < 1", actual=f"dropout={dropout!r}")
        )
    if adapter_dtype is not None and adapter_dtype not in ADAPTER_DTYPES:
        rule, expected = (
            "adapter_dtype must be trainable",
            ", ".join(map(str, (None, *ADAPTER_DTYPES))),
        )
        raise ShapeError(
            explain(name, rule, expected=expected, actual=f"adapter_dtype={adapter_dtype!r}")
        )
    return float(scale), float(dropout)


def is_real(value: Any) -> bool:
    """Whether ``value`` is a finite number, and no bool."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    return real and bool(abs(value) <= sys.float_info.max)


def looks_linear(module: nn.Module) -> bool:
    """Whether a user would call ``module`` a linear layer: an `nn.Linear` of any subclass, or the `Conv1D` of transformers."""
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ())
    return isinstance(module, (nn.Linear, conv1d))


def refusal(module: nn.Module, names: Set[str]) -> str | None:
    """Why a module that `looks_linear` cannot be adapted, and what to do; None if it can.

    ``names`` are the attributes that an adapted layer has beyond `nn.Linear`: the module must have none of them. A layer that
    is adapted already is for the caller to tell.
    """
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if type(module) is not nn.Linear:
        if isinstance(module, nn.modules.lazy.LazyModuleMixin):
            return f"is a {kind}, which has no shape yet: run the model once, then inject"
        if nn.utils.parametrize.is_parametrized(module):
            return f"is parametrized ({kind}): call torch.nn.utils.parametrize.remove_parametrizations first"
        return f"is a {kind}; only torch.nn.Linear itself is adapted, as another type may compute something else"
    if not isinstance(module._parameters.get("weight"), Tensor):
        return "has no parameter 'weight' of its own (weight_norm, spectral_norm, pruning?): remove what replaced it"
    if "forward" in module.__dict__:
        return "has an instance-level forward, which would bypass the adapter (accelerate's hooks?): remove it, then inject"
    if functional.is_dtensor(module.weight):
        return "has a DTensor weight: inject first, then parallelize"
    own = (
        set(module.__dict__) | set(module._parameters) | set(module._buffers) | set(module._modules)
    ) & names
    if own:
        return (
            f"has attributes of its own named {sorted(own)}, which the adapter needs: rename them"
        )
    return None


def unwritable(tensor: Tensor) -> str | None:
    """Why a tensor cannot be written in place, as the end of a sentence; None if it can."""
    if type(tensor) not in (nn.Parameter, Tensor) or tensor.layout != torch.strided:
        return f"is a {type(tensor).__name__} of layout {tensor.layout}, not an ordinary tensor"
    if tensor.is_meta:
        return "is on the meta device and has no data"
    if tensor.is_inference():
        return "was made in torch.inference_mode"
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride())):
        return "has elements that share memory (expand?)"
    return None
