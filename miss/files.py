"""A file of named tensors and a JSON description: written whole or not at all, and read without running code from it."""

import contextlib
import ctypes
import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miss.errors import CheckpointError, explain

__all__ = ["FORMAT", "Content", "check_path", "check_tensors", "dense", "read", "read_tensors"]
__all__ += ["safetensors", "safetensors_bytes", "write", "write_bytes"]


FORMAT = 1  # of the description; a reader refuses a higher one
KEY = "miss"  # where the description lies: in the metadata of a .safetensors file, beside the tensors of a .pt file


class Content(NamedTuple):
    """What a file holds. ``intact`` says whether its checksum fits, which a reader asks last: other errors say more."""

    tensors: dict[str, Tensor]
    about: dict[str, Any]
    intact: bool


def check_path(path: str | os.PathLike[str]) -> str:
    """``path`` as a string; a `CheckpointError` unless it ends in ``.safetensors`` or ``.pt``."""
    name = os.fspath(path)
    if os.path.splitext(name)[1] not in (".safetensors", ".pt"):
        rule = "the suffix says the format, and this one is none of ours"
        raise CheckpointError(explain(name, rule, expected=".safetensors (recommended) or .pt"))
    return name


def check_tensors(where: str, tensors: Mapping[str, Tensor]) -> None:
    """A `CheckpointError` that names the first tensor that is not dense, has no elements, or has one that is not finite."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                explain(where, f"{name} is not a tensor", actual=type(tensor).__name__)
            )
        if (
            type(tensor) not in (Tensor, torch.nn.Parameter)
            or tensor.layout != torch.strided
            or tensor.is_meta
            or tensor.is_quantized
        ):
            kind = f"{type(tensor).__name__} of layout {tensor.layout} on {tensor.device}"
            raise CheckpointError(
                explain(where, f"{name} is not an ordinary tensor with data", actual=kind)
            )
        if not tensor.numel():
            raise CheckpointError(
                explain(where, f"{name} has no elements", actual=f"shape {tuple(tensor.shape)}")
            )
        try:  # 8-bit floats have no isfinite
            finite = torch.isfinite(
                tensor.detach().float() if tensor.itemsize == 1 else tensor.detach()
            ).all()
        except (RuntimeError, NotImplementedError) as error:
            raise CheckpointError(
                explain(where, f"{name} has a dtype that cannot be checked", actual=tensor.dtype)
            ) from error
        if not finite:
            raise CheckpointError(explain(where, f"{name} has elements that are not finite"))


def write(path: str, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write a file that `read` gives back, atomically.

    Args:
        path: as `check_path` returned it.
        tensors: dense tensors on any device, which have passed `check_tensors`.
        about: what JSON can say; the format version and a checksum are added.

    Raises:
        CheckpointError: the file cannot be written; what was there before is still there.
        ImportError: the suffix is ``.safetensors`` and that package is absent.
    """
    tensors = dense(tensors)
    about = {"format": FORMAT, **about}
    text = json.dumps(about | {"sha256": _digest(tensors, about)}, allow_nan=False)
    write_bytes(
        path,
        (safetensors_bytes if path.endswith(".safetensors") else _pt_bytes)(
            path, tensors, {KEY: text}
        ),
    )


def dense(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU: a view would be saved with its whole storage, and safetensors refuses shared memory."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def write_bytes(path: str, content: bytes) -> None:
    """Replace a file: into a temporary one in the same folder, flushed to the disk, then renamed; links are followed.

    A process that is killed on the way leaves the old file, and perhaps a hidden ``.tmp`` file beside it.
    """
    try:
        target = os.path.realpath(path)
    except (OSError, ValueError) as error:  # the working directory is gone; a null byte
        raise CheckpointError(explain(path, f"cannot be written: {error}")) from error
    folder = os.path.dirname(target)
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
        raise CheckpointError(explain(path, f"cannot be written: {error}")) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    with contextlib.suppress(
        OSError, AttributeError
    ):  # the renaming itself outlives a power cut, where folders can be flushed
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(path: str) -> Content:
    """Read a file that `write` wrote. Tensors are on the CPU; only their container and the description have been checked.

    Raises:
        CheckpointError: there is no such file, it is damaged or of another kind, or of a newer format.
        ImportError: the suffix is ``.safetensors`` and that package is absent.
    """
    text, tensors = read_tensors(path)
    if not isinstance(text, str):
        raise CheckpointError(
            explain(path, f"has no metadata {KEY!r}: it was not written by miss.save")
        )
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            explain(path, f"its metadata {KEY!r} is not JSON: {error}")
        ) from error
    if not isinstance(about, dict) or type(about.get("format")) is not int or about["format"] < 1:
        raise CheckpointError(explain(path, f"its metadata {KEY!r} has no format version"))
    if about["format"] > FORMAT:
        rule = f"was written by a newer version of this package ({about.get('version', 'unknown')})"
        actual, do = (
            f"format {about['format']}",
            "install a newer version, or save again with this one",
        )
        raise CheckpointError(
            explain(path, rule, expected=f"format {FORMAT} or lower", actual=actual, do=do)
        )
    sha256 = about.pop("sha256", None)
    try:
        return Content(tensors, about, sha256 == _digest(tensors, about))
    except RecursionError as error:
        raise CheckpointError(
            explain(path, f"its metadata {KEY!r} is nested too deeply")
        ) from error


def read_tensors(path: str) -> tuple[Any, dict[str, Tensor]]:
    """The text under `KEY`, if any, and the tensors of a file, on the CPU; errors are those of `read`."""
    reader = _read_safetensors if path.endswith(".safetensors") else _read_pt
    if reader is _read_safetensors:
        safetensors()
    try:
        return reader(path)
    except Exception as error:  # of many kinds, for a damaged file
        rule = (
            f"cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        )
        raise CheckpointError(explain(path, rule)) from error


def safetensors() -> Any:
    """The package of that name, or an ImportError that says how to install it, or to do without."""
    try:
        import safetensors.torch
    except ImportError as error:
        do = "pip install 'miss-torch[files]', or use the suffix .pt"
        raise ImportError(
            explain("miss", "a .safetensors file needs the package safetensors", do=do)
        ) from error
    return safetensors


def safetensors_bytes(path: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The content of a .safetensors file of `dense` tensors; errors are those of `write`."""
    package = safetensors()
    try:
        content: bytes = package.torch.save(tensors, metadata)
    except Exception as error:  # a dtype that the format lacks
        raise CheckpointError(
            explain(path, f"the format cannot hold these tensors: {error}", do="use .pt")
        ) from error
    return content


def _pt_bytes(path: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    torch.save({**metadata, "tensors": tensors}, buffer)
    return buffer.getvalue()


def _read_safetensors(path: str) -> tuple[Any, dict[str, Tensor]]:
    with safetensors().safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get(KEY), {
            name: file.get_tensor(name).clone() for name in file.keys()
        }  # noqa: SIM118  # no dict


def _read_pt(path: str) -> tuple[Any, dict[str, Tensor]]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not isinstance(content.get("tensors"), dict):
        return None, {}
    tensors = content["tensors"]
    if not all(
        isinstance(name, str) and type(tensor) is Tensor for name, tensor in tensors.items()
    ):
        raise ValueError("it does not hold tensors by name")
    if not all(
        not t.is_nested
        and t.layout == torch.strided
        and t.device.type == "cpu"
        and t.is_contiguous()
        for t in tensors.values()
    ):
        raise ValueError("it holds tensors that are not dense")
    return content.get(KEY), tensors


def _digest(tensors: dict[str, Tensor], about: dict[str, Any]) -> str:
    """SHA-256 of the description and of each tensor's name, dtype, shape and bytes; tensors are contiguous and on the CPU."""
    sha = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.nbytes:
            sha.update((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
    return sha.hexdigest()
