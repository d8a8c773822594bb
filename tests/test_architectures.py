"""Tiny random models of real architectures.

Every linear layer is adapted, called, trained, and taken out again.
"""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn

from miss import adapted_modules, adapter_parameters, disabled, eject, inject, summary, verify
from tests.models import snapshot

TOKENS = {"input_ids": torch.tensor([[1, 2, 3, 4, 5]])}
SIZES = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 31}
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, torch.Tensor]]] = {
    "llama": (
        lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **SIZES, num_key_value_heads=1, intermediate_size=20, tie_word_embeddings=True
            )
        ),
        TOKENS,
    ),
    "gpt_neox": (
        lambda: transformers.GPTNeoXForCausalLM(
            transformers.GPTNeoXConfig(**SIZES, intermediate_size=20)
        ),
        TOKENS,
    ),
    "bert": (
        lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(**SIZES, intermediate_size=20)
        ),
        TOKENS,
    ),
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                d_model=12, d_kv=6, d_ff=20, num_layers=2, num_heads=2, vocab_size=31
            )
        ),
        TOKENS | {"decoder_input_ids": TOKENS["input_ids"]},
    ),
    "vit": (
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(
                hidden_size=12,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=20,
                image_size=8,
                patch_size=4,
                num_labels=7,
            )
        ),
        {"pixel_values": torch.ones(1, 3, 8, 8)},
    ),
}


@pytest.mark.parametrize("method", ["misse", "miss"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_linear_layer(name: str, method: str):
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    # Frozen, since torch chooses attention kernels by that flag.
    model = build().eval().requires_grad_(False)
    before, base = snapshot(model), model(**inputs).logits
    inject(model, "all-linear", rank=5, method=method)
    left_out = (model.get_output_embeddings(), getattr(model, "classifier", None))
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m not in left_out]
    assert len(adapted_modules(model)) == len(linear) == len(summary(model).layers)
    verify(model, **inputs)
    assert torch.equal(model(**inputs).logits, base)
    for d in adapter_parameters(model):
        nn.init.normal_(d)
    tuned = model(**inputs).logits
    assert not torch.equal(tuned, base)
    tuned.square().mean().backward()
    with_gradient = [name for name, p in model.named_parameters() if p.grad is not None]
    with_gradient = [name for name in with_gradient if not name.startswith("classifier")]
    assert {name.rsplit(".", 1)[1] for name in with_gradient} == {"miss_D"}
    with disabled(model):
        assert torch.equal(model(**inputs).logits, base)
    eject(model).requires_grad_(False)  # a head is trained, and stays so
    assert snapshot(model) == before
    assert torch.equal(model(**inputs).logits, base)
