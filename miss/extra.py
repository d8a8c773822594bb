"""What a file holds besides adapters: all else that training changes, or what ``extra`` names."""

from typing import Any

from torch import Tensor, nn

from miss.errors import CheckpointError, at, named
from miss.heads import head_of, made_anew
from miss.layers import AdaptedLayer
from miss.layers.host import d_name
from miss.matching import Targets
from miss.state import named_tensors
from miss.targets import chosen
from miss.tree import Tree, joined

__all__ = ["RUNNING", "extra_tensors", "trained_names"]

RUNNING = ("running_mean", "running_var", "num_batches_tracked")  # the statistics of batch norm


def extra_tensors(tree: Tree, extra: "Targets | None") -> dict[str, Tensor]:
    """The tensors that a file holds besides adapters, by full name; a merged layer's base.

    Args:
        tree: an adapted model.
        extra: modules, with all Parameters and persistent buffers inside, and Parameters. None is
            all that training changes besides D: Parameters that require grad, the buffers of their
            modules, and running statistics; and the Parameters of an adapted layer that a base made
            afresh has not: those of a head, and those that ``from_pretrained`` made anew.

    Raises:
        TargetError: an ``extra`` matches nothing.
        CheckpointError: a module holds state that is no Parameter or buffer.
    """
    if extra is None:
        return _changed(tree)
    found: dict[str, Tensor] = {}
    wanted = chosen(tree, extra, "extra")
    for name, module in tree.of_type(nn.Module).items():
        tensors = named_tensors(name, module)
        if name in wanted.modules:
            _check_state(name, module, tensors)
            found |= tensors
        else:
            found |= {key: tensor for key, tensor in tensors.items() if key in wanted.parameters}
    return found


def trained_names(tree: Tree, tensors: dict[str, Tensor]) -> list[str]:
    """Those of ``tensors``, by full name, whose Parameters require grad, sorted."""
    found = []
    for name, module in tree.of_type(nn.Module).items():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and joined(name, key) in tensors:
                found.append(joined(name, key))
    return sorted(found)


def _changed(tree: Tree) -> dict[str, Tensor]:
    afresh = set(map(id, (head_of(tree) | made_anew(tree)).values()))
    found: dict[str, Tensor] = {}
    for name, module in tree.of_type(nn.Module).items():
        adapted = isinstance(module, AdaptedLayer)
        configs = module.miss_configs if isinstance(module, AdaptedLayer) else ()
        ds = set(map(d_name, configs))
        wanted = set()
        trained = False
        for key, parameter in module._parameters.items():
            if parameter is not None and key not in ds:
                trained |= parameter.requires_grad
                if parameter.requires_grad or (adapted and id(parameter) in afresh):
                    wanted.add(key)
        wanted |= set(module._buffers if trained else RUNNING) & set(module._buffers)
        if wanted:
            tensors = named_tensors(name, module)
            if trained:
                _check_state(name, module, tensors)
            full = {joined(name, key) for key in wanted}
            found |= {key: tensor for key, tensor in tensors.items() if key in full}
    return found


def _check_state(name: str, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Raise a `CheckpointError` if a module has state besides Parameters and buffers."""
    state: dict[str, Any] = {}
    module._save_to_state_dict(state, joined(name, ""), False)
    ds = {joined(name, d_name(parameter)) for parameter in getattr(module, "miss_configs", ())}
    if foreign := sorted(set(state) - set(tensors) - ds):
        with at(named(name)):
            rule = f"holds state that is no Parameter or buffer: {foreign[0]}"
            do = "save it yourself, and pass extra=() or the modules to save"
            raise CheckpointError(rule, do=do)
