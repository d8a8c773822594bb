"""`Tree` walks a model once: its names, first names, adapters, output head, and what shards it."""

import sys
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from miss.errors import StateError, TargetError, at, brief, no_adapter_error
from miss.layers import AdaptedLayer
from miss.tensors import has_two_axes, is_dtensor, is_managed

__all__ = ["Entry", "Tree", "joined"]

M = TypeVar("M", bound=nn.Module)

MOST_NAMES = 1000  # of one module; modules that refer to each other have names without end


class Entry(NamedTuple):
    """A module under one of its names; ``parent`` is the index of its parent's entry, or -1."""

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
        TargetError: ``model`` is not a module.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            with at("model"):
                raise _no_module(model)
        self.model = model
        self.entries: list[Entry] = []
        self._wrappers = _wrappers()
        self._wrapper_types = tuple(self._wrappers)
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
        """The attribute in which a transparent wrapper keeps its module; None for other modules."""
        if not isinstance(module, self._wrapper_types):
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
        """The module of each name; a wrapper's name stands for the module that it wraps."""
        return {entry.name: entry.module for entry in self.entries}

    @cached_property
    def weights(self) -> dict[str, list[tuple[str, nn.Module, Tensor]]]:
        """By own name, the Parameters of two or more axes: full name, module and Parameter."""
        found: dict[str, list[tuple[str, nn.Module, Tensor]]] = {}
        for name, module, _ in self.entries:
            for key, parameter in module._parameters.items():
                if has_two_axes(parameter):
                    full = joined(name, key)
                    found.setdefault(key, []).append((full, module, parameter))
        return found

    def of_type(self, kind: type[M]) -> dict[str, M]:
        """The modules of a type, each once, by first name; in place of a wrapper its module."""
        return {self.first[id(m)]: m for m in self.unique if isinstance(m, kind)}

    @property
    def adapted(self) -> dict[str, AdaptedLayer]:
        """The adapted layers as they are now, by first name."""
        return self.of_type(AdaptedLayer)

    def require_adapted(self) -> dict[str, AdaptedLayer]:
        """`adapted`; a `StateError` if the model has none."""
        found = self.adapted
        if not found:
            raise no_adapter_error()
        return found

    @cached_property
    def times_held(self) -> Counter[int]:
        """By id, in how many places the modules of the model hold each module."""
        found: Counter[int] = Counter()
        for module in self.unique:
            found.update(map(id, module._modules.values()))
        return found

    @cached_property
    def pretrained(self) -> dict[str, nn.Module]:
        """The models of transformers, by first name: modules that are a ``PreTrainedModel``."""
        return self.of_type(_loaded("transformers.modeling_utils", "PreTrainedModel"))

    @cached_property
    def output_head(self) -> set[int]:
        """The modules that ``get_output_embeddings()`` returns, and all inside them, by id.

        The root is asked, and every model of transformers in it. A list or a tuple counts as what
        it holds. Where the method raises NotImplementedError, there is no output head.
        """
        tops: list[nn.Module] = []
        for model in {id(m): m for m in (self.root, *self.pretrained.values())}.values():
            ask = getattr(model, "get_output_embeddings", None)
            try:
                given = ask() if callable(ask) else None
            except NotImplementedError:
                continue
            listed = given if isinstance(given, (list, tuple)) else [given]
            tops += [top for top in listed if isinstance(top, nn.Module)]
        return set(self.inside(tops))

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
    def _fsdp(self) -> str | None:
        """Which FSDP the model, a part of it, or what it is a part of, is under; else None."""
        if (name := self._made_by(_SHARDERS)) is not None:
            return name
        if any(map(is_managed, self.unique)) or _inside_fsdp2(self.unique):
            return "FSDP, of which this is a part"
        return None

    @property
    def sharder(self) -> str | None:
        """What shards Parameters of the model: FSDP1, FSDP2 or a parallel plan; else None."""
        if self._fsdp is not None:
            return self._fsdp
        for module in self.unique:
            if any(map(is_dtensor, module._parameters.values())):
                return "a parallel plan (DTensors)"
        return None

    def _made_by(self, makers: dict[str, tuple[str, str]]) -> str | None:
        """The first of ``makers``, types by name, that a module of the model is an instance of."""
        for name, (home, kind) in makers.items():
            made = _loaded(home, kind)
            if made and any(isinstance(module, made) for module in self.unique):
                return name
        return None

    def refuse_sharded(self) -> None:
        """Raise a `StateError` if the model is sharded: a write could go to a transient copy."""
        if (sharder := self.sharder) is not None:
            rule = f"the model is sharded by {sharder}, and its tensors may be parts or copies"
            full = "torch.distributed.checkpoint.state_dict.get_model_state_dict"
            do = "do it before the model is sharded; or take the adapters out of a full state dict"
            do += f" ({full}): keys with miss_D"
            raise StateError(rule, do=do)

    def refuse_wrapped(self) -> None:
        """Raise a `StateError` if DistributedDataParallel or FSDP wraps the model or a part of it.

        They keep a list of the Parameters, and would not see new ones.
        """
        wrapper = self._made_by(_REPLICAS) or self._fsdp
        if wrapper is not None:
            rule = f"the model is wrapped by {wrapper}, which knows the Parameters it was given"
            raise StateError(rule, do="inject, load or eject first, then wrap")


_FSDP1 = "FullyShardedDataParallel"
_SHARDERS = {
    _FSDP1: ("torch.distributed.fsdp.fully_sharded_data_parallel", _FSDP1),
    "replicate": ("torch.distributed._composable.replicate_with_fsdp", "ReplicateModule"),
    "fully_shard": ("torch.distributed.fsdp", "FSDPModule"),
}
_REPLICAS = {
    "DistributedDataParallel": ("torch.nn.parallel", "DistributedDataParallel"),
    "replicate": ("torch.distributed._composable.replicate", "DDP"),
}


def _no_module(given: Any) -> TargetError:
    """The error of a model that is none."""
    actual, do = brief(given), "give the model itself, as the first argument"
    if isinstance(given, type) and issubclass(given, nn.Module):
        actual, do = f"the class {given.__name__}", f"give an instance: {given.__name__}(...)"
    return TargetError("must be a module", expected="a torch.nn.Module", actual=actual, do=do)


def _loaded(home: str, name: str) -> Any:
    """A type that is costly to import; ``()`` if nothing loaded it, so that it has no instance."""
    return getattr(sys.modules.get(home), name, ())


def _inside_fsdp2(modules: Iterable[nn.Module]) -> bool:
    """Whether a model that ``fully_shard`` or ``replicate`` made holds one of ``modules``.

    ``replicate`` leaves no mark on the parts of its model.
    """
    fsdp2, own = _loaded(*_SHARDERS["fully_shard"]), set(map(id, modules))
    tops = list(_loaded("torch.distributed._composable_state", "_module_state_mapping"))
    held = (set(map(id, top.modules())) for top in tops if isinstance(top, fsdp2))
    return any(own & inner for inner in held)


def _wrappers() -> dict[type, str]:
    """The transparent wrappers, and the name under which each keeps the module that it wraps."""
    kinds: dict[type, str] = {nn.DataParallel: "module"}
    kinds[nn.parallel.DistributedDataParallel] = "module"
    checkpoint = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"
    for home, name, key in (
        ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
        (checkpoint, "ActivationWrapper", "_checkpoint_wrapped_module"),
        (*_SHARDERS[_FSDP1], "_fsdp_wrapped_module"),
    ):
        if kind := _loaded(home, name):
            kinds[kind] = key
    return kinds
