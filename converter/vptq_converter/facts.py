"""What is in a GGUF file: its model, its size, and how each linear layer is stored (docs/file-format.md)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.gguf_reader import ReaderTensor
from numpy.typing import NDArray

from vptq_converter.gguf_reader import open_gguf, row_major
from vptq_converter.layer import MAX_CENTROIDS, index_bits, packed_words
from vptq_runtime.errors import FileError

EMBEDDINGS = ("token_embd", "output")
BLOCK = re.compile(r"^blk\.([0-9]{1,9})\.")
VPTQ_FIELD = re.compile(r"(.+)\.vptq_([a-z_]+)")


@dataclass(frozen=True)
class VPTQConfig:
    """How a VPTQ layer is quantised; the names are those of docs/file-format.md."""

    v: int
    k: int
    r: int  # 0: no residual
    g: int
    n0: int  # outlier columns; without any v0 and k0 are 0 too
    v0: int
    k0: int
    has_perm: bool
    norm: str  # input, output or none: what scale and shift belong to

    @property
    def index_bits(self) -> int:
        """Bits of one packed index, residual included."""
        return index_bits(self.k) + (index_bits(self.r) if self.r else 0)


@dataclass(frozen=True)
class Linear:
    """One linear layer."""

    name: str
    out_features: int
    in_features: int
    type: str  # VPTQ, or the type of a dense weight: F16, Q8_0, ...
    vptq: VPTQConfig | None
    has_bias: bool
    nbytes: int  # of all its tensors
    codebook_bytes: int
    indices: NDArray[np.int32] | None = field(repr=False, compare=False)  # (g, B, words), in the mapped file

    @property
    def n_weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def bits_per_weight(self) -> float:
        """Of all the layer's tensors, codebooks included."""
        return 8 * self.nbytes / self.n_weights

    @property
    def block(self) -> int | None:
        """N of `blk.N.`; None for embedding and output."""
        match = BLOCK.match(self.name)
        return int(match[1]) if match else None

    @property
    def kind(self) -> str:
        """The name without `blk.N.`."""
        return BLOCK.sub("", self.name)


@dataclass(frozen=True)
class Facts:
    """What a file holds."""

    path: Path
    file_bytes: int
    metadata: Mapping[str, Any]
    linears: tuple[Linear, ...]  # the embedding among them where it is a VPTQ layer
    embedding_type: str | None  # VPTQ, or a dense one's; None: there is none
    n_parameters: int  # numbers that the model has, not that the file stores
    n_embedding_parameters: int
    tensor_bytes: int
    embedding_bytes: int

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", "unknown"))

    @cached_property
    def bits_per_weight(self) -> dict[str, float]:
        """Bits per weight, four ways; those of the quantised layers only where there are any."""
        quantised = [linear for linear in self.linears if linear.vptq]
        n_weights = sum(linear.n_weights for linear in quantised)
        nbytes = sum(linear.nbytes for linear in quantised)
        codebook_bytes = sum(linear.codebook_bytes for linear in quantised)
        ways = {
            "whole_file": (self.file_bytes, self.n_parameters),
            "without_embeddings": (
                self.tensor_bytes - self.embedding_bytes,
                self.n_parameters - self.n_embedding_parameters,
            ),
            "quantised_layers": (nbytes, n_weights),
            "quantised_layers_without_codebooks": (nbytes - codebook_bytes, n_weights),
        }
        return {way: 8 * size / n for way, (size, n) in ways.items() if n}


def read_facts(path: Path) -> Facts:
    """Reads a GGUF file's header and the shapes in it; raises FileError. Tensor data is only mapped."""
    reader = open_gguf(path)
    metadata = reader.metadata()
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    linears = tuple(_linears(path, metadata, tensors))
    in_linears = sum(linear.n_weights for linear in linears)
    biases = sum(linear.out_features for linear in linears if linear.has_bias)
    names = {linear.name for linear in linears}
    others = [tensor for name, tensor in tensors.items() if _owner(name) not in names]
    embeddings = [tensor for name, tensor in tensors.items() if _owner(name) in EMBEDDINGS]
    outside = [linear for linear in linears if linear.name in EMBEDDINGS]
    token_embd = tensors.get("token_embd.weight")
    return Facts(
        path=path,
        file_bytes=len(reader.data),
        metadata=metadata,
        linears=linears,
        embedding_type=token_embd.tensor_type.name
        if token_embd is not None
        else next((linear.type for linear in outside if linear.name == "token_embd"), None),
        n_parameters=in_linears + biases + sum(_n_elements(tensor) for tensor in others),
        n_embedding_parameters=sum(linear.n_weights for linear in outside)
        + (_n_elements(token_embd) if token_embd is not None else 0),
        tensor_bytes=sum(tensor.n_bytes for tensor in tensors.values()),
        embedding_bytes=sum(tensor.n_bytes for tensor in embeddings),
    )


def _shown(value: object) -> str:
    """For a message: on one line, not endless, whatever a file holds."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _owner(tensor_name: str) -> str:
    """The base name of the layer that a tensor belongs to."""
    return tensor_name.rpartition(".")[0]


def _n_elements(tensor: ReaderTensor) -> int:
    return prod(row_major(tensor))


def _linears(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, ReaderTensor]
) -> Iterable[Linear]:
    """Every linear layer, in the order of the file: VPTQ, or a dense weight with two dimensions."""
    vptq: dict[str, dict[str, ReaderTensor]] = {}
    for name, tensor in tensors.items():
        if match := VPTQ_FIELD.fullmatch(name):
            vptq.setdefault(match[1], {})[match[2]] = tensor
    seen = set()
    for tensor_name, tensor in tensors.items():
        name = _owner(tensor_name)
        bias = tensors.get(f"{name}.bias")
        bias_bytes = bias.n_bytes if bias is not None else 0
        if name in vptq and name not in seen:
            seen.add(name)
            parts = vptq[name]
            out_features, in_features = _vptq_features(path, metadata, name)
            config = _vptq_config(path, name, parts, out_features, in_features)
            yield Linear(
                name=name,
                out_features=out_features,
                in_features=in_features,
                type="VPTQ",
                vptq=config,
                has_bias=bias is not None,
                nbytes=sum(part.n_bytes for part in parts.values()) + bias_bytes,
                codebook_bytes=sum(part.n_bytes for key, part in parts.items() if key.endswith("centroids")),
                indices=parts["indices"].data,
            )
        elif (name.startswith("blk.") or name == "output") and tensor_name.endswith(".weight"):
            shape = row_major(tensor)
            if len(shape) == 2 and prod(shape) > 0 and name not in vptq:
                yield Linear(
                    name=name,
                    out_features=shape[0],
                    in_features=shape[1],
                    type=tensor.tensor_type.name,
                    vptq=None,
                    has_bias=bias is not None,
                    nbytes=tensor.n_bytes + bias_bytes,
                    codebook_bytes=0,
                    indices=None,
                )


def _vptq_features(path: Path, metadata: Mapping[str, Any], name: str) -> tuple[int, int]:
    """(out_features, in_features) of a VPTQ layer: its tensors don't say, the hyperparameters do."""

    def count(key: str) -> int:
        full_key = key if key.startswith("general.") else f"{metadata.get('general.architecture')}.{key}"
        value = metadata.get(full_key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise FileError(
                f"{path}: key {_shown(full_key)}: found {_shown(value)}, expected a positive integer"
            )
        return value

    n_embd = count("embedding_length")
    if name in EMBEDDINGS:
        return count("vocab_size"), n_embd
    match = re.fullmatch(r"blk\.\d+\.(attn_q|attn_k|attn_v|attn_output|ffn_gate|ffn_up|ffn_down)", name)
    if match is None:
        raise FileError(
            f"{path}: {_shown(name)}: found VPTQ tensors, expected them only for the known linear layers"
        )
    if match[1].startswith("attn"):
        n_head = count(
            "attention.head_count_kv" if match[1] in ("attn_k", "attn_v") else "attention.head_count"
        )
        heads = n_head * count("attention.key_length")
        return (n_embd, heads) if match[1] == "attn_output" else (heads, n_embd)
    n_ff = count("feed_forward_length")
    return (n_embd, n_ff) if match[1] == "ffn_down" else (n_ff, n_embd)


def _vptq_config(
    path: Path, name: str, parts: Mapping[str, ReaderTensor], out_features: int, in_features: int
) -> VPTQConfig:
    """The configuration from the tensors' shapes, which must fit the layer's."""

    def shape(key: str, n_dims: int) -> tuple[int, ...]:
        if key not in parts:
            raise FileError(f"{path}: tensor {_shown(f'{name}.vptq_{key}')} is missing")
        found = row_major(parts[key])
        if len(found) != n_dims or 0 in found:
            where = _shown(f"{name}.vptq_{key}")
            raise FileError(f"{path}: tensor {where}: found shape {found}, expected {n_dims} dimensions")
        return found

    g, k, v = shape("centroids", 3)
    r = shape("res_centroids", 3)[1] if "res_centroids" in parts else 0
    n0 = v0 = k0 = 0
    if "outlier_indices" in parts or "outlier_centroids" in parts:
        (k0, v0), n0 = shape("outlier_centroids", 2), shape("outlier_indices", 2)[1]
    norm = "input" if "scale" in parts else "output" if "out_scale" in parts else "none"
    config = VPTQConfig(v, k, r, g, n0, v0, k0, has_perm="perm" in parts, norm=norm)
    if max(k, r, k0) > MAX_CENTROIDS:
        raise FileError(
            f"{path}: {_shown(name)}: found {max(k, r, k0)} centroids, expected at most {MAX_CENTROIDS}"
        )

    group_size, left = divmod(in_features - n0, g)
    expected = (g, -(-out_features // v), packed_words(group_size, config.index_bits))
    found = shape("indices", 3)
    found_type = parts["indices"].tensor_type.name
    if left or group_size < 1 or found != expected or found_type != "I32":
        raise FileError(
            f"{path}: tensor {_shown(f'{name}.vptq_indices')}: found {found_type} {found}, expected "
            f"I32 {expected} for {out_features} x {in_features} weights, v={v}, k={k}, r={r}, g={g}, n0={n0}"
        )
    return config
