import copy
import pickle
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from miss import (
    MiSSeLinear,
    ShapeError,
    StateError,
    TargetError,
    adapted_modules,
    adapter_parameters,
    eject,
    inject,
    summary,
    verify,
)
from miss.parents import keep_slow_path
from tests.models import TOKENS, Decoder, perturb, snapshot
from tests.strategies import FORMS, OPTIONS, methods

LINEAR_NAMES = ["q_proj", "k_proj", "v_proj", "out_proj", "mlp.0", "mlp.2", "lm_head"]


@given(
    st.sampled_from(list(FORMS)),
    st.sets(st.sampled_from(LINEAR_NAMES), min_size=1),
    st.integers(1, 8),
    st.booleans(),
    st.booleans(),
)
def test_inject_then_eject_leaves_the_model_as_it_was(
    method: str, targets: set[str], rank: int, training: bool, freeze: bool
):
    model = Decoder().train(training)
    model.layers[0].self_attn.q_proj.user_attribute = "kept"
    hook_calls: list[nn.Module] = []
    model.layers[0].mlp[0].register_forward_hook(
        lambda module, args, output: hook_calls.append(module)
    )
    before, output = snapshot(model), model(TOKENS)
    assert inject(model, targets, rank=rank, **OPTIONS[method], freeze=freeze) is model
    assert torch.equal(model(TOKENS), output)
    assert {type(m) for m in adapted_modules(model).values()} == {FORMS[method].func}
    assert all(m.training == training for m in model.modules())
    perturb(model)
    assert not torch.equal(model(TOKENS), output)
    assert eject(model) is model
    assert torch.equal(model(TOKENS), output)
    if freeze:
        assert not any(p.requires_grad for p in model.parameters())
        model.requires_grad_(True)
    assert snapshot(model) == before
    assert len(hook_calls) == 4
    eject(model)


@methods
def test_keys_identity_and_aliases(method: str):
    model = Decoder()
    keys, modules = set(model.state_dict()), [id(m) for m in model.modules()]
    inject(model, "mlp.2", rank=2, **OPTIONS[method])
    assert [id(m) for m in model.modules()] == modules
    assert set(model.state_dict()) - keys == {
        "layers.0.mlp.2.miss_D",
        "layers.1.mlp.2.miss_D",
        "alias.miss_D",
    }
    assert model.alias is model.layers[1].mlp[2]
    assert list(adapted_modules(model)) == ["layers.0.mlp.2", "layers.1.mlp.2"]
    assert len(list(adapter_parameters(model))) == 2


def test_the_root_itself():
    linear = nn.Linear(6, 4)
    assert inject(linear, nn.Linear, rank=2) is linear
    assert isinstance(linear, MiSSeLinear)
    assert list(adapted_modules(linear)) == [""]
    verify(linear, torch.randn(6))
    assert type(eject(linear)) is nn.Linear


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 9}, ShapeError, r"layers\.0\.mlp\.0: rank.*in_features.*1 <= rank <= 8.*rank=9"),
        (
            {"rank": 12, "method": "miss"},
            ShapeError,
            r"lm_head: rank.*out_features.*1 <= rank <= 11.*rank=12",
        ),
        ({"method": []}, ShapeError, "unknown method"),
        ({"scale": float("inf")}, ShapeError, "scale=inf"),
        ({"targets": ["mlp.0", "nope"]}, TargetError, "nope"),
        ({"targets": ["mlp.0", "norm"]}, TargetError, "LayerNorm"),
        ({"exclude": "nope"}, TargetError, "exclude"),
        ({"trainable": "nope"}, TargetError, "trainable"),
    ],
)
def test_failed_inject_changes_nothing(
    options: dict[str, object], error: type[Exception], message: str
):
    model = Decoder()
    before = snapshot(model)
    arguments = {"targets": ["mlp.0", "lm_head"], "rank": 2} | options
    with pytest.raises(error, match=f"(?s){message}"):
        inject(model, **arguments)
    assert snapshot(model) == before


def test_rank_and_scale_can_be_functions():
    asked = []

    def rank(name: str, module: nn.Module) -> int:
        asked.append((name, module))
        return min(12, module.in_features)

    model = Decoder()
    inject(model, ["mlp.0", "mlp.2"], rank=rank, scale=lambda name, module: 1 / module.in_features)
    layers = adapted_modules(model)
    settings = {name: (layer.rank, layer.scale) for name, layer in layers.items()}
    first = {"layers.0.mlp.0": (8, 1 / 8), "layers.0.mlp.2": (12, 1 / 16)}
    assert settings == first | {name.replace("0", "1", 1): each for name, each in first.items()}
    assert asked == list(layers.items())
    before = snapshot(model)
    for wrong in (0, "4", None, 2.0, True):
        with pytest.raises(ShapeError, match=rf"q_proj: rank.*\n.*\n.*rank={wrong!r}"):
            inject(model, "q_proj", rank=lambda name, module, wrong=wrong: wrong)
    with pytest.raises(ShapeError, match="scale='1'"):
        inject(model, "q_proj", rank=2, scale=lambda name, module: "1")
    with pytest.raises(ZeroDivisionError):
        inject(model, "q_proj", rank=lambda name, module: 1 // 0)
    assert snapshot(model) == before


def test_all_layers_too_small_for_the_rank_are_named_at_once():
    with pytest.raises(ShapeError) as error:
        inject(Decoder(), ["mlp.0", "mlp.2", "lm_head"], rank=17)
    text = str(error.value)
    for name, limit in (("layers.1.mlp.0", 8), ("layers.0.mlp.2", 16), ("lm_head", 8)):
        assert f"{name} (at most {limit})" in text
    assert text.startswith("layers.0.mlp.0: rank of MiSSe must be an int from 1 to in_features")
    assert "do:       give a smaller rank, exclude these layers, or pass rank=lambda" in text
    inject(Decoder(), ["mlp.0", "mlp.2"], rank=lambda name, module: min(17, module.in_features))


def test_failed_allocation_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    model = Decoder()
    before, calls, zeros = snapshot(model), [], torch.zeros

    def failing(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError
        return zeros(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros", failing)
    with pytest.raises(MemoryError):
        inject(model, "all-linear", rank=2)
    monkeypatch.undo()
    assert snapshot(model) == before


def test_a_model_that_is_none():
    for model in (None, 5, nn.Linear):
        with pytest.raises(TargetError, match=r"(?s)model.*torch\.nn\.Module"):
            inject(model, "q_proj")


def test_repeated_calls():
    model = inject(Decoder(), "q_proj", rank=2)
    before = snapshot(model)
    for targets in ("q_proj", "all-linear", "*q_proj", nn.Linear):
        with pytest.raises(StateError, match=r"layers\.0\.self_attn\.q_proj: is adapted already"):
            inject(model, targets, rank=2)
    assert snapshot(model) == before
    inject(model, "all-linear", rank=3, method="miss", exclude="q_proj")
    assert summary(model).layers[0].method == "misse"
    assert {layer.method for layer in summary(model).layers} == {"misse", "miss"}


def test_freezing():
    model = inject(Decoder(), "q_proj", rank=2, trainable=nn.LayerNorm)
    flags = {name for name, p in model.named_parameters() if p.requires_grad}
    trained = ("norm.weight", "norm.bias", "self_attn.q_proj.miss_D")
    first = {f"layers.0.{name}" for name in trained}
    assert flags == first | {f"layers.1.{name}" for name in trained}
    model.layers[0].mlp.requires_grad_(True)  # a user's own choice between two calls stays
    inject(model, "layers.0.mlp.0", rank=2)
    now = {name for name, p in model.named_parameters() if p.requires_grad}
    assert now - flags == {"layers.0.mlp.0.miss_D", "layers.0.mlp.2.weight", "layers.0.mlp.2.bias"}
    free = inject(Decoder(), "q_proj", rank=2, freeze=False)
    assert all(p.requires_grad for p in free.parameters())
    frozen = Decoder().requires_grad_(False)
    inject(frozen, "q_proj", rank=2, trainable="norm")
    inject(frozen, "v_proj", rank=2, trainable="*.2.bias")  # later calls switch on too
    assert frozen.get_parameter("layers.0.mlp.2.bias").requires_grad
    inject(frozen, "k_proj", rank=2, trainable="embed.weight")
    assert frozen.get_parameter("embed.weight").requires_grad
    on = {name for name, p in frozen.named_parameters() if p.requires_grad and "miss_D" not in name}
    norms = {"layers.0.norm.weight", "layers.0.norm.bias"}
    norms |= {"layers.1.norm.weight", "layers.1.norm.bias"}
    assert on == norms | {"layers.0.mlp.2.bias", "layers.1.mlp.2.bias", "embed.weight"}


def test_the_first_call_freezes_whatever_is_in_the_model_before():
    model = nn.Sequential(MiSSeLinear(4, 4, 2), nn.Linear(4, 4), nn.Linear(4, 4))
    inject(torch.compile(model, backend="eager"), "1", rank=2)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "0.miss_D",
        "1.miss_D",
    }
    model[2].requires_grad_(True)
    inject(model, "2", rank=2, trainable="2")
    assert model[2].weight.requires_grad
    eject(model)
    inject(model, "1", rank=2)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"1.miss_D"}


def test_a_lazy_module_that_is_no_target():
    model = inject(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3)), "0", rank=2)
    model(torch.randn(2, 4))
    assert not model[1].weight.requires_grad


def test_tied_weights_stay_tied():
    model = inject(Decoder(), "lm_head", rank=2)
    assert model.lm_head.weight is model.embed.weight
    assert model(TOKENS).shape == (2, 4, 11)
    both = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    both[1].weight = both[0].weight
    inject(both, "all-linear", rank=2)
    assert both[0].miss_D is not both[1].miss_D
    assert both[1].weight is both[0].weight


@methods
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
def test_only_adapters_receive_gradients_and_move(method: str, checkpointing: str | None):
    torch.manual_seed(0)
    model = inject(Decoder(checkpointing=checkpointing), "all-linear", rank=2, **OPTIONS[method])
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == name.endswith("miss_D"), name
        assert torch.equal(p, before[name]) != name.endswith("miss_D"), name


@methods
def test_checkpointing_gives_the_same_gradients(method: str):
    gradients = []
    for checkpointing in (None, "reentrant", "non-reentrant"):
        torch.manual_seed(0)
        model = inject(
            Decoder(checkpointing=checkpointing), "all-linear", rank=2, **OPTIONS[method]
        )
        perturb(model)
        model(TOKENS).sum().backward()
        gradients.append([d.grad for d in adapter_parameters(model)])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            assert torch.equal(a, b)


@methods
def test_inject_after_compile_takes_effect(method: str):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    compiled, x = torch.compile(model, backend="eager"), torch.randn(2, 6)
    base = compiled(x)
    inject(compiled, "all-linear", rank=2, **OPTIONS[method])
    assert torch.equal(compiled(x), base)
    perturb(model)
    assert torch.equal(compiled(x), model(x))
    assert not torch.equal(compiled(x), base)
    eject(compiled)
    assert torch.equal(compiled(x), base)


@methods
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_transformer_encoder_in_every_mode(method: str):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2
    )
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    before = snapshot(encoder)
    inject(encoder, ["linear1", "linear2"], rank=2, **OPTIONS[method])
    assert [keep_slow_path in layer._forward_hooks.values() for layer in encoder.layers] == [
        True,
        True,
    ]
    perturb(encoder)
    expected = encoder.train()(x, src_key_padding_mask=mask)[~mask]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got = encoder.eval()(x, src_key_padding_mask=mask)[~mask]
            torch.testing.assert_close(got, expected)
            torch.testing.assert_close(encoder.eval()(x), encoder.train()(x))
            verify(encoder.eval(), x)
    assert not encoder.eval()(x, src_key_padding_mask=mask, mask=None).isnan().any()
    with torch.inference_mode():
        torch.testing.assert_close(encoder.eval()(x, src_key_padding_mask=mask)[~mask], expected)
    other = pickle.loads(pickle.dumps(copy.deepcopy(encoder)))
    with torch.no_grad():
        assert torch.equal(other(x), encoder(x))
    for part in (other, encoder):
        eject(part)
    assert not any(m._forward_hooks for m in other.modules())
    encoder.requires_grad_(True).train()
    assert snapshot(encoder) == before


@methods
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_transformer_encoder_trains_in_eval_mode_under_a_padding_mask(method: str):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2
    ).eval()
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    base = encoder(x, None, mask)
    inject(encoder, "linear1", rank=2, **OPTIONS[method])
    for arguments in (
        ((x, None, mask), {}),
        ((x,), {"src_key_padding_mask": mask}),
        ((), {"src": x, "src_key_padding_mask": mask}),
    ):
        y = encoder(*arguments[0], **arguments[1])
        torch.testing.assert_close(y, base)
        y.sum().backward()
    assert x.grad is None
    assert not x.requires_grad
    assert all(d.grad is not None for d in adapter_parameters(encoder))
    eject(encoder)
    assert not encoder._forward_pre_hooks


def test_encoder_hook_is_one_and_leaves_with_the_last_adapter():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layer.register_forward_hook(print)
    inject(layer, "linear1", rank=2)
    inject(layer, "linear2", rank=2)
    assert list(layer._forward_hooks.values()) == [print, keep_slow_path]
    eject(layer.linear1)
    assert keep_slow_path in layer._forward_hooks.values()
    eject(layer.linear2)
    assert keep_slow_path in layer._forward_hooks.values()
    eject(layer)
    assert list(layer._forward_hooks.values()) == [print]


def test_multihead_attention_is_named():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    with pytest.raises(TargetError, match=r"(?s)0\.out_proj.*'0' \(MultiheadAttention\)"):
        inject(model, ["out_proj", "1"], rank=2)
    model[0].out_proj = nn.Linear(8, 8)  # of the right type, and read as a weight all the same
    with pytest.raises(TargetError, match="MultiheadAttention"):
        inject(model, "0.out_proj", rank=2)
    inject(model, "all-linear", rank=2)
    assert list(adapted_modules(model)) == ["1"]
    assert list(summary(model).skipped) == ["0.out_proj"]
    eject(model)
    assert not summary(model).skipped


def test_eject_refuses_a_class_that_was_swapped_since():
    model = inject(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "all-linear", rank=2)
    swapped = type("FSDPMiSSeLinear", (MiSSeLinear,), {})
    model[1].__class__ = swapped
    with pytest.raises(
        StateError, match=r"1: its class was replaced after injection.*\n.*\n.*FSDPMiSSeLinear"
    ):
        eject(model)
    assert [type(m) for m in model] == [MiSSeLinear, swapped]
    assert len(adapted_modules(model)) == 2


def test_devices_dtypes_and_inference_mode():
    with torch.device("meta"):
        model = Decoder()
    inject(model, "all-linear", rank=2)
    assert all(d.is_meta for d in adapter_parameters(model))
    model.to_empty(device="cpu")
    assert not any(d.any() for d in adapter_parameters(model))
    for dtype in (torch.bfloat16, torch.float16):
        ds = adapter_parameters(inject(Decoder().to(dtype), "q_proj", rank=2))
        assert {d.dtype for d in ds} == {torch.float32}
    (d, _) = adapter_parameters(inject(Decoder().double(), "q_proj", rank=2))
    assert d.dtype == torch.float64
    model = inject(Decoder(), "q_proj", rank=2, adapter_dtype=torch.float16)
    assert adapter_parameters(model)[0].dtype == torch.float16
    with torch.inference_mode():
        model = inject(Decoder(), "q_proj", rank=2)
    assert not any(d.is_inference() for d in adapter_parameters(model))


def test_dtensor_weights_are_refused(monkeypatch: pytest.MonkeyPatch):
    import torch.distributed as dist
    from torch.distributed.tensor import distribute_tensor

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        model = nn.Sequential(nn.Linear(4, 4))
        model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh))
        with pytest.raises(TargetError, match=r"DTensor.*inject first"):
            inject(model, "0", rank=2)
    finally:
        dist.destroy_process_group()


def test_nothing_outlives_the_model():
    model = inject(Decoder(), "all-linear", rank=2)
    alive = weakref.ref(model.layers[0].mlp[0])
    del model
    assert alive() is None
