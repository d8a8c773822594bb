import copy
import math
import pickle

import pytest
import torch
import torch.nn.utils.prune
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from miss import MiSSeLinear, StateError, disabled, eject, inject, merge, unmerge, verify
from miss.merging import refuse_loading
from tests import reference
from tests.models import TOKENS, Decoder, adapted_decoder, perturb, snapshot
from tests.strategies import DTYPES, Case, cases, methods, tolerance

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, None], ids=str)
@given(case=cases(), cycles=st.integers(1, 4))
def test_merge_rounds_once_and_unmerge_restores_every_bit(
    case: Case, dtype: torch.dtype, adapter_dtype: torch.dtype | None, cycles: int
):
    layer, x = case.layer(dtype, adapter_dtype).eval(), case.input(dtype)
    weight, base, unmerged = layer.weight, layer.weight.detach().clone(), layer(x)
    delta = case.scale * reference.delta(
        case.method, layer.miss_D.detach().double(), case.out_features, case.in_features
    )
    exact, size = base.double() + delta, base.double().abs() + delta.abs()
    wide = torch.promote_types(torch.promote_types(dtype, layer.miss_D.dtype), torch.float32)
    once = (
        torch.finfo(dtype).eps / 2 * exact.abs()
        + 2 * torch.finfo(wide).eps * size
        + torch.finfo(dtype).tiny
    )
    for _ in range(cycles):
        errors = merge(layer)
        assert layer.weight is weight
        assert ((weight.double() - exact).abs() <= once).all()
        lost = float((weight.double() - exact).norm() / delta.norm()) if delta.any() else 0.0
        assert errors == {"": pytest.approx(lost, rel=1e-3, abs=1e-6)}
        assert merge(layer) == errors  # once more changes nothing
        bias = 0 if layer.bias is None else layer.bias.double().abs()
        bound = tolerance(dtype, x.double().abs() @ size.T + bias, case.in_features + 1)
        assert ((layer(x).double() - unmerged.double()).abs() <= 2 * bound).all()
        assert set(layer.state_dict()) == {"weight"} | ({"bias"} if case.bias else set())
        assert torch.equal(layer.state_dict()["weight"], weight)
        assert torch.equal(layer.miss_base, base)
        unmerge(layer)
        assert torch.equal(weight.view(torch.uint8), base.view(torch.uint8))
        assert torch.equal(layer(x), unmerged)
    unmerge(layer)
    assert not layer._buffers


def test_merge_reports_what_bfloat16_rounds_away():
    torch.manual_seed(0)
    layer = MiSSeLinear(256, 64, rank=8, dtype=torch.bfloat16)
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.normal_(layer.miss_D, std=1e-4)
    assert 0.1 < merge(layer)[""] < 1
    unmerge(layer)
    nn.init.normal_(layer.miss_D, std=1.0)
    assert merge(layer)[""] < 0.01


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_error_of_tiny_and_huge_deltas_neither_underflows_nor_overflows(size: float):
    layer = MiSSeLinear(6, 4, rank=2)
    nn.init.constant_(layer.miss_D, size)
    assert merge(layer)[""] == pytest.approx(1.0 if size < 1 else 0.0, abs=1e-6)


@methods
def test_disabled_gives_the_base_while_merged(method: str):
    model = adapted_decoder(method).double().eval()
    with disabled(model):
        base = model(TOKENS)
    on = model(TOKENS)
    merge(model)
    torch.testing.assert_close(model(TOKENS), on)
    merged = model(TOKENS)
    with disabled(model):
        assert torch.equal(model(TOKENS), base)
        unmerge(model)
        assert torch.equal(model(TOKENS), base)
        merge(model)
        assert torch.equal(model(TOKENS), base)
    assert torch.equal(model(TOKENS), merged)
    verify(model, TOKENS)


@methods
@pytest.mark.parametrize("merged_before", [False, True])
def test_eject_with_merge_bakes_and_without_restores(method: str, merged_before: bool):
    model = adapted_decoder(method).double().eval()
    plain = copy.deepcopy(model)
    parameters = {}
    for name in eject(plain).state_dict():
        parameters[name] = id(model.get_parameter(name))
    base, on = eject(copy.deepcopy(model)), model(TOKENS)
    other = copy.deepcopy(model)
    if merged_before:
        merge(model), merge(other)
    eject(model, merge=True)
    assert not any(isinstance(m, MiSSeLinear) for m in model.modules())
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == parameters
    assert not dict(model.named_buffers())
    torch.testing.assert_close(model(TOKENS), on)
    eject(other)
    assert torch.equal(other(TOKENS), base(TOKENS))
    for plain in (model, other):
        plain.load_state_dict(base.state_dict())
        assert not any(m._load_state_dict_pre_hooks for m in plain.modules())


def test_training_while_merged_is_refused():
    model = adapted_decoder().train()
    merge(model)
    with pytest.raises(StateError, match=r"MiSSeLinear: is merged.*\n.*unmerge"):
        model(TOKENS)
    with torch.no_grad():
        model(TOKENS)
    model.eval()(TOKENS)
    for call in (model.layers[0].mlp[0].reset_adapter, model.layers[0].mlp[0].reset_parameters):
        before = snapshot(model)
        with pytest.raises(StateError, match="merged"):
            call()
        assert snapshot(model) == before


@methods
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "float", "meta", "share_memory"])
def test_merged_models_are_copied_and_moved(method: str, how: str):
    model = adapted_decoder(method).double().eval()
    base, on = eject(copy.deepcopy(model))(TOKENS), model(TOKENS)
    merge(model)
    if how == "deepcopy":
        model = copy.deepcopy(model)
    elif how == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif how == "float":
        base, on = (part.float() for part in (base, on))
        model.float()
    elif how == "meta":
        state = copy.deepcopy(model.to("meta")).layers[0].mlp[0].state_dict()
        assert {tensor.device.type for tensor in state.values()} == {"meta"}
        return
    else:
        model.share_memory()
    close = (
        {"rtol": 1e-3, "atol": 1e-2} if how == "float" else {}
    )  # the outputs are of the order of 100
    torch.testing.assert_close(model(TOKENS), on, **close)
    with pytest.raises(StateError):
        model.load_state_dict(model.state_dict())
    unmerge(model)
    torch.testing.assert_close(model(TOKENS), on, **close)
    torch.testing.assert_close(eject(model)(TOKENS), base, **close)


def test_a_half_precision_copy_of_a_merged_model_unmerges_to_the_half_precision_base():
    model = adapted_decoder()
    expected = eject(copy.deepcopy(model)).bfloat16().state_dict()
    merge(model)
    unmerge(model.bfloat16())
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())


def test_merged_models_compile():
    model = adapted_decoder().double().eval()
    merge(model)
    on = model(TOKENS)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(TOKENS), on)
    with disabled(model):
        base = model(TOKENS)
        assert torch.equal(compiled(TOKENS), base)
    unmerge(compiled)
    torch.testing.assert_close(compiled(TOKENS), on)


def two_layers() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    perturb(inject(model, ["0", "1"], rank=2))
    return model


class Quantised(torch.Tensor):
    """A tensor subclass, as quantisers make them."""


def tie(model: nn.Sequential) -> None:
    model.append(nn.Embedding(4, 4))
    model[2].weight = model[1].weight


def tie_by_storage(model: nn.Sequential) -> None:
    model.append(nn.Module())
    model[2].register_buffer("transposed", model[1].weight.detach().T)


def tie_by_attribute(model: nn.Sequential) -> None:
    model[0].copy = model[1].weight.detach()[:, 3:]


def tie_two_layers(model: nn.Sequential) -> None:
    model[1].weight = model[0].weight


def inference_weight(model: nn.Sequential) -> None:
    with torch.inference_mode():
        weight = torch.randn(4, 4)
    model[1].weight = nn.Parameter(weight, requires_grad=False)


def set_weight(weight: torch.Tensor):
    def change(model: nn.Sequential) -> None:
        model[1].weight = nn.Parameter(weight, requires_grad=False)

    return change


def set_d(value: float):
    def change(model: nn.Sequential) -> None:
        with torch.no_grad():
            model[1].miss_D[0, 0] = value

    return change


def overflow(model: nn.Sequential) -> None:
    model.half()
    nn.init.constant_(model[1].weight, 6e4)
    nn.init.constant_(model[1].miss_D, 6e3)


def parametrize(model: nn.Sequential) -> None:
    nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Identity())


@pytest.mark.parametrize(
    "call", [merge, lambda model: eject(model, merge=True)], ids=["merge", "eject"]
)
@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (tie, "1: cannot be merged: its weight is tied to 2.weight"),
        (tie_by_storage, "tied to 2.transposed"),
        (tie_by_attribute, "tied to 0.copy"),
        (tie_two_layers, "0: cannot be merged: its weight is tied to 1.weight"),
        (set_d(math.nan), "miss_D is not finite"),
        (set_d(math.inf), "miss_D is not finite"),
        (overflow, "sum of weight and delta is not finite in torch.float16"),
        (set_weight(torch.full((4, 4), math.nan)), "sum of weight and delta is not finite"),
        (
            set_weight(torch.zeros(4, 4, dtype=torch.int8)),
            r"its weight is quantised \(torch.int8\)",
        ),
        (
            set_weight(torch.zeros(4, 4).to(torch.float8_e4m3fn)),
            r"its weight is quantised \(torch.float8_e4m3fn\)",
        ),
        (set_weight(torch.zeros(4, 4).as_subclass(Quantised)), "its weight is a Quantised"),
        (set_weight(torch.zeros(4, 4, device="meta")), "its weight is on the meta device"),
        (set_weight(torch.zeros(4, 1).expand(4, 4)), "elements that share memory"),
        (set_weight(torch.zeros(0)), "partitioned"),
        (inference_weight, "torch.inference_mode"),
        (parametrize, "parametrized|class was replaced"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_any_layer_is_touched(call, break_, message: str):
    model = two_layers()
    break_(model)
    weight, buffers, kind = (
        model[0].weight.detach().clone(),
        dict(model.named_buffers()),
        type(model[1]),
    )
    with pytest.raises(StateError, match=message):
        call(model)
    assert torch.equal(model[0].weight, weight)
    assert dict(model.named_buffers()).keys() == buffers.keys()
    assert (type(model[0]), type(model[1])) == (MiSSeLinear, kind)
    assert not any(layer.merged for layer in model[:2])


def test_views_of_one_storage_that_do_not_overlap_are_not_tied():
    model, flat = two_layers(), torch.randn(2, 4, 4)
    for layer, weight in zip(model, flat):
        layer.weight = nn.Parameter(weight, requires_grad=False)
    merge(model)
    unmerge(model)
    assert torch.equal(torch.stack([layer.weight for layer in model]), flat)


def test_an_alias_is_not_a_tie():
    model = inject(Decoder(), "all-linear", rank=2)
    assert "layers.1.mlp.2" in merge(model)


def test_a_large_sum_that_stays_in_range_is_merged():
    model = two_layers().half()
    nn.init.constant_(model[1].weight, 6e4)
    nn.init.constant_(model[1].miss_D, -6e4)  # the bound says 1.2e5, the sum is 0
    merge(model)
    assert not model[1].weight.any()


def test_running_out_of_memory_leaves_nothing_merged(monkeypatch: pytest.MonkeyPatch):
    model = two_layers()
    before = snapshot(model)
    error_of = torch.linalg.vector_norm
    calls: list[object] = []

    def fail_late(*args: object) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 3:  # in the second layer
            raise torch.OutOfMemoryError
        return error_of(*args)

    monkeypatch.setattr(torch.linalg, "vector_norm", fail_late)
    with pytest.raises(torch.OutOfMemoryError):
        merge(model)
    monkeypatch.undo()
    after = snapshot(model)
    for name in (
        "0.weight parameter",
        "1.weight parameter",
    ):  # all but the version counter, which tells autograd of the write
        (*kept, _, values), (*now, _, values_now) = before.pop(name), after.pop(name)
        assert (kept, values) == (now, values_now)
    assert before == after
    assert not any(layer.merged for layer in model)


def widen(model: nn.Sequential) -> None:
    model[1].weight.data = model[1].weight.data.double()


def prune_weight(model: nn.Sequential) -> None:
    torch.nn.utils.prune.identity(model[1], "weight")


def tie_to_another(model: nn.Sequential) -> None:
    model.append(nn.Embedding(4, 4))
    model[1].weight = model[2].weight


@pytest.mark.parametrize("replace", [widen, parametrize, prune_weight, tie_to_another])
def test_a_weight_replaced_while_merged_is_not_overwritten(replace):
    model = two_layers()
    merge(model)
    replace(model)
    weights = [layer.weight.detach().clone() for layer in model]
    for call in (unmerge, eject):
        weight_is = "its weight (is no parameter|has been replaced|is tied to 2)"
        message = rf"1: (its class was replaced|.* unmerged: {weight_is})"
        with pytest.raises(StateError, match=message):
            call(model)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model, weights))
    assert all(layer.merged for layer in model[:2])


def test_merge_of_a_model_without_adapters_says_so():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(StateError, match=r"merge: the model has no adapter\n.*miss\.inject"):
        merge(model)
    unmerge(model)
    eject(model, merge=True)
    assert not model._load_state_dict_pre_hooks


def test_merge_inside_inference_mode_leaves_ordinary_tensors():
    model = two_layers().eval()
    with torch.inference_mode():
        merge(model)
    x = torch.randn(2, 4, requires_grad=True)
    with disabled(model):
        model(x).sum().backward()
    assert x.grad is not None
    with torch.inference_mode():
        unmerge(model)
    model(x).sum().backward()
    assert model[0].miss_D.grad is not None


def test_a_backward_across_a_merge_is_an_error_not_a_wrong_gradient():
    model = two_layers()
    loss = model(torch.randn(2, 4, requires_grad=True)).sum()
    merge(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_unfrozen_weight_can_be_merged():
    layer = nn.Linear(4, 4)
    perturb(MiSSeLinear.adopt_(layer, 2))
    layer.eval()
    merge(layer)
    assert layer.weight.requires_grad
    assert layer.weight.is_leaf
    unmerge(layer)
    assert layer.weight.requires_grad


def test_a_hook_that_is_left_does_nothing_once_unmerged():
    model = two_layers()
    merge(model)
    for layer in model:  # without their parent, which keeps its hook
        unmerge(layer)
    assert len(model._load_state_dict_pre_hooks) == 1
    model.load_state_dict(model.state_dict())
    refuse_loading(model)
