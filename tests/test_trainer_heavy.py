"""Checkpoints of adapters alone under the Trainers of TRL and of sentence-transformers."""

import copy
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from miss import CheckpointError, inject, load
from miss.interop.transformers import AdapterCheckpoints

REASON = "needs the extra `test-heavy`, which the README's command leaves out"
datasets = pytest.importorskip("datasets", reason=REASON)
trl = pytest.importorskip("trl", reason=REASON)
sentences = pytest.importorskip("sentence_transformers", reason=REASON)

from sentence_transformers.sentence_transformer import losses, modules  # noqa: E402

pytestmark = [  # of these packages
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
WORDS = ["red", "blue", "green", "warm", "cold", "old", "new", "sea", "sky", "sun"]
SETTINGS: dict[str, Any] = {
    "max_steps": 8,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "save_steps": 4,
    "eval_steps": 4,
    "eval_strategy": "steps",
    "logging_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
}


class AdapterSFT(AdapterCheckpoints, trl.SFTTrainer):
    pass


class AdapterSentences(AdapterCheckpoints, sentences.SentenceTransformerTrainer):
    pass


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    special = ["<pad>", "<unk>", "<eos>"]
    vocabulary = {word: index for index, word in enumerate(special + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names)


def texts() -> list[str]:
    return [" ".join(WORDS[k : k + 3]) for k in range(8)]


def language_model(folder: pathlib.Path) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "vocab_size": 13}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


def sentence_model(folder: pathlib.Path) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "vocab_size": 13}
    config = transformers.BertConfig(**sizes, num_attention_heads=2, pad_token_id=0)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    body = modules.Transformer(str(folder))
    head = modules.Dense(12, 4)
    return sentences.SentenceTransformer(modules=[body, modules.Pooling(12), head], device="cpu")


def sft(model: nn.Module, folder: pathlib.Path) -> transformers.Trainer:
    rows = datasets.Dataset.from_dict({"text": texts()})
    args = trl.SFTConfig(output_dir=str(folder), max_length=8, bf16=False, **SETTINGS)
    given = {"train_dataset": rows, "eval_dataset": rows, "processing_class": tokenizer()}
    return AdapterSFT(model=model, args=args, **given)


def sentence_trainer(model: nn.Module, folder: pathlib.Path) -> transformers.Trainer:
    pairs = {"anchor": texts(), "other": texts()[::-1], "score": [k / 8 for k in range(8)]}
    rows = datasets.Dataset.from_dict(pairs)
    args = sentences.SentenceTransformerTrainingArguments(output_dir=str(folder), **SETTINGS)
    given = {
        "train_dataset": rows,
        "eval_dataset": rows,
        "loss": losses.CosineSimilarityLoss(model),
    }
    return AdapterSentences(model=model, args=args, **given)


@pytest.mark.parametrize(
    ("base", "run", "trainable", "answer"),
    [
        (language_model, sft, (), lambda m: m(torch.arange(12).reshape(2, 6)).logits),
        (language_model, sft, "lm_head", lambda m: m(torch.arange(12).reshape(2, 6)).logits),
        (sentence_model, sentence_trainer, (), lambda m: m.encode(texts(), convert_to_tensor=True)),
        (
            sentence_model,
            sentence_trainer,
            "2",
            lambda m: m.encode(texts(), convert_to_tensor=True),
        ),
    ],
    ids=["SFT", "SFT, head", "sentences", "sentences, head"],
)
def test_checkpoints_hold_adapters_resume_is_exact_and_the_best_model_comes_back(
    tmp_path: pathlib.Path,
    base: Callable[[pathlib.Path], nn.Module],
    run: Callable[[nn.Module, pathlib.Path], transformers.Trainer],
    trainable: Any,
    answer: Callable[[nn.Module], torch.Tensor],
):
    made = base(tmp_path / "base")

    def adapted() -> nn.Module:
        targets = ["q_proj", "down_proj"] if run is sft else ["query", "value"]
        return inject(copy.deepcopy(made), targets, rank=2, trainable=trainable)

    whole, folder = adapted(), tmp_path / "whole"
    first = run(whole, folder)
    first.train()
    first.save_model(str(tmp_path / "end"))
    names = {path.name for path in folder.rglob("*")} | {p.name for p in tmp_path.glob("end/*")}
    assert {"adapter.safetensors", "tokenizer.json", "training_args.bin"} <= names
    assert not {"model.safetensors", "pytorch_model.bin"} & names
    loaded = load(copy.deepcopy(made), tmp_path / "end" / "adapter.safetensors").eval()
    assert torch.equal(answer(loaded), answer(whole.eval()))
    assert not torch.equal(answer(made.eval()), answer(whole))

    again = adapted()
    run(again, tmp_path / "again").train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key

    best = adapted()
    last = run(best, folder)
    last.state.best_model_checkpoint = str(folder / "checkpoint-4")
    last._load_best_model()
    at_4 = load(copy.deepcopy(made), folder / "checkpoint-4" / "adapter.safetensors").eval()
    assert torch.equal(answer(best.eval()), answer(at_4))
    last.state.best_model_checkpoint = str(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no such directory"):
        last._load_best_model()
