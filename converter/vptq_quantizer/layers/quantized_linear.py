"""A quantised linear layer in torch: what it stands for, and its tensors in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from vptq_converter.layer import LayerConfig, index_bits, pack, unpack

from vptq_quantizer.layers.codebook import Codebook

NORM_TENSORS = ("weight_scale", "weight_bias")


@dataclass
class Segment:
    """The columns from `start` that share a codebook: the outliers, or a group.

    index, res_index (width, n_blocks): a vector for each column and each block of v outputs.
    """

    start: int
    codebook: Codebook
    index: Tensor
    res_index: Tensor | None

    @classmethod
    def encode(cls, columns: Tensor, start: int, codebook: Codebook) -> Segment:
        """The nearest centroids of columns (width, out_features)."""
        index, res_index = _encode(codebook, columns)
        return cls(start, codebook, index, res_index)

    def encode_column(self, j: int, column: Tensor) -> Tensor:
        """Chooses column j's indices (of the layer's) for values (out_features,); returns what they mean."""
        index, res_index = _encode(self.codebook, column[None])
        self.index[j - self.start] = index[0]
        if self.res_index is not None and res_index is not None:
            self.res_index[j - self.start] = res_index[0]
            return self.codebook.decode(index[0], res_index[0]).flatten()[: len(column)]
        return self.codebook.decode(index[0], None).flatten()[: len(column)]

    def decode(self, out_features: int) -> Tensor:
        """The columns (width, out_features)."""
        return self.codebook.decode(self.index, self.res_index).flatten(1)[:, :out_features]


def _encode(codebook: Codebook, columns: Tensor) -> tuple[Tensor, Tensor | None]:
    """Indices (width, n_blocks) of columns (width, out_features); a last vector may be shorter."""
    width, out_features = columns.shape
    n_whole = out_features // codebook.v
    whole = columns[:, : n_whole * codebook.v].reshape(width * n_whole, codebook.v)
    parts = [codebook.encode(whole)]
    if out_features % codebook.v:
        parts.append(codebook.encode(columns[:, n_whole * codebook.v :]))
    elif width == 1:
        index, res_index = parts[0]
        return index[None], None if res_index is None else res_index[None]
    index = torch.cat([index.view(width, -1) for index, _ in parts], 1)
    residual = [res_index.view(width, -1) for _, res_index in parts if res_index is not None]
    return index, torch.cat(residual, 1) if residual else None


@dataclass
class QuantizedLinear:
    """Segments (outliers first) in the order of `perm` (in_features,): permuted column -> input column.

    scale, shift (in_features,) stand in the order of the input columns; None: not normalised.
    """

    config: LayerConfig
    segments: list[Segment]
    perm: Tensor
    scale: Tensor | None
    shift: Tensor | None

    @classmethod
    def from_tensors(cls, config: LayerConfig, tensors: Mapping[str, Tensor]) -> QuantizedLinear:
        """The layer whose `tensors` these are; its columns stand in the order in which they are stored."""
        c = config

        def book(name: str, size: int, v: int) -> Tensor:
            return tensors[name].float().view(-1, size, v)

        segments = []
        if c.n0:
            index = torch.from_numpy(tensors["outlier_indices"][0].numpy().view(np.uint16).astype(np.int64))
            outliers = Codebook(book("outlier_centroids.weight", c.k0, c.v0)[0])
            segments.append(Segment(0, outliers, index.T.contiguous(), None))
        words = unpack(tensors["indices"].numpy(), c.group_size, c.bits)
        rows = torch.from_numpy(words.astype(np.int64))  # (g, n_blocks, group_size)
        for q in range(c.g):
            residual = book("res_centroids.weight", c.r, c.v)[q] if c.r else None
            codebook = Codebook(book("centroids.weight", c.k, c.v)[q], residual)
            index = (rows[q] & (1 << index_bits(c.k)) - 1).T.contiguous()
            res_index = (rows[q] >> index_bits(c.k)).T.contiguous() if c.r else None
            segments.append(Segment(c.n0 + q * c.group_size, codebook, index, res_index))
        perm = torch.arange(c.in_features)
        if c.perm:
            perm = torch.from_numpy(tensors["perm"].numpy().view(np.uint16).astype(np.int64))
        scale, shift = (tensors[name].float() if name in tensors else None for name in NORM_TENSORS)
        return cls(config, segments, perm, scale, shift)

    def columns(self) -> Tensor:
        """(in_features, out_features): normalised, in permuted order."""
        return torch.cat([segment.decode(self.config.out_features) for segment in self.segments])

    def weight(self) -> Tensor:
        """The weight (out_features, in_features) that the layer stands for, in float32."""
        weight = self.columns()[self.perm.argsort()]
        if self.scale is not None and self.shift is not None:
            weight = weight * self.scale[:, None] + self.shift[:, None]
        return weight.T

    def parameters_by_name(self) -> dict[str, Tensor]:
        """All but the indices: codebooks by segment, scale, shift; not copies."""
        found: dict[str, Tensor] = {}
        for n, segment in enumerate(self.segments):
            found[f"{n}.centroids"] = segment.codebook.centroids
            if segment.codebook.res_centroids is not None:
                found[f"{n}.res_centroids"] = segment.codebook.res_centroids
        if self.scale is not None and self.shift is not None:
            found |= {"scale": self.scale, "shift": self.shift}
        return found

    def with_parameters(self, parameters: Mapping[str, Tensor]) -> QuantizedLinear:
        """The layer with the same indices (not copies) and these parameters."""
        segments = [
            replace(s, codebook=Codebook(parameters[f"{n}.centroids"], parameters.get(f"{n}.res_centroids")))
            for n, s in enumerate(self.segments)
        ]
        return replace(self, segments=segments, scale=parameters.get("scale"), shift=parameters.get("shift"))

    def to(self, device: torch.device) -> QuantizedLinear:
        """The layer on that device."""
        moved = self.with_parameters(
            {name: value.to(device) for name, value in self.parameters_by_name().items()}
        )
        moved.perm = self.perm.to(device)
        for segment in moved.segments:
            segment.index = segment.index.to(device)
            segment.res_index = None if segment.res_index is None else segment.res_index.to(device)
        return moved

    def with_own_indices(self) -> QuantizedLinear:
        """The layer with copies of its indices, so that they can be chosen again."""
        copies = [
            replace(s, index=s.index.clone(), res_index=None if s.res_index is None else s.res_index.clone())
            for s in self.segments
        ]
        return replace(self, segments=copies)

    def encode_column(self, j: int, column: Tensor) -> Tensor:
        """Chooses permuted column j's indices for values (out_features,); returns what they mean."""
        c = self.config
        place = 0 if j < c.n0 else (j - c.n0) // c.group_size + (c.n0 > 0)
        return self.segments[place].encode_column(j, column)

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The checkpoint's tensors by their names under the module path: docs/file-format.md."""
        c = self.config
        groups = self.segments[1:] if c.n0 else self.segments
        rows = torch.stack([segment.index.T for segment in groups]).cpu()  # (g, n_blocks, group_size)
        if c.r:
            residual = torch.stack([s.res_index.T for s in groups if s.res_index is not None]).cpu()
            rows = rows | residual << index_bits(c.k)
        if not c.perm:  # one codebook for all columns, so they can stand in the order of the input
            rows = rows[:, :, self.perm.argsort().cpu()]
        tensors = {
            "indices": torch.from_numpy(pack(rows.numpy().astype(np.uint64), c.bits)),
            "centroids.weight": torch.stack([segment.codebook.centroids.flatten() for segment in groups]),
        }
        if c.r:
            books = [s.codebook.res_centroids for s in groups if s.codebook.res_centroids is not None]
            tensors["res_centroids.weight"] = torch.stack([book.flatten() for book in books])
        if c.n0:
            outliers = self.segments[0]
            tensors["outlier_indices"] = _uint16_bits(outliers.index.T[None])
            tensors["outlier_centroids.weight"] = outliers.codebook.centroids.flatten()[None]
        if c.perm:
            tensors["perm"] = _uint16_bits(self.perm)
        if self.scale is not None and self.shift is not None:
            tensors |= {"weight_scale": self.scale, "weight_bias": self.shift}
        return {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }


def _uint16_bits(values: Tensor) -> Tensor:
    """As int16 with the same bits."""
    return torch.from_numpy(values.cpu().numpy().astype(np.uint16).view(np.int16))


def decoded(configs: Mapping[str, LayerConfig], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that linear layers stand for, by their paths; the names of `tensors` begin with these."""
    weights = {}
    for path, config in configs.items():
        fields = {
            name.removeprefix(f"{path}."): t for name, t in tensors.items() if name.startswith(f"{path}.")
        }
        weights[path] = QuantizedLinear.from_tensors(config, fields).weight()
    return weights
