"""Training under the Hugging Face Trainer: its own checkpoints, and those of the adapters alone."""

import copy
import json
import os
import pathlib
import re
import types
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from miss import (
    CheckpointError,
    StateError,
    adapted_modules,
    adapter_parameters,
    inject,
    load,
    save,
)
from miss.interop.transformers import AdapterCheckpoints
from tests.pretrained import TEXTS, llama
from tests.processes import on_two_processes

pytestmark = [  # of transformers and accelerate
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
BASE = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json")


class AdapterTrainer(AdapterCheckpoints, transformers.Trainer):
    pass


class Texts(torch.utils.data.Dataset):
    """Eight sequences of six tokens."""

    def __len__(self) -> int:
        return len(TEXTS)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": TEXTS[index], "labels": TEXTS[index]}


class Classifier(nn.Module):
    """A model that is none of transformers', with running statistics and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 31)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.norm(self.body(input_ids.float())).relu())
        return {"loss": nn.functional.cross_entropy(logits, labels[:, 0]), "logits": logits}


def adapted_lm() -> nn.Module:
    return inject(llama(), "all-linear", rank=2)


def adapted_classifier() -> nn.Module:
    torch.manual_seed(0)
    return inject(Classifier(), "body", rank=2, method="miss", trainable=["norm", "head"])


def trainer(
    model: nn.Module,
    folder: pathlib.Path,
    kind: type[transformers.Trainer] = transformers.Trainer,
    *,
    given: dict[str, Any] | None = None,
    **settings: Any,
) -> transformers.Trainer:
    arguments: dict[str, Any] = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "save_steps": 4,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    args = transformers.TrainingArguments(output_dir=str(folder), **arguments | settings)
    texts = {"train_dataset": Texts(), "eval_dataset": Texts()}
    return kind(model=model, args=args, **texts, **given or {})


def same(one: Any, two: Any) -> bool:
    """Whether two nests of dicts, lists and tensors are equal, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


@pytest.mark.parametrize("method", ["misse", "miss"])
def test_train_checkpoint_resume_save_and_load(tmp_path: pathlib.Path, method: str):
    base = llama()
    model = inject(copy.deepcopy(base), "all-linear", rank=2, method=method)
    whole = trainer(model, tmp_path / "whole")
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert len(adapted_modules(model)) == 14
    for name, parameter in base.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)

    resumed = inject(copy.deepcopy(base), "all-linear", rank=2, method=method)
    trainer(resumed, tmp_path / "resumed").train(
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4")
    )
    for layer, again in zip(adapted_modules(model).values(), adapted_modules(resumed).values()):
        assert layer.miss_D.any()
        assert torch.equal(layer.miss_D, again.miss_D)

    save(model, tmp_path / "adapter.safetensors")
    adapters = sum(layer.miss_D.nbytes for layer in adapted_modules(model).values())
    size = (tmp_path / "adapter.safetensors").stat().st_size
    assert size < adapters + 8000 + 400 * 16  # metadata of 14 layers, values of 16 weights
    loaded = load(copy.deepcopy(base), tmp_path / "adapter.safetensors").eval()
    assert torch.equal(loaded(TEXTS).logits, model.eval()(TEXTS).logits)


@pytest.mark.parametrize("resume", ["path", "the last"])
@pytest.mark.parametrize("make", [adapted_lm, adapted_classifier])
def test_training_resumed_from_adapters_alone_is_the_uninterrupted_run(
    tmp_path: pathlib.Path, make: Any, resume: str
):
    whole, folder = make(), tmp_path / "whole"
    start = copy.deepcopy(whole.state_dict())
    trainer(whole, folder, AdapterTrainer).train()
    for checkpoint in ("checkpoint-4", "checkpoint-8"):
        assert not set(BASE) & set(os.listdir(folder / checkpoint))
    changed = {key for key, tensor in whole.state_dict().items() if not same(tensor, start[key])}
    written = load_file(folder / "checkpoint-8" / "adapter.safetensors")
    assert changed <= set(written) - {".base"} < set(whole.state_dict())

    torch.save(start, tmp_path / "later")  # nothing of the first run is left in memory
    (folder / "checkpoint-8").rename(tmp_path / "checkpoint-8")
    again = make()
    where = str(folder / "checkpoint-4") if resume == "path" else True
    trainer(again, folder, AdapterTrainer).train(resume_from_checkpoint=where)
    assert same(dict(again.state_dict()), dict(whole.state_dict()))
    for part in ("optimizer.pt", "scheduler.pt"):
        one, two = (torch.load(at / "checkpoint-8" / part) for at in (tmp_path, folder))
        assert same(one, two), part


class Words:
    """A tokenizer, as far as a Trainer asks."""

    def save_pretrained(self, folder: str) -> None:
        pathlib.Path(folder, "words.txt").touch()


def collate(rows: list[Any]) -> Any:
    return transformers.default_data_collator(rows)


def with_words(rows: list[Any]) -> Any:
    return collate(rows)


with_words.tokenizer = Words()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, set()),
        ({"processing_class": Words()}, {"words.txt"}),
        ({"data_collator": with_words}, {"words.txt"}),
    ],
)
def test_save_model_writes_the_adapters_and_what_the_trainer_writes_beside_the_model(
    tmp_path: pathlib.Path, given: dict[str, Any], words: set[str]
):
    model = adapted_lm()
    run = trainer(model, tmp_path / "run", AdapterTrainer, given=given, max_steps=1)
    run.train()
    run.save_model(str(tmp_path / "end"))
    run.save_model()
    for folder in ("end", "run"):
        files = {path.name for path in (tmp_path / folder).iterdir() if path.is_file()}
        assert files == {"adapter.safetensors", "training_args.bin"} | words
        loaded = load(llama(), tmp_path / folder / "adapter.safetensors").eval()
        assert torch.equal(loaded(TEXTS).logits, model.eval()(TEXTS).logits)


class Snapshots(transformers.TrainerCallback):
    """The tensors of the model at every checkpoint."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, torch.Tensor]] = {}

    def on_save(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.states[state.global_step] = copy.deepcopy(dict(model.state_dict()))


@pytest.mark.parametrize("make", [adapted_lm, adapted_classifier])
def test_the_best_model_comes_back_and_the_limit_on_checkpoints_holds(
    tmp_path: pathlib.Path, make: Any
):
    model, snapshots = make(), Snapshots()
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    best |= {"greater_is_better": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    limits = {"save_total_limit": 1, "save_only_model": True}
    run = trainer(
        model, tmp_path, AdapterTrainer, given={"callbacks": [snapshots]}, **best, **limits
    )
    run.train()
    assert run.state.best_global_step == 2  # the loss falls, and the highest is asked for
    assert same(dict(model.state_dict()), snapshots.states[2])
    assert not same(snapshots.states[2], snapshots.states[8])
    assert os.listdir(tmp_path) == ["checkpoint-2"]
    files = {"adapter.safetensors", "training_args.bin", "trainer_state.json"}
    assert set(os.listdir(tmp_path / "checkpoint-2")) == files


def test_a_checkpoint_without_adapters_or_with_others_is_an_error_that_says_so(
    tmp_path: pathlib.Path,
):
    trainer(adapted_lm(), tmp_path / "plain", max_steps=1).train()
    trainer(adapted_lm(), tmp_path / "adapters", AdapterTrainer, max_steps=1).train()
    (tmp_path / "empty").mkdir()
    model = adapted_lm()
    run = trainer(model, tmp_path / "new", AdapterTrainer)
    for folder, actual in [
        ("plain/checkpoint-1", r"config\.json, .*model\.safetensors"),
        ("empty", "an empty directory"),
        ("absent", "no such directory"),
    ]:
        place = re.escape(str(tmp_path / folder))
        text = rf"{place}: has no adapters\n  expected: adapter\.safetensors\n  actual:   {actual}"
        with pytest.raises(CheckpointError, match=text + r".*\n  do: .*without the mixin"):
            run.train(resume_from_checkpoint=str(tmp_path / folder))
        run.state.best_model_checkpoint = str(tmp_path / folder)
        with pytest.raises(CheckpointError, match=text):
            run._load_best_model()

    other = inject(llama(), "all-linear", rank=3)
    before = copy.deepcopy(dict(other.state_dict()))
    run = trainer(other, tmp_path / "new", AdapterTrainer)
    with pytest.raises(CheckpointError, match=r"the rank of .* is not the model's"):
        run.train(resume_from_checkpoint=str(tmp_path / "adapters" / "checkpoint-1"))
    assert same(dict(other.state_dict()), before)


@pytest.mark.parametrize("flag", ["is_fsdp_enabled", "is_fsdp_xla_enabled", "is_deepspeed_enabled"])
def test_what_writes_checkpoints_of_its_own_is_refused_before_training(
    tmp_path: pathlib.Path, flag: str
):
    class Flagged(transformers.Trainer):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            setattr(self, flag, True)

    class Mine(AdapterCheckpoints, Flagged):
        pass

    with pytest.raises(StateError, match=r"^Mine: .* hold the whole model\n  do: .*mixin$"):
        trainer(adapted_lm(), tmp_path, Mine)


def test_a_model_without_adapters_is_refused_before_training(tmp_path: pathlib.Path):
    with pytest.raises(StateError, match=r"^AdapterTrainer: the model has no adapter"):
        trainer(llama(), tmp_path, AdapterTrainer)


def test_a_checkpoint_that_is_pushed_has_the_adapters(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    pushed: list[tuple[str, set[str]]] = []

    class Hub:
        def create_repo(self, name: str, **_: Any) -> Any:
            return types.SimpleNamespace(repo_id=name)

        def upload_folder(self, *, folder_path: str, commit_message: str, **_: Any) -> Any:
            pushed.append((commit_message, set(os.listdir(folder_path))))
            return types.SimpleNamespace(done=lambda: True)

    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    settings = {"push_to_hub": True, "hub_strategy": "every_save", "hub_always_push": True}
    trainer(adapted_lm(), tmp_path, AdapterTrainer, **settings).train()
    assert len(pushed) == 2
    for message, files in pushed:
        assert "Training in progress" in message
        assert "adapter.safetensors" in files
        assert not set(BASE) & files


def as_accelerate_starts(rank: int) -> None:
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in found.items()})
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def two_ranks(rank: int, folder: str) -> None:
    as_accelerate_starts(rank)
    root = pathlib.Path(folder)
    whole = adapted_lm()
    run = trainer(whole, root, AdapterTrainer, ddp_backend="gloo")
    run.train()
    assert isinstance(run.model_wrapped, nn.parallel.DistributedDataParallel)
    again = adapted_lm()
    resumed = trainer(again, root / "again", AdapterTrainer, ddp_backend="gloo")
    resumed.train(resume_from_checkpoint=str(root / "checkpoint-4"))
    assert all(d.any() for d in adapter_parameters(again))
    assert same(dict(again.state_dict()), dict(whole.state_dict()))
    assert not set(BASE) & set(os.listdir(root / "checkpoint-8"))
    state = json.loads((root / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["global_step"] == 8


def test_two_ranks_write_and_resume_one_file(tmp_path: pathlib.Path):
    on_two_processes(two_ranks, str(tmp_path))
