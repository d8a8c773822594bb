"""Adapters over quantised bases: bitsandbytes in 4 and 8 bit, torchao, transformers, PEFT.

The two quantisation libraries come with the extra `test-heavy`: bitsandbytes alone is 60 MB, and
nothing else in the tests needs them. They run on the CPU. bitsandbytes repacks a 4-bit weight at
the first forward in eval mode on CPUs with AVX512-BF16, so that the same layer computes something
else on another CPU. The tests switch that off for bases without adapters.
"""

import copy
import pathlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from miss import (
    AdaptedLayer,
    ShapeError,
    StateError,
    TargetError,
    adapted_modules,
    adapter_parameters,
    disabled,
    eject,
    inject,
    interop,
    load,
    merge,
    save,
    summary,
    unmerge,
    verify,
)
from miss.interop.transformers import AdapterCheckpoints
from miss.layers import host_of
from miss.layers.linear import LinearHost
from tests.battery import Battery, dtypes, ranks
from tests.models import perturb, snapshot
from tests.pretrained import TEXTS
from tests.strategies import OPTIONS, methods
from tests.test_site import HEAVY
from tests.test_site import test_code_of_a_page_runs_as_shown as run_page
from tests.test_trainer import trainer

REASON = "needs the extra `test-heavy`, which the README's command leaves out"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of these packages
    bnb = pytest.importorskip("bitsandbytes", reason=REASON)
    torchao = pytest.importorskip("torchao.quantization", reason=REASON)
    import peft

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@contextmanager
def no_warning_of_ours() -> Iterator[None]:
    """Ours are `UserWarning`s whose place is in this file or in the package."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    ours = [
        str(one.message) for one in caught if "tests/" in one.filename or "/miss/" in one.filename
    ]
    assert not ours


def four_bit(quant_type: str, nested: bool, sizes: tuple[int, int], **options: Any) -> nn.Module:
    o, i = sizes
    kind = {"quant_type": quant_type, "compress_statistics": nested}
    layer = bnb.nn.Linear4bit(i, o, **kind, **options).to("cpu")
    layer.support_avx512bf16_for_cpu = False
    return layer


def eight_bit(sizes: tuple[int, int], kept: bool = False, **options: Any) -> nn.Module:
    o, i = sizes
    return bnb.nn.Linear8bitLt(i, o, has_fp16_weights=kept, **options).to("cpu")


def dequantised(layer: nn.Module) -> Tensor:
    """The weight that a layer of bitsandbytes computes with, in fp32."""
    if isinstance(layer, bnb.nn.Linear4bit):
        state = layer.weight.quant_state
        return bnb.functional.dequantize_4bit(layer.weight.data, state).float()
    codes = layer.weight.data if layer.state.CB is None else layer.state.CB
    scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    return codes.float() * scales.float()[:, None] / 127


class QuantisedBattery(Battery):
    """What is other than for full-precision layers.

    A D is fp64 where the battery says float64, and the layer computes in fp32: the 4-bit kernels of
    bitsandbytes know no float64. Derivatives of all orders, to fp64, are in `tests/test_around.py`.
    """

    TRAINING: ClassVar[bool] = False

    def base(self, dtype: torch.dtype = torch.float64) -> nn.Sequential:
        torch.manual_seed(0)
        layer = self.layer(torch.float32 if dtype == torch.float64 else dtype)
        return nn.Sequential(layer).train(self.TRAINING).requires_grad_(False)

    def input(self, dtype: torch.dtype) -> Tensor:
        kind = torch.float32 if dtype == torch.float64 else dtype
        return torch.randn(2, 3, self.SIZES[1]).to(kind)

    def adapted(self, method: str, rank: int | str, dtype: torch.dtype = torch.float64, **options):
        wide = {"adapter_dtype": torch.float64} if dtype == torch.float64 else {}
        return super().adapted(method, rank, dtype, **wide | options)

    def output(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return x.to(weights["weight"].dtype) @ weights["weight"].mT + weights["bias"]

    def rounded(self, layer: AdaptedLayer) -> dict[str, Tensor]:
        return {"weight": dequantised(layer).double(), "bias": layer.bias.detach().double()}

    def bound(self, layer: AdaptedLayer, x: Tensor, dtype: torch.dtype) -> Tensor:
        return super().bound(layer, x, torch.float32 if dtype == torch.float64 else dtype)

    @methods
    @ranks
    @dtypes
    def test_forward_equals_the_oracle(self, method, rank, dtype):
        model, layer = self.adapted(method, rank, dtype)
        x = self.x(dtype)
        y = model(x)
        assert y.dtype == x.dtype
        assert ((y.double() - self.exact(layer, x)).abs() <= self.bound(layer, x, dtype)).all()

    @methods
    @ranks
    def test_gradients_equal_those_of_the_dense_delta(self, method, rank):
        model, layer = self.adapted(method, rank)
        x = self.x().requires_grad_()
        (d,) = adapter_parameters(model)
        dy = torch.randn(2, 3, self.SIZES[0], generator=torch.Generator().manual_seed(3))
        got = torch.autograd.grad(model(x), (x, d), dy)
        weights = self.rounded(layer)
        weights["weight"] = weights["weight"] + layer.miss_delta_weight()
        want = torch.autograd.grad(self.output(weights, x), (x, d), dy.double())
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=1e-4)

    @methods
    def test_derivatives_of_first_and_second_order(self, method):
        """The kernels of bitsandbytes have no forward-mode derivative, and no float64."""
        _, layer = self.adapted(method, 3)
        x = self.x().requires_grad_()  # else a tangent is lost in bitsandbytes, without a word
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            for module in (layer, self.base()):
                with pytest.raises(RuntimeError, match=r"forward mode AD|jvp"):
                    module(dual)

    @methods
    @ranks
    @dtypes
    def test_merge_rounds_once_and_unmerge_restores_every_bit(self, method, rank, dtype):
        """A quantised weight is not merged, and the model stays as it was."""
        model, layer = self.adapted(method, rank, dtype)
        y, before = model(self.x(dtype)), snapshot(model)
        rule = r"(?s)0: cannot be merged.*quantised.*load the base in half precision"
        for refused in (merge, partial(eject, merge=True)):
            with pytest.raises(StateError, match=rule):
                refused(model)
        assert snapshot(model) == before
        unmerge(model)
        assert not layer.miss_merged
        assert torch.equal(model(self.x(dtype)), y)

    @methods
    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    @pytest.mark.parametrize("merged", [False])
    def test_a_file_goes_round(self, method, suffix, merged, tmp_path):
        model, _ = self.adapted(method, 3)
        y = model(self.x())
        save(model, tmp_path / f"a{suffix}")
        with no_warning_of_ours():
            fresh = load(self.base(), tmp_path / f"a{suffix}")
        assert repr(fresh) == repr(model)
        assert torch.equal(fresh(self.x()), y)

    @methods
    @pytest.mark.parametrize("to_full", [True, False])
    def test_files_move_between_quantised_and_full_bases(self, method, to_full, tmp_path):
        quantised = self.base()
        full = nn.Sequential(nn.Linear(*self.SIZES[::-1])).train(self.TRAINING)
        full[0].weight.data.copy_(dequantised(quantised[0]))
        full[0].bias.data.copy_(quantised[0].bias)
        one, other = (quantised, full) if to_full else (full, quantised)
        inject(one, "0", rank=3, scale=2.0, **OPTIONS[method])
        perturb(one)
        save(one, tmp_path / "a.safetensors")
        with no_warning_of_ours():
            load(other, tmp_path / "a.safetensors")
            load(other, tmp_path / "a.safetensors")  # into the same adapters
        torch.testing.assert_close(other(self.x()), one(self.x()), rtol=1e-4, atol=1e-4)
        if to_full:
            merge(other)
            with torch.no_grad():
                torch.testing.assert_close(other(self.x()), one(self.x()), rtol=1e-4, atol=1e-4)

    @methods
    @pytest.mark.parametrize("baked", [False])
    def test_eject_leaves_the_layer_as_it_was(self, method, baked):
        super().test_eject_leaves_the_layer_as_it_was(method, baked)

    @methods
    @ranks
    def test_compiled_in_one_graph_equals_eager(self, method, rank):
        """bitsandbytes breaks the graph itself; the parts give what eager gives."""
        torch.compiler.reset()
        model, layer = self.adapted(method, rank)
        compiled = torch.compile(layer, backend="aot_eager")
        x = self.x().requires_grad_()
        outputs = compiled(x), layer(x)
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
        wanted = (x, *adapter_parameters(model))
        for pair in zip(*(torch.autograd.grad(y.square().sum(), wanted) for y in outputs)):
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)

    @methods
    def test_transforms_of_functorch(self, method):
        """The nodes of bitsandbytes cannot be transformed, adapted or not; `verify` needs none."""
        _, layer = self.adapted(method, 3)
        x = self.x().requires_grad_()
        for module in (layer, self.base()):
            with pytest.raises(RuntimeError, match=r"functorch|setup_context|vmap"):
                torch.func.grad(lambda x, f=module: f(x).sum())(x)

    @methods
    def test_meta_and_initialisers_leave_d_zero(self, method):
        """A packed weight cannot be made anew on meta, so only D is asked for."""
        _, layer = self.adapted(method, 3)
        layer.miss_reset_adapter()
        assert not any(d.any() for d in adapter_parameters(layer))

    @methods
    def test_another_shape_is_an_error_and_never_another_form(self, method):
        for place in ("sizes", "d"):
            model, layer = self.adapted(method, 3)
            if place == "sizes":
                layer.out_features *= 2
            else:
                layer._parameters["miss_D"] = nn.Parameter(torch.cat([layer.miss_D.detach()] * 2))
            rule = r"(?s)another shape than when it was adapted.*eject"
            with pytest.raises(ShapeError, match=rule):
                model(self.x())

    @methods
    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("seam", [True, False])  # of the plain path, which an own seam takes
    def test_checkpointing_gives_the_same_gradients(self, method, reentrant, seam):
        model, layer = self.adapted(method, 3, torch.float32)
        if not seam:
            layer.miss_delta = partial(type(layer).miss_delta, layer)
        found = []
        for run in (model, partial(checkpoint, model, use_reentrant=reentrant)):
            model.zero_grad()
            x = self.x(torch.float32).requires_grad_()
            run(x).square().sum().backward()
            found.append((x.grad, *(d.grad for d in adapter_parameters(model))))
        for pair in zip(*found):
            assert torch.equal(*pair)

    @methods
    @dtypes
    def test_the_fast_path_equals_the_plain_one(self, method, dtype):
        model, layer = self.adapted(method, 3, dtype)
        x = self.x(dtype)
        y = model(x)
        layer.miss_delta = partial(type(layer).miss_delta, layer)  # a seam of its own
        bound = self.bound(layer, x, dtype)
        assert ((y.double() - model(x).double()).abs() <= bound).all()
        layer.miss_delta = lambda x, y: y
        assert torch.equal(model(x), self.base(dtype)(x))


class TestNF4(QuantisedBattery):
    def layer(self, dtype: torch.dtype) -> nn.Module:
        return four_bit("nf4", False, self.SIZES, compute_dtype=dtype)


class TestFP4Nested(QuantisedBattery):
    def layer(self, dtype: torch.dtype) -> nn.Module:
        return four_bit("fp4", True, self.SIZES, compute_dtype=dtype)


class TestInt8(QuantisedBattery):
    """In training mode; in eval mode the base rounds its input too, which the oracle does not."""

    TRAINING = True

    def layer(self, dtype: torch.dtype) -> nn.Module:
        return eight_bit(self.SIZES)

    @methods
    def test_eval_mode_adds_the_delta_to_what_the_base_gives(self, method):
        model, layer = self.adapted(method, 3, torch.float32)
        x = self.x(torch.float32)
        delta = x @ layer.miss_delta_weight().T
        got = model.eval()(x) - self.base(torch.float32).eval()(x)
        torch.testing.assert_close(got, delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("base", "kind"),
    [
        (partial(four_bit, "nf4", False), "Linear4bit"),
        (partial(four_bit, "nf4", True), "Linear4bit"),
        (partial(four_bit, "fp4", True), "Linear4bit"),
        (lambda sizes: bnb.nn.LinearNF4(*sizes[::-1]).to("cpu"), "LinearNF4"),
        (eight_bit, "Linear8bitLt"),
        (partial(eight_bit, kept=True), "Linear8bitLt"),
        (partial(eight_bit, threshold=6.0), "Linear8bitLt"),
    ],
)
def test_kinds_of_bitsandbytes_train_in_both_modes(base: Callable[..., nn.Module], kind: str):
    """Evaluation between steps takes no gradient away, on CPUs that repack weights too."""
    torch.manual_seed(0)
    layers = [base((64, 128)), nn.Tanh(), base((32, 64))]
    for layer in layers:
        layer.__dict__.pop("support_avx512bf16_for_cpu", None)
    del layers  # the layers of the model are as bitsandbytes makes them
    model = nn.Sequential(*(base(sizes) for sizes in ((64, 128), (32, 64))))
    for layer in model if kind != "Linear8bitLt" else ():
        layer.support_avx512bf16_for_cpu = True  # as on a CPU with AVX512-BF16
    inject(model, "all-linear", rank=4)
    assert summary(model).layers[0].shape == (64, 128)
    assert all(type(layer).__name__ == f"MiSSe{kind}" for layer in model)
    perturb(model)
    x = torch.randn(3, 128)

    def grads() -> list[Tensor]:
        model.zero_grad()
        model.train()(x).square().sum().backward()
        return [d.grad for d in adapter_parameters(model)]

    before = grads()
    with torch.no_grad():
        y = model.eval()(x)
        with disabled(model):
            model(x)
    verify(model, x, backward=True)
    assert model.state_dict()
    assert all(torch.equal(*pair) for pair in zip(before, grads()))
    with torch.no_grad():
        assert torch.equal(model.eval()(x), y)
    assert len({(d.dtype, d.grad.dtype) for d in adapter_parameters(model)}) == 1


def whole_numbers(bits: int) -> Any:
    if bits == 8:
        return torchao.Int8WeightOnlyConfig()
    return torchao.IntxWeightOnlyConfig(torch.int4, granularity=torchao.PerGroup(32))


@methods
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchao_through_the_host_of_linear(tmp_path, method, bits, dtype):
    """Its weight is a tensor subclass in a plain `nn.Linear`, which knows neither tolist nor equal.

    So the battery, which compares Parameters, does not fit.
    """
    torch.manual_seed(0)
    full = nn.Sequential(nn.Linear(64, 32, dtype=dtype)).requires_grad_(False)
    base = copy.deepcopy(full)
    torchao.quantize_(base, whole_numbers(bits))
    model = inject(copy.deepcopy(base), "0", rank=4, scale=0.5, **OPTIONS[method])
    layer = model[0]
    assert (type(base[0]), layer.miss_host) == (nn.Linear, LinearHost)
    x = torch.randn(5, 64).to(dtype).requires_grad_()
    assert torch.equal(model(x), base(x))
    perturb(model)
    weight = base[0].weight.dequantize().double()
    dense = (weight + layer.delta_weight().detach().double()).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, want = model(x), nn.functional.linear(exact, dense, base[0].bias.double())
    close = partial(torch.testing.assert_close, rtol=40 * torch.finfo(dtype).eps)
    close(y.double(), want, atol=400 * torch.finfo(dtype).eps)
    y.sum().backward(), want.sum().backward()
    close(x.grad.double(), exact.grad, atol=400 * torch.finfo(dtype).eps)
    d = layer.miss_D.detach().double().requires_grad_()
    config = layer.miss_configs["weight"]
    (config.form.delta(d, config) * 0.5 * dense.grad).sum().backward()
    close(layer.miss_D.grad.double(), d.grad, atol=400 * torch.finfo(dtype).eps)
    verify(model, x)
    with disabled(model):
        assert torch.equal(model(x), base(x))
    assert torch.equal(copy.deepcopy(model)(x), y)
    for refused in (merge, partial(eject, merge=True)):
        with pytest.raises(
            StateError, match=r"is quantised \((Int|.*)Tensor.*load the base in half"
        ):
            refused(model)
    save(model, tmp_path / "a.safetensors")
    with no_warning_of_ours():
        assert torch.equal(load(copy.deepcopy(base), tmp_path / "a.safetensors")(x), y)
        load(copy.deepcopy(full), tmp_path / "a.safetensors")
    eject(model)
    assert torch.equal(model(x), base(x))


def tiny(kind: str, folder: pathlib.Path, name: str = "LlamaForCausalLM") -> nn.Module:
    """A llama saved to disk and loaded with a quantised body, in training mode."""
    if not folder.exists():
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 31}
        config = transformers.LlamaConfig(**sizes, **heads)
        getattr(transformers, name)(config).save_pretrained(folder)
    if kind == "full":
        return getattr(transformers, name).from_pretrained(folder)
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    if kind != "int8":
        nested = kind == "nf4, nested"
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested
        )
    given = {"quantization_config": config, "device_map": "cpu"}
    return getattr(transformers, name).from_pretrained(folder, **given)


KINDS = ["nf4", "nf4, nested", "int8"]
TOKENS = torch.stack([TEXTS[0], TEXTS[1]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prepared", [False, True])
def test_a_model_of_transformers(tmp_path: pathlib.Path, kind: str, prepared: bool):
    base = tiny(kind, tmp_path / "base")
    logits = base.train()(TOKENS).logits
    if prepared:
        base = peft.prepare_model_for_kbit_training(base)
    with no_warning_of_ours():
        model = inject(base, "all-linear", rank=4)
    assert len(adapted_modules(model)) == 14
    plain = summary(inject(tiny("full", tmp_path / "base"), "all-linear", rank=4))
    assert str(summary(model)) == str(plain)  # packed weights count in full
    assert all(d.dtype == torch.float32 for d in adapter_parameters(model))
    torch.testing.assert_close(model.train()(TOKENS).logits, logits)
    verify(model, TOKENS, backward=True)
    perturb_a_little(model)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(d.grad.any() for d in adapter_parameters(model))
    save(model, tmp_path / "a.safetensors")
    with no_warning_of_ours():
        again = load(tiny(kind, tmp_path / "base"), tmp_path / "a.safetensors").train()
        full = load(tiny("full", tmp_path / "base"), tmp_path / "a.safetensors")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    merge(full)
    save(full, tmp_path / "b.safetensors")
    with no_warning_of_ours():
        load(again, tmp_path / "b.safetensors")


def perturb_a_little(model: nn.Module) -> None:
    torch.manual_seed(1)
    for d in adapter_parameters(model):
        nn.init.normal_(d, std=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_is_the_referee(tmp_path: pathlib.Path, kind: str):
    """PEFT reads our MiSS and our LoRA over the quantised base, and we read its MiSS."""
    model = inject(tiny(kind, tmp_path / "base"), "all-linear", rank=4).train()
    perturb_a_little(model)
    want = model(TOKENS).logits
    interop.peft.save(model, tmp_path / "miss")
    interop.lora.save(model, tmp_path / "lora")
    for name in ("miss", "lora"):
        theirs = peft.PeftModel.from_pretrained(tiny(kind, tmp_path / "base"), tmp_path / name)
        torch.testing.assert_close(theirs.train()(TOKENS).logits, want)
    config = peft.MissConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny(kind, tmp_path / "base"), config)
    for key, block in theirs.named_parameters():
        if "miss_block" in key:
            nn.init.normal_(block.data, std=0.02)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = interop.peft.load(tiny(kind, tmp_path / "base"), tmp_path / "theirs").train()
    torch.testing.assert_close(theirs.train()(TOKENS).logits, ours(TOKENS).logits)
    for method in ("miss", "alternating"):
        model = inject(tiny(kind, tmp_path / "base"), "all-linear", rank=4, **OPTIONS[method])
        perturb_a_little(model)
        interop.lora.save(model, tmp_path / method)
        theirs = peft.PeftModel.from_pretrained(tiny(kind, tmp_path / "base"), tmp_path / method)
        torch.testing.assert_close(theirs.train()(TOKENS).logits, model.train()(TOKENS).logits)


class AdapterTrainer(AdapterCheckpoints, transformers.Trainer):
    pass


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_takes_it_writes_and_resumes(tmp_path, kind, checkpointing):
    def adapted() -> nn.Module:
        return inject(tiny(kind, tmp_path / "base"), "all-linear", rank=4)

    settings: dict[str, Any] = {"gradient_checkpointing": checkpointing}
    settings |= {"eval_strategy": "steps", "eval_steps": 2}  # an evaluation changes nothing
    model = adapted()
    before = model.config.to_dict(), set(model.__dict__)
    whole = trainer(model, tmp_path / "whole", AdapterTrainer, **settings)
    full = inject(tiny("full", tmp_path / "base"), "all-linear", rank=4)
    config = full.config.to_dict()
    trainer(full, tmp_path / "full", AdapterTrainer, **settings)
    changed = [key for key, value in full.config.to_dict().items() if value != config.get(key)]
    now = {k: v for k, v in model.config.to_dict().items() if k not in changed}
    assert now == {k: v for k, v in before[0].items() if k not in changed}  # only by the Trainer
    assert set(model.__dict__) == before[1]
    assert model.is_quantized
    assert not model._hf_peft_config_loaded
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    names = {path.name for path in (tmp_path / "whole").rglob("*")}
    assert "adapter.safetensors" in names
    assert "model.safetensors" not in names
    resumed = adapted()
    again = trainer(resumed, tmp_path / "resumed", AdapterTrainer, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for one, other in zip(adapter_parameters(model), adapter_parameters(resumed)):
        assert torch.equal(one, other)


def test_what_a_trainer_still_refuses(tmp_path: pathlib.Path):
    """No adapter, no mixin; and what is refused leaves no mark on the model."""
    bare, model = tiny("nf4", tmp_path / "base"), tiny("nf4", tmp_path / "base")
    inject(model, "all-linear", rank=4)
    for kind, given in ((AdapterTrainer, bare), (transformers.Trainer, model)):
        with pytest.raises(ValueError, match="purely quantized"):
            trainer(given, tmp_path / "out", kind)
        assert "_hf_peft_config_loaded" not in given.__dict__
    with pytest.raises(RuntimeError, match="either a `model` or `model_init`"):
        trainer(None, tmp_path / "out", AdapterTrainer)
    made: list[nn.Module] = []

    def init() -> nn.Module:
        made.append(inject(tiny("nf4", tmp_path / "base"), "all-linear", rank=4))
        return made[-1]

    trainer(None, tmp_path / "out", AdapterTrainer, given={"model_init": init})
    assert "_hf_peft_config_loaded" not in made[0].__dict__


def test_bad_input():
    sizes = (64, 128)
    raw = bnb.nn.Linear4bit(128, 64)
    cases = {
        "4 bit, not quantised": (raw, r"Linear4bit whose weight, on cpu, is not quantised yet"),
        "8 bit, not quantised": (
            bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False),
            r"Linear8bitLt whose weight, on cpu, is not quantised yet: .*model.to\(device\)",
        ),
        "on meta": (
            bnb.nn.Linear4bit(128, 64, device="meta"),
            r"Linear4bit whose weight, on meta, is not quantised yet",
        ),
    }
    packed = four_bit("nf4", False, sizes)
    packed.weight.quant_state.packing_format_for_cpu = True
    cases["repacked"] = packed, r"repacked for inference.*inject before"

    class Own(bnb.nn.Linear4bit):
        pass

    cases["a subclass"] = Own(128, 64), r"Own with a forward of its own.*miss.register"
    for name, (layer, rule) in cases.items():
        half = nn.ModuleDict({"full": nn.Linear(128, 64), "packed": layer})
        before = list(half.named_parameters())
        with pytest.raises(TargetError, match=rf"(?s){rule}"):
            inject(half, ["full", "packed"], rank=2)
        assert [(key, id(p)) for key, p in before] == [
            (k, id(p)) for k, p in half.named_parameters()
        ]
        inject(half, "all-linear", rank=2)
        assert list(adapted_modules(half)) == ["full"], name
    half = nn.Sequential(nn.Linear(128, 64), four_bit("nf4", True, (32, 64)))
    inject(half, "all-linear", rank=4)
    assert half(torch.randn(3, 128)).shape == (3, 32)
    with pytest.raises(StateError, match=r"1: cannot be merged"):
        merge(half)  # and so is not half merged
    assert not half[0].merged
    for layer in (four_bit("nf4", False, sizes), eight_bit(sizes)):
        plain = copy.deepcopy(layer)
        inject(layer, lambda name, module: True, rank=2)
        messages = []
        for one in (layer.train(), plain.train()):
            with pytest.raises((RuntimeError, AssertionError)) as caught:
                one(torch.ones(2, 100))
            messages.append(str(caught.value))
        assert messages[0] == messages[1]  # the base's own
        with pytest.raises((ShapeError, RuntimeError), match=r"floating dtype|type Long"):
            layer(torch.ones(2, 128, dtype=torch.int64))
        assert layer.train()(torch.ones(0, 128)).shape == (0, 64)
    with pytest.raises(ShapeError, match=r"1 <= rank <= 128"):
        inject(nn.Sequential(four_bit("nf4", False, sizes)), "0", rank=129)
    model = inject(nn.Sequential(four_bit("nf4", False, sizes)), "0", rank=2)
    assert host_of(eject(model)[0]).__name__ == "Linear4bitHost"


@pytest.mark.parametrize("page", HEAVY)
def test_code_of_the_pages_on_quantised_models(page, tmp_path, monkeypatch, capsys):
    run_page(page, tmp_path, monkeypatch, capsys)
