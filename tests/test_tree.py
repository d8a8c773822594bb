"""One walk of the tree for each public verb."""

import pathlib

import pytest
import torch
from torch import nn

import miss
from miss import interop
from miss.tree import MOST_NAMES, Tree
from tests.models import TOKENS, Decoder, adapted_decoder


def calls(folder: pathlib.Path):
    """Each verb on a model that it works on."""
    model, merged, plain = adapted_decoder(), adapted_decoder(), Decoder()
    miss.merge(merged)
    path, state = folder / "a.pt", miss.adapter_state_dict(model)
    miss.save(model, path)
    ours = miss.inject(nn.Sequential(nn.Sequential(nn.Linear(4, 4))), "0.0", rank=2)
    interop.peft.save(ours, folder / "peft")
    return {
        "inject": lambda: miss.inject(plain, "all-linear", rank=2),
        "eject": lambda: miss.eject(plain),
        "eject, merge": lambda: miss.eject(adapted_decoder_once(), merge=True),
        "adapted_modules": lambda: miss.adapted_modules(model),
        "adapter_parameters": lambda: miss.adapter_parameters(model),
        "summary": lambda: miss.summary(model),
        "verify": lambda: miss.verify(model, TOKENS),
        "disabled": lambda: miss.disabled(model).__enter__(),
        "merge": lambda: miss.merge(model),
        "unmerge": lambda: miss.unmerge(model),
        "unmerge, merged": lambda: miss.unmerge(merged),
        "adapter_state_dict": lambda: miss.adapter_state_dict(model),
        "load_adapter_state_dict": lambda: miss.load_adapter_state_dict(model, state),
        "save": lambda: miss.save(model, path, extra="lm_head"),
        "load": lambda: miss.load(model, path),
        "load, base": lambda: miss.load(Decoder(), path, any_base=True),
        "peft.save": lambda: interop.peft.save(ours, folder / "peft"),
        "peft.load": lambda: interop.peft.load(ours, folder / "peft"),
        "lora.save": lambda: interop.lora.save(ours, folder / "lora"),
    }


ONCE = []


def adapted_decoder_once() -> nn.Module:
    return ONCE.pop()


def test_each_verb_walks_the_model_once(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    verbs = calls(tmp_path)
    ONCE.append(adapted_decoder())
    build = Tree.__init__
    counted: list[nn.Module] = []

    def counting(self: Tree, model: nn.Module) -> None:
        counted.append(model)
        build(self, model)

    monkeypatch.setattr(Tree, "__init__", counting)
    for name, call in verbs.items():
        counted.clear()
        call()
        assert len(counted) == 1, name
    public = {
        "merge",
        "unmerge",
        "save",
        "load",
        "inject",
        "eject",
        "verify",
        "summary",
        "disabled",
    }
    assert public <= set(verbs)


@pytest.mark.parametrize("model", [None, 5, nn.Linear, [nn.Linear(2, 2)]], ids=repr)
def test_every_verb_says_that_a_model_is_a_module(model: object, tmp_path: pathlib.Path):
    verbs = (
        miss.adapted_modules,
        miss.adapter_parameters,
        miss.adapter_state_dict,
        miss.merge,
        miss.unmerge,
        miss.eject,
        miss.summary,
        miss.verify,
        lambda model: miss.inject(model, "all-linear"),
        lambda model: miss.save(model, tmp_path / "a.pt"),
        lambda model: miss.load(model, tmp_path / "a.pt"),
        lambda model: miss.disabled(model).__enter__(),
    )
    for verb in verbs:
        with pytest.raises(
            miss.TargetError, match=r"(?s)model: must be a module.*torch\.nn\.Module"
        ):
            verb(model)


def test_inside_and_holding():
    model = Decoder()
    tree = Tree(model)
    mlp = model.layers[0].mlp
    assert set(tree.inside([mlp])) == {id(module) for module in mlp.modules()}
    assert tree.inside([model]).keys() == {id(module) for module in model.modules()}
    last = model.layers[1]
    holders = (model, model.layers, last, last.mlp, model.alias)
    assert tree.holding([model.alias]) == {id(module) for module in holders}
    assert tree.holding([]) == set()
    assert tree.first[id(model.alias)] == "layers.1.mlp.2"
    assert tree.modules["alias"] is model.alias
    assert tree.times_held[id(model.alias)] == 2
    assert tree.output_head == {id(model.lm_head)}


def test_a_wrapper_and_its_module_share_a_name():
    model = Decoder()
    tree = Tree(torch.compile(model, backend="eager"))
    assert tree.root is model
    assert tree.modules[""] is model
    assert tree.of_type(nn.Module)[""] is model
    assert len(tree.unique) == len(list(model.modules())) + 1
    assert MOST_NAMES == 1000
