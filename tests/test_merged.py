"""A merged model through the tools that people use: what they write is the merged plain model."""

import copy
import pathlib
import re

import pytest
import torch
from torch import nn

from miss import StateError, inject, merge, unmerge
from tests.models import perturb
from tests.pretrained import TEXTS, bert, llama
from tests.test_trainer import trainer


def adapted(model: nn.Module, method: str) -> nn.Module:
    targets = re.compile(r".*(query|q_proj|down_proj|dense)")
    inject(model, targets, rank=3, method=method)
    perturb(model)
    return model


@pytest.mark.parametrize("method", ["misse", "miss"])
@pytest.mark.parametrize("shard", ["5GB", "4KB"])
@pytest.mark.parametrize("make", [llama, bert])
def test_save_pretrained_writes_the_merged_model(
    tmp_path: pathlib.Path, make, method: str, shard: str
):
    model = adapted(make(), method)
    kind = type(make())
    merge(model)
    expected = model(TEXTS).logits
    model.save_pretrained(tmp_path, max_shard_size=shard)
    plain, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(plain.eval()(TEXTS).logits, expected)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "4KB")


@pytest.mark.parametrize("method", ["misse", "miss"])
def test_torch_save_writes_the_merged_model(tmp_path: pathlib.Path, method: str):
    base = llama()
    model = adapted(copy.deepcopy(base), method)
    merge(model)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    base.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(base(TEXTS).logits, model(TEXTS).logits)


@pytest.mark.parametrize("method", ["misse", "miss"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # not ours to mend
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_best_model_of_a_trainer_never_has_a_delta_twice(tmp_path: pathlib.Path, method: str):
    """A checkpoint that was written while merged, and the Trainer's own way to load the best."""
    model = adapted(llama(), method)
    tokens = torch.arange(6)[None]
    expected = model.eval()(tokens).logits
    work = trainer(model, tmp_path, max_steps=1)
    merge(model)
    work.save_model(str(tmp_path / "best"))
    unmerge(model)
    work.state.best_model_checkpoint = str(tmp_path / "best")
    with pytest.raises(StateError, match="the incoming weight is a merged one"):
        work._load_best_model()
    torch.testing.assert_close(model.eval()(tokens).logits, expected)
    work.save_model(str(tmp_path / "best"))
    work._load_best_model()
    assert torch.equal(model.eval()(tokens).logits, expected)
