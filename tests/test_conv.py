"""Convolutions: the battery for each kind, the fast path against the plain one, and real models."""

import copy
import itertools
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from measure import peak_bytes, saved_bytes
from miss import (
    MiSSConv1d,
    MiSSConv2d,
    MiSSConv3d,
    MiSSeConv1d,
    MiSSeConv2d,
    MiSSeConv3d,
    ShapeError,
    StateError,
    TargetError,
    adapted_modules,
    eject,
    fused_conv,
    inject,
    load,
    merge,
    save,
    unmerge,
    verify,
)
from miss.gradients_conv import channel_blocks, channel_shards
from tests.battery import Battery
from tests.models import perturb
from tests.strategies import OPTIONS, methods, tolerance

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def convolution(layer: nn.Module, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """A convolution by its definition: for each position of the kernel, a matrix."""
    kernel, dilation = weight.shape[2:], layer.dilation
    spans = [step * (size - 1) for step, size in zip(dilation, kernel)]
    if layer.padding == "same":
        pads = [(span // 2, span - span // 2) for span in spans]
    else:
        pads = [(size, size) for size in layer.padding]
    mode = {"zeros": "constant"}.get(layer.padding_mode, layer.padding_mode)
    x = F.pad(x, [side for pair in reversed(pads) for side in pair], mode=mode)
    y = bias.reshape(-1, *(1 for _ in kernel))
    for position in itertools.product(*map(range, kernel)):
        seen = x
        for axis, place in enumerate(position):
            start, length = place * dilation[axis], x.shape[2 + axis] - spans[axis]
            seen = seen.narrow(2 + axis, start, length)
            seen = seen.index_select(2 + axis, torch.arange(0, length, layer.stride[axis]))
        y = y + torch.einsum("oi,bi...->bo...", weight[(..., *position)], seen)
    return y


class Convolutions(Battery):
    SPACE: tuple[int, ...] = (5, 4)
    CONV: dict[str, object] = {"kernel_size": 3, "stride": 2, "padding": 1}  # noqa: RUF012

    def layer(self, dtype: torch.dtype) -> nn.Module:
        out, in_ = self.SIZES
        return CONVS[len(self.SPACE)](in_, out, **self.CONV, dtype=dtype)

    def input(self, dtype: torch.dtype) -> Tensor:
        return torch.randn(2, self.SIZES[1], *self.SPACE).to(dtype)

    def output(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return convolution(self.layer(torch.float64), weights["weight"], weights["bias"], x)

    def bound(self, layer: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
        terms = 2 * layer.weight.numel()
        return tolerance(dtype, self.exact(layer, x, size=True), terms)


class TestConv1d(Convolutions):
    SPACE = (6,)


class TestConv2d(Convolutions):
    pass


class TestPointwiseConv2d(Convolutions):
    CONV = {"kernel_size": 1}  # noqa: RUF012


class TestCircularConv2d(Convolutions):
    CONV = {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}  # noqa: RUF012


class TestDilatedConv2dOfTheSameSize(Convolutions):
    CONV = {"kernel_size": (3, 2), "padding": "same", "dilation": (1, 2)}  # noqa: RUF012


class TestConv3d(Convolutions):
    SPACE = (3, 2, 4)
    CONV = {"kernel_size": (2, 1, 3), "padding": (0, 1, 1)}  # noqa: RUF012


def fast_and_plain(layer: nn.Module, x: Tensor) -> list[list[Tensor]]:
    """Output, gradients of input, D and bias, and their derivatives, on each path."""
    found = []
    for plain in (False, True):
        with mock.patch.object(fused_conv, "fits", return_value=False) if plain else nullcontext():
            x = x.detach().requires_grad_()
            wanted = [x, layer.miss_D, *([layer.bias] if layer.bias.requires_grad else [])]
            y = layer(x)
            assert ("MiSS" in y.grad_fn.name()) != plain
            first = torch.autograd.grad(y.pow(3).sum(), wanted, retain_graph=True)
            graph = torch.autograd.grad(y.pow(3).sum(), wanted, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in graph), wanted)
            found.append([y, *first, *graph, *second])
    return found


@methods
@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize(
    ("space", "options"),
    [
        ((9,), {"kernel_size": 3, "stride": 2}),
        ((6, 7), {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 0), "dilation": (1, 2)}),
        ((40, 40), {"kernel_size": 3, "padding": 1}),  # so large that the sum is built
        ((3, 4, 3), {"kernel_size": 2, "padding": 1, "stride": 2}),
    ],
)
def test_fast_path_equals_the_plain_one(method, rank, space, options):
    torch.manual_seed(0)
    layer = CONVS[len(space)](10, 7, **options, dtype=torch.float64)
    inject(layer, type(layer), rank=rank, scale=-1.5, **OPTIONS[method])
    perturb(layer)
    layer.bias.requires_grad_()
    for shape in ((2, 10, *space), (5, 10, *space)):
        for one, other in zip(*fast_and_plain(layer, torch.randn(shape, dtype=torch.float64))):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@methods
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_layout_stays_and_half_precision_is_not_widened(method, layout, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(12, 10, 3, padding=1)).to(dtype, memory_format=layout)
    inject(model, "0", rank=4, **OPTIONS[method])
    perturb(model)
    model.to(memory_format=layout)
    x = torch.randn(3, 12, 20, 20, dtype=dtype).to(memory_format=layout).requires_grad_()
    y = model(x)
    y.backward(torch.randn_like(y))
    for tensor in (y, x.grad):
        assert tensor.is_contiguous(memory_format=layout)
        assert tensor.dtype == dtype
    assert model[0].miss_D.grad.dtype == torch.float32
    for wide in (dtype, torch.float16):  # S
        s = channel_blocks(x.detach().to(wide), 4, wide, method == "alternating")
        assert s.is_contiguous(memory_format=layout)
    assert channel_shards(y.detach(), 4).is_contiguous(memory_format=layout)
    with mock.patch.object(fused_conv, "fits", return_value=False):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(model(x), y, rtol=8 * eps, atol=120 * eps)


@methods
def test_unbatched_and_empty_inputs_and_inference_tensors(method):
    torch.manual_seed(0)
    layer = inject(nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d, rank=2, **OPTIONS[method])
    perturb(layer)
    x = torch.randn(3, 6, 5, 5)
    torch.testing.assert_close(layer(x[1]), layer(x)[1])
    empty = layer(x[:0].requires_grad_())
    assert empty.shape == (0, 4, 5, 5)
    empty.sum().backward()
    assert not layer.miss_D.grad.any()
    with torch.inference_mode():
        inferred = layer(x)
    assert torch.equal(inferred, layer(x))
    for wrong in (torch.ones(1, 6, 5, 5, dtype=torch.int64), torch.ones(1, 5, 5, 5)):
        with pytest.raises(RuntimeError) as base:
            eject(copy.deepcopy(layer))(wrong)
        with pytest.raises(RuntimeError) as ours:
            layer(wrong)
        assert str(ours.value) == str(base.value)


@methods
@pytest.mark.parametrize(
    ("in_channels", "rank", "side"),
    [(64, 16, 14), (16, 4, 14), (64, 16, 12)],  # the last two in parts of the batch
)
def test_memory_of_a_step(method, in_channels, rank, side):
    """MiSSe keeps no tensor as wide as its input, and a step holds hardly more than the base's."""
    base = nn.Conv2d(in_channels, 64, 3, padding=1).requires_grad_(False)
    layer = copy.deepcopy(base)
    inject(layer, nn.Conv2d, rank=rank, **OPTIONS[method])
    x = torch.randn(8, in_channels, side, side, requires_grad=True)
    saved = x.nbytes if method == "miss" else x.nbytes // 4
    assert saved_bytes(layer, x) == saved
    peaks = []
    for module in (base, layer):
        clear = [x, *module.parameters()]
        peaks.append(peak_bytes(lambda module=module: module(x).sum().backward(), clear))
    assert peaks[1] - layer.miss_D.nbytes <= 1.15 * peaks[0]


CLASSES = [
    (MiSSeConv1d, nn.Conv1d, (8, 3)),
    (MiSSConv1d, nn.Conv1d, (3, 10)),
    (MiSSeConv2d, nn.Conv2d, (8, 3)),
    (MiSSConv2d, nn.Conv2d, (3, 10)),
    (MiSSeConv3d, nn.Conv3d, (8, 3)),
    (MiSSConv3d, nn.Conv3d, (3, 10)),
]


@pytest.mark.parametrize(("cls", "plain", "d_shape"), CLASSES)
def test_the_public_classes(cls, plain, d_shape):
    where = {"device": "meta", "dtype": torch.bfloat16}
    options = {"stride": 2, "padding": 1, "dilation": 2, "bias": False, "padding_mode": "reflect"}
    layer = cls(10, 8, 3, 3, **options, scale=2.0, dropout=0.5, **where)
    base = plain(10, 8, 3, **options, **where)
    assert repr(layer) == repr(base).replace(plain.__name__, cls.__name__)[:-1] + (
        ", rank=3, scale=2.0, dropout=0.5)"
    )
    dims = layer.weight.dim() - 2
    assert layer.miss_D.shape == (*d_shape, *(3,) * dims)
    assert (layer.miss_D.dtype, layer.miss_D.device.type) == (torch.float32, "meta")
    flags = {name: p.requires_grad for name, p in layer.named_parameters()}
    assert flags == {"weight": False, "miss_D": True}
    layer.to_empty(device="cpu")
    assert not layer.miss_D.any()
    adopted = plain(10, 8, 3, **options)
    assert cls.adopt_(adopted, 3) is adopted
    assert type(adopted) is cls
    made = inject(nn.Sequential(plain(10, 8, 3)), "0", rank=3, method=cls.miss_form.name)
    assert type(made[0]) is cls
    limit = 10 if cls.miss_form.axis else 8
    for wrong in ({"rank": 0}, {"rank": limit + 1}, {"dropout": 1.0}, {"scale": float("inf")}):
        with pytest.raises(ShapeError, match=next(iter(wrong))):
            cls(10, 8, 3, **{"rank": 2} | wrong)
    with pytest.raises(ShapeError, match="adapter_dtype"):
        cls(10, 8, 3, 2, adapter_dtype=torch.int8)
    with pytest.raises(StateError, match=r"groups=2.*reach over groups"):
        cls(10, 8, 3, 2, groups=2)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Conv2d(4, 4, 3, groups=4), r"groups=4.*miss\.register"),
        (nn.ConvTranspose1d(4, 4, 3), r"ConvTranspose1d.*miss\.register"),
        (nn.ConvTranspose2d(4, 4, 3), r"ConvTranspose2d.*miss\.register"),
        (nn.ConvTranspose3d(4, 4, 3), r"ConvTranspose3d.*miss\.register"),
        (nn.Bilinear(4, 4, 3), r"Bilinear.*miss\.register"),
        (nn.EmbeddingBag(4, 4), r"EmbeddingBag.*miss\.register"),
        (nn.LazyConv2d(4, 3), "run the model once"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), "parametrized"),
    ],
)
def test_refusals_name_the_layer_and_the_way(layer, why):
    before = type(layer)
    with pytest.raises(TargetError, match=f"(?s)'layer'.*{why}|layer.*{why}"):
        inject(nn.ModuleDict({"layer": layer}), "layer", rank=2)
    assert type(layer) is before


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 12, 16, 20],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        num_labels=3,
    )
    return transformers.ResNetForImageClassification(config)


def convnext() -> nn.Module:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 12], depths=[2, 2], num_stages=2)
    config.num_labels = 3
    return transformers.ConvNextForImageClassification(config)


@methods
@pytest.mark.parametrize("build", [resnet, convnext])
def test_a_model_of_transformers_lives_with_adapted_convolutions(method, build, tmp_path):
    torch.manual_seed(0)
    base = build()
    x, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    targets = [nn.Conv2d, nn.Linear]
    model = inject(copy.deepcopy(base), targets, rank=3, exclude="classifier", **OPTIONS[method])
    grouped = {name for name, m in base.named_modules() if getattr(m, "groups", 1) > 1}
    convolutions = {name for name, m in base.named_modules() if isinstance(m, nn.Conv2d)}
    assert set(adapted_modules(model)) >= convolutions - grouped
    assert not grouped & set(adapted_modules(model))
    assert len(grouped) == (4 if build is convnext else 0)
    verify(model, x, backward=True)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(pixel_values=x, labels=labels).loss.backward()
        optimizer.step()
    logits = model.eval()(x).logits
    assert not torch.allclose(logits, base.eval()(x).logits)
    save(model, tmp_path / "adapter.pt")
    fresh = load(copy.deepcopy(base), tmp_path / "adapter.pt").eval()
    assert torch.equal(fresh(x).logits, logits)
    merge(model)
    torch.testing.assert_close(model(x).logits, logits, rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert torch.equal(model(x).logits, logits)
    eject(model)
    assert [*model.state_dict()] == [*base.state_dict()]
    for name in convolutions:
        assert torch.equal(
            model.get_parameter(f"{name}.weight"), base.get_parameter(f"{name}.weight")
        )
