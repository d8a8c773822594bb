"""Models that FSDP, tensor parallelism or DDP hold: what is refused there, and what works.

FSDP keeps the whole tensors of its root after a forward, as ordinary Parameters, and lets them go
later: what a verb wrote to them would be lost without a word.
"""

import copy
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import miss
from miss import StateError, TargetError, fused, inject
from miss.interop import lora, peft
from tests.processes import on_two_processes
from tests.strategies import OPTIONS

PART = "FSDP, of which this is a part"
FSDP1 = "FullyShardedDataParallel"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(8, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def base(dtype: torch.dtype = torch.float64) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


def adapted(method: str, dtype: torch.dtype = torch.float64, freeze: bool = True) -> Model:
    """The base, and adapters whose D is random."""
    model = inject(base(dtype), ["up", "down"], rank=5, **OPTIONS[method], scale=0.5, freeze=freeze)
    for d in miss.adapter_parameters(model):
        nn.init.normal_(d, std=0.2)
    return model


class Sharding(NamedTuple):
    """What shards a model, and its names in errors: of the model, ``layers[0]``, a layer there."""

    make: Callable[[nn.Module], nn.Module]
    names: tuple[str, str, str]
    gathered: tuple[str, ...] = ()  # Parameters that are whole and ordinary after a forward
    frozen: bool = True


def fully_shardings() -> dict[str, Sharding]:
    """`fully_shard` in the ways in which it is used, and `replicate`, which is built on it."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicas", "shards"))

    def layers(model):
        for part in (model.layers[0].up, *model.layers, model):
            fully_shard(part)
        return model

    def part(model):
        fully_shard(model.layers[0])
        return model

    def offloaded(model):
        return fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))

    d, whole = "layers.0.down.miss_D", ("fully_shard", PART, PART)
    found = {
        "root": Sharding(fully_shard, whole, (d, "head.weight")),
        "layer by layer": Sharding(layers, ("fully_shard", "fully_shard", PART), ("head.weight",)),
        "a part": Sharding(part, ("fully_shard", "fully_shard", PART), (d,)),
        "mesh of 1 x 2": Sharding(lambda model: fully_shard(model, mesh=mesh), whole, (d,)),
        "CPU offload": Sharding(offloaded, whole, (d,)),
    }
    if importlib.util.find_spec("torch.distributed._composable.replicate_with_fsdp"):  # torch 2.9
        from torch.distributed._composable.replicate_with_fsdp import replicate

        found["replicate"] = Sharding(replicate, ("replicate", PART, PART), (d,))
    return found


def fsdp1_shardings() -> dict[str, Sharding]:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    def wrap(model, **settings):
        settings = {"device_id": torch.device("cpu"), "use_orig_params": True} | settings
        return FullyShardedDataParallel(model, **settings)

    def layers(model):
        return wrap(model, auto_wrap_policy=ModuleWrapPolicy({Block}))

    def flat(model):
        return wrap(model, use_orig_params=False)

    return {
        "root": Sharding(wrap, (FSDP1, PART, PART)),
        "nested": Sharding(layers, (FSDP1, FSDP1, PART)),
        "flat": Sharding(flat, (FSDP1, PART, PART), frozen=False),
    }


def plans() -> dict[str, Sharding]:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    plan = {"layers.*.up": ColwiseParallel(), "layers.*.down": RowwiseParallel()}
    names = ("a parallel plan (DTensors)",) * 3
    return {"plan": Sharding(lambda model: parallelize_module(model, mesh, plan), names)}


@contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """Inside, FSDP shows the whole tensors, where the model is FSDP's."""
    if hasattr(model, "summon_full_params"):
        with model.summon_full_params(model):
            yield
    elif hasattr(model, "unshard"):
        model.unshard()
        yield
        model.reshard()
    else:
        yield


def answer(call: Callable[..., object], *args: object) -> str:
    """The text of the StateError that a call raises; else what it did instead."""
    try:
        call(*args)
    except StateError as error:
        return str(error)
    except Exception as error:
        return f"another error: {error!r}"
    return "no error"


class Guard:
    """A sharded model, the verbs that must be refused on it, and how it was before them."""

    def __init__(self, sharding: Sharding, method: str, folder: str):
        self.plain, self.names = adapted(method, freeze=sharding.frozen), sharding.names
        self.x = torch.randn(4, 8, dtype=torch.float64)
        other = copy.deepcopy(self.plain)
        for d in miss.adapter_parameters(other):
            d.data.mul_(2)
        self.state = miss.adapter_state_dict(other)
        miss.save(other, f"{folder}/old.pt")
        peft.save(adapted("misse"), f"{folder}/old")
        self.folder, self.files = folder, sorted(os.listdir(folder))
        self.model = sharding.make(copy.deepcopy(self.plain))
        self.layers = miss.adapted_modules(self.model)
        self.types = {name: type(layer) for name, layer in self.layers.items()}

    def verbs(self) -> dict[str, Callable[[nn.Module], object]]:
        new = f"{self.folder}/new"
        return {
            "merge": miss.merge,
            "unmerge": miss.unmerge,
            "eject": miss.eject,
            "eject, merged": lambda model: miss.eject(model, merge=True),
            "save": lambda model: miss.save(model, f"{new}.pt"),
            "load": lambda model: miss.load(model, f"{self.folder}/old.pt"),
            "adapter_state_dict": miss.adapter_state_dict,
            "load_adapter_state_dict": lambda m: miss.load_adapter_state_dict(m, self.state),
            "peft.save": lambda model: peft.save(model, new),
            "peft.load": lambda model: peft.load(model, f"{self.folder}/old"),
            "lora.save": lambda model: lora.save(model, new),
        }

    def check_refused(self) -> None:
        """Each verb, on the model and on parts of it, names what shards it and changes nothing."""
        parts = self.model, self.model.layers[0], self.layers["layers.0.down"]
        for part, name in zip(parts, self.names, strict=True):
            answers = {verb: answer(call, part) for verb, call in self.verbs().items()}
            wrong = {verb: text for verb, text in answers.items() if f"by {name}," not in text}
            assert not wrong, (name, wrong)
        assert {name: type(layer) for name, layer in self.layers.items()} == self.types
        assert not any(layer.miss_merged for layer in self.layers.values())
        assert sorted(os.listdir(self.folder)) == self.files

    def check_works(self) -> None:
        """What does not change the model works on it, and under the names of the plain one."""
        assert list(self.layers) == list(miss.adapted_modules(self.plain))
        miss.verify(self.model, self.x)
        with torch.no_grad(), miss.disabled(self.model):
            torch.testing.assert_close(self.model(self.x), base()(self.x), rtol=1e-12, atol=1e-12)
        rows = [(row.name, row.shape, row.rank) for row in miss.summary(self.model).layers]
        assert rows == [(row.name, row.shape, row.rank) for row in miss.summary(self.plain).layers]
        assert all(name in str(miss.summary(self.model)) for name in self.layers)
        assert len(miss.adapter_parameters(self.model)) == 4

    def check_way_out(self) -> None:
        """What the error says to do: D in a full state dict, for a plain model."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True)
        full = get_model_state_dict(self.model, options=options)
        state = {key: value for key, value in full.items() if key.endswith("miss_D")}
        fresh = copy.deepcopy(self.plain)
        for layer in miss.adapted_modules(fresh).values():
            layer.reset_adapter()
        miss.load_adapter_state_dict(fresh, state)
        for one, two in zip(*map(miss.adapter_parameters, (fresh, self.plain)), strict=True):
            assert torch.equal(one, two)


def check_guard(guard: Guard, sharding: Sharding) -> None:
    """Before a forward, after one, between forward and backward, after the backward, and opened."""
    model, x = guard.model, guard.x
    guard.check_refused()
    guard.check_works()
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(y, guard.plain(x), rtol=1e-12, atol=1e-12)
    whole = dict(model.named_parameters())
    assert {type(whole[name]) for name in sharding.gathered} <= {nn.Parameter}
    guard.check_refused()
    again = model(x)
    assert torch.equal(again, y)
    guard.check_refused()
    again.square().mean().backward()
    guard.check_refused()
    assert torch.equal(model(x), y)
    with opened(model):
        guard.check_refused()
    assert torch.equal(model(x), y)
    guard.check_works()
    if sharding.frozen:  # FSDP1 without use_orig_params has no D of its own
        parameters = set(map(id, model.parameters()))
        assert parameters.issuperset(map(id, miss.adapter_parameters(model)))
        guard.check_way_out()


def check_guards(rank: int, folder: str) -> None:
    for shardings in (fully_shardings(), fsdp1_shardings(), plans()):
        for name, sharding in shardings.items():
            for method in OPTIONS:
                case = f"{sharding.names[0]}, {name}, {method}"
                own = f"{folder}/{case}, {rank}"
                os.makedirs(own)
                try:
                    check_guard(Guard(sharding, method, own), sharding)
                except Exception as error:
                    raise AssertionError(case) from error


def test_a_sharded_model_refuses_what_would_be_lost(tmp_path):
    on_two_processes(check_guards, str(tmp_path))


def compare_training(rank: int) -> None:
    """Each process has half of the batch; outputs and gradients are as of one that has it all."""
    fits, shardings = fused.fits, fully_shardings()
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        tolerance = 12 * torch.finfo(dtype).eps  # the longest sum is of 12 terms
        for sharding in (shardings["root"], shardings["layer by layer"]):
            for method in OPTIONS:
                for fast in (True, False):
                    taken = []

                    def recorded(*args, fast=fast, taken=taken):
                        taken.append(fast and fits(*args))
                        return taken[-1]

                    plain, x = adapted(method, dtype), torch.randn(4, 8).to(dtype)
                    model = sharding.make(copy.deepcopy(plain))
                    with mock.patch.object(fused, "fits", recorded):
                        y = model(x[rank::2])
                        y.float().square().mean().backward()
                    assert set(taken) == {fast}
                    expected = plain(x)
                    expected.float().square().mean().backward()
                    close = {"rtol": tolerance, "atol": tolerance}
                    torch.testing.assert_close(y, expected[rank::2], **close)
                    ds = map(miss.adapter_parameters, (model, plain))
                    for sharded, d in zip(*ds, strict=True):
                        torch.testing.assert_close(sharded.grad.full_tensor(), d.grad, **close)


def test_fully_sharded_training_equals_one_process():
    on_two_processes(compare_training)


def wrappings() -> dict[str, tuple[str, Callable[[nn.Module], nn.Module]]]:
    """By name, what the error calls it, and how a model of which no layer is adapted is wrapped."""
    from torch.distributed._composable.replicate import replicate
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    def fsdp1(model):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)

    def of_child(wrap):
        def wrapped(model):
            model.layers[1] = wrap(model.layers[1])
            return model

        return wrapped

    ddp, found = nn.parallel.DistributedDataParallel, {}
    kinds = ("DistributedDataParallel", ddp), ("replicate", replicate)
    for name, wrap in (*kinds, (FSDP1, fsdp1), ("fully_shard", fully_shard)):
        found[name], found[f"{name} of a child"] = (name, wrap), (name, of_child(wrap))
    return found


def look(model: nn.Module) -> dict[str, object]:
    """What injection would change: types, attributes, Parameters and their flags."""
    seen: dict[str, object] = {}
    for name, module in model.named_modules():
        flags = {key: p.requires_grad for key, p in module._parameters.items()}
        seen[name] = type(module), sorted(key for key in module.__dict__ if "miss" in key), flags
    return seen


def check_injection(rank: int, folder: str) -> None:
    """`inject` on what is wrapped already says to inject, then wrap, and changes nothing."""
    x = torch.randn(4, 8, dtype=torch.float64)
    miss.save(adapted("misse"), f"{folder}/{rank}.pt")
    for what, (name, wrap) in wrappings().items():
        model = wrap(base())
        child = model.layers[1] if what.endswith("of a child") else model
        wrapped = [model, child]
        if "ully" in name:  # FSDP marks the parts of what it wraps; DDP does not
            wrapped += [child.layers[0]] if child is model else [child.up]
        before = look(model)
        for _ in range(2):  # before a forward and after
            for part in wrapped:
                text = answer(lambda part=part: inject(part, "all-linear", rank=4))
                assert f"wrapped by {name}," in text or f"wrapped by {PART}," in text, (what, text)
                assert "inject, load or eject first, then wrap" in text
            text = answer(miss.load, model, f"{folder}/{rank}.pt")
            assert f"ed by {name}," in text, (what, text)
            with torch.no_grad():
                torch.testing.assert_close(model(x), base()(x), rtol=1e-12, atol=1e-12)
        assert look(model) == before
    for sharding in plans().values():
        model = sharding.make(base())
        before = look(model)
        with pytest.raises(TargetError, match="inject first"):
            inject(model, ["up", "down"], rank=4)
        assert look(model) == before


def check_ddp(rank: int, folder: str) -> None:
    path, close = f"{folder}/{rank}", {"rtol": 1e-12, "atol": 1e-12}
    for method in OPTIONS:
        plain, x = adapted(method), torch.randn(4, 8, dtype=torch.float64)
        model = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
        names = list(miss.adapted_modules(plain))
        expected = plain(x)
        y = model(x[rank::2])
        torch.testing.assert_close(y, expected[rank::2], **close)
        y.square().mean().backward()
        expected.square().mean().backward()
        for one, two in zip(*map(miss.adapter_parameters, (model, plain)), strict=True):
            torch.testing.assert_close(one.grad, two.grad, **close)

        state = miss.adapter_state_dict(model)
        miss.save(model, f"{path}.pt")
        miss.save(plain, f"{path} plain.pt")
        peft.save(adapted("misse"), f"{path} peft")
        verbs = {
            "load": lambda m: miss.load(m, f"{path}.pt"),  # called in this turn
            "eject": miss.eject,
            "eject, merged": lambda m: miss.eject(m, merge=True),
            "peft.load": lambda m: peft.load(m, f"{path} peft"),
        }
        for verb, call in verbs.items():
            text = answer(call, model)
            assert "wrapped by DistributedDataParallel, which" in text, (verb, text)

        assert list(miss.adapted_modules(model)) == names
        assert list(state) == list(miss.adapter_state_dict(plain))
        assert [row.name for row in miss.summary(model).layers] == names
        assert "module" not in str(miss.summary(model))
        miss.verify(model, x)
        with torch.no_grad(), miss.disabled(model):
            torch.testing.assert_close(model(x), base()(x), **close)

        before = {name: p.clone() for name, p in model.named_parameters()}
        assert list(miss.merge(model)) == names
        assert all(layer.miss_merged for layer in miss.adapted_modules(model).values())
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x), plain(x), **close)
        miss.unmerge(model.train())
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

        loaded = miss.load(base(), f"{path}.pt")
        assert torch.equal(loaded(x), plain(x))
        twice = {key: 2 * d for key, d in state.items()}
        for module in (model, plain):
            miss.load_adapter_state_dict(module, twice)
        torch.testing.assert_close(model(x), plain(x), **close)
        assert not torch.equal(model(x), loaded(x))


def check_wrapped(rank: int, folder: str) -> None:
    check_injection(rank, folder)
    check_ddp(rank, folder)


def test_injection_comes_before_wrapping_and_ddp_keeps_names(tmp_path):
    on_two_processes(check_wrapped, str(tmp_path))
