"""Files that appear under their names only when they are whole, and stay through a power cut."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vptq_runtime.errors import FileError

REMEDY = "delete it to have it made again"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file that write_tensors has made; raises FileError for a damaged one."""
    try:
        if not path.is_file():  # a pipe would block
            raise FileError(f"{path}: found something that is not a regular file; {REMEDY}")
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path}: not a whole safetensors file: {error}; {REMEDY}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file; raises FileError, and leaves what stood there, when it cannot be written."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _write(path, lambda temporary: save_file(on_cpu, temporary, {"format": "pt", **metadata}))


def write_json(path: Path, value: Any) -> None:
    """A JSON file; raises FileError, and leaves what stood there, when it cannot be written."""
    text = json.dumps(value, indent=2) + "\n"
    _write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def link(path: Path, target: Path) -> None:
    """A second name for a file, which takes no room; a copy where the file system has no such thing."""

    def write(temporary: Path) -> None:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)

    _write(target, write)


def copy(source: BinaryIO, target: Path, name: str) -> None:
    """A copy of an open file, which errors call `name`; raises FileError, and leaves what stood there, when
    it cannot be made."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            shutil.copyfileobj(source, file)

    _write(target, write, f", a copy of {name}")


def temporary_files(directory: Path) -> list[Path]:
    """What writers that were killed have left there: _write, and safetensors, which has files of its own."""
    return [path for pattern in (".*.????????.tmp", ".tmp??????") for path in directory.glob(pattern)]


def _write(path: Path, write: Callable[[Path], object], what: str = "") -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            temporary.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner reads
            _sync(temporary)
            temporary.replace(path)
            with contextlib.suppress(OSError):  # not every file system can do that
                _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise FileError(f"{path}{what}: cannot be written: {reason}") from error


def _sync(path: Path) -> None:
    """Waits until a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)  # it cannot be read without being set
    os.umask(mask)
    return mask
