"""Training under the Hugging Face Trainer.

Checkpoint, resume, and a small adapter file at the end.
"""

import copy
import pathlib

import pytest
import torch
import transformers
from torch import nn

from miss import adapted_modules, inject, load, save

TEXTS = torch.arange(8 * 6).reshape(8, 6) % 31


class Texts(torch.utils.data.Dataset):
    """Eight sequences of six tokens."""

    def __len__(self) -> int:
        return len(TEXTS)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": TEXTS[index], "labels": TEXTS[index]}


def causal_lm() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "vocab_size": 31}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


def trainer(model: nn.Module, folder: pathlib.Path, steps: int) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=Texts())


@pytest.mark.parametrize("method", ["misse", "miss"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # not ours to mend
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_train_checkpoint_resume_save_and_load(tmp_path: pathlib.Path, method: str):
    base = causal_lm()
    model = inject(copy.deepcopy(base), "all-linear", rank=2, method=method)
    whole = trainer(model, tmp_path / "whole", steps=8)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert len(adapted_modules(model)) == 14
    for name, parameter in base.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)

    resumed = inject(copy.deepcopy(base), "all-linear", rank=2, method=method)
    trainer(resumed, tmp_path / "resumed", steps=8).train(
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4")
    )
    for layer, again in zip(adapted_modules(model).values(), adapted_modules(resumed).values()):
        assert layer.miss_D.any()
        assert torch.equal(layer.miss_D, again.miss_D)

    save(model, tmp_path / "adapter.safetensors")
    adapters = sum(layer.miss_D.nbytes for layer in adapted_modules(model).values())
    size = (tmp_path / "adapter.safetensors").stat().st_size
    assert size < adapters + 8000  # 14 layers' metadata
    loaded = load(copy.deepcopy(base), tmp_path / "adapter.safetensors").eval()
    assert torch.equal(loaded(TEXTS).logits, model.eval()(TEXTS).logits)
