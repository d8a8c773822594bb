"""Faults: whatever happens to a file, loading gives what was saved, or fails cleanly.

The error says what is wrong, and the model has not changed.
"""

import copy
import errno
import json
import os
import pathlib
import pickle
import resource
import stat
import subprocess
import sys
import textwrap

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from miss import CheckpointError, adapter_state_dict, inject, load, save
from tests.installed import ENVIRONMENT
from tests.models import perturb, snapshot

suffixes = pytest.mark.parametrize("suffix", [".safetensors", ".pt"])


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))


@pytest.fixture
def model() -> nn.Sequential:
    adapted = inject(small(), "0", rank=2, method="misse")
    perturb(inject(adapted, "1", rank=2, method="miss"))
    return adapted


def assert_refused_or_the_same(
    path: pathlib.Path, model: nn.Module, message: str | None = None
) -> bool:
    """Load into a base model and into an adapted one; whether the file was refused."""
    other = copy.deepcopy(model)
    perturb(other)
    for target in (small(), other):
        before = snapshot(target)
        error = None
        try:
            load(target, path)
        except CheckpointError as raised:
            error = str(raised)
        if error is not None:
            assert snapshot(target) == before
            assert str(path) in error
            assert (message or "") in error
        else:
            state, expected = adapter_state_dict(target), adapter_state_dict(model)
            assert list(state) == list(expected)
            assert all(torch.equal(state[key], expected[key]) for key in state)
    return error is not None


@suffixes
def test_truncated_files(tmp_path: pathlib.Path, model: nn.Module, suffix: str):
    path = tmp_path / f"a{suffix}"
    save(model, path, extra="1")
    content = path.read_bytes()
    for length in [*range(0, len(content), 64), len(content) - 1]:
        path.write_bytes(content[:length])
        assert assert_refused_or_the_same(path, model), length


@suffixes
@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_flipped_bytes(tmp_path: pathlib.Path, model: nn.Module, suffix: str, flip: int):
    path = tmp_path / f"a{suffix}"
    save(model, path)
    content = path.read_bytes()
    refused = 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= flip
        path.write_bytes(damaged)
        refused += assert_refused_or_the_same(path, model)
    assert refused > len(content) / 3  # the rest is padding, and what a zip file says twice


def rewrite(path: pathlib.Path, change) -> None:
    """Let ``change(tensors, about)`` edit a .safetensors file, the checksum left as it was.

    It may return another text.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["miss"])
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    text = change(tensors, about)
    save_file(tensors, path, {"miss": text if isinstance(text, str) else json.dumps(about)})


def put(key: str, tensor: Tensor):
    return lambda tensors, about: tensors.update({key: tensor}) or None


def put_field(field: str, value: object):
    return lambda tensors, about: about["adapters"]["0.miss_D"].update({field: value}) or None


WRONG = "metadata of '0.miss_D': not the settings of an adapter"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t, a: t.update({"0.miss_E": t.pop("0.miss_D")}),
            "1 missing: 0.miss_D; 1 unexpected: 0.miss_E",
        ),
        (put("2.miss_D", torch.zeros(1)), "1 unexpected: 2.miss_D"),
        (lambda t, a: t.pop("1.miss_D") is None, "1 missing: 1.miss_D"),
        (
            put("0.miss_D", torch.zeros(3, 4)),
            "0.miss_D does not fit its metadata\n  expected: (3, 2)\n  actual:   (3, 4)",
        ),
        (
            put("0.miss_D", torch.zeros(3, 2, dtype=torch.int32)),
            "0.miss_D does not fit its metadata",
        ),
        (put("0.miss_D", torch.zeros(3, 2).half()), "checksum"),
        (
            put("0.miss_D", torch.full((3, 2), torch.nan)),
            "0.miss_D has elements that are not finite",
        ),
        (put("0.miss_D", torch.zeros(3, 0)), "0.miss_D has no elements"),
        (put("0.miss_D", torch.zeros(3, 2)), "content does not match its checksum"),
        (lambda t, a: "{", "is not JSON"),
        (lambda t, a: "[" * 100_000, "is not JSON"),
        (lambda t, a: "[]", "no format version"),
        (lambda t, a: a.pop("format") and None, "no format version"),
        (lambda t, a: a.update(format=True), "no format version"),
        (
            lambda t, a: a.update(format=3, version="9.0"),
            "newer version of this package (9.0)\n  expected: format 2 or lower",
        ),
        (lambda t, a: a.update(format=1), "lists no adapted modules"),
        (lambda t, a: a.update(modules=a.pop("adapters")), "lists no adapted modules"),
        (lambda t, a: a.pop("adapters") and None, "lists no adapted modules"),
        (lambda t, a: a.update(adapters={}), "lists no adapted modules"),
        (lambda t, a: a.update(adapters=[1]), "lists no adapted modules"),
        (lambda t, a: a.update(extra=[1]), "lists no extra tensors"),
        (lambda t, a: a["adapters"].update({"0.miss_D": 3}), WRONG),
        (lambda t, a: a["adapters"]["0.miss_D"].pop("rank") and None, WRONG),
        (lambda t, a: a["adapters"]["0.miss_D"].pop("module") and None, WRONG),
        (lambda t, a: a["adapters"]["0.miss_D"].pop("scale") and None, WRONG),
        (
            lambda t, a: a.update(adapters={"miss_D": a["adapters"]["0.miss_D"] | {"module": []}}),
            "metadata of 'miss_D': not the settings of an adapter",
        ),
        (put_field("other", 1), WRONG),
        (put_field("axes", [0, 1]), WRONG),
        (put_field("module", "1"), f"{WRONG}\n  expected: those of 1.miss_D"),
        (put_field("module", 0), f"{WRONG}\n  expected: those of miss_D"),
        (put_field("parameter", "bias"), WRONG),
        (put_field("parameter", ["weight"]), WRONG),
        (
            put_field("host", "mine.Host"),
            "0 needs a host that is not registered here\n  expected: mine.Host",
        ),
        (put_field("host", 3), "0 needs a host that is not registered here"),
        (put_field("rank", 2.0), WRONG),
        (put_field("rank", 6), WRONG),
        (put_field("rank", 0), WRONG),
        (put_field("method", "mist"), WRONG),
        (put_field("method", ["misse"]), WRONG),
        (put_field("alternate", 1), f"{WRONG}\n  actual:   alternate=1"),
        (lambda t, a: a["adapters"]["1.miss_D"].update(alternate=True), "not the settings of"),
        (lambda t, a: a["adapters"]["0.miss_D"].update(alternate=True, rows=1), WRONG),
        (put_field("alternate", True), "checksum"),
        (put_field("scale", float("nan")), WRONG),
        (put_field("scale", "1"), WRONG),
        (put_field("dropout", 1.0), WRONG),
        (put_field("shape", [3]), WRONG),
        (put_field("shape", ["3", "5"]), WRONG),
        (put_field("rows", 2), WRONG),
        (put_field("rows", 0), WRONG),
        (put_field("rows", True), WRONG),
        (put_field("rows", 1), "0.miss_D does not fit its metadata"),
        (
            lambda t, a: a["adapters"]["1.miss_D"].update(rows=1),
            "metadata of '1.miss_D': not the settings of an adapter",
        ),
        (put_field("shape", [30, 5]), "0.miss_D does not fit its metadata"),
        (put_field("shape", [3, 5, 7]), "0.miss_D does not fit its metadata"),
        (put_field("scale", 2.0), "checksum"),
        (lambda t, a: a.update(version="0.0.1"), "checksum"),
        (lambda t, a: a.pop("sha256") and None, "checksum"),
    ],
)
def test_edited_files(tmp_path: pathlib.Path, model: nn.Module, change, message: str):
    path = tmp_path / "a.safetensors"
    save(model, path)
    rewrite(path, change)
    assert assert_refused_or_the_same(path, model, message)


def test_metadata_missing(tmp_path: pathlib.Path, model: nn.Module):
    path = tmp_path / "a.safetensors"
    save(model, path)
    tensors = load_file(path)
    for metadata in (None, {"format": "pt"}):
        save_file(tensors, path, metadata)
        assert assert_refused_or_the_same(path, model, "has no metadata 'miss'")


class Hostile:
    """A pickle that runs code where it is let."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return (pathlib.Path.touch, (self.path,))


@suffixes
def test_pickles_are_not_run(tmp_path: pathlib.Path, model: nn.Module, suffix: str):
    path, trace = tmp_path / f"a{suffix}", tmp_path / "trace"
    path.write_bytes(pickle.dumps(Hostile(trace)))
    assert assert_refused_or_the_same(path, model, "cannot be read")
    torch.save({"miss": "{}", "tensors": Hostile(trace)}, path)
    assert assert_refused_or_the_same(path, model, "cannot be read")
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        3,
        [],
        {"miss": "{}"},
        {"miss": 3, "tensors": {}},
        {"miss": "{}", "tensors": [torch.ones(1)]},
        {"miss": "{}", "tensors": {"a": 1}},
        {"miss": "{}", "tensors": {1: torch.ones(1)}},
        {"miss": "{}", "tensors": {"a": nn.Parameter(torch.ones(1))}},
        {"miss": '{"format": 1}', "tensors": {"a": torch.ones(1).expand(1 << 40)}},
        {"miss": "{}", "tensors": {"a": torch.ones(1, device="meta")}},
        {"miss": "{}", "tensors": {"a": torch.eye(2).to_sparse()}},
    ],
    ids=lambda content: str(content)[:40],
)
def test_other_contents_of_a_pt_file(tmp_path: pathlib.Path, model: nn.Module, content: object):
    torch.save(content, tmp_path / "a.pt")
    assert assert_refused_or_the_same(tmp_path / "a.pt", model)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_in_a_pt_file(tmp_path: pathlib.Path, model: nn.Module):
    torch.save(
        {"miss": '{"format": 1}', "tensors": {"a": torch.nested.nested_tensor([torch.ones(2)])}},
        tmp_path / "a.pt",
    )
    assert assert_refused_or_the_same(tmp_path / "a.pt", model, "cannot be read")


@suffixes
def test_missing_files_and_folders(tmp_path: pathlib.Path, model: nn.Module, suffix: str):
    assert assert_refused_or_the_same(tmp_path / f"a{suffix}", model, "there is no such file")
    (tmp_path / f"folder{suffix}").mkdir()
    assert assert_refused_or_the_same(tmp_path / f"folder{suffix}", model, "cannot be read: ")
    for wrong in (tmp_path / "missing" / f"a{suffix}", tmp_path / f"folder{suffix}"):
        with pytest.raises(CheckpointError, match="cannot be written: "):
            save(model, wrong)
    assert [p.name for p in tmp_path.iterdir()] == [f"folder{suffix}"]


@suffixes
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("fault", ["too large", "fsync", "rename", "interrupt"])
def test_a_write_that_fails(
    tmp_path: pathlib.Path,
    model: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
    existing: bool,
    fault: str,
):
    path, old = tmp_path / f"a{suffix}", copy.deepcopy(model)
    if existing:
        save(old, path)
    before, content = snapshot(model), path.read_bytes() if existing else None

    def fail(*args: object) -> None:
        if fault == "interrupt":
            raise KeyboardInterrupt
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    perturb(old)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if fault == "too large":  # the system's own refusal, in the middle of the file
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    else:
        monkeypatch.setattr(os, "replace" if fault == "rename" else "fsync", fail)
    expected = KeyboardInterrupt if fault == "interrupt" else CheckpointError
    try:
        with pytest.raises(
            expected, match=None if fault == "interrupt" else "cannot be written: .*(space|large)"
        ):
            save(model, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert snapshot(model) == before
    assert (path.read_bytes() if path.exists() else None) == content
    assert len(list(tmp_path.iterdir())) == existing


@suffixes
def test_links_are_followed_and_permissions_kept(
    tmp_path: pathlib.Path, model: nn.Module, suffix: str
):
    path, link = tmp_path / f"a{suffix}", tmp_path / f"link{suffix}"
    save(model, path)
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    path.chmod(0o640)
    link.symlink_to(path)
    perturb(model)
    save(model, link)
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert not assert_refused_or_the_same(path, model)


def test_a_folder_that_cannot_be_flushed_is_no_failure(
    tmp_path: pathlib.Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delattr(os, "O_DIRECTORY")
    save(model, tmp_path / "a.pt")
    assert not assert_refused_or_the_same(tmp_path / "a.pt", model)


def test_a_dtype_that_the_format_lacks(tmp_path: pathlib.Path, model: nn.Module):
    model.append(nn.Module())
    model[2].register_buffer("wide", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(
        CheckpointError, match=r"the format cannot hold these tensors.*\n.*use the suffix \.pt"
    ):
        save(model, tmp_path / "a.safetensors", extra="2")
    save(model, tmp_path / "a.pt", extra="2")


KILLED = """
    import os, random, signal, sys, time
    import torch
    from miss import MiSSeLinear, load, save

    path, random.seed = sys.argv[1], random.seed(0)
    torch.set_num_threads(1)
    layers = [MiSSeLinear(200, 100, rank=100) for _ in range(2)]
    for value, layer in enumerate(layers):
        torch.nn.init.constant_(layer.miss_D, value + 1.0)
    save(layers[0], path)
    seen, kills, deadline = set(), 0, time.monotonic() + 60
    while kills < 40 or (len(seen) < 2 and time.monotonic() < deadline):
        kills += 1
        child = os.fork()
        if not child:
            while True:
                save(layers[1], path)
                save(layers[0], path)
        time.sleep(random.uniform(0.0, 0.02 * (1 + kills / 40)))  # longer on a busy machine
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        values = load(torch.nn.Linear(200, 100), path, any_base=True).miss_D.unique().tolist()
        assert values in ([1.0], [2.0]), values
        seen.add(values[0])
        print(int(values[0]), end="")
"""


@suffixes
def test_a_process_killed_while_it_saves_leaves_the_old_file_or_the_new_one(
    tmp_path: pathlib.Path, suffix: str
):
    path = tmp_path / f"a{suffix}"
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(KILLED), str(path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=180, env=ENVIRONMENT)
    assert run.returncode == 0, run.stderr
    assert set(run.stdout) == {"1", "2"}
    assert {p.suffix for p in tmp_path.iterdir()} <= {suffix, ".tmp"}
