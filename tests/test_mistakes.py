"""The commonest mistakes of users: each error says what is wrong, what to do, and with which call.

On each of them the model and every file are as they were.
"""

import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import peft
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer

import miss
from miss import CheckpointError, MissError, ShapeError, StateError, TargetError, interop
from miss.layers.linear import LinearHost
from tests.models import TOKENS, Decoder, perturb, snapshot

TARGETS = ["q_proj", "v_proj"]
Q = "layers.0.self_attn.q_proj"


def base(seed: int = 0, **sizes: int) -> nn.Module:
    torch.manual_seed(seed)
    return Decoder(**sizes)


def adapted(targets: Any = TARGETS, **settings: Any) -> nn.Module:
    model = miss.inject(base(), targets, **{"rank": 4} | settings)
    perturb(model)
    return model


def merged() -> nn.Module:
    model = adapted()
    miss.merge(model)
    return model


class Odd(nn.Module):
    """What cannot be adapted, what cannot be trained, and a layer that is never called."""

    def __init__(self):
        super().__init__()
        self.fc, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.index = nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def merged_then_reweighted() -> nn.Module:
    model = merged()
    model.get_submodule(Q).weight = nn.Parameter(torch.ones(4, 4))
    return model


def parametrized() -> nn.Module:
    model = adapted()
    nn.utils.parametrize.register_parametrization(model.get_submodule(Q), "miss_D", nn.Identity())
    return model


def another_model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8))


def wrapped() -> nn.Module:
    return nn.ModuleDict({"model": base()})


def wide() -> nn.Module:
    return base(width=16)


def other_weights() -> nn.Module:
    return base(3)


def other_layers() -> nn.Module:
    return adapted("q_proj")


def peft_model(config: Callable[..., Any], **settings: Any) -> nn.Module:
    return peft.get_peft_model(base(), config(target_modules=TARGETS, **settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Files of this package and of others, good and bad."""
    folder = tmp_path_factory.mktemp("files")
    model, state = adapted(), base().state_dict()
    for name in ("ours.pt", "ours.safetensors"):
        miss.save(model, folder / name)
        whole = (folder / name).read_bytes()
        (folder / f"cut_{name}").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.pt").touch()
    content = torch.load(folder / "ours.pt")
    about = json.loads(content["miss"]) | {"format": 9, "version": "9.0"}
    torch.save(content | {"miss": json.dumps(about)}, folder / "newer.pt")
    torch.save(state, folder / "state.pt")
    torch.save(base(), folder / "pickled.pt")
    torch.save(miss.adapter_state_dict(model), folder / "adapter.pt")
    torch.save(state, folder / "pytorch_model.bin")
    save_file({key: tensor.clone() for key, tensor in state.items()}, folder / "model.safetensors")
    peft_model(peft.MissConfig, r=4).save_pretrained(folder / "peft")
    peft_model(peft.LoraConfig, r=4).save_pretrained(folder / "lora")
    peft_model(peft.IA3Config, feedforward_modules=[]).save_pretrained(folder / "ia3")
    (folder / "checkpoint-1").mkdir()
    save_file({"a": torch.ones(1)}, folder / "checkpoint-1" / "model.safetensors")
    return folder


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Mistake(NamedTuple):
    """A name, the call that is the mistake, its error, parts of the text, and the model."""

    name: str
    call: Callable[[Any, pathlib.Path], object]
    error: type[Exception]
    texts: tuple[str, ...]
    model: Callable[[], nn.Module] = base
    loads_some: bool = False  # torch's load_state_dict may have loaded what came before


def label(value: object) -> str:
    """A value in the name of a test: the same in every process."""
    known = isinstance(value, (str, int, float, dict, torch.dtype, type(None)))
    return repr(value) if known else type(value).__name__


def targeting(target: Any, *texts: str, model: Any = base, **options: Any) -> Mistake:
    """A target, or another argument in ``options``, that matches nothing it may."""
    name = f"target {label(target)}"
    settings = {"rank": 4} | options
    return Mistake(name, lambda m, _: miss.inject(m, target, **settings), TargetError, texts, model)


def setting(error: type[Exception], name: str, value: Any, *texts: str) -> Mistake:
    """A keyword of `inject` that it does not take, or not with this value."""
    settings = {"rank": 4} | {name: value}
    call = lambda m, _: miss.inject(m, "q_proj", **settings)  # noqa: E731
    return Mistake(f"{name}={label(value)}", call, error, texts)


def loading(file: str, *texts: str, model: Any = base, read: Any = miss.load) -> Mistake:
    """A file or directory that cannot be loaded into the model."""
    name = f"{read.__module__} of {file} into {model.__name__}"
    return Mistake(name, lambda m, f: read(m, f / file), CheckpointError, (file, *texts), model)


def swapped(name: str, call: Callable[[Any, pathlib.Path], object], given: str) -> Mistake:
    """Arguments in the wrong order."""
    texts = ("model: must be a module", f"actual:   {given}", "give the model itself, as the first")
    return Mistake(f"swapped, {name}", call, TargetError, texts, adapted)


def of_another(name: str, expected: str, actual: str, **settings: Any) -> Mistake:
    """An adapted model whose settings are not those of the file."""
    texts = (f"the {name} of '{Q}' is not", f"expected: {expected}", f"actual:   {actual}")
    return Mistake(
        f"load, another {name}",
        lambda m, f: miss.load(m, f / "ours.pt"),
        CheckpointError,
        (*texts, "miss.eject(model) first"),
        lambda: adapted(**settings),
    )


def saving(path: str, *texts: str) -> Mistake:
    """A path that `save` does not write to."""
    call = lambda m, f: miss.save(m, f / path)  # noqa: E731
    return Mistake(f"save to {path!r}", call, CheckpointError, texts, adapted)


def combining(name: str, pairs: Callable[[Any, Any], Any], *texts: str) -> Mistake:
    """What `combine` does not take, made of the states of two models."""

    def call(model: nn.Module, folder: pathlib.Path) -> object:
        other = adapted("q_proj")
        return miss.combine(pairs(miss.adapter_state_dict(model), miss.adapter_state_dict(other)))

    return Mistake(f"combine {name}", call, CheckpointError, texts, adapted)


def load_state(change: Callable[[nn.Module, pathlib.Path], Any]) -> Callable[..., object]:
    """The call that loads what ``change`` gives as a state."""
    return lambda model, folder: miss.load_adapter_state_dict(model, change(model, folder))


class Resumed(interop.transformers.AdapterCheckpoints):
    """The mixin over a Trainer that only holds the model."""

    model: Any


def resume(model: nn.Module, folder: pathlib.Path) -> None:
    trainer = Resumed.__new__(Resumed)
    trainer.model = model
    trainer._load_from_checkpoint(str(folder / "checkpoint-1"))


# --- what several errors say

UNKNOWN = "targets: unknown form of target"
NOTHING = "matches nothing"
NO_ADAPTER = ("the model has no adapter", "miss.inject(model, targets) first")
UNMERGE = "miss.unmerge(model) first"
SUFFIX = ("unsupported file suffix", ".safetensors (recommended) or .pt")
AGAIN = "save or copy it again"
EJECT = "miss.eject(model) first: a model without adapters is injected as the file says"
SAVED_FROM = "load it into the model whose adapters were saved"

# --- the mistakes

WRONG_TARGETS = [
    targeting("q_porj", NOTHING, "did you mean 'q_proj'"),
    targeting("Q_PROJ", NOTHING, "did you mean 'q_proj'"),
    targeting("all_linear", NOTHING, "did you mean 'all-linear'"),
    targeting("ALL-LINEAR", NOTHING, "did you mean 'all-linear'"),
    targeting("all", NOTHING, "model.named_modules()", "'all-linear' is every linear layer"),
    targeting("query", NOTHING, f"such as 'embed', '{Q}'", "model.named_modules() has the names"),
    targeting("model.layers.0.self_attn.q_proj", NOTHING, f"did you mean '{Q}'"),
    targeting("layers[0].self_attn.q_proj", NOTHING, f"did you mean '{Q}'"),
    targeting("q_proj,v_proj", "a string is one name", "give a list: ['q_proj', 'v_proj']"),
    targeting(r".*\.(q|v)_proj", "a string is no regular expression", "re.compile('.*"),
    targeting("layers.+q_proj", "a string is no regular expression", "re.compile('layers.+q_proj'"),
    targeting(re.compile("q_proj"), NOTHING, "did you mean 'q_proj'"),
    targeting(nn.Conv2d, "target Conv2d: matches nothing", "model.named_modules() has the names"),
    targeting(lambda name, module: False, NOTHING, "model.named_modules() has the names"),
    targeting("all-linear", "the model has no linear", "miss.register", model=lambda: nn.ReLU()),
    targeting("", "hold layers, and no layer", "actual:   Decoder", "'*' adapts those inside"),
    targeting("layers", "hold layers, and no layer", "'layers.*' adapts those inside"),
    targeting("self_attn", "hold layers, and no layer", "'*.self_attn.*' adapts those inside"),
    targeting("norm", "LayerNorm", "miss.register(type, host)", "trainable='norm' trains it whole"),
    targeting("q_proj.bias", "a Parameter that is no matrix", "trainable='q_proj.bias' trains it"),
    targeting("normed", "is parametrized", "remove_parametrizations first", model=Odd),
    targeting("q_proj", "nothing is left to adapt", "exclude='layers'", exclude="layers"),
    targeting("q_proj", "exclude: 'k_porj' matches", "did you mean 'k_proj'", exclude="k_porj"),
    targeting(
        "q_proj",
        "part of a PEFT adapter",
        "merge_and_unload",
        model=lambda: peft_model(peft.LoraConfig),
    ),
    targeting(None, UNKNOWN, "actual:   None", "pass 'all-linear'"),
    targeting(3, UNKNOWN, "actual:   int 3", "name layers, such as 'q_proj'"),
    targeting([], "targets: must name at least one module", "a str, compiled pattern"),
    targeting(nn.Linear(2, 2), UNKNOWN, "Linear(in_features=2", "as in model.named_modules()"),
    targeting([nn.Parameter(torch.ones(2))], UNKNOWN, "as in model.named_parameters()"),
    targeting(nn.Parameter(torch.ones(2)), UNKNOWN, "as in model.named_parameters()"),
    targeting(
        peft.MissConfig(r=4), UNKNOWN, "MissConfig", "miss.inject(model, config.target_modules"
    ),
    targeting("q_proj", "trainable: 'lm_haed' matches nothing", "'lm_head'", trainable="lm_haed"),
    targeting("q_proj", "trainable: unknown form", "pass () for none", trainable=None),
]

RANK = "rank of MiSSe must be an int from 1 to in_features"
WRONG_SETTINGS = [
    setting(ShapeError, "rank", 0, Q, RANK, "1 <= rank <= 8", "rank=0"),
    setting(
        ShapeError, "rank", 64, Q, RANK, "layers.1.self_attn.q_proj (at most 8)", "rank=lambda"
    ),
    setting(ShapeError, "rank", 4.0, Q, RANK, "rank=4.0", "give an int, or rank=lambda"),
    setting(ShapeError, "rank", "4", Q, RANK, "rank='4'", "give an int, or rank=lambda"),
    setting(ShapeError, "rank", None, Q, RANK, "rank=None", "give an int, or rank=lambda"),
    setting(ShapeError, "rank", True, Q, RANK, "rank=True"),
    setting(ShapeError, "rank", {"q_proj": 4}, Q, RANK, "give an int, or rank=lambda"),
    setting(ShapeError, "rank", lambda name, module: None, Q, "rank=None", "rank=lambda"),
    setting(
        ShapeError,
        "method",
        "bone",
        "unknown method",
        "'misse' or 'miss'",
        "'misse' is the default, which PEFT calls MiSS (once Bone)",
    ),
    setting(ShapeError, "method", None, "unknown method", "method=None"),
    setting(ShapeError, "alternate", "yes", "inject: alternate must be True or False", "'yes'"),
    setting(ShapeError, "scale", float("nan"), Q, "scale must be a number", "a finite number"),
    setting(ShapeError, "dropout", 1.0, Q, "dropout must be a prob", "0 <= dropout < 1"),
    setting(ShapeError, "adapter_dtype", torch.int8, "must be trainable", "torch.bfloat16", "int8"),
    setting(
        ShapeError, "adapter_dtype", "float16", "must be trainable", "torch.float16", "'float16'"
    ),
    # Python names the keyword; docs/how-to/coming-from.md says what it is called here.
    setting(TypeError, "r", 8, "unexpected keyword argument 'r'"),
]

WRONG_MODELS = [
    swapped("inject", lambda m, f: miss.inject("q_proj", m), "str 'q_proj'"),
    swapped("save", lambda m, f: miss.save(f / "a.pt", m), "PosixPath"),
    swapped("load", lambda m, f: miss.load(str(f / "ours.pt"), m), "str '"),
    swapped("state", lambda m, f: miss.load_adapter_state_dict(m.state_dict(), m), "OrderedDict"),
    swapped("verify", lambda m, f: miss.verify(TOKENS, m), "Tensor"),
    swapped("None", lambda m, f: miss.merge(miss.unmerge(m)), "None"),
    Mistake(
        "a class",
        lambda m, f: miss.inject(Decoder, "q_proj"),
        TargetError,
        ("model: must be a module", "the class Decoder", "give an instance: Decoder(...)"),
    ),
    Mistake(
        "inject under DistributedDataParallel",
        lambda m, f: miss.inject(m, "q_proj", rank=4),
        StateError,
        ("wrapped by DistributedDataParallel", "inject, load or eject first, then wrap"),
        lambda: nn.parallel.DistributedDataParallel(base()),
    ),
    Mistake(
        "train integers",
        lambda m, f: miss.inject(m, "fc", rank=2, trainable="index"),
        StateError,
        ("index: cannot be trained", "torch.int64", "leave it out of trainable"),
        Odd,
    ),
    Mistake(
        "inject twice",
        lambda m, f: miss.inject(m, "q_proj", rank=4, method="miss"),
        StateError,
        (f"{Q}: is adapted already", "miss.eject(model), or leave it out with exclude"),
        adapted,
    ),
]

BEFORE_INJECT = {
    "save": lambda m, f: miss.save(m, f / "new.pt"),
    "merge": lambda m, f: miss.merge(m),
    "verify": lambda m, f: miss.verify(m, TOKENS),
    "interop.peft.save": lambda m, f: interop.peft.save(m, f / "new"),
    "interop.lora.save": lambda m, f: interop.lora.save(m, f / "new"),
}
WHILE_MERGED = {
    "train": lambda m, f: m.train()(TOKENS),
    "load": lambda m, f: miss.load(m, f / "ours.pt"),
    "load_adapter_state_dict": lambda m, f: miss.load_adapter_state_dict(m, {}),
    "interop.peft.load": lambda m, f: interop.peft.load(m, f / "peft"),
    "reset_adapter": lambda m, f: m.get_submodule(Q).reset_adapter(),
    "load_state_dict": lambda m, f: m.load_state_dict(base().state_dict()),
    "verify": lambda m, f: miss.verify(m, TOKENS, backward=True),
}


PAIRS = ("needs (state, weight) pairs", "miss.combine([(state, 0.5), (other, 0.5)])")
KEYS = ("the keys are not those of the model", "strict=False loads the keys that fit")
WRONG_STATES = [
    *(
        Mistake(f"{name} before inject", call, StateError, NO_ADAPTER)
        for name, call in BEFORE_INJECT.items()
    ),
    *(
        Mistake(f"{name} while merged", call, StateError, ("is merged: ", UNMERGE), merged)
        for name, call in WHILE_MERGED.items()
    ),
    Mistake(
        "load_state_dict of a merged state",
        lambda m, f: m.load_state_dict(merged().state_dict(), strict=False),
        StateError,
        (f"{Q}: the incoming weight is a merged one", "adapter_state_dict(model)"),
        adapted,
        loads_some=True,
    ),
    Mistake(
        "merge a tied layer",
        lambda m, f: miss.merge(m),
        StateError,
        ("lm_head: cannot be merged", "tied to embed.weight", "inject again with this layer in ex"),
        lambda: adapted("lm_head"),
    ),
    Mistake(
        "unmerge another weight",
        lambda m, f: miss.unmerge(m),
        StateError,
        (
            f"{Q}: cannot be unmerged",
            "(8, 8) of torch.float32 by (4, 4)",
            "miss.eject(model, merge",
        ),
        merged_then_reweighted,
    ),
    Mistake(
        "eject another class",
        lambda m, f: miss.eject(m),
        StateError,
        (f"{Q}: its class was replaced after injection", "expected: MiSSeLinear"),
        parametrized,
    ),
    Mistake(
        "verify without input",
        lambda m, f: miss.verify(m),
        StateError,
        ("verify: needs an example input", "'tokens'", "miss.verify(model, *inputs)"),
        adapted,
    ),
    Mistake(
        "verify what is never called",
        lambda m, f: miss.verify(m, torch.ones(1, 4)),
        StateError,
        ("verify: 1 of 2 adapters were not called", "actual:   spare", "leave them out with ex"),
        lambda: miss.inject(Odd(), ["fc", "spare"], rank=2),
    ),
    Mistake(
        "load_adapter_state_dict of the model's state",
        load_state(lambda m, f: m.state_dict()),
        CheckpointError,
        ("32 unexpected: embed.weight", *KEYS),
        adapted,
    ),
    Mistake(
        "load_adapter_state_dict of other layers",
        load_state(lambda m, f: miss.adapter_state_dict(adapted("k_proj"))),
        CheckpointError,
        ("4 missing", "2 unexpected", *KEYS),
        adapted,
    ),
    Mistake(
        "load_adapter_state_dict of a path",
        load_state(lambda m, f: f / "ours.pt"),
        CheckpointError,
        ("the state must be a mapping", "PosixPath", "miss.load(model, path)"),
        adapted,
    ),
    Mistake(
        "load_adapter_state_dict of another rank",
        load_state(lambda m, f: miss.adapter_state_dict(adapted(rank=2))),
        CheckpointError,
        (f"{Q}.miss_D has another shape", "expected: (8, 4)", "inject with the rank"),
        adapted,
    ),
    Mistake(
        "load_adapter_state_dict of another form",
        load_state(lambda m, f: miss.adapter_state_dict(adapted(method="miss"))),
        CheckpointError,
        (f"{Q}.miss_D: D comes from another form", "inject with method='miss', alternate=False"),
        adapted,
    ),
    Mistake(
        "load of a state",
        lambda m, f: miss.load(m, miss.adapter_state_dict(adapted())),
        CheckpointError,
        ("load: the path must be", "OrderedDict", "miss.load_adapter_state_dict(model, state)"),
    ),
    combining("one state", lambda one, other: one, *PAIRS),
    combining("states", lambda one, other: [one, one], *PAIRS),
    combining("nothing", lambda one, other: None, *PAIRS),
    combining(
        "other keys",
        lambda one, other: [(one, 0.5), (other, 0.5)],
        "adapter 1: the keys are not those of adapter 0",
        "combine adapters of the same layers",
    ),
    Mistake(
        "resume from the Trainer's own checkpoint",
        resume,
        CheckpointError,
        ("has no adapters", "expected: adapter.safetensors", "model.safetensors", "this mixin"),
        adapted,
    ),
    Mistake(
        "the mixin last",
        lambda m, f: type("Mine", (Trainer, interop.transformers.AdapterCheckpoints), {}),
        StateError,
        ("Mine: the mixin stands behind the Trainer", "class Mine(AdapterCheckpoints, Trainer)"),
    ),
    Mistake(
        "register a type twice",
        lambda m, f: miss.register(nn.Linear, LinearHost),
        StateError,
        ("Linear is registered already", "miss.inject adapts it as it is"),
    ),
    Mistake(
        "register a local type",
        lambda m, f: miss.register(type("Own", (nn.Linear,), {}), LinearHost),
        StateError,
        ("Own cannot be imported by its name", "define it at the top level of a module"),
    ),
    Mistake(
        "register a layer",
        lambda m, f: miss.register(nn.Bilinear(2, 2, 2), LinearHost),
        TargetError,
        ("register: needs a module type", "give the type itself: Bilinear"),
    ),
]


PEFT = interop.peft.load
WRONG_FILES = [
    saving("new", *SUFFIX, "new.safetensors')"),
    saving("new.bin", *SUFFIX, "new.safetensors')"),
    saving("new.ckpt", *SUFFIX, "new.safetensors')"),
    saving("peft", *SUFFIX, "give a file in this directory, such as adapter.safetensors"),
    saving("none/new.pt", "cannot be written: there is no folder", "with os.makedirs"),
    loading("peft", "is a directory that PEFT wrote", "miss.interop.peft.load(model, directory)"),
    loading("checkpoint-1", *SUFFIX, "give a file in this directory"),
    loading("peft/adapter_model.safetensors", "not written by miss.save", "interop.peft.load("),
    loading("state.pt", "not written by miss.save", "model.load_state_dict(state)"),
    loading("model.safetensors", "not written by miss.save", "model.load_state_dict(state)"),
    loading("adapter.pt", "not written by miss.save", "miss.load_adapter_state_dict(model, state)"),
    loading("pickled.pt", "holds more than tensors", "give a file that miss.save wrote"),
    loading("pytorch_model.bin", *SUFFIX),
    loading("none.pt", "there is no such file", "nothing is downloaded"),
    loading("someone/adapter", "there is no such file", "nothing is downloaded"),
    loading("empty.pt", "it is empty", AGAIN),
    loading("cut_ours.pt", "cannot be read", AGAIN),
    loading("cut_ours.safetensors", "cannot be read", AGAIN),
    loading("newer.pt", "a newer version", "format 2 or lower", "install a newer version"),
    loading("ours.pt", f"no module '{Q}'", SAVED_FROM, model=another_model),
    loading("ours.pt", f"no module '{Q}'", "load it into the model's part 'model'", model=wrapped),
    loading("ours.pt", f"weight of module '{Q}' has another shape", SAVED_FROM, model=wide),
    loading("ours.pt", "has other weights than", "pass any_base=True", model=other_weights),
    loading("ours.pt", "2 unexpected: ", EJECT, model=other_layers),
    of_another("rank", "2", "4", rank=2),
    of_another("method", "miss", "misse", method="miss"),
    of_another("alternate", "True", "False", alternate=True),
    of_another("scale", "2.0", "1.0", scale=2),
    loading("ours.pt", "is a file", "miss.load(model, path)", read=PEFT),
    loading("peft/adapter_model.safetensors", "is a file", "give the directory", read=PEFT),
    loading("lora", "unknown peft_type", "MISS or BONE", "'LORA'", "merge_and_unload", read=PEFT),
    loading("ia3", "unknown peft_type", "'IA3'", "then miss.inject", read=PEFT),
    loading("none", "there is no such directory", "nothing is downloaded", read=PEFT),
    loading("checkpoint-1", "has no adapter_config.json", "that PEFT wrote with", read=PEFT),
    loading("peft", "does not fit r", "load it into the model that PEFT", model=wide, read=PEFT),
    loading(
        "peft", f"no module '{Q}'", "the model that PEFT adapted", model=another_model, read=PEFT
    ),
    Mistake(
        "interop.peft.save of miss",
        lambda m, f: interop.peft.save(m, f / "new"),
        StateError,
        (f"{Q}: is a MiSSLinear, a form that PEFT does not have", "miss.interop.lora.save(model"),
        lambda: adapted(method="miss"),
    ),
    Mistake(
        "interop.peft.save of several ranks",
        lambda m, f: interop.peft.save(m, f / "new"),
        StateError,
        ("PEFT has one rank", "(2, 1, 0.0), (4, 1, 0.0)", "miss.interop.lora.save(model"),
        lambda: miss.inject(adapted("q_proj"), "v_proj", rank=2),
    ),
    Mistake(
        "interop.peft.save to a file",
        lambda m, f: interop.peft.save(m, f / "ours.pt"),
        CheckpointError,
        ("ours.pt: cannot be written: it is a file", "give a directory; miss.save(model, path)"),
        adapted,
    ),
    Mistake(
        "interop.lora.save of what is trained besides",
        lambda m, f: interop.lora.save(m, f / "new"),
        StateError,
        ("more than adapters is to be saved", "layers.0.norm.bias", "extra=() leaves it out"),
        lambda: adapted(trainable="norm"),
    ),
]

MISTAKES = [*WRONG_TARGETS, *WRONG_SETTINGS, *WRONG_MODELS, *WRONG_STATES, *WRONG_FILES]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_told_and_changes_nothing(mistake: Mistake, folder: pathlib.Path):
    torch.manual_seed(0)
    model = mistake.model()
    before, files = None if mistake.loads_some else snapshot(model), contents(folder)
    with pytest.raises(mistake.error) as error:
        mistake.call(model, folder)
    text = str(error.value)
    assert [part for part in mistake.texts if part not in text] == [], text
    if isinstance(error.value, MissError):
        assert error.value.where, text
        assert "\n" not in str(error.value.actual), text
    assert mistake.loads_some or snapshot(model) == before
    assert contents(folder) == files
