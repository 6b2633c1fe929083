"""Tensors of linear layers as a GGUF file holds them, to be handed to the native library without a file."""

import gguf
import numpy as np
from numpy.typing import NDArray

QUANTISED = {"q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8}  # GGUF's numbers
DTYPES = {"f32": 0, "f16": 1, "i16": 25, "i32": 26, "bf16": 30} | QUANTISED
MATRIX_TYPES = ("f32", "f16", "bf16", *QUANTISED)
Raw = tuple[int, list[int], bytes]


def raw(array: NDArray[np.generic], dtype: str) -> Raw:
    """A tensor as the file holds it."""
    shape = list(array.shape)
    if dtype == "bf16":
        bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
        return DTYPES[dtype], shape, (bits >> 16).astype(np.uint16).tobytes()
    if dtype in QUANTISED:
        type = gguf.GGMLQuantizationType(DTYPES[dtype])
        return DTYPES[dtype], shape, gguf.quants.quantize(array.astype(np.float32), type).tobytes()
    numpy_type = {"f32": np.float32, "f16": np.float16, "i16": np.uint16, "i32": np.int32}[dtype]
    return DTYPES[dtype], shape, np.ascontiguousarray(array, numpy_type).tobytes()


def pack(values: NDArray[np.int64], bits: int) -> NDArray[np.int32]:
    """Rows of `bits`-wide values (..., n) to rows of 32-bit words."""
    n_words = -(-values.shape[-1] * bits // 32)
    words = np.empty((*values.shape[:-1], n_words), np.int32)
    for row in np.ndindex(values.shape[:-1]):
        number = sum(int(value) << j * bits for j, value in enumerate(values[row]))
        words[row] = np.frombuffer(number.to_bytes(4 * n_words, "little"), "<i4")
    return words


def vptq_layer(
    rng: np.random.Generator,
    *,
    out: int,
    v: int,
    k: int,
    r: int = 0,
    g: int = 1,
    group_size: int,
    n0: int = 0,
    v0: int = 4,
    k0: int = 16,
    norm_dim: int | None = 0,
    perm: bool = True,
    bias: bool = False,
    dtype: str = "f16",
) -> tuple[dict[str, Raw], int]:
    """Random tensors of one layer, and its in_features."""
    n_in = n0 + g * group_size
    blocks = -(-out // v)
    index_bits = (k - 1).bit_length()
    values = rng.integers(k, size=(g, blocks, group_size))
    bits = index_bits
    tensors = {"vptq_centroids": raw(rng.normal(size=(g, k, v)), dtype)}
    if r:
        values |= rng.integers(r, size=values.shape) << index_bits
        bits += (r - 1).bit_length()
        tensors["vptq_res_centroids"] = raw(rng.normal(size=(g, r, v)), dtype)
    tensors["vptq_indices"] = raw(pack(values, bits), "i32")
    if n0:
        tensors["vptq_outlier_indices"] = raw(rng.integers(k0, size=(-(-out // v0), n0)), "i16")
        tensors["vptq_outlier_centroids"] = raw(rng.normal(size=(k0, v0)), dtype)
    if perm:
        tensors["vptq_perm"] = raw(rng.permutation(n_in), "i16")
    if norm_dim is not None:
        prefix, n = ("vptq_", n_in) if norm_dim == 0 else ("vptq_out_", out)
        tensors[f"{prefix}scale"] = raw(rng.normal(size=n), dtype)
        tensors[f"{prefix}shift"] = raw(rng.normal(size=n), dtype)
    if bias:
        tensors["bias"] = raw(rng.normal(size=out), dtype)
    return tensors, n_in


def floats(tensor: Raw) -> NDArray[np.float64]:
    number, shape, data = tensor
    if number in QUANTISED.values():
        blocks = np.frombuffer(data, np.uint8).reshape(shape[0], -1)
        return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(number)).astype(np.float64)
    if number == DTYPES["bf16"]:
        return (
            (np.frombuffer(data, np.uint16).astype(np.uint32) << 16)
            .view(np.float32)
            .reshape(shape)
            .astype(np.float64)
        )
    return np.frombuffer(data, np.float16 if number == 1 else np.float32).reshape(shape).astype(np.float64)
