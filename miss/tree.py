"""`Tree`: a model walked once. Names, first names, adapters, the output head, and what shards it."""

import sys
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from torch import nn

from miss.errors import StateError, TargetError, at, no_adapter
from miss.layers import AdaptedLayer
from miss.tensors import is_dtensor, is_managed

__all__ = ["Entry", "Tree", "joined"]

M = TypeVar("M", bound=nn.Module)

MOST_NAMES = 1000  # of one module; modules that refer to each other have names without end


class Entry(NamedTuple):
    """A module under one of its names; ``parent`` is the place of its parent's entry, -1 for none."""

    name: str
    module: nn.Module
    parent: int


def joined(name: str, key: str) -> str:
    """The name of what the module ``name`` holds under ``key``; the model itself is ``""``."""
    return f"{name}.{key}" if name else key


class Tree:
    """Every module of a model under each of its names, parents first; made once and passed on.

    Names leave out the wrappers of `torch.compile`, data parallelism, FSDP1 and activation
    checkpointing, recognised by type; a wrapper and what it wraps have the same name. A module has
    at most 1,000 names.

    Attributes:
        model: the model that was given.
        root: the module inside the wrappers around it.
        entries: the walk.

    Raises:
        TargetError: ``model`` is no module.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            with at("model"):
                actual = type(model).__name__
                raise TargetError("must be a module", expected="torch.nn.Module", actual=actual)
        self.model = model
        self.entries: list[Entry] = []
        self._wrappers = _wrappers()
        self._walk(model, "", -1, set(), Counter())
        self.root = model
        while (key := self._wrapped(self.root)) is not None:
            self.root = getattr(self.root, key)

    def _walk(
        self, module: nn.Module, name: str, parent: int, above: set[int], visits: Counter[int]
    ) -> None:
        visits[id(module)] += 1
        if visits[id(module)] > MOST_NAMES:
            return
        place = len(self.entries)
        self.entries.append(Entry(name, module, parent))
        wrapped = self._wrapped(module)
        above.add(id(module))
        for key, child in module._modules.items():
            if child is not None and id(child) not in above:
                inner = name if key == wrapped else joined(name, key)
                self._walk(child, inner, place, above, visits)
        above.remove(id(module))

    def _wrapped(self, module: nn.Module) -> str | None:
        """The name under which a transparent wrapper keeps its module; None for any other module."""
        if not isinstance(module, tuple(self._wrappers)):
            return None
        return next(key for kind, key in self._wrappers.items() if isinstance(module, kind))

    @cached_property
    def unique(self) -> list[nn.Module]:
        """Each module once, wrappers included, in the order of the walk."""
        return list({id(entry.module): entry.module for entry in self.entries}.values())

    @cached_property
    def first(self) -> dict[int, str]:
        """The first name of each module, by id."""
        return {id(entry.module): entry.name for entry in reversed(self.entries)}

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """By each name its module; of a wrapper and what it wraps, the latter."""
        return {entry.name: entry.module for entry in self.entries}

    def of_type(self, kind: type[M]) -> dict[str, M]:
        """The modules of a type, each once, by first name; of a wrapper and its module, the module."""
        return {self.first[id(m)]: m for m in self.unique if isinstance(m, kind)}

    @property
    def adapted(self) -> dict[str, AdaptedLayer]:
        """The adapted layers as they are now, by first name."""
        return self.of_type(AdaptedLayer)

    def adapters(self) -> dict[str, AdaptedLayer]:
        """`adapted`; a `StateError` if the model has none."""
        found = self.adapted
        if not found:
            raise no_adapter()
        return found

    @cached_property
    def places(self) -> Counter[int]:
        """In how many places the modules of the model hold each one, by id."""
        held = (child for module in self.unique for child in module._modules.values())
        return Counter(id(child) for child in held)

    @cached_property
    def head(self) -> set[int]:
        """The module that ``model.get_output_embeddings()`` names, by id; empty if there is none."""
        ask = getattr(self.root, "get_output_embeddings", None)
        head = ask() if callable(ask) else None
        return {id(head)} if isinstance(head, nn.Module) else set()

    def inside(self, tops: Iterable[nn.Module]) -> dict[int, nn.Module]:
        """The modules that are one of ``tops`` or lie inside one, by id."""
        wanted, found = {id(top) for top in tops}, {}
        within: list[bool] = []
        for _, module, parent in self.entries:
            within.append(id(module) in wanted or (parent >= 0 and within[parent]))
            if within[-1]:
                found[id(module)] = module
        return found

    def holding(self, inner: Iterable[nn.Module]) -> set[int]:
        """The modules that are one of ``inner`` or hold one, by id."""
        found = {id(module) for module in inner}
        for _, module, parent in reversed(self.entries):
            if parent >= 0 and id(module) in found:
                found.add(id(self.entries[parent].module))
        return found

    @cached_property
    def sharder(self) -> str | None:
        """What shards Parameters of the model: FSDP1, FSDP2 or a parallel plan; None if nothing does."""
        fsdp1 = _loaded("torch.distributed.fsdp.fully_sharded_data_parallel", _FSDP1)
        fsdp2 = _loaded("torch.distributed.fsdp", "FSDPModule")
        for module in self.unique:
            if isinstance(module, fsdp1):
                return "FullyShardedDataParallel"
            if isinstance(module, fsdp2):
                return "fully_shard"
        for module in self.unique:
            if is_managed(module):
                return "FSDP, of which this is a part"
            if any(map(is_dtensor, module._parameters.values())):
                return "a parallel plan (DTensors)"
        return None

    def refuse_sharded(self) -> None:
        """A `StateError` if something shards the model: a write could go to a transient copy."""
        if self.sharder is not None:
            rule = f"the model is sharded by {self.sharder}, and its tensors may be parts or copies"
            do = "do it before the model is sharded; or take the adapters out of a full state dict"
            do += (
                " (torch.distributed.checkpoint.state_dict.get_model_state_dict): keys with miss_D"
            )
            raise StateError(rule, do=do)

    def refuse_wrapped(self) -> None:
        """A `StateError` if DistributedDataParallel or FSDP wraps the model or a part of it.

        They have taken note of the Parameters, and would not see others.
        """
        ddp = any(isinstance(m, nn.parallel.DistributedDataParallel) for m in self.unique)
        sharder = None if self.sharder and "DTensor" in self.sharder else self.sharder
        wrapper = "DistributedDataParallel" if ddp else sharder
        if wrapper is not None:
            rule = f"the model is wrapped by {wrapper}, which knows the Parameters it was given"
            raise StateError(rule, do="inject, load or eject first, then wrap")


_FSDP1 = "FullyShardedDataParallel"


def _loaded(home: str, name: str) -> Any:
    """A type that is costly to import; if its module was never loaded, nothing is an instance."""
    return getattr(sys.modules.get(home), name, ())


def _wrappers() -> dict[type, str]:
    """The transparent wrappers, and the name under which each keeps the module that it wraps."""
    kinds: dict[type, str] = {nn.DataParallel: "module"}
    kinds[nn.parallel.DistributedDataParallel] = "module"
    checkpoint = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"
    for home, name, key in (
        ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
        (checkpoint, "ActivationWrapper", "_checkpoint_wrapped_module"),
        ("torch.distributed.fsdp.fully_sharded_data_parallel", _FSDP1, "_fsdp_wrapped_module"),
    ):
        if kind := _loaded(home, name):
            kinds[kind] = key
    return kinds
