"""Heads of models of transformers, what `from_pretrained` made anew, and output heads."""

import copy
import pathlib
import sys
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

import miss
import task_heads
from miss.heads import head_of, made_anew
from miss.tree import Tree

BERT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT |= {"intermediate_size": 20, "max_position_embeddings": 32}
LAYERS = {"num_hidden_layers": 1}
CHILDREN = ["classifier", "score", "qa_outputs", "classification_head", "head", "projector", "fc"]
CLASSIFIER = ["classifier.weight", "classifier.bias"]


def meta(name: str, **settings: Any) -> nn.Module:
    kind = getattr(transformers, name)
    with torch.device("meta"):
        return kind(kind.config_class(**settings))


def tiny(kind: type[nn.Module] = BertForSequenceClassification, **settings: Any) -> nn.Module:
    return kind(BertConfig(**BERT, **settings))


def names(model: nn.Module) -> list[str]:
    found = head_of(Tree(model))
    parameters = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in found.values()} <= parameters
    return list(found)


@pytest.mark.parametrize(
    ("name", "settings", "tops"),
    [
        ("BertForSequenceClassification", LAYERS, ["classifier"]),
        ("BertForTokenClassification", LAYERS, ["classifier"]),
        ("BertForQuestionAnswering", LAYERS, ["qa_outputs"]),
        ("BertForMultipleChoice", LAYERS, ["classifier"]),
        ("DistilBertForSequenceClassification", {}, ["pre_classifier", "classifier"]),
        ("DebertaV2ForSequenceClassification", LAYERS, ["pooler", "classifier"]),
        ("LlamaForSequenceClassification", LAYERS, ["score"]),
        ("T5ForSequenceClassification", {"num_layers": 1}, ["classification_head"]),
        ("WhisperForAudioClassification", {"encoder_layers": 1}, ["projector", "classifier"]),
        (
            "Wav2Vec2ForXVector",
            LAYERS | {"use_weighted_layer_sum": True},
            ["layer_weights", "projector", "tdnn", "feature_extractor", "classifier", "objective"],
        ),
        ("SiglipForImageClassification", {}, ["classifier"]),
        ("SegformerForImageClassification", {}, ["classifier"]),
        (
            "XLNetForQuestionAnswering",
            {"n_layer": 1},
            ["start_logits", "end_logits", "answer_class"],
        ),
        ("XLNetForQuestionAnsweringSimple", {"n_layer": 1}, ["qa_outputs"]),
        (
            "DeiTForImageClassificationWithTeacher",
            LAYERS,
            ["cls_classifier", "distillation_classifier"],
        ),
        ("LlamaForCausalLM", LAYERS, []),
        ("BertForMaskedLM", LAYERS, []),
        ("CLIPModel", {}, []),
        ("MusicgenForCausalLM", LAYERS, []),
        ("Wav2Vec2ForCTC", LAYERS | {"vocab_size": 32}, []),
        ("DPTForDepthEstimation", LAYERS, []),
        ("SegformerForSemanticSegmentation", {}, []),
    ],
)
def test_head(name: str, settings: dict[str, Any], tops: list[str]):
    model = meta(name, **settings)
    every = [key for key, _ in model.named_parameters()]
    expected = [key for key in every if key.split(".")[0] in tops]
    assert {key.split(".")[0] for key in expected} == set(tops)
    assert names(model) == expected


class Mine(BertForSequenceClassification):
    """A user's subclass, which adds to the head."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.dense, self.factor = nn.Linear(16, 16), nn.Parameter(torch.ones(1))


class Odd(BertForSequenceClassification):
    """Its `base_model` is no module."""

    base_model_prefix = "config"


class MyForSequenceClassification(nn.Module):
    """The name alone makes no head."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(2, 2)


class Holder(nn.Module):
    """A model of transformers inside another module, as in Lightning."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


def test_where_the_head_stands():
    assert names(Mine(BertConfig(**BERT))) == ["factor", *CLASSIFIER, "dense.weight", "dense.bias"]
    for name in CHILDREN:
        odd = Odd(BertConfig(**BERT))
        odd.add_module(name, odd._modules.pop("classifier"))
        assert names(odd) == [f"{name}.weight", f"{name}.bias"]
    odd.add_module("output", odd._modules.pop(name))
    assert names(odd) == []
    assert names(MyForSequenceClassification()) == []
    model = tiny()
    assert list(head_of(Tree(torch.compile(model, backend="eager")))) == CLASSIFIER
    assert names(Holder(model)) == [f"model.{name}" for name in CLASSIFIER]
    both = nn.ModuleList([Holder(model), tiny(transformers.BertForQuestionAnswering)])
    held = [f"0.model.{name}" for name in CLASSIFIER]
    assert names(both) == [*held, "1.qa_outputs.weight", "1.qa_outputs.bias"]
    model.bert = torch.compile(model.bert, backend="eager")
    assert list(head_of(Tree(model))) == CLASSIFIER
    alias = Holder(model.classifier)
    alias.all = model
    assert list(head_of(Tree(alias))) == ["model.weight", "model.bias"]


def test_what_the_body_holds_and_adapters_are_no_part():
    model = tiny(num_labels=16)
    model.classifier.weight = model.bert.pooler.dense.weight
    assert names(model) == ["classifier.bias"]
    miss.inject(model, ["classifier", "query"], rank=2, trainable="pooler")
    assert "classifier.miss_D" in dict(model.named_parameters())
    assert names(model) == ["classifier.bias"]
    siglip = meta("SiglipForImageClassification")
    siglip.classifier.bias = siglip.vision_model.post_layernorm.bias
    assert names(siglip) == ["classifier.weight"]


def test_without_transformers(monkeypatch: pytest.MonkeyPatch):
    model = tiny()
    monkeypatch.delitem(sys.modules, "transformers.modeling_utils")
    assert names(model) == []


def loaded(path: pathlib.Path, saved: nn.Module) -> nn.Module:
    saved.save_pretrained(path)
    return BertForSequenceClassification.from_pretrained(path)


def test_made_anew(tmp_path: pathlib.Path):
    model = loaded(tmp_path / "base", tiny(BertModel))
    assert list(made_anew(Tree(model))) == CLASSIFIER
    assert list(made_anew(Tree(Holder(model)))) == [f"model.{name}" for name in CLASSIFIER]
    assert made_anew(Tree(model))["classifier.weight"] is model.classifier.weight
    transform = ["bias", "transform.dense.weight", "transform.dense.bias"]
    transform += ["transform.LayerNorm.weight", "transform.LayerNorm.bias"]
    language = BertForMaskedLM.from_pretrained(tmp_path / "base")  # its decoder is tied
    assert list(made_anew(Tree(language))) == [f"cls.predictions.{name}" for name in transform]
    pooler = loaded(tmp_path / "no pooler", BertModel(BertConfig(**BERT), add_pooling_layer=False))
    assert list(made_anew(Tree(pooler)))[:2] == [
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
    ]
    whole = loaded(tmp_path / "whole", tiny())
    assert not made_anew(Tree(whole))
    resized = BertForSequenceClassification.from_pretrained(
        tmp_path / "whole", num_labels=5, ignore_mismatched_sizes=True
    )
    assert list(made_anew(Tree(resized))) == CLASSIFIER


def test_made_anew_in_a_model_that_has_changed(tmp_path: pathlib.Path):
    model = loaded(tmp_path, tiny(BertModel))

    def found(changed: nn.Module = model) -> list[str]:
        return list(made_anew(Tree(changed)))

    assert found(copy.deepcopy(model)) == found(tiny()) == found(nn.Linear(2, 2)) == []
    model.half().float().load_state_dict(model.state_dict())
    model.resize_token_embeddings(60)
    assert found() == CLASSIFIER
    miss.inject(model, ["query", "classifier"], rank=2)
    assert found() == CLASSIFIER
    miss.merge(model)
    assert found() == CLASSIFIER
    miss.unmerge(model)
    assert found(miss.eject(model)) == CLASSIFIER
    both = nn.ModuleList([model, tiny()])  # the second was not loaded
    assert found(both) == [f"0.{name}" for name in CLASSIFIER]
    query = model.bert.encoder.layer[0].attention.self.query
    query.weight = nn.Parameter(query.weight.detach().to(torch.int8), requires_grad=False)
    query.lora = nn.Linear(16, 2)
    torch.nn.utils.parametrizations.weight_norm(model.bert.pooler.dense)
    assert found() == CLASSIFIER
    model.classifier = nn.Linear(16, 2)
    assert found() == []


def test_what_a_class_declares_as_missing_is_not_anew(tmp_path: pathlib.Path):
    sizes = {"vocab_size": 60, "d_model": 16, "pad_token_id": 1, "decoder_start_token_id": 1}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 20}
    config = transformers.MarianConfig(**sizes, max_position_embeddings=30)
    transformers.MarianMTModel(config).save_pretrained(tmp_path)
    model = transformers.MarianMTModel.from_pretrained(tmp_path)
    tables = [p for name, p in model.named_parameters() if "embed_positions" in name]
    assert tables
    assert not any(hasattr(table, "_is_hf_initialized") for table in tables)
    assert not made_anew(Tree(Holder(model)))
    model._keys_to_ignore_on_load_missing = {"^model.encoder"}  # a pattern sees the model's names
    [name] = made_anew(Tree(Holder(model)))
    assert name == "model.model.decoder.embed_positions.weight"


def adapted(model: nn.Module) -> set[str]:
    miss.inject(model, "all-linear", rank=2)
    return set(miss.adapted_modules(model))


def test_output_head():
    llama = meta("LlamaForCausalLM", **LAYERS)
    assert Tree(Holder(llama)).output_head == {id(llama.lm_head)}
    assert "model.lm_head" not in adapted(Holder(llama))
    musicgen = meta("MusicgenForCausalLM", **LAYERS)
    heads = {id(musicgen.lm_heads), *map(id, musicgen.lm_heads)}
    assert len(heads) == 5
    assert Tree(musicgen).output_head == heads
    assert not [name for name in adapted(musicgen) if "lm_heads" in name]


@pytest.mark.parametrize("kind", [list, tuple, nn.ModuleList, nn.Sequential, None])
def test_output_head_of_a_users_class(kind: Any):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            if kind in (nn.ModuleList, nn.Sequential):
                self.heads = kind(
                    *([[self.a, self.b]] if kind is nn.ModuleList else [self.a, self.b])
                )

        def get_output_embeddings(self) -> Any:
            if kind is None:
                raise NotImplementedError
            return getattr(self, "heads", None) or kind([self.a, self.b])

    assert adapted(Own()) == ({"body"} if kind else {"body", "a", "b"})


def test_the_survey_of_task_classes():
    wanted = ["BertForSequenceClassification", "PPLCNetForImageClassification", "BertForMaskedLM"]
    wanted += ["DinatForImageClassification", "XLNetForQuestionAnsweringSimple", "CLIPModel"]
    kinds = {name: getattr(transformers, name) for name in wanted}
    result = task_heads.sweep(kinds)
    assert {key: result["task"][key] for key in ("tried", "right")} == {"tried": 3, "right": 2}
    assert result["task"]["missed"] == {
        "PPLCNetForImageClassification": ["last_convolution.weight"]
    }
    assert result["other"]["right"] == result["other"]["tried"] == 2
    assert "natten" in result["left out"]["DinatForImageClassification"]["reason"]
    assert "| with a head | 3 | 2 | 1 | 0 |" in task_heads.report(result)
    model = meta("BertForSequenceClassification", **LAYERS)
    assert task_heads.true_head(model) == set(CLASSIFIER)
