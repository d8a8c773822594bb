import copy
import threading

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from miss import (
    StateError,
    TargetError,
    adapted_modules,
    disabled,
    eject,
    inject,
    merge,
    summary,
    verify,
)
from tests.models import TOKENS, Decoder, adapted_decoder, perturb
from tests.strategies import OPTIONS, methods


def test_summary_counts():
    model = nn.Sequential(
        nn.Linear(8, 16), nn.MultiheadAttention(16, 2), nn.LayerNorm(16), nn.Linear(16, 3)
    )
    inject(model, "*", rank=4, method="miss", exclude="3", trainable=nn.LayerNorm)
    result = summary(model)
    base = sum(p.numel() for p in Decoder().parameters())
    assert [(r.name, r.shape, r.method, r.rank, r.trainable) for r in result.layers] == [
        ("0", (16, 8), "miss", 4, 32)
    ]
    assert result.total == sum(p.numel() for p in model.parameters())
    assert (result.trainable, result.adapter, result.adapted_base) == (64, 32, 16 * 8 + 16)
    assert result.other_trainable == {"2": 32}
    assert list(result.skipped) == ["1.out_proj"]
    assert result.percent == pytest.approx(100 * 64 / result.total)
    assert result.share == pytest.approx(144 / (result.total - 32))
    for text in ("16 x 8", "64 of", "also trainable: 2 (32)", "skipped: 1.out_proj"):
        assert text in str(result)
    tied = summary(inject(Decoder(), ["lm_head", "q_proj"], rank=2))
    assert tied.total - tied.adapter == base  # the tied weight and the alias count once


def test_summary_names_the_large_weights_that_no_adapter_reaches():
    sizes = {"hidden_size": 8, "moe_intermediate_size": 6, "num_hidden_layers": 1, "head_dim": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4}
    config = transformers.Qwen3MoeConfig(**sizes, **heads, vocab_size=20)
    model = inject(transformers.Qwen3MoeForCausalLM(config), "q_proj", rank=2)
    experts = "model.layers.0.mlp.experts."
    counts = {"model.embed_tokens.weight": 20 * 8, "model.layers.0.mlp.gate.weight": 4 * 8}
    counts |= {f"{experts}gate_up_proj": 4 * 12 * 8, f"{experts}down_proj": 4 * 8 * 6}
    assert summary(model).unreached == counts
    assert f"no adapter reaches: {experts}gate_up_proj (384)" in str(summary(model))
    inject(model, "k_proj", rank=2, trainable=["embed_tokens", "gate"])
    assert set(summary(model).unreached) == {f"{experts}gate_up_proj", f"{experts}down_proj"}
    with pytest.raises(TargetError, match=r"mean 'experts\.gate_up_proj' \(a Parameter\) or"):
        inject(model, "gate_proj", rank=2)


def test_summary_of_models_without_adapters():
    assert summary(nn.ReLU()).percent == summary(nn.ReLU()).share == 0
    assert "0 of 0" in str(summary(nn.ReLU()))
    assert summary(nn.Sequential(nn.LazyLinear(3))).total == 0


@methods
def test_disabled_nests_and_survives_errors(method: str):
    model = adapted_decoder(method)
    on = model(TOKENS)
    base = eject(copy.deepcopy(model))(TOKENS)
    with disabled(model):
        assert torch.equal(model(TOKENS), base)
        with pytest.raises(ZeroDivisionError), disabled(model):
            raise ZeroDivisionError
        assert torch.equal(model(TOKENS), base)
        with disabled(model.layers[0]):
            assert torch.equal(model(TOKENS), base)
        assert torch.equal(model(TOKENS), base)
    assert torch.equal(model(TOKENS), on)


@given(st.permutations(range(4)), st.permutations(range(4)))
def test_disabled_overlaps(enter: list[int], leave: list[int]):
    model, x = inject(nn.Sequential(nn.Linear(3, 3)), "0", rank=2), torch.ones(3)
    base = model(x)
    perturb(model)
    contexts = [disabled(model) for _ in range(4)]
    for k in enter:
        contexts[k].__enter__()
        assert torch.equal(model(x), base)
    for k in leave:
        assert torch.equal(model(x), base)
        contexts[k].__exit__(None, None, None)
    assert not torch.equal(model(x), base)


def test_disabled_is_seen_by_all_threads():
    model, results = adapted_decoder(), []
    with disabled(model):
        base = model(TOKENS)
        thread = threading.Thread(target=lambda: results.append(model(TOKENS)))
        thread.start()
        thread.join()
    assert torch.equal(results[0], base)

    def enter_often() -> None:
        for _ in range(200):
            with disabled(model):
                pass

    threads = [threading.Thread(target=enter_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torch.equal(model(TOKENS), base)


def test_eject_inside_disabled():
    model = adapted_decoder()
    with disabled(model):
        eject(model)
    inject(model, "all-linear", rank=2)
    perturb(model)
    with disabled(model):
        base = model(TOKENS)
    assert not torch.equal(model(TOKENS), base)


@methods
@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
def test_disabled_under_activation_checkpointing(method: str, checkpointing: str):
    model = adapted_decoder(method, checkpointing=checkpointing)
    plain = adapted_decoder(method)
    for part in (model, plain):
        part.embed.weight.requires_grad_(True)
        with disabled(part):
            part(TOKENS).sum().backward()
    torch.testing.assert_close(model.embed.weight.grad, plain.embed.weight.grad)
    assert all(layer.miss_D.grad is None for layer in adapted_modules(model).values())


class Normed(nn.Module):
    """A model with running statistics and dropout.

    It never calls one of its layers, and calls another past the hooks.
    """

    def __init__(self):
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.used, self.direct, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("counter", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.counter = self.counter + 1
        return self.direct.forward(self.dropout(self.norm(self.used(x)))) @ self.unused.weight.mT


def test_verify_names_what_was_not_called_and_leaves_no_trace():
    model = inject(Normed(), "all-linear", rank=2)
    x, buffers = torch.randn(5, 4), {name: (id(b), b.clone()) for name, b in model.named_buffers()}
    random = torch.get_rng_state()
    with pytest.raises(
        StateError, match=r"(?s)1 of 3 adapters were not called.*actual:   unused\n"
    ):
        verify(model, x)
    with pytest.raises(TypeError):
        verify(model, x, wrong=1)
    assert torch.equal(torch.get_rng_state(), random)
    for name, b in model.named_buffers():
        assert id(b) == buffers[name][0]
        assert torch.equal(b, buffers[name][1])
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(StateError, match="has no adapter"):
        verify(nn.Linear(4, 4), x)


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
@pytest.mark.parametrize("compiled", [None, "wrapper", "in place"])
def test_verify_on_compiled_and_checkpointed_models(
    checkpointing: str | None, compiled: str | None
):
    torch._dynamo.reset()
    model = adapted_decoder(checkpointing=checkpointing)
    callee = torch.compile(model, backend="eager") if compiled == "wrapper" else model
    if compiled == "in place":
        model.compile(backend="eager")
    if compiled and not checkpointing:
        callee(TOKENS)  # compiled before
    verify(callee, TOKENS)
    model.layers[0].self_attn.forward = lambda x: x
    with pytest.raises(StateError, match=r"4 of 12 adapters.*\n.*layers\.0\.self_attn\.q_proj"):
        verify(callee, TOKENS)


def test_verify_with_unusual_buffers():
    model = inject(nn.Sequential(nn.Linear(4, 4)), "0", rank=2)
    model.register_buffer("sparse", torch.eye(4).to_sparse())
    model.register_buffer("expanded", torch.tensor(float("nan")).expand(3))
    model.register_buffer("absent", None)
    with torch.inference_mode():
        model.register_buffer("inference", torch.ones(2))
    verify(model, torch.randn(4))


def test_verify_keeps_an_instance_level_forward():
    model = inject(nn.Sequential(nn.Linear(4, 4)), "0", rank=2)
    inner = model[0].forward
    model[0].forward = wrapper = lambda x: inner(x)
    verify(model, torch.randn(4))
    assert model[0].__dict__["forward"] is wrapper


class Outputs(nn.Module):
    """A body, a pool that gets no gradient, and outputs inside one another."""

    def __init__(self, detached: bool):
        super().__init__()
        self.body, self.pool, self.detached = nn.Linear(4, 4), nn.Linear(4, 4), detached

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        hidden = self.body(x)
        pooled = self.pool(hidden)
        return {"states": [(hidden, torch.ones(3, dtype=torch.long))], "pooled": self.last(pooled)}

    def last(self, pooled: torch.Tensor) -> torch.Tensor:
        return pooled.detach() if self.detached else pooled


@methods
def test_verify_with_a_backward_names_each_d_without_a_gradient(method: str):
    x = torch.randn(2, 4)
    model = inject(Outputs(detached=False), "all-linear", rank=2, **OPTIONS[method])
    kept = model.body.miss_D.grad = torch.ones_like(model.body.miss_D)
    with torch.no_grad():
        verify(model, x, backward=True)
    assert model.body.miss_D.grad is kept
    assert model.pool.miss_D.grad is None
    detached = inject(Outputs(detached=True), "all-linear", rank=2, **OPTIONS[method])
    verify(detached, x)
    with pytest.raises(StateError, match=r"1 D got no gradient .*\n.*actual:   pool\n"):
        verify(detached, x, backward=True)
    model.body.miss_D.requires_grad_(False)
    with pytest.raises(StateError, match=r"actual:   body\n"):
        verify(model, x, backward=True)
    merge(model)
    with pytest.raises(StateError, match=r"is merged: .*\n.*unmerge"):
        verify(model, x, backward=True)
    frozen = nn.Sequential(nn.Linear(4, 4), nn.Flatten(0))
    inject(frozen, "0", rank=2, **OPTIONS[method])
    frozen[0].register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(StateError, match=r"actual:   0\n"):
        verify(frozen, x, backward=True)


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
def test_verify_with_a_backward_under_activation_checkpointing(checkpointing: str | None):
    verify(adapted_decoder(checkpointing=checkpointing), TOKENS, backward=True)
