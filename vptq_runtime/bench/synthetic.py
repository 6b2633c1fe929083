"""A model of random weights, whole and valid, in memory: as large and as slow as a real one of its shape."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray
from vptq_converter.architectures import Hyperparameters, Key
from vptq_converter.convert import vptq_keys
from vptq_converter.dense import OPTION_TYPES, VQ
from vptq_converter.gguf_writer import OutputTensor, write_in_place
from vptq_converter.layer import index_bits, packed_words

from vptq_runtime.bench.shapes import Shape
from vptq_runtime.bench.speed import ModelFacts, kv_bytes
from vptq_runtime.errors import OptionError, OutOfMemoryError

CHUNK = 1 << 24  # bytes made and written at a time
F16, F32 = GGMLQuantizationType.F16, GGMLQuantizationType.F32
I16, I32 = GGMLQuantizationType.I16, GGMLQuantizationType.I32
# What public checkpoints use; others run, too, in the limits that Quant.parse names.
QUANTS = (
    *("v8-k65536-65536", "v8-k65536-4096", "v8-k65536-256", "v12-k65536-4096", "v8-k65536-4", "v8-k1024-512"),
    *("v8-k512-512", "v8-k65536-0", "v16-k65536-65536", "v8-k256-256", "v16-k65536-32768", "v8-k32768-0"),
    *("v16-k32768-32768", "v16-k65536-16384", "v8-k16384-0", "v16-k65536-4096", "v16-k65536-1024"),
    *("v8-k4096-0", "v16-k65536-256", "v16-k65536-128", "v16-k65536-64", "v6-k4096-0", "v12-k4096-4096"),
)


@dataclass(frozen=True)
class Quant:
    """Vector length, centroids, residual centroids (0: no residual)."""

    v: int
    k: int
    r: int

    @classmethod
    def parse(cls, text: str) -> Quant:
        """Reads v{v}-k{k}-{r}, as in a checkpoint's name, where -woft often follows.

        Raises OptionError, which lists the known ones.
        """
        match = re.fullmatch(r"v(\d{1,2})-k(\d{1,5})-(\d{1,5})(?:-woft)?", text, re.ASCII)
        quant = cls(*map(int, match.groups())) if match else cls(0, 0, 0)
        # With powers of two every random index is one of a centroid.
        sizes = [2**bits for bits in range(1, 17)]
        if not 1 <= quant.v <= 64 or quant.k not in sizes or quant.r not in (0, *sizes):
            expected = "expected v{v}-k{k}-{r}: v up to 64, k and r powers of two up to 65536, r = 0 for none"
            raise OptionError(f"--quant: found {text!r:.80}, {expected}; known are {', '.join(QUANTS)}")
        return quant

    @property
    def name(self) -> str:
        return f"v{self.v}-k{self.k}-{self.r}"

    @property
    def bits(self) -> int:
        """Of one packed index, residual included."""
        return index_bits(self.k) + (index_bits(self.r) if self.r else 0)


class Random:
    """Makes tensors of random numbers about as fast as memory is filled: bits as they come, never zeros."""

    def __init__(self) -> None:
        self._generator = np.random.Generator(np.random.SFC64(0))  # the fastest of numpy's

    def bits(self, n_bytes: int) -> NDArray[np.uint8]:
        words = self._generator.integers(0, 1 << 64, -(-n_bytes // 8), dtype=np.uint64)
        return words.view(np.uint8)[:n_bytes]

    def indices(self, name: str, shape: tuple[int, ...]) -> OutputTensor:
        def chunks() -> Iterator[NDArray[Any]]:
            left = 4 * prod(shape)
            while left:
                yield self.bits(min(left, CHUNK))
                left -= min(left, CHUNK)

        return OutputTensor(name, I32, shape, chunks)

    def f16(self, name: str, shape: tuple[int, ...], exponent: int) -> OutputTensor:
        """Numbers of size 2**exponent to 2**(exponent + 1), of either sign."""

        def chunks() -> Iterator[NDArray[Any]]:
            left = prod(shape)
            while left:
                values = self.bits(2 * min(left, CHUNK // 2)).view(np.uint16)
                values &= 0x83FF  # keeps sign and mantissa
                values |= (exponent + 15) << 10
                yield values
                left -= len(values)

        return OutputTensor(name, F16, shape, chunks)

    def blocks(self, type_name: str, name: str, shape: tuple[int, ...], exponent: int) -> OutputTensor:
        """Numbers of a quantised type, of size up to 2**(exponent + 1), of either sign."""
        type, size = OPTION_TYPES[type_name], 2.0 ** (exponent + 1)
        block, n_bytes = GGML_QUANT_SIZES[type]
        halves = [size / 2 ** (int(type_name[1]) - 1)]  # what the whole numbers of a block are multiplied by
        if type_name.endswith("_1"):
            halves.append(-size)  # the smallest weight, which is added
        start = np.array(halves, np.float16).view(np.uint8)

        def chunks() -> Iterator[NDArray[Any]]:
            left = prod(shape) // block
            while left:
                n_blocks = min(left, CHUNK // n_bytes)
                blocks = self.bits(n_bytes * n_blocks).reshape(n_blocks, n_bytes)
                blocks[:, : len(start)] = start
                yield blocks
                left -= n_blocks

        return OutputTensor(name, type, shape, chunks)

    def matrix(self, type_name: str, name: str, shape: tuple[int, ...], exponent: int) -> OutputTensor:
        """Of f16, or of a quantised type."""
        if type_name == "f16":
            return self.f16(name, shape, exponent)
        return self.blocks(type_name, name, shape, exponent)

    def permutation(self, name: str, n: int) -> OutputTensor:
        return OutputTensor(
            name, I16, (n,), lambda: [self._generator.permutation(n).astype(np.uint16).view(np.int16)]
        )


@dataclass(frozen=True)
class SyntheticModel:
    """A model of a shape, quantised throughout in one way: permuted, normalised per input feature."""

    name: str
    shape: Shape
    quant: Quant
    embedding_type: str  # f16, q8_0 ... q4_0, or vq: as the layers are
    output_type: str

    def tensors(self, n_layer: int) -> list[OutputTensor]:
        """The tensors of a model of n_layer layers; nothing is made before it is written."""
        s, random = self.shape, Random()

        def matrix(type_name: str, name: str) -> list[OutputTensor]:
            if type_name == VQ:
                return list(vptq_linear(self.quant, random, name, s.n_vocab, s.n_embd))
            return [random.matrix(type_name, f"{name}.weight", (s.n_vocab, s.n_embd), -6)]

        tensors = matrix(self.embedding_type, "token_embd")
        for layer in range(n_layer):
            name = f"blk.{layer}"
            tensors += [
                _constant(f"{name}.{norm}.weight", F32, s.n_embd, 1) for norm in ("attn_norm", "ffn_norm")
            ]
            for linear, (out_features, in_features) in s.linears.items():
                tensors += vptq_linear(self.quant, random, f"{name}.{linear}", out_features, in_features)
                if s.arch == "qwen2" and linear in ("attn_q", "attn_k", "attn_v"):
                    tensors.append(_constant(f"{name}.{linear}.bias", F32, out_features, 0))
        tensors.append(_constant("output_norm.weight", F32, s.n_embd, 1))
        if not s.tied or self.output_type != self.embedding_type:  # as vptq-convert has it
            tensors += matrix(self.output_type, "output")
        return tensors

    def facts(self, n_layer: int, kv_type: str) -> ModelFacts:
        """What a model of n_layer layers takes, without making it."""
        s = self.shape
        tensor_bytes = {tensor.name: tensor.nbytes for tensor in self.tensors(n_layer)}
        return ModelFacts.of_tensors(
            tensor_bytes,
            name=self.name,
            quant=self.quant.name,
            n_layer=n_layer,
            n_vocab=s.n_vocab,
            model_bytes=sum(tensor_bytes.values()),
            kv_bytes=kv_bytes(n_layer, s.n_head_kv, s.head_dim, kv_type),
        )

    def keys(self, n_layer: int) -> list[Key]:
        """The keys of its file: all but a tokenizer's."""
        name = ("general.name", self.name, GGUFValueType.STRING, None)
        return [name, *hyperparameters(self.shape, n_layer).keys(self.shape.arch), *vptq_keys([])]

    @contextmanager
    def file(self, n_layer: int) -> Iterator[str]:
        """Makes the model and lends the path of its file: one in memory, or a temporary one without memfd."""
        with _empty_file() as path:
            try:
                write_in_place(Path(path), self.shape.arch, self.keys(n_layer), self.tensors(n_layer))
            except OSError as error:
                raise OutOfMemoryError(f"{self.name}: {path} cannot be written: {error.strerror}") from error
            yield path


def vptq_linear(
    quant: Quant, random: Random, name: str, out_features: int, in_features: int
) -> Iterator[OutputTensor]:
    """The tensors of one linear layer."""
    v, k, r = quant.v, quant.k, quant.r
    words = packed_words(in_features, quant.bits)
    yield random.indices(f"{name}.vptq_indices", (1, -(-out_features // v), words))
    yield random.f16(f"{name}.vptq_centroids", (1, k, v), -1)
    if r:
        yield random.f16(f"{name}.vptq_res_centroids", (1, r, v), -3)
    yield random.permutation(f"{name}.vptq_perm", in_features)
    # Sums of in_features products then stay as large as what goes in, and the logits finite.
    yield _constant(f"{name}.vptq_scale", F16, in_features, in_features**-0.5)
    yield _constant(f"{name}.vptq_shift", F16, in_features, 0)


def hyperparameters(shape: Shape, n_layer: int) -> Hyperparameters:
    return Hyperparameters(
        n_layer=n_layer,
        n_ctx_train=shape.n_ctx_train,
        n_embd=shape.n_embd,
        n_ff=shape.n_ff,
        n_vocab=shape.n_vocab,
        n_head=shape.n_head,
        n_head_kv=shape.n_head_kv,
        head_dim=shape.head_dim,
        norm_rms_eps=1e-5,
        rope_theta=shape.rope_theta,
        rope_linear_factor=None,
        rope_freqs=None,  # llama3 scaling costs no time
        sliding_window=shape.sliding_window,
        sliding_window_pattern=None,
    )


def _constant(name: str, type: GGMLQuantizationType, n: int, value: float) -> OutputTensor:
    dtype = np.float16 if type == F16 else np.float32
    return OutputTensor(name, type, (n,), lambda: [np.full(n, value, dtype)])


@contextmanager
def _empty_file() -> Iterator[str]:
    if not hasattr(os, "memfd_create") or not Path("/proc/self/fd").is_dir():
        with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
            yield file.name
        return
    descriptor = os.memfd_create("vptq-synthetic")
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
