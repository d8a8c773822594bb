"""Quantised layers of other libraries that cannot be adapted, known by the path of their type."""

import functools

from torch import nn

__all__ = ["quantised_refusal"]

_LOAD = "load the model with transformers' BitsAndBytesConfig or TorchAoConfig instead, whose "
_LOAD += "layers are adapted"
_LATER = "adapt the full-precision model, train it, miss.eject(model, merge=True), then quantise"

# By the first parts of a module's path: the library's name, and what to do.
_LIBRARIES: dict[tuple[str, ...], tuple[str, str]] = {
    ("torch", "ao", "nn", "quantized"): ("torch.ao", _LATER),
    ("torch", "ao", "nn", "intrinsic", "quantized"): ("torch.ao", _LATER),
    ("hqq",): ("HQQ", _LOAD),
    ("gptqmodel",): ("GPTQ", _LOAD),
    ("auto_gptq",): ("GPTQ", _LOAD),
    ("awq",): ("AWQ", _LOAD),
}


def quantised_refusal(module: nn.Module) -> str | None:
    """Why a quantised linear layer cannot be adapted, and what to do; None for all other modules.

    A module is a linear layer here if it has ``in_features``.
    """
    kind = type(module)
    found = _library_of(kind.__module__)
    if found is None or not hasattr(module, "in_features"):
        return None
    library, do = found
    name = f"{kind.__module__}.{kind.__qualname__}"
    return f"is a {name}, a quantised layer of {library}, which has no host: {do}"


@functools.cache
def _library_of(home: str) -> tuple[str, str] | None:
    """The entry of `_LIBRARIES` for a module of Python; asked once for each."""
    path = tuple(home.split("."))
    return next((of for start, of in _LIBRARIES.items() if path[: len(start)] == start), None)
