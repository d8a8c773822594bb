import copy
import io
import itertools
import pickle
import warnings
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from miss import (
    MiSSeLinear,
    MiSSLinear,
    ShapeError,
    disabled,
    eject,
    fused,
)
from miss.forms import LayerConfig, MiSSeMini
from miss.layers.swap import Adapter, new_d, swap_
from tests import reference
from tests.strategies import (
    DTYPES,
    FORMS,
    RAGGED,
    Case,
    assert_equals_oracle,
    cases,
    forms,
    methods,
    ragged,
    tolerance,
)


@pytest.mark.parametrize("adapter_dtype", [None, "same"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(case=cases())
@example(case=Case("misse", 12, 5, 4, True, 1.0, (3,), 1))
@example(case=Case("miss", 5, 12, 4, True, 1.0, (3,), 1))
@example(case=Case("alternating", 12, 5, 3, True, 1.0, (3,), 1))
@example(case=RAGGED[0])
@example(case=RAGGED[1])
@example(case=RAGGED[2])
def test_sharded_forward_equals_oracle_and_merged_weight(
    case: Case, dtype: torch.dtype, adapter_dtype: str | None
):
    assert_equals_oracle(
        case, case.layer(dtype, dtype if adapter_dtype else None), case.input(dtype)
    )


def mini(case: Case, rows: int, dtype: torch.dtype) -> MiSSeLinear:
    """The layer of a case in PEFT's mini form: a D of ``rows`` rows."""
    layer = eject(case.layer(dtype))
    shape = case.out_features, case.in_features
    config = LayerConfig(MiSSeMini, case.rank, shape, scale=case.scale, rows=rows)
    d = new_d(layer, "weight", config, None)
    swap_(Adapter(layer, "weight", MiSSeLinear, config, nn.init.normal_(d)))
    return layer


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    case=cases().filter(lambda case: case.method == "misse"),
    times=st.integers(1, 3),
    rows=st.integers(1, 4),
)
def test_the_mini_form_cycles_the_rows_of_d(
    case: Case, dtype: torch.dtype, fast: bool, times: int, rows: int
):
    case = replace(case, out_features=rows * times)
    layer, x = mini(case, rows, dtype), case.input(dtype)
    assert layer.miss_D.shape == layer.miss_configs["weight"].d_shape == (rows, case.rank)
    d, w = layer.miss_D.detach().double(), layer.weight.double()
    delta = torch.empty_like(w)
    for o in range(len(w)):
        for c in range(case.in_features):
            delta[o, c] = d[o % rows, c % case.rank]
    want = (case.scale * delta).to(layer.miss_D.dtype)
    assert torch.equal(layer.delta_weight(), want)
    allowed = fused.fits if fast else (lambda *args: False)
    with mock.patch.object(fused, "fits", side_effect=allowed):
        y = layer(x)
    assert y.shape == (*case.leading, rows * times)
    y.sum().backward()
    bias = torch.zeros(len(w)) if layer.bias is None else layer.bias.double()
    exact = x.double() @ (w + case.scale * delta).T + bias
    size = x.double().abs() @ (w.abs() + abs(case.scale) * delta.abs()).T + bias.abs()
    assert ((y.double() - exact).abs() <= tolerance(dtype, size, case.in_features + 1)).all()
    blocks = reference.factor("misse", case.rank, len(w), case.in_features)
    flat = x.double().reshape(-1, case.in_features).repeat(times, 1)
    grad = case.scale * (flat @ blocks.T).sum(0)
    magnitude = abs(case.scale) * (flat.abs() @ blocks.T).sum(0)
    bound = tolerance(dtype, magnitude, len(flat) * case.in_features + 1)
    assert ((layer.miss_D.grad.double() - grad).abs() <= bound).all()


@ragged
def test_a_d_or_weight_of_another_shape_is_refused_at_the_next_forward(case: Case):
    layer, x = case.layer(), case.input()
    d, weight = layer.miss_D, layer.weight
    refused = pytest.raises(ShapeError, match=r"(?s)another shape.*\(7, 10\).*inject again after")
    for other in (d[:1], d[:, :1], torch.cat([d, d])):
        layer.miss_D = nn.Parameter(other.detach())
        for path in (fused.fits, lambda *args: False):
            with mock.patch.object(fused, "fits", side_effect=path), refused:
                layer(x)
        with disabled(layer):
            layer(x)
    layer.miss_D = d
    layer.weight = nn.Parameter(torch.cat([weight, weight]).detach(), requires_grad=False)
    with pytest.raises(ShapeError, match=r"(?s)another shape.*\(7, 10\).*\(14, 10\)"):
        layer(x)


@given(case=cases(max_size=5))
def test_gradcheck_and_gradgradcheck(case: Case):
    layer, x = case.layer(), case.input().requires_grad_()

    def forward(x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"miss_D": d}, (x,))

    d = layer.miss_D.detach().clone().requires_grad_()
    if 0 in case.leading:
        return
    assert torch.autograd.gradcheck(forward, (x, d), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(forward, (x, d))


@given(case=cases())
def test_zero_adapter_gives_the_base_bitwise(case: Case):
    for dtype in DTYPES:
        layer, x = case.layer(dtype), case.input(dtype)
        layer.reset_adapter()
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@given(case=cases())
def test_rank_bound_and_lora_equivalence(case: Case):
    layer = case.layer()
    with torch.no_grad():
        delta = layer.delta_weight()
        frozen = reference.factor(case.method, case.rank, case.out_features, case.in_features)
        d = layer.miss_D
        lora = frozen @ d if case.method == "miss" else d @ frozen
        torch.testing.assert_close(delta, case.scale * lora, rtol=0, atol=0)
        assert torch.linalg.matrix_rank(delta) <= case.rank == layer.rank


def test_the_two_forms_are_different_operators():
    # MiSSe repeats columns, MiSS repeats rows; a delta of one is not a delta of the other.
    misse, miss = MiSSeLinear(4, 4, 2), MiSSLinear(4, 4, 2)
    with torch.no_grad():
        misse.miss_D.copy_(torch.arange(8.0).reshape(4, 2))
        miss.miss_D.copy_(torch.arange(8.0).reshape(2, 4))
        a, b = misse.delta_weight(), miss.delta_weight()
    assert torch.equal(a[:, :2], a[:, 2:])
    assert not torch.equal(a[:1].expand(2, 4), a[:2])
    assert torch.equal(b[0], b[1])
    assert not torch.equal(b[:, :2], b[:, 2:])


@ragged
def test_functional_transforms(case: Case):
    layer, x = case.layer(), case.input()
    d = layer.miss_D.detach()
    many = torch.randn(5, *d.shape, dtype=d.dtype)

    def forward(d: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"miss_D": d}, (x,))

    with torch.no_grad():
        looped = torch.stack([forward(one, x) for one in many])
        torch.testing.assert_close(torch.vmap(forward, (0, None))(many, x), looped)
        torch.testing.assert_close(torch.vmap(forward, (None, 0))(d, x), forward(d, x))
    _, tangent = torch.func.jvp(lambda d: forward(d, x), (d,), (many[0],))
    torch.testing.assert_close(tangent, forward(d + many[0], x) - forward(d, x))

    def loss(d: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        return forward(d, row).square().sum()

    rows = x.reshape(-1, case.in_features)
    per_sample = torch.vmap(torch.func.grad(loss), (None, 0))(d, rows)
    torch.testing.assert_close(
        per_sample, torch.stack([torch.func.grad(loss)(d, row) for row in rows])
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@ragged
def test_autocast_gives_the_base_layers_dtype(case: Case, dtype: torch.dtype):
    layer, x = case.layer(torch.float32), case.input(torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype):
        y = layer(x)
        with disabled(layer):
            assert y.dtype == layer(x).dtype == dtype
    tensors = [t.detach().double() for t in (x, layer.weight, layer.bias, layer.miss_D)]
    exact = reference.output(case.method, *tensors, 1.0)
    unsigned = reference.unsigned(case.method)
    magnitude = reference.output(unsigned, *(t.abs() for t in tensors), 1.0)
    assert ((y.double() - exact).abs() <= tolerance(dtype, magnitude, case.in_features)).all()
    y.float().sum().backward()
    assert x.grad is not None
    assert layer.miss_D.grad is not None
    assert layer.miss_D.grad.dtype == torch.float32


def check_sums_beyond_fp16(method: str, in_features: int, rank: int):
    layer = FORMS[method](in_features, 8, rank, dtype=torch.float16)
    signs = [reference.sign(method, c, rank) for c in range(in_features)]
    x = (6e4 * torch.tensor([signs])).half()  # two terms of one sum are beyond fp16
    exact = torch.full((1, 8), in_features * 6e4 * 1e-3) + layer.bias.float()
    for allowed in (True, False):
        with torch.no_grad(), mock.patch.object(fused, "fits", return_value=allowed):
            layer.weight.zero_()
            layer.miss_D.fill_(1e-3)
            torch.testing.assert_close(layer(x).float(), exact, rtol=2e-3, atol=0)


@methods
def test_fp16_block_sums_that_overflow(method: str):
    check_sums_beyond_fp16(method, 64, 2)


@methods
@pytest.mark.parametrize("rank", [4, 7])  # a whole block and a short one, and one alone
def test_fp16_ragged_block_sums_that_overflow(method: str, rank: int):
    check_sums_beyond_fp16(method, 7, rank)


@ragged
def test_trace(case: Case):
    layer, x = case.layer(), case.input()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated and says so
        traced = torch.jit.trace(layer, x)
    torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_reduces_without_a_full_width_copy(dtype: torch.dtype):
    layer, x = MiSSeLinear(1024, 8, 16, dtype=dtype), torch.randn(4096, 1024).to(dtype)
    with (
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profiler,
        torch.no_grad(),
    ):
        layer(x)
    events = profiler.profiler.kineto_results.events()
    largest = max(event.nbytes() for event in events if event.name() == "[memory]")
    assert largest < x.nbytes  # an fp32 copy would be twice that


@forms
def test_dropout_acts_on_the_adapter_in_training_only(form: type[nn.Linear]):
    layer, x = form(8, 4, 2, dropout=0.5), torch.ones(64, 8)
    base = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), base)
    nn.init.ones_(layer.miss_D)
    assert len(layer(x).unique(dim=0)) > 1
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.5)
    torch.testing.assert_close(y, base + F.linear(dropped, layer.delta_weight()))
    layer.eval()
    torch.testing.assert_close(
        layer(x), F.linear(x, layer.weight + layer.delta_weight(), layer.bias)
    )


@ragged
def test_compile_fullgraph_equals_eager(case: Case):
    layer, x = case.layer(torch.float32), case.input(torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    with disabled(layer):
        torch.testing.assert_close(compiled(x), F.linear(x, layer.weight, layer.bias))
    compiled(x).sum().backward()
    got, layer.miss_D.grad = layer.miss_D.grad, None
    layer(x).sum().backward()
    torch.testing.assert_close(got, layer.miss_D.grad)


def test_compiled_layers_of_both_signs_share_no_graph():
    torch.compiler.reset()
    x = torch.randn(2, 12)
    for signs in itertools.product([False, True], repeat=2):
        model = nn.Sequential(*(MiSSeLinear(12, 12, 3, alternate=sign) for sign in signs))
        for layer in model:
            nn.init.normal_(layer.miss_D)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), model(x))


@ragged
def test_compile_with_inductor(case: Case):
    torch.compiler.reset()
    layer, x = case.layer(torch.float32), case.input(torch.float32).requires_grad_()
    outputs = torch.compile(layer, fullgraph=True)(x), layer(x)
    torch.testing.assert_close(*outputs)
    for pair in zip(*(torch.autograd.grad(y.square().sum(), (x, layer.miss_D)) for y in outputs)):
        torch.testing.assert_close(*pair)


@ragged
def test_pickle_deepcopy_and_save(case: Case):
    layer, x = case.layer(), case.input()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    with disabled(layer):  # a copy made in here is outside
        copies = [
            pickle.loads(pickle.dumps(layer)),
            copy.deepcopy(layer),
            torch.load(buffer, weights_only=False),
        ]
    for other in copies:
        assert type(other) is type(layer)
        assert torch.equal(other(x), layer(x))
        assert repr(other) == repr(layer)
        assert other.miss_configs == layer.miss_configs
        other.scale = 2 * layer.scale  # its own
        assert layer.scale == case.scale


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@given(st.sampled_from(list(FORMS)), st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_strided_nested_input(method: str, lengths: list[int]):
    layer = Case(method, 5, 7, 3, True, 1.0, (), 0).layer()
    rows = [torch.randn(length, 5, dtype=torch.float64) for length in lengths]
    out = layer(torch.nested.as_nested_tensor(rows))
    for got, row in zip(out.unbind(), rows, strict=True):
        torch.testing.assert_close(got, layer(row))


@forms
def test_meta_to_empty_and_reset(form: type[nn.Linear]):
    layer = form(6, 4, 2, device="meta")
    assert layer.miss_D.is_meta
    layer.to_empty(device="cpu")
    assert not layer.miss_D.any()
    with torch.no_grad():
        layer.miss_D.fill_(float("nan"))
    layer.to_empty(device="cpu")
    assert not layer.miss_D.any()
    with torch.no_grad():
        layer.miss_D.fill_(float("nan"))
    layer.reset_parameters()
    assert not layer.miss_D.any()
    assert layer.weight.isfinite().all()


@forms
@pytest.mark.parametrize("assign", [False, True])
def test_meta_then_a_base_checkpoint(form: type[nn.Linear], assign: bool):
    layer, base = form(6, 4, 2, device="meta"), nn.Linear(6, 4)
    if not assign:
        layer.to_empty(device="cpu")
    missing = layer.load_state_dict(base.state_dict(), strict=False, assign=assign).missing_keys
    assert missing == ["miss_D"]
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), base(x))
    assert layer.miss_D.requires_grad
