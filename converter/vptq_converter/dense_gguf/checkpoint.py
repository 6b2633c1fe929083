"""A dense GGUF file of llama.cpp as a checkpoint: names, order of rows and files as Hugging Face has them."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from gguf.gguf_reader import ReaderTensor
from numpy.typing import NDArray

from vptq_converter.architectures import LINEARS, NORMS
from vptq_converter.checkpoint import Checkpoint, Shard, Stamp, Tensor
from vptq_converter.config import Section
from vptq_converter.dense_gguf.config import architecture, config_values
from vptq_converter.dense_gguf.tokenizer import token_ids, tokenizer_files
from vptq_converter.gguf_reader import CheckedReader, check_blocks, open_gguf, row_major
from vptq_runtime.errors import FileError, UnsupportedError, printable

F32, F16, BF16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16
ROPE_FREQS = "rope_freqs.weight"
SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
MAX_SPLIT = 1 << 10  # files of one model
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {gguf_name: name for name, gguf_name in (LINEARS | NORMS).items()}


@dataclass(frozen=True)
class GgufTensor(Tensor):
    """A tensor whose numbers are made of the file's: of quantised blocks, or in another order of rows.

    `dtype` is F32, what it gives; `start` and `nbytes` are those of the file.
    """

    type: GGMLQuantizationType
    n_heads_permuted: int  # heads whose rows llama.cpp has in another order; 0: none

    @property
    def stored_type(self) -> str:
        return self.type.name

    def rows(self, rows: slice | NDArray[np.int64] = slice(None)) -> NDArray[np.float32]:
        raw = np.frombuffer(self.shard.map, np.uint8, self.nbytes, self.start)
        raw = raw.reshape(self.shape[0], -1)
        if self.n_heads_permuted:
            # Row i of a head rotates with i + head_dim/2 here, 2i with 2i + 1 there.
            order = np.arange(self.shape[0]).reshape(self.n_heads_permuted, -1, 2).swapaxes(1, 2).reshape(-1)
            raw = raw[order[rows]]
        else:
            raw = raw[rows]
        values = quants.dequantize(raw, self.type).reshape(-1, *self.shape[1:])
        return np.require(values, np.float32, "W")  # what is F32 is the mapped file itself

    def array(self) -> NDArray[np.float32]:
        return self.rows()

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        yield self.array().reshape(-1).view(np.uint8)

    def copy_to(self, target: BinaryIO) -> Iterator[int]:
        yield from self._copy_mapped(target)


class GgufCheckpoint(Checkpoint):
    """A dense model of llama.cpp, read as it is needed: nothing is dequantised before it is asked for.

    source: the file, or the first one of a split model. Raises FileError for what is damaged, missing or
    contradicts itself, UnsupportedError for what is well formed and not a dense Llama, Mistral or Qwen2.
    """

    def __init__(self, source: str | Path) -> None:
        path = Path(source)
        reader = open_gguf(path)
        keys = Section(path, reader.metadata())
        arch = architecture(keys)
        self.weights = path
        self.directory = path.parent
        self._stamps: dict[Path, Stamp] = {}
        split = SPLIT_NAME.fullmatch(path.name)
        self.name = os.fsencode(split[1] if split else path.stem).decode(errors="replace")
        found = _all_tensors(path, reader, keys)
        shapes = {name: row_major(tensor) for name, (_, tensor) in found.items()}
        freqs = _vector(*found[ROPE_FREQS]) if ROPE_FREQS in found else None
        values = config_values(keys, shapes, freqs)
        n_tokens = values["vocab_size"]
        self._files = tokenizer_files(keys, n_tokens)
        self.config = Section(path, values | token_ids(keys, n_tokens))
        heads: Mapping[str, int] = {}
        if arch == "llama":
            heads = {"attn_q": values["num_attention_heads"], "attn_k": values["num_key_value_heads"]}
        self.tensors = dict(
            _tensor(name, *place, heads) for name, place in found.items() if name != ROPE_FREQS
        )
        self.unused = set(self.tensors)

    def files(self) -> set[Path]:
        return {tensor.shard.path for tensor in self.tensors.values()}

    def has(self, file_name: str) -> bool:
        return file_name in self._files

    def path(self, file_name: str) -> Path:
        return self.weights

    def open(self, file_name: str) -> BinaryIO:
        return io.BytesIO(self.text(file_name).encode())

    def text(self, file_name: str) -> str:
        return self._files[file_name]


def open_checkpoint(source: str | Path) -> Checkpoint:
    """A checkpoint in the Hugging Face layout, of a directory, a file or the hub, or a dense GGUF file.

    Raises FileError and UnsupportedError as the two kinds do.
    """
    return GgufCheckpoint(source) if Path(source).suffix == ".gguf" else Checkpoint(source)


def hugging_face_name(name: str) -> str:
    """A tensor's name there; the same where it has none."""
    module, _, kind = name.rpartition(".")
    match = re.fullmatch(r"blk\.(\d{1,9})\.(\w+)", module)
    if match and match[2] in _IN_LAYER:
        return f"model.layers.{int(match[1])}.{_IN_LAYER[match[2]]}.{kind}"
    return f"{_OUTSIDE[module]}.{kind}" if module in _OUTSIDE else name


def _all_tensors(path: Path, reader: CheckedReader, keys: Section) -> dict[str, tuple[Shard, ReaderTensor]]:
    """The tensors of all the model's files by their GGUF names."""
    found: dict[str, tuple[Shard, ReaderTensor]] = {}
    for file, part in _parts(path, reader, keys):
        shard = _shard(file)
        for tensor in part.tensors:
            if tensor.name in found:
                raise FileError(
                    f"{file}: found the tensor {printable(tensor.name)} a second time, expected it once"
                )
            check_blocks(file, tensor)
            found[tensor.name] = shard, tensor
    return found


def _parts(path: Path, reader: CheckedReader, keys: Section) -> Iterator[tuple[Path, CheckedReader]]:
    """The files of the model, the first one first."""
    count = keys.integer("split.count", minimum=0, default=1)
    yield path, reader
    if count <= 1:
        return
    match = SPLIT_NAME.fullmatch(path.name)
    if count > MAX_SPLIT or not match or int(match[3]) != count or int(match[2]) != 1:
        raise FileError(
            f"{path}: found one of {count} files, expected the first, with a name that ends in "
            f"-00001-of-{count:05}.gguf"
        )
    for n in range(2, count + 1):
        file = path.with_name(f"{match[1]}-{n:05}-of-{count:05}.gguf")
        part = open_gguf(file)
        own = Section(file, part.metadata())
        if own.integer("split.no", minimum=0) != n - 1 or own.integer("split.count") != count:
            raise own.error("split.no", own.values["split.no"], f"{n - 1} of {count}")
        yield file, part


def _shard(path: Path) -> Shard:
    try:
        return Shard.open(path)
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from error


def _tensor(name: str, shard: Shard, tensor: ReaderTensor, heads: Mapping[str, int]) -> tuple[str, Tensor]:
    """A tensor under its Hugging Face name; heads: how many, of layers with rows in another order."""
    shape, type = row_major(tensor), tensor.tensor_type
    place: dict[str, Any] = {
        "name": hugging_face_name(name), "shard": shard, "shape": shape,
        "start": int(tensor.data_offset), "nbytes": int(tensor.n_bytes),
    }  # fmt: skip
    n_heads = next((n for part, n in heads.items() if re.fullmatch(rf"blk\.\d+\.{part}\.\w+", name)), 0)
    if not n_heads and type in (F32, F16, BF16):
        return place["name"], Tensor(dtype=type.name, **place)
    made = GgufTensor(dtype="F32", type=type, n_heads_permuted=n_heads, **place)
    _check_readable(made)
    if n_heads and shape[0] % (2 * n_heads):
        raise made.error(f"{shape[0]} rows", f"a multiple of {2 * n_heads}, two for each of {n_heads} heads")
    return made.name, made


def _vector(shard: Shard, tensor: ReaderTensor) -> NDArray[np.float32]:
    return _tensor(ROPE_FREQS, shard, tensor, {})[1].finite()


def _check_readable(tensor: GgufTensor) -> None:
    """Refuses a type that the library cannot dequantise."""
    if tensor.type not in dequantised_types():
        known = ", ".join(type.name for type in dequantised_types())
        raise UnsupportedError(
            f"{tensor.shard.path}: tensor {printable(tensor.name)}: type {tensor.type.name} is not "
            f"supported, only {known}"
        )


@cache
def dequantised_types() -> tuple[GGMLQuantizationType, ...]:
    """The types that the gguf library dequantises, as it shows with a block of zeros."""
    return tuple(type for type in GGMLQuantizationType if _dequantises(type))


def _dequantises(type: GGMLQuantizationType) -> bool:
    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[type][1]), np.uint8), type)
    except NotImplementedError:
        return False
    return True
