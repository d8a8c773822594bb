"""MiSS, Matrix Shard Sharing (arXiv 2409.15371): adapt any PyTorch model with one trainable matrix per linear layer."""

from miss.adapter import Summary, adapted_modules, adapter_parameters, disabled, summary, verify
from miss.errors import CheckpointError, MissError, ShapeError, StateError, TargetError
from miss.inject import eject, inject
from miss.linear import MiSSeLinear, MiSSLinear

__all__ = [
    "CheckpointError",
    "MiSSLinear",
    "MiSSeLinear",
    "MissError",
    "ShapeError",
    "StateError",
    "Summary",
    "TargetError",
    "adapted_modules",
    "adapter_parameters",
    "disabled",
    "eject",
    "inject",
    "summary",
    "verify",
]
