"""Streams tensors into a GGUF file that appears under its name only when it is whole."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from vptq_converter.architectures import Key
from vptq_converter.checkpoint import Tensor
from vptq_runtime.errors import FileError, OptionError

ALIGNMENT = 64  # bytes: a mapped tensor begins on a cache line
# Of a file for llama.cpp: the format's default. llama-quantize pads by it whatever a file says, so that
# what it makes of one with another alignment cannot be read.
PLAIN_ALIGNMENT = 32


@dataclass(frozen=True)
class TensorInfo:
    """What a file's directory says of a tensor."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]  # row-major, of elements

    @property
    def nbytes(self) -> int:
        block_size, block_bytes = GGML_QUANT_SIZES[self.type]
        return prod(self.shape) // block_size * block_bytes

    @property
    def entry_bytes(self) -> int:
        """Of the entry: the name and its length, the shape and its length, the type, where the data begin."""
        return 8 + len(self.name.encode()) + 4 + 8 * len(self.shape) + 4 + 8


@dataclass(frozen=True)
class OutputTensor(TensorInfo):
    """A tensor of the file; chunks() makes its bytes: arrays of any type, or checkpoint tensors as is."""

    chunks: Callable[[], Iterable[NDArray[Any] | Tensor]]


def check_target(target: Path, sources: Iterable[Path]) -> Path:
    """The file that target stands for, links followed; raises OptionError when it can't be written over."""
    resolved = target.resolve()
    if not resolved.parent.is_dir():
        raise OptionError(f"{target}: found no directory {resolved.parent}, expected one to write into")
    if resolved.exists() and not resolved.is_file():
        raise OptionError(f"{target}: found something that is not a regular file, expected a file or nothing")
    if resolved.exists() and any(source.exists() and resolved.samefile(source) for source in sources):
        raise OptionError(f"{target}: is a file of the checkpoint, expected another name")
    return resolved


def write_gguf(
    target: Path,
    arch: str,
    keys: Iterable[Key],
    tensors: Sequence[OutputTensor],
    alignment: int = ALIGNMENT,
) -> int:
    """Writes the file through a temporary one beside it and returns its size in bytes.

    Whatever goes wrong, target is left as it was; unless the process is killed, nothing else stays.
    Raises FileError for what the operating system refuses, and whatever the tensors' chunks raise.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        # Exclusively: nobody may have put a link there. The writer then opens it by name.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise FileError(f"{target}: cannot be written: {temporary}: {error.strerror}") from error
    try:
        size = write_in_place(temporary, arch, keys, tensors, alignment)
        temporary.replace(target)
        _sync_directory(target.parent)
    except OSError as error:
        raise FileError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return size


def write_in_place(
    path: Path,
    arch: str,
    keys: Iterable[Key],
    tensors: Sequence[OutputTensor],
    alignment: int = ALIGNMENT,
) -> int:
    """Writes over the file itself; a part of it is left there if anything goes wrong. Raises OSError, too."""
    writer = _writer(path, arch, keys, alignment)
    for tensor in tensors:
        # The writer reads the shape as one of bytes if it is told uint8; otherwise raw_dtype alone counts.
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.int8), tensor.nbytes, raw_dtype=tensor.type
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        with _progress(sum(tensor.nbytes for tensor in tensors)) as advance:
            for tensor in tensors:
                start = file.tell()
                for chunk in tensor.chunks():
                    for n_bytes in _write_chunk(file, chunk):
                        advance(n_bytes)
                written = file.tell() - start
                assert written == tensor.nbytes, f"{tensor.name}: {written} bytes, announced {tensor.nbytes}"
                writer.write_padding(file, written)
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    finally:
        writer.close()
    return size


def _writer(path: Path, arch: str, keys: Iterable[Key], alignment: int) -> GGUFWriter:
    writer = GGUFWriter(path, arch)
    writer.add_custom_alignment(alignment)
    for name, value, value_type, element_type in keys:
        writer.add_key_value(name, value, value_type, element_type)
    return writer


def keys_bytes(arch: str, keys: Iterable[Key], alignment: int = ALIGNMENT) -> int:
    """What a file's header and keys take, up to the first tensor's entry: found by writing them to a
    temporary file. Raises FileError where that cannot be."""
    try:
        with tempfile.TemporaryDirectory() as directory:
            writer = _writer(Path(directory) / "keys.gguf", arch, keys, alignment)
            try:
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                assert writer.fout is not None
                return writer.fout[0].tell()
            finally:
                writer.close()
    except OSError as error:
        reason = error.strerror or error
        raise FileError(f"{tempfile.gettempdir()}: a temporary file cannot be written: {reason}") from error


def padded(n_bytes: int, alignment: int = ALIGNMENT) -> int:
    """Up to where the next tensor begins."""
    return -(-n_bytes // alignment) * alignment


def _write_chunk(file: BinaryIO, chunk: NDArray[Any] | Tensor) -> Iterator[int]:
    """Writes step by step, yielding each step's bytes; the system brings them to the disk meanwhile."""
    begin = file.tell()
    steps = chunk.copy_to(file) if isinstance(chunk, Tensor) else _write_array(file, chunk)
    for n_bytes in steps:
        if hasattr(os, "posix_fadvise"):  # otherwise the disk would sit idle until the sync at the end
            file.flush()
            with suppress(OSError):  # it is only advice
                os.posix_fadvise(file.fileno(), begin, n_bytes, os.POSIX_FADV_DONTNEED)
        begin += n_bytes
        yield n_bytes


def _write_array(file: BinaryIO, array: NDArray[Any]) -> Iterator[int]:
    yield file.write(np.ascontiguousarray(array).data.cast("B"))


@contextmanager
def _progress(n_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, when that is a terminal."""
    columns = (
        TextColumn("writing"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task("", total=n_bytes)
        yield lambda n: bar.advance(task, n)


def _sync_directory(directory: Path) -> None:
    """Makes the rename last through a power cut, where the system lets a directory be opened."""
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
