"""Adapt PyTorch models with MiSS, Matrix Shard Sharing (arXiv 2409.15371).

Each adapted weight has one trainable matrix, D.
"""

from miss import interop
from miss.adapters import adapted_modules, adapter_parameters, disabled
from miss.checkpoint import load, save
from miss.errors import CheckpointError, MissError, ShapeError, StateError, TargetError
from miss.inject import eject, inject
from miss.layers import AdaptedLayer, Host, register
from miss.layers.conv import (
    MiSSConv1d,
    MiSSConv2d,
    MiSSConv3d,
    MiSSeConv1d,
    MiSSeConv2d,
    MiSSeConv3d,
)
from miss.layers.embedding import MiSSeEmbedding, MiSSEmbedding
from miss.layers.linear import MiSSeLinear, MiSSLinear
from miss.merging import merge, unmerge
from miss.state_dicts import adapter_state_dict, combine, load_adapter_state_dict
from miss.summary import Summary, summary
from miss.verify import verify

__all__ = [
    "AdaptedLayer",
    "CheckpointError",
    "Host",
    "MiSSConv1d",
    "MiSSConv2d",
    "MiSSConv3d",
    "MiSSEmbedding",
    "MiSSLinear",
    "MiSSeConv1d",
    "MiSSeConv2d",
    "MiSSeConv3d",
    "MiSSeEmbedding",
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
    "register",
    "save",
    "summary",
    "unmerge",
    "verify",
]
