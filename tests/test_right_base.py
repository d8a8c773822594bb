"""A file knows the base that its adapters were trained on."""

import copy
import pathlib
from collections.abc import Callable

import pytest
import torch
from torch import nn

from miss import CheckpointError, inject, load, merge, save
from tests.models import fill, snapshot
from tests.pretrained import bert, llama

pytestmark = pytest.mark.filterwarnings("error")


def wide(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Embedding(50, 64), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)]
    return nn.Sequential(*layers, nn.Linear(64, 5)).requires_grad_(False)


def saved(tmp_path: pathlib.Path, base: nn.Module, targets: object = ["1", "3"]) -> pathlib.Path:
    save(fill(inject(copy.deepcopy(base), targets, rank=4)), tmp_path / "a.pt")
    return tmp_path / "a.pt"


def slightly(weight: torch.Tensor) -> None:
    weight.mul_(1 + 1e-3 * torch.randn_like(weight))


def all_but_a_column(weight: torch.Tensor) -> None:
    weight[:, 1:] += 1.0


def all_but_eight_rows(weight: torch.Tensor) -> None:
    weight[8:] += 1.0


@pytest.mark.parametrize("change", [slightly, all_but_a_column, all_but_eight_rows])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sibling_is_an_error(tmp_path: pathlib.Path, change: Callable, dtype: torch.dtype):
    base = wide().to(dtype)
    path = saved(tmp_path, base)
    other = wide()
    change(other[3].weight)
    other = other.to(dtype)
    before = snapshot(other)
    message = r"a\.pt: .*other weights than the base.*\n  actual: +3\.weight\n  do: .*any_base=True"
    with pytest.raises(CheckpointError, match=message):
        load(other, path)
    assert snapshot(other) == before
    load(other, path, any_base=True)
    again = wide()
    change(again[3].weight)
    inject(again.to(dtype), ["1", "3"], rank=4)
    with pytest.raises(CheckpointError, match=message):
        load(again, path)


@pytest.mark.parametrize("one", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("two", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("merged", [False, True])
def test_copies_of_one_base_in_other_dtypes_are_that_base(
    tmp_path: pathlib.Path, one: torch.dtype, two: torch.dtype, merged: bool
):
    base = wide()
    base[1].weight[:, 7:30] *= 1e-6  # subnormal in fp16
    base[1].weight[:8] = float("inf")
    base[0].weight[3:9] = 1e5  # inf in fp16
    model = fill(inject(copy.deepcopy(base).to(one), "3", rank=4))
    if merged:
        merge(model)
    save(model, tmp_path / "a.pt")
    loaded = load(copy.deepcopy(base).to(two), tmp_path / "a.pt")
    assert torch.equal(loaded[3].miss_D, model[3].miss_D)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: nn.init.normal_(m[4].weight), r"4\.weight"),
        (lambda m: m.__setitem__(0, nn.Embedding(60, 64)), r"0\.weight"),
        (lambda m: m.__setitem__(0, nn.Identity()), r"0\.weight"),
        (lambda m: m.__setitem__(4, nn.Linear(64, 7)), r"4\.weight"),
    ],
)
def test_what_else_differs_is_a_warning(tmp_path: pathlib.Path, change: Callable, named: str):
    path, other = saved(tmp_path, wide()), wide()
    change(other)
    before = snapshot(other)
    with pytest.raises(UserWarning, match=rf"a\.pt: .*other values of {named}$"):
        load(other, path)
    assert snapshot(other) == before  # even where a warning is an error
    with pytest.warns(UserWarning, match=rf"other values of {named}$"):
        load(other, path)
    load(copy.deepcopy(other), path, any_base=True)


def test_an_adapted_weight_that_is_tied_counts_under_every_name(tmp_path: pathlib.Path):
    base = llama()
    base.lm_head.weight = base.model.embed_tokens.weight
    path = saved(tmp_path, base, "lm_head")
    load(copy.deepcopy(base), path)
    other = copy.deepcopy(base).requires_grad_(False)
    nn.init.normal_(other.lm_head.weight)
    with pytest.raises(CheckpointError, match=r"actual: +model\.embed_tokens\.weight"):
        load(other, path)


def test_a_tie_of_the_file_is_compared_name_by_name(tmp_path: pathlib.Path):
    base = llama()
    base.lm_head.weight = base.model.embed_tokens.weight
    path = saved(tmp_path, base, "q_proj")
    untied = copy.deepcopy(base)
    untied.lm_head.weight = nn.Parameter(base.lm_head.weight + 1.0, requires_grad=False)
    with pytest.warns(UserWarning, match=r"other values of lm_head\.weight$"):
        load(untied, path)
    path = saved(tmp_path, base, "lm_head")
    untied = copy.deepcopy(base)
    untied.lm_head.weight = nn.Parameter(base.lm_head.weight + 1.0, requires_grad=False)
    with pytest.raises(CheckpointError, match=r"actual: +lm_head\.weight\n"):
        load(untied, path)


def test_what_the_file_holds_is_not_asked(tmp_path: pathlib.Path):
    whole = fill(inject(wide().requires_grad_(True), "1", rank=4, freeze=False))
    save(whole, tmp_path / "whole.pt")
    loaded = load(wide(9), tmp_path / "whole.pt")
    assert torch.equal(loaded[3].weight, whole[3].weight)
    path = saved(tmp_path, bert(), "query")  # its head is trained, so the file holds it
    other = bert()
    nn.init.normal_(other.classifier.weight)
    load(other, path)
