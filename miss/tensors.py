"""What a tensor is: ordinary, a DTensor, writable, tied, held by FSDP. Only this module asks."""

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn

__all__ = ["ADAPTER_DTYPES", "SAMPLES", "Owners", "can_be_trained", "contiguous"]
__all__ += ["has_two_axes", "is_data", "is_dtensor", "is_lazy", "is_managed", "is_ordinary"]
__all__ += ["largest", "numel", "owners", "positions", "quantised", "same", "tied_to", "unwritable"]

ADAPTER_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SAMPLES = 64  # how many values of a tensor `positions` names, unless told

Owners: TypeAlias = dict[tuple[torch.device, int], list[tuple[str, Tensor]]]

_ORDINARY = (Tensor, nn.Parameter)


def is_ordinary(tensor: Any) -> bool:
    """Whether ``tensor`` is a Tensor or a Parameter itself, of no subclass."""
    return type(tensor) in _ORDINARY


def is_dtensor(tensor: Any) -> bool:
    """Whether ``tensor`` is a DTensor.

    Their module is costly to import. If it was never loaded, there is no DTensor.
    """
    return isinstance(tensor, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))


def is_data(tensor: Tensor) -> bool:
    """Whether ``tensor`` is ordinary, dense, not quantised, and has values (not on meta)."""
    ordinary = is_ordinary(tensor) and tensor.layout == torch.strided
    return ordinary and not tensor.is_meta and not tensor.is_quantized


def is_lazy(tensor: Any) -> bool:
    """Whether ``tensor`` has no shape yet."""
    return isinstance(
        tensor, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)
    )


def is_managed(module: nn.Module) -> bool:
    """Whether FSDP manages the Parameters of ``module``, which may then be transient copies.

    FSDP1 and ``fully_shard`` leave this mark for torch's compiler on every module that they manage.
    """
    return bool(module.__dict__.get("_is_fsdp_managed_module", False))


def quantised(tensor: Tensor) -> str | None:
    """The type or dtype of a tensor that holds a quantised weight; None if it does not."""
    kind = type(tensor)
    if kind.__module__.partition(".")[0] in ("bitsandbytes", "torchao"):
        return f"{kind.__name__}, {tensor.dtype}"
    return None if tensor.dtype in ADAPTER_DTYPES else str(tensor.dtype)


def unwritable(tensor: Tensor) -> str | None:
    """Why a tensor cannot be written in place, as the end of a sentence; None if it can."""
    if not is_ordinary(tensor) or tensor.layout != torch.strided:
        kind = f"{type(tensor).__name__} of layout {tensor.layout}"
        return f"is a {kind}, not an ordinary tensor"
    if tensor.is_meta:
        return "is on the meta device and has no data"
    if tensor.is_inference():
        return "was made in torch.inference_mode"
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride())):
        return "has elements that share memory (expand?)"
    return None


def can_be_trained(parameter: Tensor) -> bool:
    """Whether a Parameter can require grad: of a floating dtype, and not made in inference mode."""
    if not (parameter.is_floating_point() or parameter.is_complex()):
        return False
    return parameter.requires_grad or is_lazy(parameter) or not parameter.is_inference()


def has_two_axes(tensor: Tensor | None) -> TypeGuard[Tensor]:
    """Whether ``tensor`` has a shape, of two or more axes."""
    return tensor is not None and not is_lazy(tensor) and tensor.dim() >= 2


def numel(tensor: Tensor) -> int:
    """The number of elements; 0 if the tensor has no shape yet.

    In a 4-bit weight of bitsandbytes, that of the weights that are packed in it.
    """
    packed: Any = getattr(getattr(tensor, "quant_state", None), "shape", None)
    if packed is not None:
        return math.prod(packed)
    return 0 if is_lazy(tensor) else tensor.numel()


def largest(tensor: Tensor) -> float:
    """The largest absolute value; NaN if an element is NaN."""
    low, high = torch.aminmax(tensor)
    return max(-float(low), float(high))


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU.

    A view would be saved with its whole storage, and safetensors refuses shared memory.
    """
    copies = {}
    for name, tensor in tensors.items():
        copies[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return copies


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have equal values; NaN equals NaN."""
    return bool(((a == b) | ((a != a) & (b != b))).all())


def positions(count: int, samples: int = SAMPLES, device: torch.device | str = "cpu") -> Tensor:
    """Flat positions in a tensor of ``count`` elements, spread over its rows and columns.

    They are at most ``samples``, and depend on nothing else. A plain stride would stay in one
    column if it is a multiple of the width. The triangular numbers reach odd columns even when
    every stride is even.

    >>> positions(4096)[:4]
    tensor([  0,  72, 191, 229])
    """
    n = min(samples, count)
    step = max(1, count // max(1, n))
    i = torch.arange(n, device=device)
    return i * count // max(1, n) + (i * (i + 1) // 2 * 7919 + i * 104729) % step


def owners(named: Iterable[tuple[str, Any]]) -> Owners:
    """By storage, each of the ``(name, tensor)`` pairs that is an ordinary tensor with data."""
    found: Owners = {}
    for name, tensor in named:
        if is_ordinary(tensor) and is_data(tensor):
            storage = tensor.device, tensor.untyped_storage().data_ptr()
            found.setdefault(storage, []).append((name, tensor))
    return found


def tied_to(name: str, tensor: Tensor, found: Owners) -> str | None:
    """The name of the first other tensor that shares memory with the tensor ``name``; else None."""
    if not is_data(tensor):
        return None
    for owner, other in found.get((tensor.device, tensor.untyped_storage().data_ptr()), []):
        if owner != name and _overlap(tensor, other):
            return owner
    return None


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage may share an element: whether their memory ranges meet."""
    if not a.numel() or not b.numel():
        return False
    (start_a, end_a), (start_b, end_b) = _range(a), _range(b)
    return start_a < end_b and start_b < end_a


def _range(tensor: Tensor) -> tuple[int, int]:
    first = int(tensor.storage_offset())
    steps = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return first * tensor.itemsize, (first + sum(steps) + 1) * tensor.itemsize
