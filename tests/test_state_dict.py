"""A `state_dict` says what it means, and loading one heeds it."""

import copy
import io
import itertools
import pathlib
import warnings
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from miss import (
    CheckpointError,
    StateError,
    adapter_state_dict,
    combine,
    eject,
    inject,
    load_adapter_state_dict,
    merge,
    unmerge,
)
from tests.models import TOKENS, Decoder, adapted_decoder, perturb, snapshot
from tests.strategies import OPTIONS, methods

FULL = StateDictOptions(full_state_dict=True)
NOT_STRICT = StateDictOptions(full_state_dict=True, strict=False)
MERGED = r"(?s)the incoming weight is a merged one.*adapter_state_dict.*unmerge before state_dict"


def test_while_merged_it_is_the_merged_plain_model_and_nothing_is_loaded():
    model = adapted_decoder()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plain = eject(copy.deepcopy(model), merge=True).state_dict()
    merge(model)
    merge(model)
    guarded = (model, model.layers[0].mlp, model.layers[0].mlp[0])
    assert {len(module._load_state_dict_pre_hooks) for module in guarded} == {1}
    kept = snapshot(model)
    merged = model.state_dict()
    assert list(merged) == list(plain)
    assert all(torch.equal(tensor, plain[key]) for key, tensor in merged.items())
    Decoder().load_state_dict(merged)
    zeros = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    for part, prefix in (
        (model, ""),
        (model.layers, "layers."),
        (model.layers[0].mlp[0], "layers.0.mlp.0."),
    ):
        keys = [key for key in zeros if key.startswith(prefix)]
        part_zeros = {key.removeprefix(prefix): zeros[key] for key in keys}
        for assign in (False, True):
            with pytest.raises(StateError, match=r"is merged.*\n.*unmerge"):
                part.load_state_dict(part_zeros, assign=assign)
    assert snapshot(model) == kept
    unmerge(model.layers[0])
    with pytest.raises(StateError):
        model.load_state_dict(zeros)
    model.layers[0].load_state_dict(model.layers[0].state_dict())
    unmerge(model)
    assert not any(m._load_state_dict_pre_hooks for m in model.modules())
    model.load_state_dict(zeros)


def through_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


def through_safetensors(state: dict[str, Tensor], folder: pathlib.Path) -> dict[str, Tensor]:
    save_file({key: tensor.clone() for key, tensor in state.items()}, folder / "state.safetensors")
    return load_file(folder / "state.safetensors")


def same_values(model: nn.Module, state: dict[str, Tensor]) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in own)


@methods
def test_metadata_says_form_sign_and_whether_it_is_merged(method: str):
    model = adapted_decoder(method)
    for merged in (False, True):
        if merged:
            merge(model)
        own = model.state_dict()
        for state in (own, copy.deepcopy(own), through_file(own)):
            about = state._metadata["layers.0.mlp.0"]["miss"]
            name, alternate = OPTIONS[method]["method"], method == "alternating"
            assert about == {"form": name, "alternate": alternate, "merged": merged}
            assert "miss" not in state._metadata["layers.0"]
    assert adapter_state_dict(model)._metadata["layers.0.mlp.0"]["miss"]["merged"] is False


@methods
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("how", ["same", "deepcopy", "dict", "torch.save", "safetensors"])
def test_an_unmerged_state_goes_back_silently(
    tmp_path: pathlib.Path, method: str, how: str, assign: bool
):
    model = adapted_decoder(method)
    state = copy.deepcopy(model.state_dict())
    if how == "dict":
        state = dict(state)
    elif how == "torch.save":
        state = through_file(state)
    elif how == "safetensors":
        state = through_safetensors(state, tmp_path)
    fresh = inject(Decoder(), "all-linear", rank=2, **OPTIONS[method])
    for other in (model, fresh, copy.deepcopy(fresh)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other.load_state_dict(state, assign=assign)
        assert same_values(other, state)
        assert torch.equal(other(TOKENS), model(TOKENS))


@methods
@pytest.mark.parametrize("how", ["marked", "dict", "safetensors"])
def test_a_merged_state_is_refused_where_its_own_adapter_is(
    tmp_path: pathlib.Path, method: str, how: str
):
    model = adapted_decoder(method).double()
    merge(model)
    best = copy.deepcopy(model.state_dict())  # the best state, kept while merged
    unmerge(model)
    if how == "dict":
        best = dict(best)
    elif how == "safetensors":
        best = through_safetensors(best, tmp_path)
    before = snapshot(model.layers[0].self_attn.q_proj)
    for part, prefix in (
        (model, ""),
        (model.layers[0].self_attn.q_proj, "layers.0.self_attn.q_proj."),
    ):
        keys = [key for key in best if key.startswith(prefix)]
        state = OrderedDict((key.removeprefix(prefix), best[key]) for key in keys)
        if how == "marked":
            state = best if part is model else sub_state(best, prefix)
        for strict in (False, True):
            with pytest.raises(StateError, match=MERGED):
                part.load_state_dict(state, strict=strict)
    assert snapshot(model.layers[0].self_attn.q_proj) == before
    for state in (best, dict(best)):  # without an adapter it is a plain model's
        plain = Decoder().double()
        plain.load_state_dict(state)
        assert same_values(plain, best)


def sub_state(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The part of a state under ``prefix``, with its metadata."""
    keys = [key for key in state if key.startswith(prefix)]
    part = OrderedDict((key.removeprefix(prefix), state[key]) for key in keys)
    part._metadata = OrderedDict({"": state._metadata[prefix[:-1]]})
    return part


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_merged_weight_is_known_by_its_values_in_every_dtype(method: str, dtype: torch.dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 36)).to(dtype)
    perturb(inject(model, "0", rank=5, **OPTIONS[method], scale=-0.5))
    merge(model)
    state = {"0.weight": model[0].weight.detach().clone()}
    unmerge(model)
    with pytest.raises(StateError, match=r"0: the incoming weight is a merged one"):
        model.load_state_dict(state, strict=False)


@methods
def test_a_marked_state_is_refused_by_a_fresh_adapter(method: str):
    model = adapted_decoder(method)
    merge(model)
    fresh = inject(Decoder(), "q_proj", rank=2, **OPTIONS[method])
    with pytest.raises(StateError, match=MERGED):
        fresh.load_state_dict(model.state_dict(), strict=False)
    rest = {key: tensor for key, tensor in model.state_dict().items() if "q_proj" not in key}
    fresh.load_state_dict(rest, strict=False)  # nothing of an adapted layer is in it


@pytest.mark.parametrize(("own", "other"), list(itertools.permutations(OPTIONS, 2)))
def test_another_form_or_sign_is_refused(own: str, other: str):
    def square(method: str) -> nn.Module:
        return inject(nn.Sequential(nn.Linear(4, 4)), "0", rank=4, **OPTIONS[method])

    one, two = perturbed(square(own)), square(other)
    before = snapshot(two)
    with pytest.raises(StateError, match="0: D comes from another form or sign"):
        two.load_state_dict(one.state_dict())
    settings = {"alternate": False} | OPTIONS[own]
    do = f"inject with method={settings['method']!r}, alternate={settings['alternate']}"
    with pytest.raises(CheckpointError, match=f"(?s)D comes from another form or sign.*{do}"):
        load_adapter_state_dict(two, adapter_state_dict(one))
    assert snapshot(two) == before
    with pytest.raises(CheckpointError, match=r"0\.miss_D is of another form than in adapter 0"):
        combine([(adapter_state_dict(one), 1.0), (adapter_state_dict(two), 1.0)])
    for state in (dict(adapter_state_dict(one)), combine([(dict(adapter_state_dict(one)), 1.0)])):
        load_adapter_state_dict(two, state)  # what is absent is unknown
    total = combine([(adapter_state_dict(one), 0.5), (dict(adapter_state_dict(one)), 0.5)])
    assert total._metadata == adapter_state_dict(one)._metadata
    weight_alone = OrderedDict({"0.weight": torch.zeros(4, 4)})
    weight_alone._metadata = one.state_dict()._metadata
    square(other).load_state_dict(weight_alone, strict=False)


def perturbed(model: nn.Module) -> nn.Module:
    perturb(model)
    return model


def test_another_base_under_a_trained_adapter_is_a_warning():
    model = adapted_decoder()
    base = eject(copy.deepcopy(model)).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(base, strict=False)  # the present one
        inject(Decoder(), "all-linear", rank=2).load_state_dict(base, strict=False)  # D is zero
    other = {key: tensor.clone() for key, tensor in base.items()}
    other["layers.0.mlp.0.weight"][3, 5] += 1
    with pytest.warns(UserWarning, match="another base weight") as caught:
        model.load_state_dict(other, strict=False)
    assert len(caught) == 1
    assert same_values(eject(model), other)


def test_a_base_that_is_assigned_to_a_meta_model_brings_a_zero_d():
    base = nn.Sequential(nn.Linear(6, 4))
    with torch.device("meta"):
        model = inject(nn.Sequential(nn.Linear(6, 4)), "0", rank=2)
    model.load_state_dict(base.state_dict(), strict=False, assign=True)
    assert model[0].miss_D.requires_grad
    assert not model[0].miss_D.any()
    x = torch.randn(3, 6)
    assert torch.equal(model(x), base(x))


def test_a_moving_average_is_an_average_of_base_and_adapter():
    torch.manual_seed(0)
    model = inject(Decoder(), "all-linear", rank=2)
    perturb(model)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    first = adapter_state_dict(model)
    averaged.update_parameters(model)
    perturb(model)
    averaged.update_parameters(model)
    second = adapter_state_dict(model)
    for key, d in adapter_state_dict(averaged.module).items():
        torch.testing.assert_close(d, 0.5 * first[key] + 0.5 * second[key])
    model.load_state_dict(averaged.module.state_dict())
    torch.testing.assert_close(model(TOKENS), averaged(TOKENS))
    with torch.no_grad():  # in place, on a state dict that shares memory with the model
        own = {tensor.data_ptr(): tensor for tensor in averaged.state_dict().values()}
        for tensor in own.values():
            tensor.mul_(2)
    for key, d in adapter_state_dict(averaged.module).items():
        torch.testing.assert_close(d, first[key] + second[key])


@methods
@pytest.mark.parametrize("options", [None, FULL], ids=["plain", "full"])
def test_distributed_state_dicts_go_round_unmerged(method: str, options: StateDictOptions | None):
    model = adapted_decoder(method)
    state = {key: t.clone() for key, t in get_model_state_dict(model, options=options).items()}
    fresh = inject(Decoder(), "all-linear", rank=2, **OPTIONS[method])
    for other in (fresh, model):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            set_model_state_dict(other, dict(state), options=options)
        assert torch.equal(other(TOKENS), model(TOKENS))


@methods
@pytest.mark.parametrize("options", [None, FULL, NOT_STRICT], ids=["plain", "full", "not strict"])
def test_a_merged_distributed_state_dict_never_counts_a_delta_twice(method: str, options):
    model = adapted_decoder(method).double()
    merge(model)
    state = {key: t.clone() for key, t in get_model_state_dict(model, options=options).items()}
    assert not any("miss_D" in key for key in state)
    unmerge(model)
    on = model(TOKENS)
    with pytest.raises(StateError, match=MERGED):
        set_model_state_dict(model, state, options=options)
    assert torch.equal(model(TOKENS), on)
