"""Files of named tensors and a JSON description, written whole or not at all.

Reading one runs no code in it.
"""

import contextlib
import ctypes
import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miss.errors import CheckpointError, brief
from miss.tensors import contiguous, is_data, is_lazy

__all__ = ["FORMAT", "Content", "as_path", "check_exists", "check_path", "check_tensors", "read"]
__all__ += ["read_tensors", "safetensors", "safetensors_bytes", "write", "write_bytes"]

FORMAT = 2  # of the description; a reader refuses a higher one
KEY = "miss"  # of the description: in .safetensors metadata, or at the top level of a .pt file


class Content(NamedTuple):
    """What a file holds.

    ``intact`` says whether the checksum fits. A reader asks it last, because other errors say more.
    """

    tensors: dict[str, Tensor]
    about: dict[str, Any]
    intact: bool


def as_path(path: str | os.PathLike[str]) -> str:
    """``path`` as a str; a `CheckpointError` if it is no path."""
    if isinstance(path, (str, os.PathLike)):
        return os.fspath(path)
    do = "give the name of a file or a directory"
    if isinstance(path, Mapping):
        do = "miss.load_adapter_state_dict(model, state) loads a state"
    rule = "the path must be a str or an os.PathLike"
    raise CheckpointError(rule, actual=brief(path), do=do)


def check_path(path: str) -> None:
    """Raise a `CheckpointError` unless ``path`` ends in ``.safetensors`` or ``.pt``."""
    stem, suffix = os.path.splitext(path)
    if suffix not in (".safetensors", ".pt"):
        expected = ".safetensors (recommended) or .pt"
        do = f"miss.save(model, {f'{stem}.safetensors'!r}) writes such a file"
        if os.path.isdir(path):
            do = "give a file in this directory, such as adapter.safetensors"
        raise CheckpointError("unsupported file suffix", expected=expected, do=do)


def check_exists(path: str) -> None:
    """Raise a `CheckpointError` unless there is a file or a directory at ``path``."""
    if not os.path.exists(path):
        do = "give a local path; nothing is downloaded"
        raise CheckpointError("there is no such file", do=do)


def check_tensors(tensors: Mapping[str, Tensor], buffers: Container[str] = ()) -> None:
    """Raise a `CheckpointError` if a tensor is not dense, has no elements or is not finite.

    Those in ``buffers``, such as a mask, may be infinite, and only must not hold NaN.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{name} is not a tensor", actual=type(tensor).__name__)
        if is_lazy(tensor):
            raise CheckpointError(f"{name} has no shape yet", do="run the model once, then save")
        if not is_data(tensor):
            kind = f"{type(tensor).__name__} of layout {tensor.layout} on {tensor.device}"
            raise CheckpointError(f"{name} is not an ordinary tensor with data", actual=kind)
        if not tensor.numel():
            raise CheckpointError(f"{name} has no elements", actual=f"shape {tuple(tensor.shape)}")
        values = tensor.detach()
        try:  # 8-bit floats have no isfinite
            values = values.float() if tensor.itemsize == 1 else values
            finite = ~values.isnan().any() if name in buffers else values.isfinite().all()
        except (RuntimeError, NotImplementedError) as error:
            rule = f"{name} has a dtype that cannot be checked"
            raise CheckpointError(rule, actual=tensor.dtype) from error
        if not finite:
            raise CheckpointError(f"{name} has elements that are not finite")


def write(path: str, tensors: Mapping[str, Tensor], about: dict[str, Any]) -> None:
    """Write a file that `read` gives back, atomically.

    Args:
        path: one that passed `check_path`.
        tensors: dense tensors on any device, which have passed `check_tensors`.
        about: the description, which JSON can hold; the format version and a checksum are added.

    Raises:
        CheckpointError: the file cannot be written; what was there before is still there.
        ImportError: the suffix is ``.safetensors`` and that package is absent.
    """
    copies = contiguous(tensors)
    about = {"format": FORMAT, **about}
    text = json.dumps(about | {"sha256": _digest(copies, about)}, allow_nan=False)
    to_bytes = safetensors_bytes if path.endswith(".safetensors") else _pt_bytes
    write_bytes(path, to_bytes(copies, {KEY: text}))


def write_bytes(path: str, content: bytes) -> None:
    """Replace a file: write a temporary one in its folder, flush it to the disk, then rename it.

    Links are followed. A process that is killed on the way leaves the old file, and perhaps a
    hidden ``.tmp`` file beside it.
    """
    try:
        target = os.path.realpath(path)
    except (OSError, ValueError) as error:  # the working directory is gone; a null byte
        raise CheckpointError(f"cannot be written: {error}") from error
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        do = "make it first, with os.makedirs"
        raise CheckpointError(f"cannot be written: there is no folder {folder}", do=do)
    if os.path.isdir(target):
        raise CheckpointError("cannot be written: it is a directory", do="give a file in it")
    temporary = os.path.join(folder, f".miss-{os.urandom(8).hex()}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise CheckpointError(f"cannot be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    # Where folders can be flushed, the renaming then survives a power cut too.
    with contextlib.suppress(OSError, AttributeError):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(path: str) -> Content:
    """Read a file that `write` wrote. Tensors are on the CPU.

    Only the container and the description have been checked, not the tensors.

    Raises:
        CheckpointError: there is no such file, it is damaged or of another kind, or of a newer
            format.
        ImportError: the suffix is ``.safetensors`` and that package is absent.
    """
    text, tensors = read_tensors(path)
    if not isinstance(text, str):
        rule = f"has no metadata {KEY!r}: it was not written by miss.save"
        raise CheckpointError(rule, do=_reader(tensors))
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its metadata {KEY!r} is not JSON: {error}") from error
    if not isinstance(about, dict) or type(about.get("format")) is not int or about["format"] < 1:
        raise CheckpointError(f"its metadata {KEY!r} has no format version")
    if about["format"] > FORMAT:
        writer = about.get("version", "unknown")
        rule = f"was written by a newer version of this package ({writer})"
        expected, actual = f"format {FORMAT} or lower", f"format {about['format']}"
        do = "install a newer version, or save again with this one"
        raise CheckpointError(rule, expected=expected, actual=actual, do=do)
    sha256 = about.pop("sha256", None)
    try:
        return Content(tensors, about, sha256 == _digest(tensors, about))
    except RecursionError as error:
        raise CheckpointError(f"its metadata {KEY!r} is nested too deeply") from error


def _reader(names: Mapping[str, Any]) -> str:
    """What reads a file that `write` did not write."""
    if any(name.startswith("base_model.") for name in names):
        return "miss.interop.peft.load(model, directory), with PEFT's adapter_config.json"
    if any(name.rpartition(".")[2].startswith("miss_D") for name in names):
        return "miss.load_adapter_state_dict(model, state), if it holds an adapter_state_dict"
    return "model.load_state_dict(state), if it holds the state of a whole model"


def read_tensors(path: str) -> tuple[Any, dict[str, Tensor]]:
    """The text under `KEY`, if any, and the tensors of a file, on the CPU; errors as in `read`."""
    reader = _read_safetensors if path.endswith(".safetensors") else _read_pt
    if reader is _read_safetensors:
        safetensors()  # outside of `try`: that it is absent says nothing about the file
    check_exists(path)
    do = "save or copy it again, if it was cut off"
    try:
        return reader(path)
    except pickle.UnpicklingError as error:
        rule = "cannot be read: it is damaged, or holds more than tensors, and no code in it is run"
        do = "give a file that miss.save wrote; torch.load reads pickled models"
        raise CheckpointError(rule, do=do) from error
    except Exception as error:  # a damaged file raises errors of many kinds
        why = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
        if not os.path.getsize(path):
            why = "it is empty"
        raise CheckpointError(f"cannot be read: {why}", do=do) from error


def safetensors() -> Any:
    """The package of that name; else an ImportError says how to install it, or to do without."""
    try:
        import safetensors.torch
    except ImportError as error:
        rule = "a .safetensors file needs the package safetensors"
        do = "pip install 'miss-torch[files]', or use the suffix .pt"
        raise ImportError(f"miss: {rule}\n  do:       {do}") from error
    return safetensors


def safetensors_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The content of a .safetensors file of `contiguous` tensors; errors are those of `write`."""
    package = safetensors()
    try:
        content: bytes = package.torch.save(tensors, metadata)
    except Exception as error:  # a dtype that the format lacks
        rule = f"the format cannot hold these tensors: {error}"
        raise CheckpointError(rule, do="use the suffix .pt") from error
    return content


def _pt_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    torch.save({**metadata, "tensors": tensors}, buffer)
    return buffer.getvalue()


def _read_safetensors(path: str) -> tuple[Any, dict[str, Tensor]]:
    with safetensors().safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in list(file.keys())}
        return (file.metadata() or {}).get(KEY), tensors


def _read_pt(path: str) -> tuple[Any, dict[str, Tensor]]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        return None, {}
    if not isinstance(content.get("tensors"), dict):
        return None, {str(name): tensor for name, tensor in content.items()}
    tensors = content["tensors"]
    for name, tensor in tensors.items():
        if not isinstance(name, str) or type(tensor) is not Tensor:
            raise ValueError("it does not hold tensors by name")
        on_cpu = not tensor.is_nested and is_data(tensor) and tensor.device.type == "cpu"
        if not on_cpu or not tensor.is_contiguous():
            raise ValueError("it holds tensors that are not dense")
    return content.get(KEY), tensors


def _digest(tensors: dict[str, Tensor], about: dict[str, Any]) -> str:
    """SHA-256 of the description and of each tensor's name, dtype, shape and bytes.

    Tensors are contiguous and on the CPU.
    """
    sha = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.nbytes:
            sha.update((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
    return sha.hexdigest()
