"""`--dequantize`: the tensors of a plain GGUF file, as llama.cpp expects them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray

from vptq_converter.architectures import Model, Weight
from vptq_converter.checkpoint import Tensor
from vptq_converter.dense import OPTION_TYPES, block_size, encoded, made, vector_f32
from vptq_converter.gguf_writer import OutputTensor
from vptq_runtime.errors import UnsupportedError

FILE_TYPES = {
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}


def plain_tensors(model: Model, types: dict[str, str]) -> tuple[list[OutputTensor], list[str]]:
    """Every matrix in the type that `types` has for its name or for ""; norms and biases in F32.

    A matrix whose rows are not whole blocks of its type becomes f16. Rows of q and k are in llama.cpp's
    order.
    Beside the tensors: what the user of the file should know. Raises UnsupportedError for what llama.cpp
    can't express.
    """
    arch = model.architecture.gguf_name
    if model.hyperparameters.rope_freqs is not None and arch != "llama":
        raise UnsupportedError(
            f"--dequantize: llama.cpp has no llama3 RoPE scaling for the architecture {arch}"
        )
    tensors = []
    not_blocks: list[tuple[str, Weight]] = []
    for weight in model.weights:
        name = f"{weight.name}.weight"
        if isinstance(weight.weight, Tensor) and len(weight.weight.shape) == 1:
            tensors.append(vector_f32(name, weight.weight))
            continue
        shape = weight.weight.shape
        type_name = types.get(weight.name, types[""])
        type = OPTION_TYPES[type_name]
        if shape[1] % block_size(type):
            type = GGMLQuantizationType.F16
            not_blocks.append((type_name, weight))
        tensors.append(OutputTensor(name, type, shape, lambda w=weight, t=type: _chunks(w, t)))  # type: ignore[misc]
        if weight.bias is not None:
            bias = _llama_cpp_order(weight.bias.finite(), weight.n_heads_permuted)
            tensors.append(made(f"{weight.name}.bias", GGMLQuantizationType.F32, bias))
    notes = []
    for type_name in dict.fromkeys(name for name, _ in not_blocks):
        weights = [weight for name, weight in not_blocks if name == type_name]
        matrices = "1 matrix is" if len(weights) == 1 else f"{len(weights)} matrices are"
        notes.append(
            f"{matrices} f16, not {type_name}, which needs rows of a multiple of "
            f"{block_size(OPTION_TYPES[type_name])} weights ({weights[0].name}: {weights[0].weight.shape[1]})"
        )
    return tensors, notes


def _chunks(weight: Weight, type: GGMLQuantizationType) -> Iterator[NDArray[Any]]:
    shape = weight.weight.shape
    head_dim = shape[0] // weight.n_heads_permuted if weight.n_heads_permuted else 1
    source = weight.weight
    layer = None if isinstance(source, Tensor) else source.load()

    def rows(start: int, stop: int) -> NDArray[np.float32]:
        if isinstance(source, Tensor):
            values = source.finite(slice(start, stop))
        else:
            assert layer is not None
            values = layer.dequantize(start, stop)
        source.release()
        return _llama_cpp_order(values, (stop - start) // head_dim if weight.n_heads_permuted else 0)

    return encoded(weight.name, type, shape, rows, multiple=head_dim)


def _llama_cpp_order(values: NDArray[np.float32], n_heads: int) -> NDArray[np.float32]:
    """Reorders each head's rows: row i rotates with i + head_dim/2 here, 2i with 2i + 1 there."""
    if not n_heads:
        return values
    halves = values.reshape(n_heads, 2, -1, *values.shape[1:])
    neighbours: NDArray[np.float32] = halves.swapaxes(1, 2).reshape(values.shape)
    return neighbours
