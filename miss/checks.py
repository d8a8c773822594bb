"""Checks of numbers and dtypes that are given as arguments."""

import math
import sys
from numbers import Integral, Real
from typing import Any

import torch

from miss.errors import ShapeError
from miss.tensors import ADAPTER_DTYPES

__all__ = ["check_adapter_dtype", "is_int", "is_real"]


def check_adapter_dtype(dtype: torch.dtype | None) -> None:
    """Raise a `ShapeError` unless ``dtype`` is None or one that D can be trained in."""
    if dtype is not None and dtype not in ADAPTER_DTYPES:
        expected = ", ".join(map(str, (None, *ADAPTER_DTYPES)))
        actual = f"adapter_dtype={dtype!r}"
        raise ShapeError("adapter_dtype must be trainable", expected=expected, actual=actual)


def is_real(value: Any) -> bool:
    """Whether ``value`` is a finite number, and no bool."""
    if type(value) is float:
        return math.isfinite(value)
    real = isinstance(value, Real) and not isinstance(value, bool)
    return real and bool(abs(value) <= sys.float_info.max)


def is_int(value: Any) -> bool:
    """Whether ``value`` is a whole number, of any integer type, and no bool."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))
