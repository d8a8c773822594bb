"""Embeddings: padding, ties, options that are refused, resized vocabularies, real models."""

import copy
import importlib
import pathlib

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import miss
from miss import MiSSeEmbedding, MiSSEmbedding, ShapeError, StateError, TargetError, interop
from tests.models import perturb, snapshot
from tests.pretrained import llama
from tests.strategies import OPTIONS, methods

TOKENS = torch.tensor([[1, 2, 3, 0, 7, 63]])


def embeddings(padding_idx: int | None = 0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(64, 12, padding_idx), nn.Linear(12, 4)).eval()


@methods
def test_padding_has_no_delta_and_no_gradient(method: str):
    model = miss.inject(embeddings(), "0", rank=4, **OPTIONS[method])
    base = copy.deepcopy(embeddings())
    perturb(model)
    padding = torch.tensor([0])
    assert torch.equal(model(padding), base(padding))
    assert not model[0].delta_weight()[0].any()
    model(padding).sum().backward()
    assert not model[0].miss_D.grad.any()
    miss.merge(model)
    assert torch.equal(model[0].weight[0], base[0].weight[0])


def test_a_file_is_for_one_padding_index(tmp_path):
    model = miss.inject(embeddings(), "0", rank=4)
    perturb(model)
    miss.save(model, tmp_path / "a.safetensors")
    with pytest.raises(miss.CheckpointError, match="padding_idx"):
        miss.load(embeddings(None), tmp_path / "a.safetensors")
    other = miss.inject(embeddings(None), "0", rank=4)
    with pytest.raises(miss.CheckpointError, match="blank"):
        miss.load(other, tmp_path / "a.safetensors")
    loaded = miss.load(embeddings(), tmp_path / "a.safetensors")
    assert torch.equal(loaded(TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 1.0}, "max_norm"),
        ({"sparse": True}, "sparse"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq"),
    ],
)
def test_options_that_change_rows_are_refused(options: dict[str, object], message: str):
    model = nn.Sequential(nn.Embedding(6, 4, **options), nn.Linear(4, 4))
    before = snapshot(model)
    with pytest.raises(TargetError, match=message):
        miss.inject(model, "0", rank=2)
    with pytest.raises(StateError, match=message):
        MiSSeEmbedding.adopt_(model[0], 2)
    assert snapshot(model) == before
    miss.inject(model, "*", rank=2)  # a glob passes over it
    assert list(miss.adapted_modules(model)) == ["1"]


@pytest.mark.parametrize("cls", [MiSSeEmbedding, MiSSEmbedding])
def test_the_constructor_is_that_of_an_adopted_layer(cls: type):
    torch.manual_seed(0)
    made = cls(8, 6, 2, 3, scale=2.0, dtype=torch.bfloat16)
    torch.manual_seed(0)
    adopted = cls.adopt_(nn.Embedding(8, 6, 3, dtype=torch.bfloat16), 2, scale=2.0)
    assert repr(made) == repr(adopted)
    assert torch.equal(made.weight, adopted.weight)
    assert (made.weight.requires_grad, made.miss_D.requires_grad) == (False, True)
    assert made.miss_D.dtype == torch.float32
    for wrong in ({"rank": 9}, {"rank": 2, "dropout": 0.1}, {"rank": 2, "scale": "1"}):
        with pytest.raises(ShapeError):
            cls(8, 6, **wrong)


def test_a_subclass_that_adds_to_the_lookup_is_no_embedding():
    class Learned(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids + 2)

    with pytest.raises(TargetError, match="register"):
        miss.inject(nn.Sequential(Learned(8, 4)), "0", rank=2)


def scaled_embeddings() -> list[type]:
    """The classes of that name in the models of transformers."""
    found = []
    folder = pathlib.Path(transformers.models.__path__[0])
    for path in sorted(folder.glob("*/modeling_*.py")):
        if "ScaledWordEmbedding(nn.Embedding)" in path.read_text():
            name = f"transformers.models.{path.parent.name}.{path.stem}"
            kinds = vars(importlib.import_module(name)).items()
            found += [kind for key, kind in kinds if key.endswith("ScaledWordEmbedding")]
    return found


def test_every_scaled_embedding_of_transformers_multiplies_by_embed_scale():
    kinds = scaled_embeddings()
    assert len(kinds) > 20
    for kind in kinds:
        model = nn.Sequential(kind(9, 4, 0, embed_scale=3.0)).requires_grad_(False)
        nn.init.normal_(model[0].weight)
        miss.inject(model, "0", rank=2)
        perturb(model)
        want = 3 * (model[0].weight + model[0].miss_delta_weight())
        torch.testing.assert_close(model(torch.arange(9)), want)


def tied(kind: str) -> nn.Module:
    """A small language model whose head and embedding are one Parameter."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    if kind == "gpt2":
        config = AutoConfig.for_model("gpt2", vocab_size=64, n_embd=32, n_layer=2, n_head=2)
    else:
        sizes |= {"intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}
        config = AutoConfig.for_model(kind, tie_word_embeddings=True, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@methods
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_tied_embedding_is_adapted_where_it_is_called_alone(kind: str, method: str):
    model = tied(kind)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    base = copy.deepcopy(model)
    miss.inject(model, name, rank=4, **OPTIONS[method])
    perturb(model)
    assert head.weight is embedding.weight
    hidden = torch.randn(1, 3, 32)
    assert torch.equal(model.lm_head(hidden), base.lm_head(hidden))
    assert not torch.equal(model(TOKENS).logits, base(TOKENS).logits)
    assert "tied" in str(miss.summary(model))
    with pytest.raises(StateError, match=r"tied to .*(lm_head|wte|embed)"):
        miss.merge(model)
    assert head.weight is embedding.weight


def test_a_vocabulary_that_grows_under_its_adapter_is_an_error():
    model = llama()
    miss.inject(model, "embed_tokens", rank=4)
    before = copy.deepcopy(model.get_input_embeddings())
    model.resize_token_embeddings(model.config.vocab_size + 3)
    with pytest.raises(ShapeError, match=r"(?s)another shape.*eject"):
        model(TOKENS % 16)
    fresh = llama()
    fresh.resize_token_embeddings(fresh.config.vocab_size + 3)
    miss.inject(fresh, "embed_tokens", rank=4)
    assert fresh(TOKENS % 16).logits.shape[-1] == before.num_embeddings + 3


@methods
@pytest.mark.parametrize("layer", ["embedding", "scaled embedding", "Conv1D", "all of GPT-2"])
def test_peft_reads_the_export(layer: str, method: str, tmp_path):
    if layer == "all of GPT-2":
        model, inputs, targets = tied("gpt2"), TOKENS, ["c_attn", "c_proj", "c_fc", "wte"]
    elif layer == "Conv1D":
        torch.manual_seed(0)
        body = transformers.pytorch_utils.Conv1D(5, 12)
        model, inputs, targets = nn.Sequential(nn.ReLU(), body).eval(), torch.randn(3, 12), "1"
    elif layer == "scaled embedding":
        scaled = Gemma3TextScaledWordEmbedding(64, 12, 0, embed_scale=3.0)
        model, inputs, targets = nn.Sequential(scaled), TOKENS, "0"
    else:
        model, inputs, targets = embeddings(), TOKENS, "0"
    base = copy.deepcopy(model)
    miss.inject(model, targets, rank=4, scale=0.5, **OPTIONS[method])
    perturb(model)
    interop.lora.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    want, got = model(inputs), theirs(inputs)
    if layer == "all of GPT-2":
        want, got = want.logits, got.logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(StateError, match="PEFT's MiSS"):
        interop.peft.save(model, tmp_path / "miss")


def test_integer_inputs_are_the_base_layers_business():
    model = miss.inject(embeddings(), "0", rank=4)
    with pytest.raises(IndexError, match="out of range"):
        model(torch.tensor([64]))
    with pytest.raises(RuntimeError, match="indices"):
        model(torch.tensor([1.0]))


def test_bart_trains_its_scaled_embedding():
    config = AutoConfig.for_model(
        "bart",
        vocab_size=40,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        scale_embedding=True,
    )
    torch.manual_seed(0)
    model = transformers.BartModel(config).eval()
    miss.inject(model, BartScaledWordEmbedding, rank=4)
    ids = torch.tensor([[3, 4, 5]])
    before = model(ids).last_hidden_state
    model(ids).last_hidden_state.square().sum().backward()
    called = miss.adapted_modules(model)
    del called["shared"]  # holds the weight of the other two, and is never called
    for layer in called.values():
        assert layer.miss_D.grad.any()
        with torch.no_grad():
            layer.miss_D -= layer.miss_D.grad
    assert not torch.equal(model(ids).last_hidden_state, before)
