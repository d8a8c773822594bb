"""What a file holds besides adapters: all else that training changes, or what ``extra`` names."""

from typing import Any

from torch import Tensor, nn

from miss.errors import CheckpointError, at, named
from miss.heads import head_of
from miss.layers import AdaptedLayer, base_parameters, d_names
from miss.matching import Targets
from miss.state import named_tensors
from miss.targets import chosen
from miss.tensors import is_lazy
from miss.trained import KEPT
from miss.tree import Tree, joined

__all__ = ["RUNNING", "extra_tensors", "trained_names"]

RUNNING = ("running_mean", "running_var", "num_batches_tracked")  # the statistics of batch norm


def extra_tensors(tree: Tree, extra: "Targets | None") -> dict[str, Tensor]:
    """The tensors that a file holds besides adapters, by full name; of a merged layer, the base.

    Args:
        tree: an adapted model.
        extra: modules, with all Parameters and persistent buffers inside, and Parameters. None is
            all that training changes besides D: Parameters that require grad, or that `inject` or
            `load` switched on; the buffers of their modules, and of modules in which every
            Parameter is such a one; and running statistics. None is also what a base made afresh
            lacks: the Parameters of an adapted layer that are part of a head, or that
            ``from_pretrained`` made anew.

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
    """What `extra_tensors` gives for None."""
    head = set(map(id, head_of(tree).values()))
    whole = tree.inside(_wholly_trained(tree))
    found: dict[str, Tensor] = {}
    for name, module in tree.of_type(nn.Module).items():
        own = base_parameters(module)
        wanted = {key for key, p in own.items() if _is_trained(module, key, p)}
        buffers = set(RUNNING)
        tensors = named_tensors(name, module)
        if wanted or id(module) in whole:
            buffers.update(module._buffers)
            _check_state(name, module, tensors)
        if isinstance(module, AdaptedLayer):
            wanted |= {key for key, p in own.items() if id(p) in head}
        names = {joined(name, key) for key in wanted | buffers.intersection(module._buffers)}
        for key, tensor in tensors.items():
            if key in names and (is_lazy(tensor) or tensor.numel()):
                found[key] = tensor
    return found


def _wholly_trained(tree: Tree) -> list[nn.Module]:
    """The modules that hold Parameters, of which each is trained."""
    trained: dict[int, bool] = {}
    for _, module, parent in reversed(tree.entries):
        flags = [_is_trained(module, key, p) for key, p in base_parameters(module).items()]
        if id(module) in trained:
            flags.append(trained[id(module)])
        if flags:
            trained[id(module)] = all(flags)
            if parent >= 0:
                above = id(tree.entries[parent].module)
                trained[above] = trained.get(above, True) and all(flags)
    return [module for module in tree.unique if trained.get(id(module), False)]


def _is_trained(module: nn.Module, key: str, parameter: nn.Parameter) -> bool:
    """Whether a Parameter requires grad, or is to be saved as if it did."""
    return parameter.requires_grad or key in module.__dict__.get(KEPT, ())


def _check_state(name: str, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Raise a `CheckpointError` if a module has state besides Parameters and buffers."""
    state: dict[str, Any] = {}
    module._save_to_state_dict(state, joined(name, ""), False)
    ds = {joined(name, key) for key in d_names(module)}
    if foreign := sorted(set(state) - set(tensors) - ds):
        with at(named(name)):
            rule = f"holds state that is no Parameter or buffer: {foreign[0]}"
            do = "save it yourself, and pass extra=() or the modules to save"
            raise CheckpointError(rule, do=do)
