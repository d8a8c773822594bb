"""MiSS, Matrix Shard Sharing (arXiv 2409.15371): adapt any PyTorch model with one trainable matrix per linear layer."""

from miss import interop
from miss.adapter import Summary, adapted_modules, adapter_parameters, disabled, summary, verify
from miss.checkpoint import adapter_state_dict, combine, load, load_adapter_state_dict, save
from miss.errors import CheckpointError, MissError, ShapeError, StateError, TargetError
from miss.inject import eject, inject
from miss.linear import MiSSeLinear, MiSSLinear
from miss.merging import merge, unmerge

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
    "adapter_state_dict",
    "combine",
    "disabled",
    "eject",
    "inject",
    "interop",
    "load",
    "load_adapter_state_dict",
    "merge",
    "save",
    "summary",
    "unmerge",
    "verify",
]
