"""Parameters as targets: what is matched, and what is said of those that no host adapts."""

import warnings

import pytest
import torch
from torch import nn

import tests.test_hosts  # noqa: F401  # registers `Mixer`
from miss import (
    CheckpointError,
    ShapeError,
    StateError,
    TargetError,
    adapted_modules,
    adapter_parameters,
    adapter_state_dict,
    files,
    inject,
    interop,
    load,
    merge,
    save,
    summary,
    tree,
)
from tests.hosts import Mixer
from tests.models import snapshot


class Router(nn.Module):
    """Chooses experts by a weight of its own, as mixtures of experts do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 8))


class Experts(nn.Module):
    """Experts in Parameters of three axes, and a scale of one."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 8, 16))
        self.down_proj = nn.Parameter(torch.randn(2, 8, 8))
        self.temperature = nn.Parameter(torch.ones(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = Router(), Experts()
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(8, 8), "down_proj": nn.Linear(8, 8)})
        self.mixer, self.alias = Mixer(8, 8), nn.Linear(8, 8)
        self.alias.twin = self.alias.weight  # a second name of the Parameter
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.mlp["up_proj"].weight  # tied


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.position_embeddings = nn.Parameter(torch.randn(1, 4, 8))
        self.blocks = nn.ModuleList([Block(), Block()])


def adapted(targets: object, **options: object) -> dict[str, list[str]]:
    model = inject(Model(), targets, rank=2, **options)
    return {name: list(layer.miss_configs) for name, layer in adapted_modules(model).items()}


MIXERS = ["blocks.0.mixer", "blocks.1.mixer"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("blocks.0.mixer.now", {"blocks.0.mixer": ["now"]}),
        ("mixer.now", {name: ["now"] for name in MIXERS}),
        ("mixer.past_weight", {name: ["past_weight"] for name in MIXERS}),
        (["mixer.now", "0.mixer"], {MIXERS[0]: ["now", "past_weight"], MIXERS[1]: ["now"]}),
        ("mixer", {name: ["now", "past_weight"] for name in MIXERS}),
        (Mixer, {name: ["now", "past_weight"] for name in MIXERS}),
        ("0.mlp.up_proj.weight", {"blocks.0.mlp.up_proj": ["weight"]}),
        ("blocks.0.alias.weight", {"blocks.0.alias": ["weight"]}),
        ("blocks.0.alias.twin", {"blocks.0.alias": ["weight"]}),  # two names, one Parameter
        (["0.alias.weight", "0.alias.twin", "0.alias"], {"blocks.0.alias": ["weight"]}),
        ("0.head.weight", {"blocks.0.head": ["weight"]}),  # tied: the layer that is named
    ],
)
def test_a_parameter_is_matched_by_whole_last_components(targets, expected: dict[str, list[str]]):
    assert adapted(targets) == expected


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        ("mixer.now", {name: ["past_weight"] for name in MIXERS}),
        ("blocks.0.mixer.past_weight", {MIXERS[0]: ["now"], MIXERS[1]: ["now", "past_weight"]}),
        (["blocks.0", "1.mixer.now"], {MIXERS[1]: ["past_weight"]}),
    ],
)
def test_a_parameter_can_be_excluded(exclude, expected: dict[str, list[str]]):
    assert adapted("mixer", exclude=exclude) == expected


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("now", r"matches no module; it is the last part.*\n.*\n.*write 'mixer.now'"),
        ("gate_up_proj", "write 'experts.gate_up_proj'"),
        ("weight", "write 'gate.weight' or 'up_proj.weight'"),
        (
            "experts.gate_up_proj",
            r"experts\.gate_up_proj: is a Parameter that cannot.*Experts.*regist",
        ),
        ("gate.weight", r"blocks\.0\.gate\.weight: is a Parameter that cannot be adapted.*Router"),
        ("gate", r"(?s)that can be adapted.*Router; their Parameters are 'blocks.0.gate.weight'"),
        (
            "experts",
            r"(?s)their Parameters are 'blocks.0.experts.gate_up_proj', 'blocks.0.experts.d",
        ),
        ("position_embeddings", r"position_embeddings: is a Parameter that cannot.*Model"),
        ("experts.temperature", "matches a Parameter that is no matrix"),
        ("mixer.nothing", "(?s)matches nothing.*a name in the model, such as"),
        ("mixr", "did you mean 'mixer'"),
        ("*.mixer.now", "matches nothing"),  # globs match modules alone
        (r".*\.(q|v)_proj", r"(?s)matches nothing.*re\.compile"),
        (r"blocks\.\d", r"(?s)matches nothing.*re\.compile"),
        ("up_proj$", r"(?s)matches nothing.*re\.compile"),
    ],
)
def test_a_parameter_that_is_not_adapted_says_why(targets: str, message: str):
    model = Model()
    before = snapshot(model)
    with pytest.raises(TargetError, match=message):
        inject(model, targets, rank=2)
    with pytest.raises(TargetError, match=message):
        inject(model, ["mixer", targets], rank=2)
    assert snapshot(model) == before


@pytest.mark.parametrize("argument", ["exclude", "trainable"])
def test_a_regular_expression_as_a_string_is_told_so_everywhere(argument: str):
    with pytest.raises(TargetError, match=rf"(?s){argument}: .*re\.compile"):
        inject(Model(), "mixer", rank=2, **{argument: r"mixer\.(a|b)"})


def test_parameters_of_the_name_of_modules_are_named_in_a_warning():
    with pytest.warns(UserWarning, match=r"'down_proj'.*blocks\.0\.experts\.down_proj, blocks\.1"):
        assert adapted("down_proj") == {f"blocks.{k}.mlp.down_proj": ["weight"] for k in (0, 1)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(adapted(["mlp.down_proj", "up_proj", "mixer"])) == 6
        assert len(adapted("down_proj", exclude="experts")) == 2


def test_a_later_call_adds_a_second_parameter_in_the_same_form():
    model = inject(Model(), "mixer.now", rank=2, method="miss", scale=0.5)
    before = snapshot(model)
    for targets, options, error, message in (
        ("mixer.now", {"method": "miss"}, StateError, "is adapted already"),
        ("mixer", {"method": "miss"}, StateError, "is adapted already"),
        ("mixer.past_weight", {}, StateError, "(?s)in another form; a layer has one.*'miss'"),
        ("mixer.past_weight", {"method": "miss", "rank": 99}, ShapeError, "rank=99"),
    ):
        with pytest.raises(error, match=message):
            inject(model, targets, **{"rank": 2} | options)
        assert snapshot(model) == before
    signed = inject(Model(), "mixer.now", rank=2, alternate=True)
    before = snapshot(signed)
    with pytest.raises(StateError, match=r"(?s)in another form.*alternate=True.*alternate=False"):
        inject(signed, "mixer.past_weight", rank=2)
    assert snapshot(signed) == before
    inject(signed, "mixer.past_weight", rank=2, alternate=True)
    inject(model, "0.mixer.past_weight", rank=3, method="miss")
    layer = model.blocks[0].mixer
    settings = {p: (c.rank, c.scale) for p, c in layer.miss_configs.items()}
    assert settings == {"now": (2, 0.5), "past_weight": (3, 1.0)}
    assert {name for name, _ in layer.named_parameters() if "miss" in name} == {
        "miss_D_now",
        "miss_D_past",
    }
    assert layer.miss_delta_weight("past_weight").shape == layer.past_weight.shape
    assert len(adapter_parameters(model)) == 3


def test_a_merged_layer_takes_no_second_parameter():
    model = inject(Model(), "mixer.now", rank=2)
    merge(model)
    before = snapshot(model)
    with pytest.raises(StateError, match=r"mixer: is merged: another of its.*\n.*unmerge"):
        inject(model, "mixer.past_weight", rank=2)
    assert snapshot(model) == before


def test_a_parameter_under_two_names_of_a_host_has_one_d():
    model = nn.Sequential(Mixer(8, 8))
    model[0].past_weight = model[0].now
    inject(model, "0", rank=2)
    assert list(model[0].miss_configs) == ["now"]
    with pytest.raises(StateError, match=r"its now is tied to 0\.past_weight"):
        merge(model)


def filled() -> Model:
    model = inject(Model(), ["mixer", "mlp.up_proj", "1.alias"], rank=2)
    for d in adapter_parameters(model):
        nn.init.normal_(d)
    return model


def test_each_d_has_its_row_its_key_and_its_place_in_a_file(tmp_path):
    model = filled()
    names = [row.name for row in summary(model).layers]
    assert names[:3] == ["blocks.0.mlp.up_proj", "blocks.0.mixer.now", "blocks.0.mixer.past_weight"]
    keys = list(adapter_state_dict(model))
    assert keys[1:3] == ["blocks.0.mixer.miss_D_now", "blocks.0.mixer.miss_D_past"]
    save(model, tmp_path / "a.pt")
    fresh = load(Model(), tmp_path / "a.pt")
    for key, d in adapter_state_dict(fresh).items():
        assert torch.equal(d, adapter_state_dict(model)[key])
    one = inject(Model(), ["mixer.now", "mlp.up_proj", "1.alias"], rank=2)
    with pytest.raises(CheckpointError, match=r"2 unexpected: blocks\.0\.mixer\.miss_D_past"):
        load(one, tmp_path / "a.pt")


@pytest.mark.parametrize("fields", [{"method": "miss"}, {"alternate": True}], ids=str)
def test_a_file_of_two_forms_for_one_module_is_refused(tmp_path, fields):
    path, key = str(tmp_path / "a.pt"), "blocks.0.mixer.miss_D_now"
    save(inject(Model(), "0.mixer", rank=2), path)
    tensors, about, _ = files.read(path)
    about["adapters"][key] |= fields
    tensors[key] = torch.zeros(2, 8) if "method" in fields else torch.zeros(8, 2)
    files.write(path, tensors, about)
    model = Model()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match="one module are adapted in two forms"):
        load(model, path)
    assert snapshot(model) == before


def test_what_a_directory_of_peft_cannot_hold_is_refused(tmp_path):
    for write in (interop.peft.save, interop.lora.save):
        with pytest.raises(StateError, match=r"blocks\.0\.mixer: is a Mixer.*\n.*miss\.save"):
            write(filled(), tmp_path / "peft")
    assert not list(tmp_path.iterdir())


def test_a_tied_parameter_is_not_merged():
    model = inject(Model(), "mlp.up_proj", rank=2)
    with pytest.raises(StateError, match=r"its weight is tied to blocks\.0\.head\.weight"):
        merge(model)


def test_a_tensor_that_is_no_parameter_is_no_target():
    model, table = Model(), torch.randn(8, 8)
    model.blocks[0].register_buffer("table", table)
    before = snapshot(model)
    with pytest.raises(TargetError, match="matches nothing"):
        inject(model, "0.table", rank=2)
    assert model.blocks[0].table is table
    assert snapshot(model) == before


@pytest.mark.parametrize("exclude", ["two", "two.q", "two.q.weight", nn.ConvTranspose1d])
def test_what_is_excluded_need_not_be_adaptable(exclude):
    one, two = (
        nn.ModuleDict({"q": nn.Linear(8, 8)}),
        nn.ModuleDict({"q": nn.ConvTranspose1d(8, 8, 1)}),
    )
    model = nn.ModuleDict({"one": one, "two": two})
    with pytest.raises(TargetError, match=r"two\.q\.weight: is a Parameter that cannot be adapted"):
        inject(model, "q.weight", rank=2)
    assert list(adapted_modules(inject(model, "q.weight", rank=2, exclude=exclude))) == ["one.q"]


def test_however_many_targets_each_parameter_is_looked_at_once(monkeypatch):
    seen = []
    monkeypatch.setattr(tree, "has_two_axes", lambda parameter: seen.append(parameter) or True)
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(50))
    inject(model, [str(place) for place in range(50)], rank=1)
    assert len(seen) == 100


def test_a_lone_name_of_modules_means_modules_beside_a_parameter_of_the_root():
    model = nn.ModuleDict({"block": nn.ModuleDict({"proj": nn.Linear(8, 8)})})
    model.register_parameter("proj", nn.Parameter(torch.ones(8, 8)))
    with pytest.warns(UserWarning, match="Parameters of that name are not adapted: proj$"):
        inject(model, "proj", rank=2)
    assert list(adapted_modules(model)) == ["block.proj"]


def test_a_target_that_is_all_excluded_says_why_it_cannot_be_adapted():
    model = nn.ModuleDict({"one": nn.Linear(8, 8), "two": nn.ConvTranspose1d(8, 8, 1)})
    with pytest.raises(TargetError, match=r"two\.weight: is a Parameter that cannot be adapted"):
        inject(model, ["one", "two.weight"], rank=2, exclude="two")
