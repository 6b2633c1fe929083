"""Plain GGUF files of random blocks, in a real model's shape: what they say is noise, their speed is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray
from vptq_converter.gguf_writer import OutputTensor, write_gguf

from vptq_runtime.bench.shapes import Shape
from vptq_runtime.bench.synthetic import CHUNK, Random, hyperparameters
from vptq_runtime.errors import OptionError

# Where a block of each type has its f16 scales, in bytes from its start; all else in it may be any bits.
SCALES = {
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}
SCALE = np.frombuffer(np.float16(2.0**-10).tobytes(), np.uint8)


def random_tensors(shape: Shape, type_name: str, n_layer: int) -> list[OutputTensor]:
    """A model with linear layers of one of the types in SCALES, embedding and output matrix in Q8_0.

    Raises OptionError where a matrix has no whole number of blocks a row.
    """
    type, random = GGMLQuantizationType[type_name], Random()
    tensors = [random.blocks("q8_0", "token_embd.weight", (shape.n_vocab, shape.n_embd), -6)]
    for layer in range(n_layer):
        name = f"blk.{layer}"
        tensors += [_ones(f"{name}.{norm}.weight", shape.n_embd) for norm in ("attn_norm", "ffn_norm")]
        for linear, size in shape.linears.items():
            tensors.append(_blocks(random, f"{name}.{linear}.weight", type, size))
            if shape.arch == "qwen2" and linear in ("attn_q", "attn_k", "attn_v"):
                tensors.append(_ones(f"{name}.{linear}.bias", size[0]))
    tensors.append(_ones("output_norm.weight", shape.n_embd))
    tensors.append(random.blocks("q8_0", "output.weight", (shape.n_vocab, shape.n_embd), -6))
    return tensors


def write_random(path: Path, shape: Shape, type_name: str, n_layer: int) -> None:
    """Writes such a model, without a tokenizer. Raises FileError, OptionError."""
    keys = hyperparameters(shape, n_layer).keys(shape.arch)
    keys.append(("tokenizer.ggml.model", "no_vocab", GGUFValueType.STRING, None))
    write_gguf(path, shape.arch, keys, random_tensors(shape, type_name, n_layer))


def _blocks(random: Random, name: str, type: GGMLQuantizationType, size: tuple[int, int]) -> OutputTensor:
    block_size, block_bytes = GGML_QUANT_SIZES[type]
    if size[1] % block_size:
        raise OptionError(f"{name}: found rows of {size[1]} weights, {type.name} has blocks of {block_size}")

    def chunks() -> Iterator[NDArray[Any]]:
        left = size[0] * size[1] // block_size
        while left:
            n_blocks = min(left, CHUNK // block_bytes)
            blocks = random.bits(n_blocks * block_bytes).reshape(n_blocks, block_bytes)
            for at in SCALES[type.name]:
                blocks[:, at : at + 2] = SCALE
            yield blocks
            left -= n_blocks

    return OutputTensor(name, type, size, chunks)


def _ones(name: str, n: int) -> OutputTensor:
    return OutputTensor(name, GGMLQuantizationType.F32, (n,), lambda: [np.ones(n, np.float32)])
