import functools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from miss import StateError, TargetError, adapted_modules, inject
from miss.layers.swap import swap_back_
from miss.tree import Tree
from tests.models import Decoder

NAMES = sorted(
    {name for name, m in Decoder().named_modules() if type(m) is nn.Linear} - {"lm_head"}
)
ALIASED = "layers.1.mlp.2"  # comes first as "alias" in no walk: parents and their order decide


def names_of(model: nn.Module) -> list[str]:
    return [entry.name for entry in Tree(model).entries]


def adapted(targets: object, **options: object) -> list[str]:
    return sorted(adapted_modules(inject(Decoder(), targets, rank=2, **options)))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj", ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]),
        ("self_attn.q_proj", ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]),
        ("layers.0.self_attn.q_proj", ["layers.0.self_attn.q_proj"]),
        ("lm_head", ["lm_head"]),
        ("layers.0.*", [n for n in NAMES if n.startswith("layers.0.")]),
        ("layers.?.mlp.[0]", ["layers.0.mlp.0", "layers.1.mlp.0"]),
        (re.compile(r".*\.[qk]_proj"), [n for n in NAMES if n.endswith(("q_proj", "k_proj"))]),
        (nn.Linear, sorted([*NAMES, "lm_head"])),
        (lambda name, module: name.endswith("v_proj"), [n for n in NAMES if n.endswith("v_proj")]),
        (
            functools.partial(lambda end, name, module: name.endswith(end), "v_proj"),
            [n for n in NAMES if n.endswith("v_proj")],
        ),
        ("all-linear", NAMES),
        (
            ["q_proj", re.compile("lm_.*")],
            ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "lm_head"],
        ),
        ((name for name in ["k_proj"]), [n for n in NAMES if n.endswith("k_proj")]),
        ({"alias"}, [ALIASED]),
        ("al*", [ALIASED]),
    ],
)
def test_each_form(targets: object, expected: list[str]):
    assert adapted(targets) == expected


@given(
    st.lists(
        st.sampled_from(["layers", "0", "1", "self_attn", "q_proj", "mlp", "2", "proj", "alias"]),
        min_size=1,
        max_size=4,
    )
)
def test_a_plain_string_matches_whole_last_components(parts: list[str]):
    # Independent definition: the components of the target are the last components of one of the
    # module's names.
    aliases = {ALIASED: ["alias", ALIASED]}
    expected = [
        n for n in NAMES if any(a.split(".")[-len(parts) :] == parts for a in aliases.get(n, [n]))
    ]
    if expected:
        assert adapted(".".join(parts)) == expected
    else:
        with pytest.raises(TargetError):
            adapted(".".join(parts))


def test_exclude_wins_under_any_name():
    assert adapted("all-linear", exclude="layers.1") == [
        n for n in NAMES if n.startswith("layers.0")
    ]
    assert adapted("mlp.2", exclude="alias") == ["layers.0.mlp.2"]
    assert adapted(["q_proj", "k_proj"], exclude="k_proj") == [
        n for n in NAMES if n.endswith("q_proj")
    ]
    assert adapted("all-linear", trainable="layers.0") == [
        n for n in NAMES if n.startswith("layers.1")
    ]
    with pytest.raises(TargetError, match="nothing is left to adapt"):
        adapted("q_proj", exclude=nn.Linear)


@pytest.mark.parametrize("argument", ["targets", "exclude", "trainable"])
@pytest.mark.parametrize(
    "value",
    [
        5,
        None,
        [None],
        b"q_proj",
        re.compile(b"q"),
        [["q_proj"]],
        int,
        nn.Linear(1, 1),
        nn.ModuleList(),
        ["q_proj", 1.5],
    ],
)
def test_unknown_forms(argument: str, value: object):
    with pytest.raises(TargetError, match=f"{argument}: unknown form"):
        adapted(**{"targets": "q_proj"} | {argument: value})


@pytest.mark.parametrize("targets", [[], (), {}, iter(())])
def test_empty_targets(targets: object):
    with pytest.raises(TargetError, match="at least one module"):
        adapted(targets)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_prj", "did you mean 'q_proj'"),
        (["q_proj", "self_atn.k_proj"], "did you mean 'self_attn.k_proj'"),
        ("layers.0.self_attn.q_porj", "did you mean 'layers.0.self_attn.q_proj'"),
        ("proj", "matches nothing"),
        ("Q_PROJ", "matches nothing"),
        (re.compile("q_proj"), "matches nothing"),
        ("norm", "matches no layer of a type that can be adapted.*LayerNorm"),
        (nn.LayerNorm, "LayerNorm"),
        (nn.Conv2d, "Conv2d: matches nothing"),
        (lambda name, module: False, "matches nothing"),
        ("", "matches modules that hold layers, and no layer.*'\\*' adapts"),
    ],
)
def test_a_target_without_a_match_says_what_comes_near(targets: object, message: str):
    with pytest.raises(TargetError, match=f"(?s){message}"):
        adapted(targets)


@pytest.mark.parametrize("argument", ["exclude", "trainable"])
def test_exclude_and_trainable_must_match(argument: str):
    with pytest.raises(TargetError, match="did you mean 'lm_head'"):
        adapted("q_proj", **{argument: "lm_haed"})


class Odd(nn.Linear):
    def forward(self, x):
        return -super().forward(x)


def odd_ones() -> dict[str, tuple[nn.Module, str]]:
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    patched, named = nn.Linear(4, 4), nn.Linear(4, 4)
    patched.forward = lambda x: x
    named.miss_delta = 3  # a name that the adapter needs; others are the layer's own
    with_legacy_hook = nn.Linear(4, 4)
    weight = with_legacy_hook.weight
    del with_legacy_hook.weight
    with_legacy_hook.weight = weight.detach()
    return {
        "odd": (Odd(4, 4), "Odd"),
        "lazy": (nn.LazyLinear(4), "LazyLinear.*run the model once"),
        "normed": (normed, "remove_parametrizations"),
        "patched": (patched, "instance-level forward"),
        "named": (named, r"\['miss_delta'\]"),
        "bare": (with_legacy_hook, "no parameter 'weight'"),
    }


@pytest.mark.parametrize("name", sorted(odd_ones()))
def test_what_looks_adaptable_and_is_not(name: str):
    module, message = odd_ones()[name]
    model = nn.Sequential()
    model.add_module(name, module)
    model.add_module("fine", nn.Linear(4, 4))
    with pytest.raises(TargetError, match=f"(?s){name}.*{message}"):
        inject(model, [name, "fine"], rank=2)
    for targets in ("*", re.compile(".*"), nn.Linear, "all-linear", lambda name, module: True):
        inject(model, targets, rank=2, freeze=False)
        assert list(adapted_modules(model)) == ["fine"]
        swap_back_(model.fine)
    with pytest.raises(TargetError, match="no layer that can be adapted"):
        inject(model, f"{name}*", rank=2)
    with pytest.raises(TargetError, match="no layer that can be adapted"):
        inject(model, [name, "fine"], rank=2, exclude=name)


def test_all_linear_includes_conv1d_of_transformers():
    from transformers.pytorch_utils import Conv1D

    model = inject(nn.Sequential(Conv1D(4, 4), nn.Linear(4, 4)), "all-linear", rank=2)
    assert list(adapted_modules(model)) == ["0", "1"]


def test_wrappers_leave_no_trace_in_names():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Decoder()
    plain = set(names_of(model))
    model.layers[0] = checkpoint_wrapper(model.layers[0])
    model.layers[1].mlp = torch.compile(model.layers[1].mlp, backend="eager")
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    assert set(names_of(wrapped)) == plain
    inject(wrapped, "all-linear", rank=2)
    assert sorted(adapted_modules(wrapped)) == NAMES
    with pytest.raises(StateError, match=r"layers\.0\.self_attn\.q_proj"):
        inject(wrapped, "layers.0.self_attn.q_proj", rank=2)


def test_a_user_attribute_that_looks_like_a_wrapper_stays_in_the_name():
    model = nn.Module()
    model.module = nn.Sequential(nn.Linear(2, 2))
    assert names_of(model) == ["", "module", "module.0"]


def test_modules_that_all_refer_to_each_other_are_walked_in_bounded_time():
    blocks = [nn.Module() for _ in range(9)]
    for block in blocks:
        block.fc = nn.Linear(4, 4)
        for k, other in enumerate(blocks):
            if other is not block:
                setattr(block, f"peer{k}", other)
    model = inject(nn.ModuleList(blocks), "all-linear", rank=2)
    assert len(names_of(model)) <= 1000 * 20
    assert len(adapted_modules(model)) == 9


def test_a_module_that_contains_itself_through_a_child_is_walked_once():
    model = nn.Sequential(nn.Linear(2, 2))
    model._modules["loop"] = model
    assert names_of(model) == ["", "0"]


def test_all_linear_says_what_it_leaves_out():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(TargetError, match=r"leaves out .* trainable names\n.*linear layers: '2'"):
        inject(model, "all-linear", rank=2, trainable="2")
    with pytest.raises(TargetError, match="did you mean 'all-linear'"):
        inject(model, "all_linear", rank=2)
    with pytest.raises(TargetError, match=r"(?s)has no linear layer.*'0'.*name layers of other"):
        inject(model[:1], "all-linear", rank=2)
