"""The fingerprint of a base model: some values of each weight, by which a file knows its base.

It has up to 64 values of every floating Parameter of two or more axes, at `miss.tensors.positions`
of the Parameter's shape.
"""

import math
from collections.abc import Container
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from miss.errors import CheckpointError
from miss.state import base_tensors
from miss.tensors import SAMPLES, is_data, positions
from miss.tree import Tree, joined

__all__ = ["KEY", "check", "differing", "taken"]

KEY = ".base"  # of the values in a file; no tensor of a model can have this name

_BYTES = 256  # at most, of the values of one Parameter
_SIGNIFICAND = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}  # bits
_KINDS = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz"]
_KINDS += ["float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"]  # the last one since torch 2.7
_DTYPES: dict[str, torch.dtype] = {k: getattr(torch, k) for k in _KINDS if hasattr(torch, k)}
_NAME_OF = {dtype: name for name, dtype in _DTYPES.items()}


def taken(tree: Tree, held: Container[str]) -> tuple[dict[str, Any], Tensor | None]:
    """Take the fingerprint of a model: up to 64 values of each weight, at most 256 bytes of each.

    Tied Parameters are one, under the first name. While a layer is merged, the kept base is taken.
    Parameters on meta, quantised ones and DTensors are left out.

    Args:
        tree: a model, adapted or not.
        held: the keys that the file holds itself. A Parameter with a name among them is left out.

    Returns:
        The description, which JSON can hold: by name, dtype and shape, ``["float32", 8, 4]``, or
        the first name of the same Parameter. And the bytes of all values in the order of the
        description, uint8, on the CPU, ``(bytes)``; None if no Parameter is taken.
    """
    weights = _weights(tree)
    names: dict[Any, list[str]] = {}  # of each Parameter, the first one first
    for name, tensor in weights.items():
        if is_data(tensor) and tensor.dtype in _NAME_OF and tensor.dim() >= 2 and tensor.numel():
            names.setdefault(_memory(tensor), []).append(name)
    firsts: set[str] = set()  # without the other names of shared modules
    for name, module in tree.of_type(nn.Module).items():
        firsts |= {joined(name, key) for key in module._parameters}
    description: dict[str, Any] = {}
    wanted = []
    for own in names.values():
        if not any(name in held for name in own):
            tensor = weights[own[0]]
            description[own[0]] = [_NAME_OF[tensor.dtype], *tensor.shape]
            description |= dict.fromkeys((name for name in own[1:] if name in firsts), own[0])
            wanted.append((tensor, _samples(tensor.dtype)))
    return description, torch.cat(_gathered(wanted)) if wanted else None


def check(description: Any, values: Tensor | None) -> None:
    """Raise a `CheckpointError` unless a file's fingerprint is one that `taken` could have made.

    Args:
        description: what the file's JSON holds, of any type.
        values: the file's tensor, None if it has none.
    """
    if not isinstance(description, dict):
        rule, actual = "its fingerprint of the base is not an object", type(description).__name__
        raise CheckpointError(rule, actual=actual)
    entries = {name: entry for name, entry in description.items() if not isinstance(entry, str)}
    for name, entry in description.items():
        if isinstance(entry, str):
            if entry not in entries:
                rule = f"its fingerprint of {name!r:.200} is that of a name that it does not list"
                raise CheckpointError(rule, actual=f"{entry!r:.80}")
        else:
            _check_entry(name, entry)
    expected_bytes = sum(map(_size, entries.values()))
    if values is None:
        if description:
            rule = f"its fingerprint of the base has no tensor {KEY!r}"
            raise CheckpointError(rule, expected=f"{expected_bytes} bytes")
        return
    fits = is_data(values) and values.dtype == torch.uint8
    if not fits or values.shape != (expected_bytes,):
        actual = type(values).__name__
        if isinstance(values, Tensor):
            actual = f"{actual} of {tuple(values.shape)}, {values.dtype}"
        rule = f"the tensor {KEY!r} does not fit the fingerprint's description"
        expected = f"Tensor of {(expected_bytes,)}, {torch.uint8}"
        raise CheckpointError(rule, expected=expected, actual=actual)


def differing(tree: Tree, description: dict[str, Any], values: Tensor | None) -> list[str]:
    """The names, in the file's order, of the Parameters that a model does not have as a file does.

    It lacks the name, or has another shape or other values. Values of one dtype are equal bit for
    bit, and NaN equals NaN. Values of two dtypes are equal if they are equal after a cast to the
    one with fewer significand bits. fp16 equals bf16 if both can come from one number. fp8 equals
    only the same fp8. Parameters of the model that are on meta, quantised or DTensors are not
    compared.

    Args:
        tree: a model, adapted or not. While a layer is merged, the kept base is compared.
        description, values: what has passed `check`.
    """
    if values is None:
        return []
    weights = _weights(tree)
    entries = {name: entry for name, entry in description.items() if not isinstance(entry, str)}
    sizes = [_size(entry) for entry in entries.values()]
    pieces = dict(zip(entries, torch.split_with_sizes(values, sizes)))
    apart: set[str] = set()
    compared: dict[str, tuple[Tensor, torch.dtype, Tensor]] = {}
    for name, entry in description.items():
        first = entry if isinstance(entry, str) else name
        kind, *shape = entries[first]
        own = weights.get(name)
        if first != name and own is weights.get(first):
            continue  # tied here too
        if own is None:
            apart.add(name)
        elif not is_data(own) or own.dtype not in _NAME_OF:  # integers are quantised values
            continue
        elif list(own.shape) != shape:
            apart.add(name)
        else:
            compared[name] = own, _DTYPES[kind], pieces[first]
    apart |= _unequal(compared)
    return [name for name in description if name in apart]


def _check_entry(name: object, entry: Any) -> None:
    """Raise a `CheckpointError` unless the entry of a Parameter is a dtype and its sizes."""
    known = isinstance(entry, list) and isinstance(name, str) and len(entry) >= 3
    if not known or not isinstance(entry[0], str) or not all(map(_is_size, entry[1:])):
        rule = f"its fingerprint of {name!r:.200} is not a dtype and two or more sizes"
        raise CheckpointError(rule, expected="like ['float32', 8, 4]", actual=f"{entry!r:.80}")
    if entry[0] not in _DTYPES:
        rule = f"its fingerprint of {name!r:.200} has a dtype that is unknown here"
        expected, actual = f"one of {', '.join(_DTYPES)}", f"{entry[0]!r:.80}"
        raise CheckpointError(rule, expected=expected, actual=actual)


def _unequal(compared: dict[str, tuple[Tensor, torch.dtype, Tensor]]) -> set[str]:
    """The names of the Parameters whose values are not those of a file.

    All that have the same two dtypes are compared at once.

    Args:
        compared: by name, the Parameter, and the dtype and the bytes of its values in the file.
    """
    wanted = [(own, _samples(theirs)) for own, theirs, _ in compared.values()]
    groups: dict[tuple[torch.dtype, torch.dtype], list[tuple[str, Tensor, Tensor]]] = {}
    for (name, (own, theirs, read)), ours in zip(compared.items(), _gathered(wanted)):
        groups.setdefault((own.dtype, theirs), []).append((name, ours, read))
    found: set[str] = set()
    for (dtype, theirs), group in groups.items():
        our_values = torch.cat([ours for _, ours, _ in group]).view(dtype)
        their_values = torch.cat([read for _, _, read in group]).view(theirs)
        counts = [read.numel() // theirs.itemsize for _, _, read in group]
        ends = torch.tensor(list(accumulate(counts)), device="cpu")
        wrong = (~_equal(our_values, their_values)).nonzero()
        places = torch.searchsorted(ends, wrong, right=True).flatten().tolist()
        found.update(group[place][0] for place in set(places))
    return found


def _weights(tree: Tree) -> dict[str, Tensor]:
    """The `base_tensors` of a model, by each of their names."""
    found: dict[str, Tensor] = {}
    for name, module, _ in tree.entries:
        found |= base_tensors(name, module)
    return found


def _memory(tensor: Tensor) -> Any:
    """What two tensors have in common only if they are the same elements."""
    place = tensor.device, tensor.data_ptr()
    return *place, tensor.dtype, tensor.shape, tensor.stride()


def _samples(dtype: torch.dtype) -> int:
    return min(SAMPLES, _BYTES // dtype.itemsize)


def _size(entry: list[Any]) -> int:
    """How many bytes the values of an entry of a description take."""
    dtype = _DTYPES[entry[0]]
    count: int = math.prod(entry[1:])
    return min(_samples(dtype), count) * dtype.itemsize


def _is_size(size: object) -> bool:
    return type(size) is int and 0 < size < 2**63


def _gathered(wanted: list[tuple[Tensor, int]]) -> list[Tensor]:
    """Of each tensor, the bytes of as many values as the number says, on the CPU.

    Each device is waited for once.
    """
    indices: dict[Any, tuple[Tensor, ...]] = {}
    parts: dict[torch.device, list[Tensor]] = {}
    for tensor, samples in wanted:
        key = tensor.device, tensor.shape, samples
        if key not in indices:
            indices[key] = _index(tensor.shape, samples, tensor.device)
        values = tensor.detach()[indices[key]]
        parts.setdefault(tensor.device, []).append(values.view(torch.uint8))
    moved = {}
    for device, own in parts.items():
        sizes = [part.numel() for part in own]
        moved[device] = iter(torch.split_with_sizes(torch.cat(own).cpu(), sizes))
    return [next(moved[tensor.device]) for tensor, _ in wanted]


def _index(shape: torch.Size, samples: int, device: torch.device) -> tuple[Tensor, ...]:
    """`positions` as one index for each axis; `torch.unravel_index` would wait for the device."""
    rest, index = positions(shape.numel(), samples, device), []
    for size in reversed(shape):
        index.append(rest % size)
        rest = rest // size
    return tuple(reversed(index))


def _equal(a: Tensor, b: Tensor) -> Tensor:
    """Which elements of two tensors of one shape come from one base."""
    if {a.dtype, b.dtype} == {torch.float16, torch.bfloat16}:
        return _of_one_number(a, b) if a.dtype == torch.float16 else _of_one_number(b, a)
    if a.dtype != b.dtype:
        if not {a.dtype, b.dtype} <= _SIGNIFICAND.keys():
            return torch.zeros_like(a, dtype=torch.bool)
        narrow = min(a.dtype, b.dtype, key=lambda dtype: _SIGNIFICAND[dtype])
        a, b = a.to(narrow), b.to(narrow)
    if a.itemsize == 1:
        a, b = a.float(), b.float()  # exact, and has isnan
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    return (a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())


def _of_one_number(half: Tensor, brain: Tensor) -> Tensor:
    """Which elements in fp16 and in bf16 may be two roundings of one number.

    Rounding to bf16 moves a number by at most ``2^-8`` of it, to fp16 by ``2^-11`` or, if it is
    subnormal, ``2^-25``. What fp16 cannot hold is inf there and may be finite in bf16.
    """
    a, b = half.double(), brain.double()
    near = (a - b).abs() <= 1.125 * 2**-8 * torch.maximum(a.abs(), b.abs()) + 2**-24
    near &= a.isfinite() & b.isfinite()
    return near | (brain.to(torch.float16) == half) | (a.isnan() & b.isnan())
