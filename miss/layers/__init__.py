"""Which layers can be adapted: the registry of layer types."""

import functools
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from miss.errors import StateError, TargetError, at
from miss.forms import METHODS
from miss.layers import conv
from miss.layers.base import AdaptedLayer
from miss.layers.bitsandbytes import Linear4bitHost, Linear8bitHost
from miss.layers.embedding import EmbeddingHost, ScaledEmbeddingHost, scales_rows
from miss.layers.example import check_example
from miss.layers.forwards import replaced
from miss.layers.host import Host, base_name, d_name
from miss.layers.linear import LinearHost
from miss.layers.made import class_of, path_of
from miss.layers.quantised import quantised_refusal
from miss.layers.transformers import Conv1DHost
from miss.tensors import is_dtensor

__all__ = ["AdaptedLayer", "Host", "class_of", "host_named", "host_of", "looks_linear", "path_of"]
__all__ += [
    "base_parameters",
    "d_names",
    "file_path",
    "looks_known",
    "parameters_of",
    "refusal",
    "register",
]

# The registry: the host of each layer type.
_HOSTS: dict[type[nn.Module], type[Host]] = {nn.Linear: LinearHost, nn.Embedding: EmbeddingHost}
_HOSTS |= conv.HOSTS
# Types of other libraries, by module and name; timm's layer casts its weight, under torch.jit.
_HOSTS_BY_NAME: dict[tuple[str, str], type[Host]] = {
    ("timm.layers.linear", "Linear"): LinearHost,
    ("transformers.pytorch_utils", "Conv1D"): Conv1DHost,
    ("bitsandbytes.nn.modules", "Linear4bit"): Linear4bitHost,
    ("bitsandbytes.nn.modules", "LinearFP4"): Linear4bitHost,
    ("bitsandbytes.nn.modules", "LinearNF4"): Linear4bitHost,
    ("bitsandbytes.nn.modules", "Linear8bitLt"): Linear8bitHost,
}
# What an adapted layer must find free.
_NAMES = {name for name in dir(AdaptedLayer) if name.startswith(("miss_", "_miss_"))}


def register(
    layer_type: type[nn.Module], host: type[Host], example: tuple[nn.Module, Any] | None = None
) -> None:
    """Make a layer type of your own adaptable, so that `inject` adapts it if a target matches.

    Args:
        layer_type: the exact type; its subclasses are not adapted by it.
        host: a subclass of `Host` that says what the type computes.
        example: a layer and its input (or a tuple of arguments). Copies of the layer are checked
            in both forms: a zero D must leave the output as it is, bit for bit, and the adapted
            layer must compute what the plain one computes with the delta in its weights.

    Raises:
        TargetError: ``layer_type`` is not a module type, or ``host`` not a complete `Host`.
        StateError: the type is registered already, or cannot be subclassed; type or host cannot be
            imported by name, which a pickle of the layer needs; or the example does not hold.

    ``docs/how-to/own-layer-type.md`` shows a host and its test.
    """
    with at("register"):
        _check_types(layer_type, host)
        if example is not None:
            with at(f"register, example of {layer_type.__name__}"):
                for form in METHODS.values():
                    check_example(layer_type, class_of(layer_type, host, form), example)
    _HOSTS[layer_type] = host


def host_of(module: nn.Module) -> type[Host] | None:
    """The host of a module's exact type; None if it has none.

    Subclasses of `nn.Linear` that inherit its ``forward`` have the host of `nn.Linear`.
    """
    if isinstance(module, AdaptedLayer):
        return module.miss_host
    kind: Any = type(module)
    host = _HOSTS.get(kind) or _HOSTS_BY_NAME.get((kind.__module__, kind.__qualname__))
    if host is None and issubclass(kind, nn.Linear) and kind.forward is nn.Linear.forward:
        return LinearHost
    if host is None and scales_rows(module):
        return ScaledEmbeddingHost
    return host


def host_named(path: str) -> type[Host] | None:
    """The registered host that files have under this path; None if there is none."""
    known = (*_HOSTS.values(), *_HOSTS_BY_NAME.values(), ScaledEmbeddingHost)
    return next((host for host in known if file_path(host) == path), None)


def file_path(host: type[Host]) -> str:
    """What files call a host: its import path, or that of the host that it stands for."""
    return path_of(host.stands_for or host)


def parameters_of(module: nn.Module) -> list[str]:
    """The Parameters of a module that its host adapts, each once, under its first name."""
    host, seen, names = host_of(module), set(), []
    for name in host.axes if host is not None else ():
        parameter = module._parameters.get(name)
        if isinstance(parameter, Tensor) and id(parameter) not in seen:
            seen.add(id(parameter))
            names.append(name)
    return names


def d_names(module: nn.Module) -> set[str]:
    """The names that the D's of a module have in it; empty unless it is adapted."""
    return set(map(d_name, module.miss_configs)) if isinstance(module, AdaptedLayer) else set()


def base_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The direct Parameters of a module by their names in it, without D's."""
    ds = d_names(module)
    return {k: p for k, p in module._parameters.items() if p is not None and k not in ds}


def looks_linear(module: nn.Module) -> bool:
    """Whether a user would call ``module`` a linear layer.

    That is an `nn.Linear`, of any subclass, the `Conv1D` of transformers, or a quantised layer of
    another library.
    """
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ())
    return isinstance(module, (nn.Linear, conv1d)) or quantised_refusal(module) is not None


def looks_known(module: nn.Module) -> bool:
    """Whether a user may expect that ``module`` is adapted, though it may have no host."""
    return looks_linear(module) or isinstance(module, conv.CONVOLUTIONS)


def refusal(module: nn.Module) -> str | None:
    """Why a module cannot be adapted, and what to do; None if it can, or is adapted already."""
    if isinstance(module, AdaptedLayer):
        return None
    host, kind = host_of(module), path_of(type(module))
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return f"is a {kind}, which has no shape yet: run the model once, then inject"
    if nn.utils.parametrize.is_parametrized(module):
        do = "call torch.nn.utils.parametrize.remove_parametrizations first"
        return f"is parametrized ({kind}): {do}"
    if host is None and (why := quantised_refusal(module)) is not None:
        return why
    if host is None:
        with_own = " with a forward of its own" if isinstance(module, nn.Linear) else ""
        rule = f"is a {kind}{with_own}, and may compute something else than a known layer"
        return f"{rule}: see miss.register, for {kind}"
    parameters = parameters_of(module)
    if not parameters:
        missing = " or ".join(map(repr, host.axes))
        why = "weight_norm, spectral_norm, pruning?"
        return f"has no parameter {missing} of its own ({why}): remove what replaced it"
    if (found := replaced(module)) is not None:
        do = f"remove it ({found[1]}), inject, then set it again"
        return f"has {found[0]}, which would bypass the adapter: {do}"
    if any(is_dtensor(module._parameters[parameter]) for parameter in parameters):
        return "has a DTensor weight: inject first, then parallelize"
    ours = _NAMES.union(*((d_name(p), base_name(p)) for p in parameters))
    layer_type: Any = type(module)
    own = set(_names_of_class(layer_type, frozenset(ours)))
    for names in (module.__dict__, module._parameters, module._buffers, module._modules):
        own |= ours.intersection(names)
    if own:
        why = "which the adapter needs: rename them"
        return f"has attributes of its own named {sorted(own)}, {why}"
    return host.refusal(module)


@functools.cache
def _names_of_class(layer_type: type[nn.Module], ours: frozenset[str]) -> frozenset[str]:
    """Which of our names a type has as class attributes; asked once for each type."""
    return frozenset(name for name in ours if hasattr(layer_type, name))


def _check_types(layer_type: Any, host: Any) -> None:
    if not (isinstance(layer_type, type) and issubclass(layer_type, nn.Module)):
        do = f"give the type itself: {type(layer_type).__name__}"
        raise TargetError("needs a module type", actual=repr(layer_type), do=do)
    if issubclass(layer_type, AdaptedLayer):
        raise TargetError("an adapted class is no type to adapt", actual=path_of(layer_type))
    if not (isinstance(host, type) and issubclass(host, Host)) or host is Host:
        raise TargetError("needs a subclass of miss.Host", actual=repr(host))
    if host.product is Host.product:
        raise TargetError(f"{path_of(host)} defines no product(layer, x, d, parameter)")
    if (
        not isinstance(host.axes, Mapping)
        or not host.axes
        or not all(map(_are_axes, host.axes.values()))
    ):
        expected = '{"weight": (0, 1)}: for each Parameter its axes "out" and "in", from 0'
        raise TargetError(f"{path_of(host)}.axes", expected=expected, actual=repr(host.axes))
    if layer_type in _HOSTS:
        actual = path_of(_HOSTS[layer_type])
        rule, do = f"{path_of(layer_type)} is registered already", "miss.inject adapts it as it is"
        raise StateError(rule, actual=actual, do=do)
    for kind in (layer_type, host):
        if _imported(path_of(kind)) is not kind:
            rule = f"{path_of(kind)} cannot be imported by its name, as a pickle of the layer needs"
            raise StateError(rule, do="define it at the top level of a module")
    for form in METHODS.values():
        try:
            class_of(layer_type, host, form)
        except TypeError as error:
            rule = f"{path_of(layer_type)} cannot be subclassed, as adapting it needs"
            raise StateError(rule, actual=str(error)) from error


def _are_axes(axes: Any) -> bool:
    pair = isinstance(axes, tuple) and len(axes) == 2 and axes[0] != axes[1]
    return pair and all(type(axis) is int and axis >= 0 for axis in axes)


def _imported(path: str) -> Any:
    """What a loaded module holds at an import path; None if there is nothing."""
    home, _, name = path.rpartition(".")
    while home and home not in sys.modules:
        home, _, outer = home.rpartition(".")
        name = f"{outer}.{name}"
    found: Any = sys.modules.get(home)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found
