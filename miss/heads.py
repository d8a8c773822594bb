"""Heads of models of transformers, and Parameters that their ``from_pretrained`` initialised."""

import re
from collections.abc import Collection, Container
from typing import Any

from torch import nn

from miss.layers import base_parameters
from miss.tensors import is_data
from miss.tree import Tree, joined

__all__ = ["head_of", "made_anew"]

_TASK = re.compile(
    r".*For.*(Classification|QuestionAnswering|MultipleChoice|XVector)(Simple|WithTeacher)?"
)
_NAMES = {"classifier", "score", "qa_outputs", "classification_head", "head", "projector", "fc"}
_LOADED = "_is_hf_initialized"  # transformers' mark


def head_of(tree: Tree, holding: Container[int] | None = None) -> dict[str, nn.Parameter]:
    """The Parameters of every head in the model, by first name.

    A head exists only in a model of transformers of which a class, its own or an inherited one, is
    named ``...For...Classification``, ``...QuestionAnswering``, ``...MultipleChoice`` or
    ``...XVector``; ``Simple`` or ``WithTeacher`` may follow. The head is every module and direct
    Parameter outside ``base_model``. Where ``base_model`` is the model itself, the head is its
    children named ``classifier``, ``score``, ``qa_outputs``, ``classification_head``, ``head``,
    ``projector`` or ``fc``.

    A Parameter that the body holds too is not part of the head, nor is the D of an adapted layer.
    Such a model can stand anywhere in the tree. With ``holding``, only models with these ids count.
    """
    found: set[int] = set()
    for model in tree.pretrained.values():
        counts = holding is None or id(model) in holding
        if counts and any(_TASK.fullmatch(kind.__name__) for kind in type(model).__mro__):
            found |= _head(tree, model)
    return _named(tree, found)


def made_anew(tree: Tree) -> dict[str, nn.Parameter]:
    """The Parameters that transformers' ``from_pretrained`` initialised itself, by first name.

    It does so where the checkpoint lacks a Parameter or has it in another shape. transformers 5
    marks every Parameter that it read from the checkpoint or tied, and every module that it
    initialised. A Parameter counts as made anew if it is ordinary and floating-point, has no mark,
    and lies in a marked module of a model in which another Parameter has the mark. Those that the
    class declares as possibly missing (``_keys_to_ignore_on_load_missing``, such as tables of
    sinusoids) and the D of an adapted layer are left out.

    Marks survive ``to``, ``half``, pickling, ``load_state_dict`` and `miss.inject`. Where every
    mark is lost or was never set, nothing counts as made anew: after ``deepcopy`` of the model,
    after ``load_state_dict(assign=True)``, and in a model built from a config.
    A module that was added later has no mark, so its Parameters do not count.

    These count although the checkpoint had their values: an untied output head after
    ``resize_token_embeddings``, a deep copy of a single layer, and a Parameter assigned to a loaded
    module by hand. The last cannot be told apart from one that was made anew.
    """
    wanted: set[int] = set()
    seen: set[int] = set()
    for name, model in tree.pretrained.items():  # outermost first: it declares for inner ones
        if id(model) in seen:
            continue
        inside = tree.inside([model])
        seen |= inside.keys()
        if any(map(_holds_loaded, inside.values())):
            lacking = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
            for module in inside.values():
                if vars(module).get(_LOADED):
                    prefix = joined(tree.first[id(module)], "").removeprefix(joined(name, ""))
                    wanted |= _unmarked(module, prefix, lacking)
    return _named(tree, wanted)


def _head(tree: Tree, model: nn.Module) -> set[int]:
    """The ids of the Parameters of the head of one model."""
    inside = tree.inside([model])
    base: Any = getattr(model, "base_model", model)
    if base is not model and id(base) in inside:
        body = set(tree.inside([base]))
    else:
        tops = [
            child for key, child in model._modules.items() if child is not None and key in _NAMES
        ]
        body = inside.keys() - tree.inside(tops).keys()
    in_body: set[int] = set()
    outside: set[int] = set()
    for key, module in inside.items():
        found = in_body if key in body else outside
        found.update(map(id, base_parameters(module).values()))
    return outside - in_body


def _holds_loaded(module: nn.Module) -> bool:
    """Whether a direct Parameter of a module has the mark."""
    return any(getattr(p, _LOADED, False) for p in base_parameters(module).values())


def _unmarked(module: nn.Module, prefix: str, lacking: Collection[str]) -> set[int]:
    """The ids of a module's Parameters without the mark; ``prefix`` precedes their names."""
    found = set()
    for key, parameter in base_parameters(module).items():
        plain = is_data(parameter) and parameter.is_floating_point()  # on meta: offloaded
        if not plain or getattr(parameter, _LOADED, False):
            continue
        if not any(re.search(pattern, prefix + key) for pattern in lacking):
            found.add(id(parameter))
    return found


def _named(tree: Tree, wanted: set[int]) -> dict[str, nn.Parameter]:
    """The Parameters with these ids, each once, by first name."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, module, _ in tree.entries if wanted else ():
        for key, parameter in base_parameters(module).items():
            if id(parameter) in wanted:
                found.setdefault(id(parameter), (joined(name, key), parameter))
    return dict(found.values())
