"""Adapters under accelerate's hooks, and under forwards that users put on a layer."""

import copy
import functools
import pathlib
import pickle
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    remove_hook_from_submodules,
)
from torch import Tensor, nn

from miss import (
    MiSSeLinear,
    StateError,
    TargetError,
    adapted_modules,
    adapter_parameters,
    disabled,
    eject,
    inject,
    load,
    merge,
    save,
    unmerge,
    verify,
)
from tests.models import TOKENS, Decoder, perturb, snapshot
from tests.pretrained import TEXTS, llama

CPU = torch.device("cpu")
TARGETS = ["q_proj", "layers.0.mlp.0", "layers.1.mlp.2"]
methods = pytest.mark.parametrize("method", ["misse", "miss"])


class Counting(ModelHook):
    """A hook that does something: it counts, and changes the sign of the output."""

    def __init__(self):
        self.calls = 0

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        self.calls += 1
        return -output


def targeted(model: nn.Module) -> list[nn.Module]:
    blocks = model.layers
    return [*(b.self_attn.q_proj for b in blocks), blocks[0].mlp[0], blocks[1].mlp[2]]


def align(model: nn.Module):
    for layer in targeted(model):
        add_hook_to_module(layer, AlignDevicesHook(CPU))


def sequential(model: nn.Module):
    align(model)
    for _ in range(2):  # so that the sign is what it was
        for layer in targeted(model):
            add_hook_to_module(layer, Counting(), append=True)


def parent(model: nn.Module):
    hook = AlignDevicesHook(CPU, io_same_device=True, place_submodules=True)
    add_hook_to_module(model.layers[0], hook)


def dispatch(model: nn.Module):
    dispatch_model(model, {"": CPU}, force_hooks=True)


def leftover(model: nn.Module):
    dispatch(model)
    remove_hook_from_submodules(model)


HOOKS: dict[str, Callable[[nn.Module], None]] = {
    function.__name__: function for function in (align, sequential, parent, dispatch, leftover)
}


def train(model: nn.Module, inputs: Tensor = TOKENS) -> list[Tensor]:
    """The losses of some steps."""
    torch.manual_seed(1)
    losses = []
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=0.1)
    for _ in range(3):
        output = model(inputs)
        loss = getattr(output, "logits", output).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def assert_no_adapted_forward(model: nn.Module):
    """No forward that the objects hold is one of an adapted class."""
    for module in model.modules():
        for key in ("forward", "_old_forward"):
            held = vars(module).get(key)
            wrapped = getattr(held, "__wrapped__", None)
            for forward in (held, wrapped):
                if isinstance(forward, MethodType):
                    assert forward.__func__ is type(module).forward
                    assert forward.__self__ is module


@methods
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", sorted(HOOKS))
def test_a_hooked_model_is_the_same_model(
    name: str, when: str, method: str, tmp_path: pathlib.Path
):
    torch.manual_seed(0)
    base = Decoder()
    want = inject(copy.deepcopy(base), TARGETS, rank=3, method=method)
    model, before = copy.deepcopy(base), base(TOKENS)
    if when == "before":
        HOOKS[name](model)
    inject(model, TARGETS, rank=3, method=method)
    if when == "after":
        HOOKS[name](model)
    assert torch.equal(model(TOKENS), before)
    assert torch.equal(torch.stack(train(model)), torch.stack(train(want)))
    for d, other in zip(adapter_parameters(model), adapter_parameters(want)):
        assert torch.equal(d, other)
        assert d.any()
    tuned = want(TOKENS)
    assert torch.equal(model(TOKENS), tuned)
    verify(model, TOKENS, backward=True)
    with disabled(model):
        assert torch.equal(model(TOKENS), before)
    merge(want)
    merge(model)
    assert torch.equal(model.eval()(TOKENS), want.eval()(TOKENS))
    for key, tensor in want.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor)
    unmerge(model.train())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(TOKENS), tuned)
    for layer in adapted_modules(twin).values():
        layer.miss_reset_adapter()
    assert torch.equal(twin(TOKENS), before)
    assert torch.equal(model(TOKENS), tuned)
    save(model, tmp_path / "adapter.pt")
    hooked = copy.deepcopy(base)
    HOOKS[name](hooked)
    assert torch.equal(load(hooked, tmp_path / "adapter.pt")(TOKENS), tuned)
    for one in (model, twin, hooked):
        eject(one)
        assert_no_adapted_forward(one)
        assert torch.equal(one(TOKENS), before)
        remove_hook_from_submodules(one)
        assert_no_adapted_forward(one)
        assert torch.equal(one(TOKENS), before)
        for module, plain in zip(one.modules(), base.modules()):
            assert type(module) is type(plain)
            known = {"forward", "hf_device_map", "_miss_injected"}
            assert set(vars(module)) - known == set(vars(plain)) - known
        for key, tensor in base.state_dict().items():
            assert torch.equal(one.state_dict()[key], tensor)


@methods
def test_the_hook_runs_around_the_adapted_forward(method: str):
    torch.manual_seed(0)
    layer, x, hook = nn.Linear(6, 4), torch.randn(3, 6), Counting()
    base = layer(x)
    add_hook_to_module(layer, hook)
    inject(layer, nn.Linear, rank=2, method=method)
    nn.init.normal_(layer.miss_D)
    adapted = layer.miss_type.forward(layer, x) + x @ layer.miss_delta_weight().T
    torch.testing.assert_close(layer(x), -adapted)
    assert torch.equal(eject(layer)(x), -base)
    assert hook.calls == 2
    add_hook_to_module(layer, late := Counting(), append=True)
    inject(layer, nn.Linear, rank=2, method=method)
    assert torch.equal(layer(x), base)
    assert (hook.calls, late.calls) == (3, 1)


@pytest.mark.parametrize("removed", ["before eject", "after eject"])
def test_a_leftover_forward_pickles(removed: str):
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 4), torch.randn(3, 6)
    add_hook_to_module(layer, Counting())
    inject(layer, nn.Linear, rank=2)
    nn.init.normal_(layer.miss_D)
    remove_hook_from_submodules(layer)
    tuned = layer(x)
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again(x), tuned)
    nn.init.zeros_(again.miss_D)
    assert torch.equal(eject(again)(x), F_linear(layer, x))
    assert_no_adapted_forward(again)
    assert again.forward.__self__ is again


def F_linear(layer: nn.Module, x: Tensor) -> Tensor:  # noqa: N802  # torch's own name
    return nn.functional.linear(x, layer.weight, layer.bias)


def patched() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    return layer


def hook_over_patched() -> nn.Module:
    return add_hook_to_module(patched(), ModelHook())


def patch_over_hook() -> nn.Module:
    layer = add_hook_to_module(nn.Linear(4, 4), ModelHook())
    inner = layer.forward
    layer.forward = lambda x: inner(x)
    return layer


def shallow_copy() -> nn.Module:
    """A copy whose hook and forward are those of another object."""
    return copy.copy(add_hook_to_module(nn.Linear(4, 4), ModelHook()))


def anothers_forward() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = nn.Linear(4, 4).forward
    return layer


def partial_of_ones_own() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = functools.partial(lambda layer, x: x, layer)
    layer._old_forward, layer._hf_hook = MethodType(nn.Linear.forward, layer), ModelHook()
    return layer


def anothers_method() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = MethodType(nn.Identity.forward, layer)
    return layer


FOREIGN = [patched, hook_over_patched, patch_over_hook, shallow_copy, anothers_forward]
FOREIGN += [partial_of_ones_own, anothers_method]


@pytest.mark.parametrize("build", FOREIGN, ids=lambda build: build.__name__)
def test_another_forward_is_refused_with_what_to_do(build: Callable[[], nn.Module]):
    model = nn.Sequential(build(), nn.Linear(4, 4))
    before = snapshot(model)
    under, first = "", ""
    if build is hook_over_patched:
        under, first = " under accelerate's hook", "accelerate's remove_hook_from_module, then "
    message = rf"0: has an instance-level forward{under}, which would bypass .*"
    message += rf"remove it \({first}del layer\.forward\), inject"
    with pytest.raises(TargetError, match=message):
        inject(model, ["0", "1"], rank=2)
    assert snapshot(model) == before
    assert list(adapted_modules(inject(model, "all-linear", rank=2))) == ["1"]


@methods
@pytest.mark.parametrize("hooked", [False, True])
def test_a_forward_that_a_user_wraps_after_injection(hooked: bool, method: str):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    base = model(x)
    inject(model, "0", rank=2, method=method)
    nn.init.normal_(model[0].miss_D)
    tuned, inner = model(x), model[0].forward
    model[0].forward = lambda x: 2 * inner(x)
    if hooked:
        add_hook_to_module(model[0], Counting())
    sign = -1 if hooked else 1
    assert torch.equal(model(x), sign * 2 * tuned)
    verify(model, x, backward=True)
    with disabled(model):
        assert torch.equal(model(x), sign * 2 * base)
    merge(model.eval())
    torch.testing.assert_close(model(x), sign * 2 * tuned)
    unmerge(model)
    assert torch.equal(copy.deepcopy(model)(x), sign * 2 * tuned)
    before = snapshot(model)
    for bake in (False, True):
        with pytest.raises(StateError, match=r"0: has an instance-level .*\n.*del layer\.forward"):
            eject(model, merge=bake)
    assert snapshot(model) == before
    remove_hook_from_submodules(model)
    del model[0].forward
    assert torch.equal(eject(model)(x), base)


Offload = Callable[[nn.Module, pathlib.Path], Any]


def offload_by_parent(model: nn.Module, folder: pathlib.Path):
    for block in model.layers:
        add_hook_to_module(block, AlignDevicesHook(CPU, offload=True, place_submodules=True))


def offload_in_sequence(model: nn.Module, folder: pathlib.Path):
    for layer in targeted(model):
        add_hook_to_module(layer, AlignDevicesHook(CPU, offload=True))
        for _ in range(2):
            add_hook_to_module(layer, Counting(), append=True)
        assert isinstance(layer._hf_hook.hooks[0], SequentialHook)


def offload_by_map(model: nn.Module, folder: pathlib.Path):
    parts = {"embed": "cpu", "layers": "disk", "alias": "disk", "lm_head": "cpu", "extra": "cpu"}
    dispatch_model(model, parts, offload_dir=folder)


OFFLOADS: dict[str, Offload] = {
    "cpu_offload": lambda model, folder: cpu_offload(model, CPU),
    "disk_offload": lambda model, folder: disk_offload(model, folder, CPU),
    "parent": offload_by_parent,
    "sequence": offload_in_sequence,
    "map": offload_by_map,
}
every_offload = pytest.mark.parametrize("name", sorted(OFFLOADS))


@every_offload
@pytest.mark.filterwarnings("ignore:The following device_map keys")
def test_a_layer_whose_weights_are_offloaded_is_refused(name: str, tmp_path: pathlib.Path):
    torch.manual_seed(0)
    base = Decoder()
    adapted = inject(copy.deepcopy(base), "q_proj", rank=2)
    perturb(adapted)
    save(adapted, tmp_path / "adapter.pt")
    model = copy.deepcopy(base)
    model.extra = nn.Linear(4, 4)  # outside of what is offloaded
    OFFLOADS[name](model.layers if "_" in name else model, tmp_path)
    before = [(type(m), set(vars(m))) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    names = r"layers\.0\.self_attn\.q_proj, layers\.1\.self_attn\.q_proj"
    message = rf"layers\.0\.self_attn\.q_proj: accelerate offloads .*\n +actual: +{names}\n"
    message += r" +do: +accelerate\.hooks\.remove_hook_from_submodules.*device_map"
    for targets in ("q_proj", "*.q_proj", ["extra", "q_proj"]):
        with pytest.raises(StateError, match=message):
            inject(model, targets, rank=2)
    with pytest.raises(StateError, match=message):
        load(model, tmp_path / "adapter.pt")
    if name != "parent":
        with pytest.raises(StateError, match="Linear: accelerate offloads"):
            MiSSeLinear.adopt_(model.layers[0].self_attn.q_proj, 2)
    assert [(type(m), set(vars(m))) for m in model.modules()] == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert list(adapted_modules(inject(model, "extra", rank=2))) == ["extra"]
    eject(model)
    remove_hook_from_submodules(model)
    assert torch.equal(load(model, tmp_path / "adapter.pt")(TOKENS), adapted(TOKENS))


@every_offload
@pytest.mark.filterwarnings("ignore:The following device_map keys")
def test_offload_after_injection_is_not_silent(name: str, tmp_path: pathlib.Path):
    torch.manual_seed(0)
    base = Decoder()
    model = inject(copy.deepcopy(base), TARGETS, rank=2)
    perturb(model)
    tuned, want = model(TOKENS), [d.detach().clone() for d in adapter_parameters(model)]
    OFFLOADS[name](model.layers if "_" in name else model, tmp_path)
    assert torch.equal(model(TOKENS), tuned)
    with pytest.raises(StateError, match=r"4 D got no gradient .*\n.*\n.*hooks of accelerate"):
        verify(model, TOKENS, backward=True)
    with pytest.raises(StateError, match=r"accelerate offloads its weights.*its hook keeps D"):
        eject(model)
    remove_hook_from_submodules(model)
    for d, value in zip(adapter_parameters(model), want):
        assert torch.equal(d, value)
        assert d.requires_grad
    verify(model, TOKENS, backward=True)
    assert torch.equal(eject(model)(TOKENS), base(TOKENS))


def test_a_meta_model_without_hooks_is_adapted():
    with torch.device("meta"):
        model = Decoder()
    add_hook_to_module(model, AlignDevicesHook(io_same_device=True))
    before = [(type(m), set(vars(m))) for m in model.modules()]
    inject(model, TARGETS, rank=2)
    assert all(d.is_meta for d in adapter_parameters(model))
    eject(model)
    assert [(type(m), set(vars(m))) for m in model.modules()] == before


def test_only_what_a_hook_reaches_is_offloaded():
    model = Decoder()
    model.bias = nn.Parameter(torch.ones(1))
    add_hook_to_module(model, AlignDevicesHook(CPU, offload=True))
    assert model.bias.is_meta
    verify(inject(model, TARGETS, rank=2), TOKENS, backward=True)


@methods
@pytest.mark.filterwarnings("ignore:Attempting to save")
def test_a_device_map_of_transformers(method: str, tmp_path: pathlib.Path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    parts = ["model.layers", "model.norm", "model.rotary_emb", "lm_head"]
    places = dict.fromkeys(parts, "cpu") | {"model.embed_tokens": "disk"}

    def dispatched() -> nn.Module:
        return transformers.LlamaForCausalLM.from_pretrained(
            tmp_path / "base", device_map=places, offload_folder=tmp_path / "disk"
        )

    model, want = dispatched(), inject(base, "all-linear", rank=3, method=method)
    plain = model(TEXTS).logits
    before = snapshot(model.model.layers)
    inject(model, "all-linear", rank=3, method=method)
    assert torch.equal(torch.stack(train(model, TEXTS)), torch.stack(train(want, TEXTS)))
    tuned = want(TEXTS).logits
    assert torch.equal(model(TEXTS).logits, tuned)
    verify(model, TEXTS, backward=True)
    save(model, tmp_path / "adapter.pt")
    assert torch.equal(load(dispatched(), tmp_path / "adapter.pt")(TEXTS).logits, tuned)
    merge(want.eval())
    merge(model.eval())
    assert torch.equal(model(TEXTS).logits, want(TEXTS).logits)
    eject(model.train())
    for module in model.model.layers.modules():
        assert not isinstance(module, nn.Linear) or type(module) is nn.Linear
    assert torch.equal(model(TEXTS).logits, plain)
    assert list(snapshot(model.model.layers)) == list(before)
