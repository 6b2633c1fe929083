"""One VPTQ linear layer: its tensors in a checkpoint, checked; its indices, packed and unpacked; its weight.

`VPTQLinear.dequantize` is the readable reference of what the format (docs/file-format.md) means.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vptq_converter.checkpoint import FLOAT_TYPES, Checkpoint, Tensor
from vptq_converter.config import Section
from vptq_runtime.errors import FileError, UnsupportedError

CHUNK_INDICES = 1 << 20  # indices that one step unpacks: some tens of MB of temporaries
MAX_CENTROIDS = 1 << 16  # an index is a uint16
MAX_VECTOR_LENGTH = 64  # of readers
INDEX_TYPES = ("I16", "U16", "F16")  # all hold the bits of a uint16


def index_bits(n_centroids: int) -> int:
    """Bits of an index into a codebook: ceil(log2 n_centroids)."""
    return (n_centroids - 1).bit_length()


def packed_words(n_columns: int, bits: int) -> int:
    """32-bit words that one row of n_columns values takes."""
    return -(-n_columns * bits // 32)


def pack(values: NDArray[np.uint64], bits: int) -> NDArray[np.int32]:
    """Packs the last axis: `bits` (1 to 32) a value, least significant first, rows padded to whole words."""
    n_columns = values.shape[-1]
    position = np.arange(n_columns) * bits
    word, shift = position // 32, (position % 32).astype(np.uint64)
    shifted = values << shift
    # A value is at most one word wide: one starts in every word but the last, which is there for crossings.
    words = np.zeros((*values.shape[:-1], word[-1] + 2), np.uint64)
    first = np.searchsorted(word, np.arange(word[-1] + 1))
    words[..., :-1] = np.bitwise_or.reduceat(shifted & np.uint64(0xFFFFFFFF), first, axis=-1)
    crossing = np.flatnonzero(position % 32 + bits > 32)  # at most one value crosses into each word
    words[..., word[crossing] + 1] |= shifted[..., crossing] >> np.uint64(32)
    return words[..., : packed_words(n_columns, bits)].astype(np.uint32).view(np.int32)


def unpack(words: NDArray[np.int32], n_columns: int, bits: int) -> NDArray[np.uint32]:
    """The n_columns values, `bits` wide each, of every row (last axis) of words."""
    position = np.arange(n_columns) * bits
    word, shift = position // 32, (position % 32).astype(np.uint64)
    low = words.view(np.uint32)
    high = np.minimum(word + 1, words.shape[-1] - 1)  # of the last word only bits that are masked away
    pair = low[..., word].astype(np.uint64) | (low[..., high].astype(np.uint64) << np.uint64(32))
    values: NDArray[np.uint64] = (pair >> shift) & np.uint64((1 << bits) - 1)
    return values.astype(np.uint32)


@dataclass(frozen=True)
class LayerConfig:
    """The numbers of one layer's entry in `quantization_config`, in the names of docs/file-format.md."""

    in_features: int
    out_features: int
    v: int  # length of a vector, along the output dimension
    k: int  # centroids of a codebook
    r: int  # centroids of a residual codebook, 0 without
    g: int  # codebooks: groups of input columns
    n0: int  # outlier columns, 0 without
    v0: int
    k0: int
    packed: bool
    perm: bool
    norm_dim: int | None  # None: not normalised, 0: per input feature, 1: per output feature

    @property
    def group_size(self) -> int:
        return (self.in_features - self.n0) // self.g

    @property
    def n_blocks(self) -> int:
        return -(-self.out_features // self.v)

    @property
    def n_outlier_blocks(self) -> int:
        return -(-self.out_features // self.v0) if self.n0 else 0

    @property
    def bits(self) -> int:
        return index_bits(self.k) + (index_bits(self.r) if self.r else 0)

    @property
    def indices_shape(self) -> tuple[int, int, int]:
        """Of the packed words."""
        return self.g, self.n_blocks, packed_words(self.group_size, self.bits)

    @classmethod
    def parse(cls, entry: Section, out_features: int, in_features: int, bias: bool) -> LayerConfig:
        """Reads the entry of a layer whose size and bias the architecture gives; raises FileError."""
        if entry.boolean("bias", default=bias) != bias:
            raise entry.error("bias", not bias, f"{bias}, as the model's hyperparameters say")
        for key, size in (("out_features", out_features), ("in_features", in_features)):
            found = entry.integer(key, default=size)
            if found != size:
                raise entry.error(key, found, f"{size}, as the model's hyperparameters say")
        v0, v = _pair(entry, "vector_lens")
        k0, k = _pair(entry, "num_centroids")
        r0, r = _pair(entry, "num_res_centroids", default=(0, 0))
        g = entry.integer("group_num", default=1)
        n0 = max(0, entry.integer("outlier_size", minimum=-1, default=0))
        if v < 1:
            raise entry.error("vector_lens", v, "a vector length of at least 1 as its second number")
        if max(v, v0) > MAX_VECTOR_LENGTH:
            raise entry.error("vector_lens", max(v, v0), f"at most {MAX_VECTOR_LENGTH}")
        for key, count in (("num_centroids", k), ("num_res_centroids", r), ("num_centroids", k0)):
            if count > MAX_CENTROIDS:
                raise entry.error(key, count, f"at most {MAX_CENTROIDS}: an index has 16 bits")
        if k < 2 or r == 1:
            raise entry.error(
                "num_res_centroids" if r == 1 else "num_centroids", min(k, max(r, 1)), "at least 2"
            )
        if n0 and (v0 < 1 or k0 < 1):
            raise entry.error(
                "outlier_size", n0, f"0, or outliers with vectors and centroids (v0 {v0}, k0 {k0})"
            )
        if n0 and r0:
            raise UnsupportedError(
                f"{entry.path}: {entry.where}.num_res_centroids: a residual on outliers ({r0})"
            )
        if n0 >= in_features or (in_features - n0) % g:
            raise entry.error(
                "outlier_size", n0, f"fewer than {in_features} columns, the rest a multiple of {g} groups"
            )
        group_size = entry.integer("group_size", minimum=-1, default=-1)
        if group_size > 0 and group_size != (in_features - n0) // g:
            raise entry.error(
                "group_size",
                group_size,
                f"(in_features - outlier_size) / group_num = {(in_features - n0) // g}",
            )
        if entry.values.get("vector_quant_dim", "out") != "out":
            raise entry.error("vector_quant_dim", entry.values["vector_quant_dim"], "'out'")
        norm_dim = entry.integer("norm_dim", minimum=0, default=0)
        if norm_dim > 1:
            raise entry.error("norm_dim", norm_dim, "0 or 1")
        return cls(
            in_features=in_features, out_features=out_features, v=v, k=k, r=r, g=g, n0=n0, v0=v0, k0=k0,
            packed=entry.boolean("is_indice_packed", default=False),
            perm=entry.boolean("enable_perm", default=False),
            norm_dim=norm_dim if entry.boolean("enable_norm", default=False) else None,
        )  # fmt: skip


def _pair(entry: Section, key: str, default: tuple[int, int] | None = None) -> tuple[int, int]:
    """[outlier part, main part]; -1 and 0 mean none and become 0."""
    value = entry.values.get(key, default)
    if value is None:
        raise entry.missing(key, "[outlier part, main part]")
    if not isinstance(value, list | tuple) or len(value) != 2 or any(type(n) is not int for n in value):
        raise entry.error(key, value, "two integers")
    if max(value) > 2**31 - 1:
        raise entry.error(key, value, "integers below 2**31")
    return max(0, value[0]), max(0, value[1])


@dataclass(frozen=True)
class LayerTensors:
    """The tensors of one layer in a checkpoint, of the types and shapes that the config implies."""

    config: LayerConfig
    indices: Tensor
    res_indices: Tensor | None  # only where not packed
    centroids: Tensor
    res_centroids: Tensor | None
    outlier_indices: Tensor | None
    outlier_centroids: Tensor | None
    perm: Tensor | None
    scale: Tensor | None
    shift: Tensor | None

    @classmethod
    def find(cls, checkpoint: Checkpoint, module: str, config: LayerConfig) -> LayerTensors:
        """Looks up the tensors under a module path; raises FileError for a missing or contradicting one."""
        c = config
        centroids = checkpoint.tensor(f"{module}.centroids.weight").expect(FLOAT_TYPES, (c.g, c.k * c.v))
        same = (centroids.dtype,)

        def find(name: str, types: tuple[str, ...], *shape: int) -> Tensor:
            return checkpoint.tensor(f"{module}.{name}").expect(types, shape)

        if c.packed:
            indices = find("indices", ("I32",), *c.indices_shape)
        else:
            indices = find("indices", INDEX_TYPES, c.g, c.n_blocks, c.group_size)
        unpacked_residual = c.r > 0 and not c.packed
        n_norm = (c.in_features, c.out_features)[c.norm_dim or 0]
        return cls(
            config=c,
            indices=indices,
            res_indices=find("res_indices", INDEX_TYPES, *indices.shape) if unpacked_residual else None,
            centroids=centroids,
            res_centroids=find("res_centroids.weight", same, c.g, c.r * c.v) if c.r else None,
            outlier_indices=find("outlier_indices", INDEX_TYPES, 1, c.n_outlier_blocks, c.n0)
            if c.n0
            else None,
            outlier_centroids=find("outlier_centroids.weight", same, 1, c.k0 * c.v0) if c.n0 else None,
            perm=find("perm", ("I16", "U16", "I32", "I64"), c.in_features) if c.perm else None,
            scale=find("weight_scale", FLOAT_TYPES, n_norm) if c.norm_dim is not None else None,
            shift=find("weight_bias", FLOAT_TYPES, n_norm) if c.norm_dim is not None else None,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight: (out_features, in_features)."""
        return self.config.out_features, self.config.in_features

    def all(self) -> list[Tensor]:
        """Every tensor that the layer has."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]

    def permutation(self) -> NDArray[np.uint16] | None:
        """perm as the file stores it, (in_features,); None for the identity; raises FileError."""
        if self.perm is None:
            return None
        bits = self.perm.array()
        perm = bits.view(np.uint16) if bits.itemsize == 2 else bits
        identity = np.arange(self.config.in_features)
        if not np.array_equal(np.sort(perm), identity):
            raise self.perm.error(
                "numbers that repeat or are out of range", f"a permutation of 0..{len(identity) - 1}"
            )
        if np.array_equal(perm, identity):
            return None
        if len(identity) > 1 << 16:
            raise UnsupportedError(
                f"{self.perm.shard.path}: tensor {self.perm.name}: {len(identity)} columns, at most 65536"
            )
        return perm.astype(np.uint16)

    def load(self) -> VPTQLinear:
        """The layer's numbers, every one checked but the indices, which are checked as they are read.

        Raises FileError for a NaN or infinity, a perm that is none, an outlier index beyond its codebook.
        """
        c = self.config

        def floats(tensor: Tensor | None, *shape: int) -> NDArray[np.float32] | None:
            if tensor is None:
                return None
            return tensor.finite().reshape(shape or tensor.shape)

        outlier_indices = None
        if self.outlier_indices is not None:
            outlier_indices = self.outlier_indices.array()[0].view(np.uint16)
            check_indices(outlier_indices, c.k0, self.outlier_indices)
        centroids = floats(self.centroids, c.g, c.k, c.v)
        assert centroids is not None
        scale, shift = floats(self.scale), floats(self.shift)
        return VPTQLinear(
            in_features=c.in_features,
            out_features=c.out_features,
            indices=self.indices.array() if c.packed else self.indices.array().view(np.uint16),
            res_indices=None if self.res_indices is None else self.res_indices.array().view(np.uint16),
            centroids=centroids,
            res_centroids=floats(self.res_centroids, c.g, c.r, c.v),
            outlier_indices=outlier_indices,
            outlier_centroids=floats(self.outlier_centroids, c.k0, c.v0),
            perm=self.permutation(),
            scale=scale if c.norm_dim == 0 else None,
            shift=shift if c.norm_dim == 0 else None,
            out_scale=scale if c.norm_dim == 1 else None,
            out_shift=shift if c.norm_dim == 1 else None,
            source=self.indices,
        )

    def packed_chunks(self) -> Iterator[NDArray[Any] | Tensor]:
        """The words of `vptq_indices` in the file's order, piece by piece, after a check of the whole layer.

        Raises FileError for what load() finds, and for an index beyond its codebook.
        """
        c = self.config
        layer = self.load()
        fills_bits = c.k == 1 << index_bits(c.k) and (not c.r or c.r == 1 << index_bits(c.r))
        if c.packed and fills_bits:  # no index can be out of range: a plain copy
            yield self.indices
            return
        step = max(1, CHUNK_INDICES // c.group_size)
        for q in range(c.g):
            for b in range(0, c.n_blocks, step):
                blocks = slice(b, min(b + step, c.n_blocks))
                index, res_index = layer.index(q, blocks)
                if c.packed:
                    yield self.indices.array()[q, blocks]
                    continue
                values = index.astype(np.uint64)
                if res_index is not None:
                    values |= res_index.astype(np.uint64) << np.uint64(index_bits(c.k))
                yield pack(values, c.bits)
            self.release()

    def release(self) -> None:
        """Tells the kernel that the layer's mapped pages may go."""
        for tensor in self.all():
            tensor.release()


def check_indices(indices: NDArray[Any], n_centroids: int, source: Tensor | None) -> None:
    """Raises FileError when an index names a centroid beyond the codebook."""
    if indices.size and int(indices.max()) >= n_centroids:
        name = f"{source.shard.path}: tensor {source.name}" if source else "indices"
        raise FileError(
            f"{name}: found index {int(indices.max())}, expected below {n_centroids}, the codebook's size"
        )


@dataclass(frozen=True)
class VPTQLinear:
    """One VPTQ linear layer in numbers, whichever file they came from.

    g codebooks of k centroids of length v, B = ceil(out_features / v), n0 outlier columns in
    B0 = ceil(out_features / v0) blocks; group_size = (in_features - n0) / g.
    """

    in_features: int
    out_features: int
    indices: NDArray[Any]  # int32 (g, B, words): packed with the residual's; or uint16 (g, B, group_size)
    centroids: NDArray[np.float32]  # (g, k, v)
    res_centroids: NDArray[np.float32] | None = None  # (g, r, v)
    res_indices: NDArray[np.uint16] | None = None  # (g, B, group_size), where indices are not packed
    outlier_indices: NDArray[np.uint16] | None = None  # (B0, n0)
    outlier_centroids: NDArray[np.float32] | None = None  # (k0, v0)
    perm: NDArray[np.uint16] | None = None  # (in_features,): permuted column -> input column
    scale: NDArray[np.float32] | None = None  # (in_features,)
    shift: NDArray[np.float32] | None = None
    out_scale: NDArray[np.float32] | None = None  # (out_features,)
    out_shift: NDArray[np.float32] | None = None
    source: Tensor | None = None  # names the indices in messages

    @property
    def n_outliers(self) -> int:
        return 0 if self.outlier_indices is None else int(self.outlier_indices.shape[1])

    @property
    def group_size(self) -> int:
        return (self.in_features - self.n_outliers) // int(self.centroids.shape[0])

    def index(self, q: int, blocks: slice) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Indices and residual indices (or None), each (blocks, group_size), of group q; raises FileError."""
        k = self.centroids.shape[1]
        r = 0 if self.res_centroids is None else self.res_centroids.shape[1]
        index, res_index = self.indices[q, blocks], None
        if index.dtype == np.uint16:
            res_index = None if self.res_indices is None else self.res_indices[q, blocks]
        else:
            low = index_bits(k)
            values = unpack(index, self.group_size, low + (index_bits(r) if r else 0))
            index = values & np.uint32((1 << low) - 1)
            res_index = values >> np.uint32(low) if r else None
        check_indices(index, k, self.source)
        if res_index is not None:
            check_indices(res_index, r, self.source)
        return index, res_index

    def dequantize(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows start to stop of the weight, (rows, in_features); each operation is rounded to float32."""
        stop = self.out_features if stop is None else stop
        columns = []
        if self.outlier_indices is not None and self.outlier_centroids is not None:
            v0 = self.outlier_centroids.shape[1]
            blocks = slice(start // v0, -(-stop // v0))
            columns.append(
                _rows(self.outlier_centroids[self.outlier_indices[blocks]], start % v0, stop - start)
            )
        v = self.centroids.shape[2]
        blocks = slice(start // v, -(-stop // v))
        for q, codebook in enumerate(self.centroids):
            index, res_index = self.index(q, blocks)
            vectors = codebook[index]
            if self.res_centroids is not None and res_index is not None:
                vectors += self.res_centroids[q][res_index]
            columns.append(_rows(vectors, start % v, stop - start))
        permuted = np.concatenate(columns, axis=1)
        weight = permuted
        if self.perm is not None:
            weight = np.empty_like(permuted)
            weight[:, self.perm] = permuted
        if self.scale is not None and self.shift is not None:
            weight *= self.scale
            weight += self.shift
        if self.out_scale is not None and self.out_shift is not None:
            weight *= self.out_scale[start:stop, None]
            weight += self.out_shift[start:stop, None]
        return weight


def _rows(vectors: NDArray[np.float32], first: int, n_rows: int) -> NDArray[np.float32]:
    """Vectors (blocks, columns, v), which run along the output, as n_rows rows from row `first`."""
    blocks, columns, v = vectors.shape
    rows: NDArray[np.float32] = vectors.transpose(0, 2, 1).reshape(blocks * v, columns)
    return rows[first : first + n_rows]
