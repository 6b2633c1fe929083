"""Reads a GGUF file's header through the `gguf` library, which trusts what lengths a file states."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFEndian, GGUFReader, GGUFValueType
from gguf.gguf_reader import ReaderField, ReaderTensor
from numpy.typing import NDArray

from vptq_runtime.errors import FileError, printable

MAX_STRINGS = 1 << 22  # of one array: the largest vocabularies have less than 2**19 tokens
MAX_ENTRIES = 1 << 17  # keys, or tensors: the largest models have some 10^4


class CheckedReader(GGUFReader):
    """GGUFReader that stops at the end of the file: by itself it goes on there, over empty arrays, for as
    long as a length in the file says. And it reads arrays fast: vocabularies have 10^5 entries."""

    def metadata(self) -> dict[str, Any]:
        """Every key with its value, but those that say how the file is built."""
        return {name: entry.contents() for name, entry in self.fields.items() if not name.startswith("GGUF.")}

    def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> NDArray[Any]:
        end = offset + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"found its end at byte {len(self.data)}, expected at least {end} bytes")
        return super()._get(offset, dtype, count, override_order)

    def _build_fields(self, offs: int, count: int) -> int:
        if count > MAX_ENTRIES:
            raise ValueError(f"found {count} keys, expected at most {MAX_ENTRIES}")
        return super()._build_fields(offs, count)

    def _build_tensor_info(self, offs: int, count: int) -> tuple[int, list[ReaderField]]:
        if count > MAX_ENTRIES:
            raise ValueError(f"found {count} tensors, expected at most {MAX_ENTRIES}")
        return super()._build_tensor_info(offs, count)

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[NDArray[Any]], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        item_type = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        length = int(self._get(orig_offs + 4, np.uint64)[0])
        types = [GGUFValueType.ARRAY, item_type]
        start = orig_offs + 12
        if item_type in self.gguf_scalar_to_np:
            items = self._get(start, self.gguf_scalar_to_np[item_type], length)
            return 12 + items.nbytes, [items], [0], types
        if item_type != GGUFValueType.STRING or length > MAX_STRINGS:
            raise ValueError(
                f"found an array of {length} {item_type.name}, expected at most {MAX_STRINGS} strings"
            )
        data = self.data.view(np.ndarray)
        strings = []
        end = start
        for _ in range(length):
            begin = end + 8
            end = begin + int.from_bytes(data[end:begin].tobytes(), "little")
            if end > len(data):
                raise ValueError(f"found its end at byte {len(data)}, expected an array of {length} strings")
            strings.append(data[begin:end])
        return end - orig_offs, strings, list(range(length)), types


def open_gguf(path: Path) -> CheckedReader:
    """A GGUF file with its header read; tensor data is only mapped. Raises FileError."""
    try:
        if path.is_dir() or (path.is_file() and path.suffix == ".safetensors"):
            found = "a directory" if path.is_dir() else "a safetensors file"
            raise FileError(
                f"{path}: found {found}, expected a GGUF file: vptq-convert makes one of a checkpoint"
            )
        if not path.is_file():
            found = "something that is not a regular file" if path.exists() else "nothing"
            raise FileError(f"{path}: found {found}, expected a GGUF file")
        reader = CheckedReader(path)
        if reader.endianess != GGUFEndian.LITTLE:
            raise FileError(f"{path}: found a big-endian file, expected a little-endian one")
        reader.metadata()  # strings that are not UTF-8
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileError(f"{path}: not a whole GGUF file: {reason}") from error
    return reader


def row_major(tensor: ReaderTensor) -> tuple[int, ...]:
    """A tensor's shape; GGUF lists the fastest dimension first."""
    return tuple(int(n) for n in reversed(tensor.shape))


def check_blocks(path: Path, tensor: ReaderTensor) -> None:
    """Refuses a tensor whose rows are not whole blocks of its type, or whose bytes are not those of its
    shape: the library's own product may have overflowed."""
    shape = row_major(tensor)
    block, block_bytes = GGML_QUANT_SIZES[tensor.tensor_type]
    where = f"{path}: tensor {printable(tensor.name)}"
    if not shape or 0 in shape or shape[-1] % block:
        expected = f"rows of a multiple of {block} numbers"
        raise FileError(f"{where}: found {tensor.tensor_type.name} {shape}, expected {expected}")
    if prod(shape) // block * block_bytes != tensor.n_bytes:
        raise FileError(f"{where}: found {tensor.n_bytes} bytes, expected those of {shape}")
