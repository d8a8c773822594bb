"""Small models of transformers, in eval mode, and tokens for them."""

import torch
import transformers
from torch import nn

SIZES = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "vocab_size": 31}
SIZES |= {"num_attention_heads": 2}
TEXTS = torch.arange(8 * 6).reshape(8, 6) % 31


def bert(seed: int = 0, kind: type = transformers.BertForSequenceClassification) -> nn.Module:
    torch.manual_seed(seed)
    return kind(transformers.BertConfig(**SIZES, pad_token_id=0)).eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1)
    return transformers.LlamaForCausalLM(config).eval()
