"""Checkpoints of the Trainer of Hugging Face transformers that hold the adapters, not the base.

Nothing is imported from transformers: the mixin stands in front of a Trainer of yours.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from miss.checkpoint import load, save
from miss.errors import CheckpointError, StateError, at
from miss.tree import Tree

__all__ = ["AdapterCheckpoints"]

FILE = "adapter.safetensors"
MARK = "_hf_peft_config_loaded"
SHARDED = {  # what a Trainer says of itself, and its name
    "is_fsdp_enabled": "FSDP",
    "is_fsdp_xla_enabled": "FSDP of XLA",
    "is_deepspeed_enabled": "DeepSpeed",
}


class AdapterCheckpoints:
    """A mixin for ``transformers.Trainer`` and its subclasses: checkpoints without the base.

    Where a checkpoint would hold the whole model, it holds ``adapter.safetensors``, which
    `miss.save` wrote: the adapters and all else that training changes. The tokenizer, the optimizer
    and the rest are as the Trainer writes them. ``save_model`` writes the same file. Resuming and
    ``load_best_model_at_end`` read it with `miss.load`, so a file that does not fit the model is an
    error. Training resumed in this way is the uninterrupted one, bit for bit. What stays frozen as
    ``from_pretrained`` initialised it, which `inject` warns of, is in no checkpoint.

    A Trainer refuses a quantised model that PEFT did not wrap. With this mixin it takes one that is
    adapted here, if its method of quantisation can be trained over. The model and its config stay
    as they are.

    The subclass is yours, with the mixin first: ``class MyTrainer(AdapterCheckpoints, Trainer)``.

    Args:
        *args: the Trainer's own, with a model that is adapted already.
        **kwargs: the same.

    Raises:
        StateError: a subclass has the mixin behind the Trainer; the model has no adapter, or FSDP,
            DeepSpeed or a parallel plan shards it.
        CheckpointError: when a checkpoint is loaded: it has no ``adapter.safetensors``, or that
            does not fit the model. When one is saved: an adapter is not finite.
    """

    model: nn.Module
    args: Any
    data_collator: Any
    processing_class: Any
    state: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
        order = [kind for kind in cls.__mro__ if kind in (AdapterCheckpoints, trainer)]
        if order[0] is not AdapterCheckpoints:
            with at(cls.__name__):
                rule = "the mixin stands behind the Trainer, which would write whole models"
                do = f"class {cls.__name__}(AdapterCheckpoints, Trainer)"
                raise StateError(rule, do=do)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("model", args[0] if args else None)
        with _taken_for_adapted(given) as take:
            self._miss_take = take  # for models that the Trainer asks `model_init` for
            try:
                super().__init__(*args, **kwargs)
            finally:
                del self._miss_take
        with at(type(self).__name__):
            tree = Tree(self.model)
            tree.refuse_sharded()
            for flag, name in SHARDED.items():
                if getattr(self, flag, False):
                    rule = f"{name} writes checkpoints of its own, which hold the whole model"
                    do = "train on one device or with DistributedDataParallel"
                    raise StateError(rule, do=f"{do}; or use the Trainer without this mixin")
            tree.require_adapted()

    def call_model_init(self, trial: Any = None) -> Any:
        """What the Trainer calls for a model of ``model_init``."""
        trainer: Any = super()
        model = trainer.call_model_init(trial)
        self.__dict__.get("_miss_take", _pass)(model)
        return model

    def _save(self, output_dir: str | None = None, state_dict: object = None) -> None:
        """What the Trainer calls for every checkpoint and in `save_model`."""
        if not self.args.should_save:
            return
        folder = self.args.output_dir if output_dir is None else output_dir
        os.makedirs(folder, exist_ok=True)
        save(self.model, os.path.join(folder, FILE))
        tokenizer = self.processing_class
        if tokenizer is None:
            tokenizer = getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """What the Trainer calls to resume."""
        path = os.path.join(resume_from_checkpoint, FILE)
        if not os.path.isfile(path):
            with at(os.fspath(resume_from_checkpoint)):
                raise _missing(resume_from_checkpoint)
        load(self.model, path)

    def _load_best_model(self) -> None:
        """What the Trainer calls at the end for `load_best_model_at_end`."""
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """What the Trainer calls to upload a checkpoint: it copies files that it knows by name."""
        if self.args.should_save:
            shutil.copy(os.path.join(checkpoint_folder, FILE), self.args.output_dir)
        trainer: Any = super()
        trainer._push_from_checkpoint(checkpoint_folder)


@contextmanager
def _taken_for_adapted(model: Any) -> Iterator[Callable[[Any], None]]:
    """While it lasts, a Trainer that is made takes an adapted quantised model.

    It asks the model for the mark that transformers sets where PEFT has put adapters in. The model
    has the mark during that call alone. Yields what marks another model for as long.
    """
    marked: list[Any] = []

    def take(model: Any) -> None:
        quantised = isinstance(model, nn.Module) and getattr(model, "is_quantized", False)
        trainable = getattr(getattr(model, "hf_quantizer", None), "is_trainable", False)
        if quantised and trainable and MARK not in model.__dict__ and Tree(model).adapted:
            model.__dict__[MARK] = True
            marked.append(model)

    try:
        take(model)
        yield take
    finally:
        for one in marked:
            one.__dict__.pop(MARK, None)


def _pass(model: Any) -> None:
    """Marks nothing."""


def _missing(folder: str) -> CheckpointError:
    actual = "no such directory"
    if os.path.isdir(folder):
        actual = ", ".join(sorted(os.listdir(folder))) or "an empty directory"
    do = "give a checkpoint that a Trainer with this mixin wrote; without the mixin, the Trainer"
    do += " resumes from its own, which hold the whole model"
    return CheckpointError("has no adapters", expected=FILE, actual=actual, do=do)
