"""Linear layers of random weights, as the native library takes them without a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from vptq_converter.gguf_writer import OutputTensor

from vptq_runtime.bench.synthetic import Quant, Random, vptq_linear

if TYPE_CHECKING:
    from vptq_runtime._native import RawTensor

# Of each tensor, by the part of its name after vptq_: its type and its numbers.
Arrays = dict[str, tuple[GGMLQuantizationType, NDArray[np.generic]]]
NUMPY_TYPES = {
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.I16: np.int16,
    GGMLQuantizationType.I32: np.int32,
}


def random_layer(quant: Quant, random: Random, out_features: int, in_features: int) -> Arrays:
    tensors = vptq_linear(quant, random, "layer", out_features, in_features)
    return {tensor.name.partition(".vptq_")[2]: _array_of(tensor) for tensor in tensors}


def rotating_layers(quant: Quant, out_features: int, in_features: int, n_bytes: int) -> list[Arrays]:
    """As many layers as have n_bytes together: used in turns, no cache that is smaller holds them."""
    random = Random()
    layers = [random_layer(quant, random, out_features, in_features)]
    for _ in range(n_bytes // layer_bytes(layers[0])):
        layers.append(random_layer(quant, random, out_features, in_features))
    return layers


def layer_bytes(layer: Arrays) -> int:
    return sum(array.nbytes for _, array in layer.values())


def raw_tensors(layer: Arrays) -> dict[str, RawTensor]:
    return {
        f"vptq_{name}": (int(type), list(array.shape), array.tobytes())
        for name, (type, array) in layer.items()
    }


def _array_of(tensor: OutputTensor) -> tuple[GGMLQuantizationType, NDArray[np.generic]]:
    data = b"".join(np.asarray(chunk).tobytes() for chunk in tensor.chunks())
    return tensor.type, np.frombuffer(data, NUMPY_TYPES[tensor.type]).reshape(tensor.shape)
