import functools
import gc
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from measure import peak_bytes, saved_bytes
from miss import MiSSeLinear, MiSSLinear, disabled
from tests.paths import both_paths, counted, plain_path, results
from tests.strategies import DTYPES, FORMS, RAGGED, Case, assert_equals_oracle, cases, forms, ragged

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Layouts of an input of the same values.
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda x: F.pad(x, (1, 2))[..., 1:-2],
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape) if x.dim() > 1 else x,
}


@pytest.mark.parametrize("adapter_dtype", [None, *DTYPES], ids=str)
@dtypes
@given(case=cases(), layout=st.sampled_from(sorted(LAYOUTS)))
@example(case=RAGGED[0], layout="transposed")
@example(case=RAGGED[1], layout="expanded")
@example(case=RAGGED[2], layout="sliced")
@example(case=Case("misse", 13, 13, 13, True, -2.0, (), 0), layout="contiguous")
@example(
    case=Case("misse", 4, 530, 2, True, -2.0, (3,), 1), layout="contiguous"
)  # more than one part of the gradient of D
@example(case=Case("miss", 530, 4, 2, True, -2.0, (3,), 1), layout="contiguous")
@example(case=Case("alternating", 13, 13, 13, True, -2.0, (), 0), layout="contiguous")
@example(case=Case("alternating", 12, 530, 3, True, -2.0, (3,), 1), layout="transposed")
def test_fast_path_equals_oracle(
    case: Case, dtype: torch.dtype, adapter_dtype: torch.dtype | None, layout: str
):
    layer = case.layer(dtype, adapter_dtype)
    with counted() as calls:
        assert_equals_oracle(case, layer, LAYOUTS[layout](case.input(dtype)))
    assert calls.call_count == 1


@dtypes
@given(case=cases())
def test_plain_path_equals_oracle(case: Case, dtype: torch.dtype):
    with plain_path(), counted() as calls:
        assert_equals_oracle(case, case.layer(dtype), case.input(dtype))
    assert not calls.called


@pytest.mark.parametrize("grad_of", ["x", "d", "bias", "x d", "d bias", "x d bias", ""])
@dtypes
@given(case=cases())
def test_fast_path_equals_plain_path_whatever_asks_for_gradients(
    case: Case, dtype: torch.dtype, grad_of: str
):
    layer, x = (
        replace(case, bias=True).layer(dtype),
        case.input(dtype).requires_grad_("x" in grad_of),
    )
    layer.miss_D.requires_grad_("d" in grad_of)
    layer.bias.requires_grad_("bias" in grad_of)
    with counted() as calls:
        fast = results(layer, x)
    with plain_path():
        plain = results(layer, x)
    assert calls.call_count == 1
    assert len(fast) == len(plain) == 1 + len(grad_of.split())
    for got, want in zip(fast, plain):
        assert (got.dtype, got.shape, got.requires_grad) == (
            want.dtype,
            want.shape,
            want.requires_grad,
        )
        size = (
            want.detach().double().abs().max() if want.numel() else 1.0
        )  # both are within the oracle's bound; this is a net
        torch.testing.assert_close(
            got, want, rtol=0, atol=float(256 * torch.finfo(dtype).eps * (1 + size))
        )


@dtypes
@given(case=cases(), rows=st.integers(0, 20))
def test_without_gradients(case: Case, dtype: torch.dtype, rows: int):
    case = replace(case, leading=(rows,))
    layer, x = case.layer(dtype), case.input(dtype)
    with plain_path():
        y = layer(x)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, counted() as calls:
            z = layer(x)
        assert calls.call_count == 1
        assert not z.requires_grad
        size = y.detach().double().abs().max() if y.numel() else 1.0
        torch.testing.assert_close(
            z, y.detach(), rtol=0, atol=float(64 * torch.finfo(dtype).eps * (1 + size))
        )


@ragged
@pytest.mark.filterwarnings(
    "ignore:Initializing zero-element tensors", "ignore:Sparse CSR tensor support"
)
def test_rule(case: Case):
    def fast(layer: nn.Linear, x: Tensor) -> bool:
        with counted() as calls:
            layer(x)
        return calls.called

    class Mine(Tensor):
        pass

    layer, x = case.layer(), case.input()
    assert fast(layer, x)
    assert not fast(layer, x.as_subclass(Mine))
    dropping = FORMS[case.method](4, 4, 2, dropout=0.5)
    assert not fast(dropping, torch.randn(4))
    assert fast(dropping.eval(), torch.randn(4))
    with disabled(nn.Sequential(layer)):
        assert not fast(layer, x)
    seam = layer.miss_delta
    layer.miss_delta = lambda x, y: seam(x, y)  # replaced on the object
    assert not fast(layer, x)
    del layer.miss_delta
    assert fast(layer, x)
    layer.weight.requires_grad_()
    assert not fast(layer, x)
    layer.weight.requires_grad_(False)
    empty = MiSSLinear(0, 7, 2) if case.method == "miss" else FORMS[case.method](10, 0, 1)
    assert not fast(empty, torch.randn(3, empty.in_features))
    sparse = case.layer()
    sparse.weight = nn.Parameter(sparse.weight.detach().to_sparse_csr(), requires_grad=False)
    assert not fast(sparse, x.flatten(0, 1))
    with counted() as calls:
        torch.vmap(layer)(x)
        torch.func.jvp(layer, (x,), (x,))
        torch.compiler.reset()
        torch.compile(layer, fullgraph=True, backend="eager")(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.trace(layer, x, check_trace=False)  # the check would run the layer itself
    assert not calls.called


@ragged
def test_saved_for_backward(case: Case):
    case = replace(case, leading=(5, 3))
    for dtype in DTYPES:
        layer, x = case.layer(dtype), case.input(dtype).requires_grad_()
        kept = case.in_features if case.method == "miss" else case.rank  # x, or S
        assert saved_bytes(layer, x) == 15 * kept * dtype.itemsize
    layer.miss_D.requires_grad_(False)
    assert saved_bytes(layer, x) == 0


def test_misse_lets_go_of_its_input():
    layer, x = RAGGED[0].layer(), RAGGED[0].input()
    alive = weakref.ref(x)
    y = layer(x)
    del x
    gc.collect()
    assert alive() is None
    y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(1024, 1024), (1000, 1500), (576, 1536)], ids=str)
@pytest.mark.parametrize("tokens", [128, 512, 2048])
@forms
def test_peak_of_a_step_is_that_of_the_base_and_a_tenth(
    form: type, tokens: int, size: tuple[int, int], dtype: torch.dtype
):
    base = nn.Linear(*size, dtype=dtype).requires_grad_(False)
    layer = form(*size, 64, dtype=dtype)
    x, g = (
        torch.randn(tokens, size[0], dtype=dtype, requires_grad=True),
        torch.randn(tokens, size[1], dtype=dtype),
    )

    def peak(layer: nn.Linear) -> int:
        layer(x).backward(g)
        layer.zero_grad()
        x.grad = None
        return peak_bytes(lambda: layer(x).backward(g))

    assert peak(layer) <= 1.1 * peak(base) + layer.miss_D.nbytes


@ragged
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_hooks_may_change_the_output_in_place(case: Case, dtype: torch.dtype):
    layer, x = case.layer(dtype), case.input(dtype).requires_grad_()
    layer.register_forward_hook(lambda module, args, y: y.mul_(2).add_(1))
    fast = results(layer, x)
    with plain_path():
        plain = results(layer, x)
    for got, want in zip(fast, plain):
        torch.testing.assert_close(got, want)


@ragged
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype_of_x", [torch.float32, "autocast"], ids=str)
def test_autocast(case: Case, dtype: torch.dtype, dtype_of_x: torch.dtype | str):
    layer = case.layer(torch.float32)
    x = case.input(dtype if dtype_of_x == "autocast" else torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype):
        with counted() as calls:
            fast = layer(x)
        with plain_path():
            plain = layer(x)
    assert calls.called
    assert fast.dtype == plain.dtype == dtype
    g = torch.randn(fast.shape, dtype=torch.float64).to(dtype)
    grads = [torch.autograd.grad(y, (x, layer.miss_D), g) for y in (fast, plain)]
    for got, want in ((fast, plain), *zip(*grads)):
        assert got.dtype == want.dtype
        torch.testing.assert_close(
            got, want, rtol=0, atol=float(32 * torch.finfo(dtype).eps * want.detach().abs().max())
        )


@ragged
@pytest.mark.parametrize("leading", [(4,), (2, 3)], ids=str)
def test_selective_checkpoints_that_keep_the_products(case: Case, leading: tuple[int, ...]):
    case = replace(
        case, leading=leading
    )  # what they keep must not change later: the delta would be added twice
    layer, x = case.layer(), case.input().requires_grad_()
    keep = functools.partial(
        create_selective_checkpoint_contexts,
        [torch.ops.aten.mm.default, torch.ops.aten.addmm.default],
    )
    y = checkpoint(lambda x: layer(x).tanh(), x, use_reentrant=False, context_fn=keep)
    for got, want in zip(
        torch.autograd.grad(y.sum(), (x, layer.miss_D)),
        torch.autograd.grad(layer(x).tanh().sum(), (x, layer.miss_D)),
    ):
        torch.testing.assert_close(got, want)


@ragged
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # linearize's own
def test_what_looks_on_sees_the_plain_path(case: Case):
    layer, x = case.layer(), case.input().flatten(0, 1)
    _, linear = torch.func.linearize(lambda x: layer(x).tanh(), x)
    torch.testing.assert_close(linear(x), torch.func.jvp(lambda x: layer(x).tanh(), (x,), (x,))[1])
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    with plain_path(), FlopCounterMode(display=False) as plain:
        layer(x).sum().backward()
    assert counter.get_total_flops() == plain.get_total_flops()


@ragged
def test_complex_layers_take_the_plain_path(case: Case):
    layer, x = case.layer(), case.input().to(torch.complex128).requires_grad_()
    for name in ("weight", "bias"):
        setattr(
            layer, name, nn.Parameter((1 + 2j) * getattr(layer, name).detach(), requires_grad=False)
        )
    layer.miss_D = nn.Parameter((2 - 1j) * layer.miss_D.detach())
    y = layer(x)
    wide = layer.weight + layer.delta_weight()
    torch.testing.assert_close(y, F.linear(x, wide, layer.bias))
    g = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], g @ wide.conj())


def test_autocast_sums_before_it_rounds():
    layer = MiSSeLinear(512, 64, 1)
    nn.init.ones_(layer.miss_D)
    x = torch.randn(256, 512)
    x -= x.mean(
        -1, keepdim=True
    )  # as after a layer norm: the sum cancels, to far below the rounding of its terms
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x) - F.linear(x, layer.weight, layer.bias)
    assert y.abs().max() < 0.05


@ragged
def test_forward_mode_without_gradients(case: Case):
    layer, x = case.layer(), case.input()

    def tangent() -> Tensor:
        with torch.no_grad(), forward_ad.dual_level():
            return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x + 1))).tangent

    torch.testing.assert_close(*both_paths(tangent))
