"""What is trained besides adapters: what ``trainable`` names, and the heads of transformers."""

import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from miss.errors import StateError, at, some
from miss.heads import head_of
from miss.matching import Targets
from miss.targets import Chosen, chosen
from miss.tensors import can_be_trained
from miss.tree import Tree, joined

__all__ = ["KEPT", "keep_", "not_in_all_linear", "trainable_of", "unadapted_head"]
__all__ += ["warn_of_frozen", "warn_of_half"]

# Attribute of a module: the names of its Parameters that `miss.save` writes, whatever their flags.
KEPT = "_miss_kept"


def trainable_of(tree: Tree, trainable: Targets) -> Chosen:
    """What ``trainable`` names, after a check that each of its Parameters can be trained.

    Raises:
        TargetError: a target is malformed or matches nothing.
        StateError: a Parameter is not of a floating dtype, or was made in inference mode.
    """
    found = chosen(tree, trainable, "trainable")
    for name, parameter in found.parameters.items():
        if not can_be_trained(parameter):
            with at(name):
                rule = "cannot be trained, as trainable asks: only floating Parameters can"
                mode = ", made in inference mode" if parameter.is_inference() else ""
                do = "leave it out of trainable, or name its layer in targets"
                raise StateError(rule, actual=f"{parameter.dtype}{mode}", do=do)
    return found


def not_in_all_linear(tree: Tree, trained: Chosen) -> set[int]:
    """By id, the modules that ``"all-linear"`` leaves out: heads, and what is ``trained``."""
    head = set(map(id, head_of(tree).values()))
    found = tree.output_head | set(map(id, trained.modules.values()))
    for module in tree.unique:
        if not head.isdisjoint(map(id, module._parameters.values())):
            found.add(id(module))
    return found


def unadapted_head(tree: Tree, layers: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The Parameters of heads, by full name, that can be trained and lie in none of ``layers``.

    A task model that holds none of ``layers``, such as a teacher, is left alone.
    """
    held: set[int] = set()
    for layer in layers:
        held |= set(map(id, layer._parameters.values()))
    found: dict[str, Tensor] = {}
    for name, parameter in head_of(tree, tree.holding(layers)).items():
        if id(parameter) not in held and can_be_trained(parameter):
            found[name] = parameter
    return found


def keep_(tree: Tree, parameters: Iterable[Tensor]) -> None:
    """Note on their modules that `miss.save` writes these Parameters, whatever their flags."""
    wanted = set(map(id, parameters))
    for module in tree.unique if wanted else ():
        names = {key for key, p in module._parameters.items() if id(p) in wanted}
        if names:
            module.__dict__[KEPT] = sorted(names.union(module.__dict__.get(KEPT, ())))


def warn_of_half(trained: Mapping[str, Tensor]) -> None:
    """Warn of Parameters that are to be trained in half precision."""
    half = [name for name, p in trained.items() if p.dtype in (torch.float16, torch.bfloat16)]
    if half:
        text = f"trained in half precision: {some(half)}. GradScaler refuses float16 gradients, "
        text += "and in bfloat16 small updates are rounded away. Convert these modules with "
        text += ".float() and train under autocast, or adapt them: name them in targets"
        warnings.warn(text, UserWarning, stacklevel=3)


def warn_of_frozen(
    tree: Tree,
    anew: Mapping[str, Tensor],
    trained: Iterable[Tensor],
    layers: Iterable[nn.Module],
    freeze: bool,
) -> None:
    """Warn of Parameters that ``from_pretrained`` made anew and that are to stay frozen.

    Args:
        tree: the model.
        anew: what `made_anew` gives.
        trained: the Parameters that are trained.
        layers: the adapted layers, whose base is saved with them.
        freeze: whether every other Parameter is to be frozen.
    """
    kept = set(map(id, trained))
    for layer in layers:
        kept |= set(map(id, layer._parameters.values()))
    frozen = []
    for name, parameter in anew.items():
        if id(parameter) not in kept and (freeze or not parameter.requires_grad):
            frozen.append(name)
    if frozen:
        text = f"from_pretrained did not read {some(frozen)} from the checkpoint. They stay frozen "
        text += f"as they were initialised. trainable={_shortest(tree, frozen)} trains them"
        warnings.warn(text, UserWarning, stacklevel=3)


def _shortest(tree: Tree, names: list[str]) -> list[str]:
    """Targets that match these Parameters and no others: a module stands for all that it holds."""
    left, found = set(names), []
    for name, module in tree.of_type(nn.Module).items():
        held = {joined(name, key) for key, _ in module.named_parameters()}
        if name and held and held <= left:
            found.append(name)
            left -= held
    return found + sorted(left)
