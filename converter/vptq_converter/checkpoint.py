"""A checkpoint on disk: `config.json` and tensors in safetensors files, mapped and never read as a whole."""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from vptq_converter.config import Section
from vptq_runtime.errors import FileError, printable
from vptq_runtime.models import hub
from vptq_runtime.models.source import Repo
from vptq_runtime.text_file import parse_json, read_text

CHUNK_BYTES = 1 << 24  # what one step of a copy maps in
CANNOT_COPY = (
    errno.EXDEV,
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
)  # two file systems, or one that can't

# Storage type in numpy; bfloat16, which numpy lacks, as its bits.
NUMPY_TYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
}
FLOAT_TYPES = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Stamp:
    """A file as it was when it was opened: a run reads it for hours, and must see the same all the time."""

    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Raises FileError for a file that is not there."""
        try:
            status = path.stat()
        except OSError as error:
            raise FileError(f"{path}: cannot be read: {error.strerror}") from error
        return cls(path, status.st_size, status.st_mtime_ns)

    def check(self) -> None:
        """Raises FileError where the file has another size or time, or is gone."""
        try:
            now = Stamp.of(self.path)
        except FileError as error:
            raise self._changed("no file") from error
        if now != self:
            found = f"{now.size} bytes" if now.size != self.size else "another time of its last change"
            raise self._changed(found)

    def _changed(self, found: str) -> FileError:
        return FileError(
            f"{self.path}: found {found}, expected the {self.size} bytes from before: it was changed "
            "while it was read"
        )


@dataclass(frozen=True)
class Shard:
    """One file of tensors, open and mapped."""

    path: Path
    file: BinaryIO
    map: mmap.mmap
    stamp: Stamp

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Raises OSError, and ValueError for an empty file."""
        stamp = Stamp.of(path)
        file = path.open("rb")
        return cls(path, file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), stamp)


@dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file, in place in the mapped file."""

    name: str
    shard: Shard
    dtype: str  # as safetensors writes it: F16, BF16, F32, I16, ...
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    nbytes: int

    def array(self) -> NDArray[Any]:
        """The values without a copy, shape `self.shape`; BF16 as uint16 bits."""
        dtype = np.dtype(NUMPY_TYPES[self.dtype])
        count = self.nbytes // dtype.itemsize
        return np.frombuffer(self.shard.map, dtype.newbyteorder("<"), count, self.start).reshape(self.shape)

    @property
    def stored_type(self) -> str:
        """What its numbers are in the file, of which `dtype` are made."""
        return self.dtype

    def rows(self, rows: slice | NDArray[np.int64] = slice(None)) -> NDArray[np.float32]:
        """Rows of F16, BF16 or F32 numbers in float32."""
        return float32(self.array()[rows], self.dtype)

    def finite(self, rows: slice | NDArray[np.int64] = slice(None)) -> NDArray[np.float32]:
        """Rows of F16, BF16 or F32 numbers in float32; raises FileError for a NaN or infinity, and where the
        file has changed since it was opened."""
        self.shard.stamp.check()  # before, as a mapped page past the end kills the process
        values = self.rows(rows)
        self.shard.stamp.check()
        if not np.isfinite(values).all():
            raise self.error("a NaN or infinity", "finite numbers")
        return values

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        """The tensor's bytes in order, at most CHUNK_BYTES at a time; pages are given back once passed."""
        stop = self.start + self.nbytes
        for begin in range(self.start, stop, CHUNK_BYTES):
            end = min(begin + CHUNK_BYTES, stop)
            yield np.frombuffer(self.shard.map, np.uint8, end - begin, begin)
            self._release(begin, end)

    def copy_to(self, target: BinaryIO) -> Iterator[int]:
        """Writes the tensor's bytes to a file, yielding how many at each step."""
        if not hasattr(os, "copy_file_range"):
            yield from self._copy_mapped(target)
            return
        # Within one file system the kernel copies by itself: twice as fast as through a mapping.
        target.flush()
        position, stop = self.start, self.start + self.nbytes
        while position < stop:
            source, count = self.shard.file.fileno(), min(CHUNK_BYTES, stop - position)
            try:
                copied = os.copy_file_range(source, target.fileno(), count, position)
            except OSError as error:
                if error.errno not in CANNOT_COPY or position > self.start:
                    raise
                yield from self._copy_mapped(target)
                return
            if copied == 0:
                raise self.error(f"the end of the file at byte {position}", f"it at {stop} or later")
            position += copied
            yield copied

    def _copy_mapped(self, target: BinaryIO) -> Iterator[int]:
        for chunk in self.chunks():
            yield target.write(chunk.data)

    def release(self) -> None:
        """Tells the kernel that the mapped pages may go; they come back when touched."""
        self._release(self.start, self.start + self.nbytes)

    def _release(self, begin: int, end: int) -> None:
        if hasattr(mmap, "MADV_DONTNEED") and end > begin:
            begin -= begin % mmap.PAGESIZE
            self.shard.map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def error(self, found: object, expected: object) -> FileError:
        return FileError(
            f"{self.shard.path}: tensor {printable(self.name)}: found {found}, expected {expected}"
        )

    def expect(self, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> Tensor:
        """Itself, when it has one of these types and this shape; raises FileError."""
        if self.dtype not in dtypes:
            raise self.error(f"type {self.dtype}", " or ".join(dtypes))
        if self.shape != shape:
            raise self.error(f"shape {self.shape}", shape)
        return self


def float32(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """F16, BF16 (as uint16 bits) or F32 values in float32: exact."""
    if dtype == "BF16":
        bits: NDArray[np.uint32] = values.astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32)
    return values.astype(np.float32)


class Checkpoint:
    """A directory in the Hugging Face layout, or the one file of it that holds the tensors.

    `source` is a .safetensors file, an index.json, a directory, or a hub repo id (downloaded first).
    Raises FileError for whatever is missing or damaged.
    """

    def __init__(self, source: str | Path) -> None:
        path = Path(source)
        if path.is_file():
            _check_kind(path)
        self.name = os.fsencode(_name(path)).decode(errors="replace")  # for people
        if not path.exists():
            path = _download(str(source))
        weights = _find_weights(path) if path.is_dir() else path
        self.directory = weights.parent
        self.config = Section.read(self.directory / "config.json")
        self.tensors: dict[str, Tensor] = (
            _open_index(weights) if weights.suffix == ".json" else _open_shard(weights)
        )
        self.weights = weights
        self.unused = set(self.tensors)
        self._stamps: dict[Path, Stamp] = {}  # of the files beside the weights that were read

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name, from now on used; raises FileError when there is none."""
        if name not in self.tensors:
            raise FileError(f"{self.weights}: tensor {name} is missing")
        self.unused.discard(name)
        return self.tensors[name]

    def files(self) -> set[Path]:
        """Every file that it may be made of: tensors, and the JSON files and templates beside them."""
        beside = (path for pattern in ("*.json", "*.jinja") for path in self.directory.glob(pattern))
        return {tensor.shard.path for tensor in self.tensors.values()} | set(beside)

    def has(self, file_name: str) -> bool:
        """Whether a file stands beside the weights; a link that leads nowhere does, and can't be read."""
        return os.path.lexists(self.directory / file_name)

    def path(self, file_name: str) -> Path:
        """What messages call a file beside the weights."""
        return self.directory / file_name

    def open(self, file_name: str) -> BinaryIO:
        """A file beside the weights; raises FileError for one that cannot be read, or was changed since
        it was opened first."""
        path = self.directory / file_name
        if path.exists() and not path.is_file():  # a pipe would block
            raise FileError(f"{path}: found something that is not a regular file")
        try:
            file = path.open("rb")
        except OSError as error:
            raise FileError(f"{path}: cannot be read: {error.strerror}") from error
        self._stamps.setdefault(path, Stamp.of(path)).check()
        return file

    def text(self, file_name: str) -> str:
        """The text of a small UTF-8 file beside the weights; raises FileError as `open` does."""
        self.open(file_name).close()
        return read_text(self.directory / file_name)

    def section(self, file_name: str) -> Section | None:
        """A JSON file beside the weights, None where there is none; raises FileError when it is damaged."""
        if not self.has(file_name):
            return None
        path = self.path(file_name)
        return Section(path, parse_json(self.text(file_name), path))


def _name(path: Path) -> str:
    """What a checkpoint is called: its directory or repository, or its file if that has a name of its own."""
    if path.is_file():
        stem = path.name.removesuffix(".json").removesuffix(".index").removesuffix(".safetensors")
        return path.parent.resolve().name if stem == "model" else stem
    return path.resolve().name if path.exists() else path.name.partition("@")[0]


def _check_kind(path: Path) -> None:
    """Refuses a file that is not what a checkpoint begins with; says what to give instead."""
    if path.suffix == ".gguf":
        raise FileError(f"{path}: found a GGUF file, which is converted already, expected a checkpoint")
    if path.suffix == ".json" and not path.name.endswith("index.json"):
        raise FileError(f"{path}: found a JSON file that is no index, expected its directory, {path.parent}")
    if path.suffix not in (".json", ".safetensors"):
        raise FileError(f"{path}: expected a .safetensors file, an index.json or a directory")
    if (match := re.search(r"-\d{5}-of-(\d{5})\.safetensors$", path.name)) and int(match[1]) > 1:
        raise FileError(
            f"{path}: found one of {int(match[1])} files, expected their directory, {path.parent}"
        )


def is_hub_id(source: str | Path) -> bool:
    """Whether it can be a repository of the hub (owner/name, owner/name@revision), and is no path here."""
    return Repo.parse(str(source)) is not None


def _download(source: str) -> Path:
    repo = Repo.parse(source)
    if repo is None:
        raise FileError(f"{source}: no such file or directory, and not a hub repo id (owner/name)")
    return hub.download_checkpoint(repo)


def _find_weights(directory: Path) -> Path:
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if (directory / name).exists():
            return directory / name
    for pattern in ("*.safetensors.index.json", "*.safetensors"):
        found = sorted(directory.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise FileError(
                f"{directory}: found {len(found)} files {pattern}, expected one, or a model.safetensors"
            )
    if (directory / ".parts").is_dir():
        raise FileError(
            f"{directory}: found a run of vptq-quantize that is not finished, expected a checkpoint: "
            "the same command goes on with it"
        )
    raise FileError(f"{directory}: found no .safetensors file, expected model.safetensors or an index.json")


def _open_index(path: Path) -> dict[str, Tensor]:
    index = Section.read(path).section("weight_map")
    if not index.values:
        raise index.missing("<tensor name>", "a file name for each tensor")
    shards: dict[str, dict[str, Tensor]] = {}
    tensors = {}
    for name, shard in index.values.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard or "\0" in shard:
            raise index.error(name, shard, "the name of a file beside the index")
        if shard not in shards:
            shards[shard] = _open_shard(path.parent / shard)
        if name not in shards[shard]:
            raise FileError(
                f"{path.parent / shard}: tensor {printable(name)} is missing, {path.name} lists it"
            )
        tensors[name] = shards[shard][name]
    return tensors


def _open_shard(path: Path) -> dict[str, Tensor]:
    if path.exists() and not path.is_file():
        raise FileError(f"{path}: found something that is not a regular file, expected a safetensors file")
    try:
        with safe_open(path, framework="numpy"):
            pass  # the library checks the header: lengths, types, every tensor inside the file, no overlap
        shard = Shard.open(path)
    except (SafetensorError, ValueError) as error:  # mmap: ValueError for an empty file
        raise FileError(f"{path}: not a whole safetensors file: {error}") from error
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error
    data = 8 + int.from_bytes(shard.map[:8], "little")
    tensors = {}
    for name, entry in json.loads(shard.map[8:data]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            tensors[name] = Tensor(
                name, shard, entry["dtype"], tuple(entry["shape"]), data + begin, end - begin
            )
    return tensors
