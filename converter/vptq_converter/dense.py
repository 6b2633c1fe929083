"""Dense tensors of the file: bytes as the checkpoint has them, or values written in another type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from numpy.typing import NDArray

from vptq_converter.checkpoint import Tensor
from vptq_converter.gguf_writer import OutputTensor
from vptq_converter.layer import LayerTensors
from vptq_runtime.errors import OptionError

CHUNK_ELEMENTS = 1 << 22  # weights that one step holds in float32: 16 MiB
MOST_F16 = 65504

STORED_TYPES = {
    "F32": GGMLQuantizationType.F32,
    "F16": GGMLQuantizationType.F16,
    "BF16": GGMLQuantizationType.BF16,
}
OPTION_TYPES = {
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
    "q5_1": GGMLQuantizationType.Q5_1,
    "q5_0": GGMLQuantizationType.Q5_0,
    "q4_1": GGMLQuantizationType.Q4_1,
    "q4_0": GGMLQuantizationType.Q4_0,
}
VQ = "vq"  # the model's own kind of layer, where the checkpoint has it
DENSE_TYPES = ("auto", *(name for name in OPTION_TYPES if name != "bf16"), VQ)  # of embedding and output
READ_ONLY = ("q6_k", "q5_k", "q4_k", "q3_k", "q2_k")  # types that the gguf library reads and can't write


def check_dense_type(value: str) -> None:
    """Raises OptionError unless the embedding or the output matrix can be written in this type."""
    if value in DENSE_TYPES:
        return
    why = ", which the gguf library cannot write" if value in READ_ONLY else ""
    raise OptionError(f"found {value!r}{why}, expected one of {', '.join(DENSE_TYPES)}")


def block_size(type: GGMLQuantizationType) -> int:
    """A row of a matrix of this type is a multiple of so many weights."""
    return GGML_QUANT_SIZES[type][0]


def copied(
    name: str, tensor: Tensor, type: GGMLQuantizationType | None = None, shape: tuple[int, ...] | None = None
) -> OutputTensor:
    """The tensor's bytes unchanged; type and shape are the checkpoint's unless they are named otherwise.

    Norms and biases are checked to be finite; a matrix is not, whose copy never comes through this process.
    """

    def chunks() -> Iterator[Tensor]:
        if len(tensor.shape) == 1:
            tensor.finite()
        yield tensor

    return OutputTensor(name, type or STORED_TYPES[tensor.dtype], shape or tensor.shape, chunks)


def made(name: str, type: GGMLQuantizationType, values: NDArray[Any]) -> OutputTensor:
    """Values that are at hand."""
    return OutputTensor(name, type, values.shape, lambda: [values])


def vector_f32(name: str, tensor: Tensor) -> OutputTensor:
    """A norm or bias in float32."""
    return OutputTensor(name, GGMLQuantizationType.F32, tensor.shape, lambda: [tensor.finite()])


def matrix(name: str, tensor: Tensor, type: GGMLQuantizationType) -> OutputTensor:
    """A dense matrix in the given type: copied where it has that type already."""
    if type == STORED_TYPES[tensor.dtype]:
        return copied(name, tensor)

    def rows(start: int, stop: int) -> NDArray[np.float32]:
        values = tensor.finite(slice(start, stop))
        tensor.release()
        return values

    return OutputTensor(name, type, tensor.shape, lambda: encoded(name, type, tensor.shape, rows))


def decoded(name: str, layer: LayerTensors, type: GGMLQuantizationType) -> OutputTensor:
    """The matrix that a VPTQ layer stands for, in the given type."""

    def chunks() -> Iterator[NDArray[Any]]:
        linear = layer.load()

        def rows(start: int, stop: int) -> NDArray[np.float32]:
            values = linear.dequantize(start, stop)
            layer.release()
            return values

        return encoded(name, type, layer.shape, rows)

    return OutputTensor(name, type, layer.shape, chunks)


def rounded(values: NDArray[np.float32], type: GGMLQuantizationType) -> NDArray[np.float32]:
    """What is left of rows of a matrix once they are stored in that type."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        result: NDArray[np.float32] = quants.dequantize(quants.quantize(values, type), type)
    return result


def encoded(
    name: str,
    type: GGMLQuantizationType,
    shape: tuple[int, ...],
    rows: Callable[[int, int], NDArray[np.float32]],
    multiple: int = 1,
) -> Iterator[NDArray[Any]]:
    """The matrix that rows(start, stop) gives in float32, encoded in steps of a multiple of `multiple` rows.

    Raises OptionError for a value that float16 can't hold: of blocks it may be the smallest weight.
    """
    n_rows, n_columns = shape
    step = -(-max(1, CHUNK_ELEMENTS // n_columns) // multiple) * multiple
    for start in range(0, n_rows, step):
        values = rows(start, min(start + step, n_rows))
        largest = float(np.abs(values).max())
        if largest > MOST_F16 and type not in (GGMLQuantizationType.F32, GGMLQuantizationType.BF16):
            raise OptionError(
                f"{name}: found a weight of size {largest:.6g}, expected at most {MOST_F16} for "
                f"{type.name.lower()}: use bf16"
            )
        yield values.astype(np.float16) if type == GGMLQuantizationType.F16 else quants.quantize(values, type)
