"""Dense models as llama.cpp's files have them: exported by the converter, and changed on purpose."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants
from vptq_converter import convert

# A key's value, its type, and the type of an array's elements.
Keys = dict[str, tuple[Any, GGUFValueType, GGUFValueType | None]]
# A tensor's type, row-major shape and bytes.
Tensors = dict[str, tuple[GGMLQuantizationType, tuple[int, ...], bytes]]


def export(dense: Path, target: Path, type: str = "f16") -> Path:
    """The file that `vptq-convert --dequantize` makes of a dense checkpoint."""
    convert(dense, target, dequantize=type)
    return target


def read(path: Path) -> tuple[Keys, Tensors]:
    """All that is in a file."""
    reader = GGUFReader(path)
    keys = {
        name: (field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    tensors = {
        t.name: (t.tensor_type, tuple(int(n) for n in reversed(t.shape)), t.data.tobytes())
        for t in reader.tensors
    }
    return keys, tensors


def write(path: Path, keys: Keys, tensors: Tensors) -> Path:
    """A file of these keys and tensors."""
    writer = GGUFWriter(path, keys.get("general.architecture", ("",))[0])
    for name, (value, type, element) in keys.items():
        if name != "general.architecture":
            writer.add_key_value(name, value, type, element)
    for name, (ggml_type, shape, data) in tensors.items():
        writer.add_tensor(name, np.frombuffer(data, np.uint8).reshape(*shape[:-1], -1), raw_dtype=ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def changed(source: Path, target: Path, change: Callable[[Keys, Tensors], object]) -> Path:
    """The file with whatever `change` does to its keys and tensors."""
    keys, tensors = read(source)
    change(keys, tensors)
    return write(target, keys, tensors)


def requantise(type: GGMLQuantizationType) -> Callable[[Keys, Tensors], None]:
    """A change: every matrix in another type. What the gguf library does not quantise gets random blocks."""

    def change(_: Keys, tensors: Tensors) -> None:
        rng = np.random.default_rng(0)
        for name, (old, shape, data) in tensors.items():
            if len(shape) != 2:
                continue
            values = quants.dequantize(np.frombuffer(data, np.uint8).reshape(shape[0], -1), old)
            try:
                new = quants.quantize(values, type).tobytes()
            except NotImplementedError:
                block, n_bytes = GGML_QUANT_SIZES[type]
                # Whatever byte is half of a float16, it is a number below 1.
                new = rng.integers(0, 0x3C, values.size // block * n_bytes, np.uint8).tobytes()
            tensors[name] = type, shape, new

    return change
