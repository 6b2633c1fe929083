"""The gradient of a quantised layer's weight, brought to what the weight is decoded from."""

from __future__ import annotations

import torch
from torch import Tensor

from vptq_quantizer.layers.quantized_linear import QuantizedLinear, Segment


def column_gradient(layer: QuantizedLinear, gradient: Tensor) -> Tensor:
    """The gradient (in_features, out_features) at layer.columns(), of that at the weight, in float32.

    gradient (out_features, in_features), of any floating type.
    """
    columns = gradient.T[layer.perm].float()
    return columns if layer.scale is None else columns * layer.scale[layer.perm, None]


def parameter_gradients(layer: QuantizedLinear, gradient: Tensor, columns: Tensor) -> dict[str, Tensor]:
    """The gradients at layer.parameters_by_name(), of that at the weight and its column_gradient.

    Autograd's own, through the gather that decodes, take four times as long and keep the weight's gradient
    in float32 for each layer.
    """
    found: dict[str, Tensor] = {}
    for n, segment in enumerate(layer.segments):
        vectors = segment_vectors(segment, columns)
        book = segment.codebook
        found[f"{n}.centroids"] = _sums(vectors, segment.index, len(book.centroids))
        if book.res_centroids is not None and segment.res_index is not None:
            found[f"{n}.res_centroids"] = _sums(vectors, segment.res_index, len(book.res_centroids))
    if layer.scale is not None:
        found["scale"] = torch.empty_like(layer.scale)
        found["scale"][layer.perm] = (gradient.T[layer.perm].float() * layer.columns()).sum(1)
        found["shift"] = gradient.float().sum(0)
    return found


def segment_vectors(segment: Segment, columns: Tensor) -> Tensor:
    """A segment's part of columns (in_features, out_features) as vectors (width, n_blocks, v).

    Where the last vectors reach past the last row they are filled with zeros.
    """
    width, n_blocks = segment.index.shape
    v = segment.codebook.v
    part = columns[segment.start : segment.start + width]
    missing = n_blocks * v - part.shape[1]
    return torch.nn.functional.pad(part, (0, missing)).view(width, n_blocks, v)


def _sums(vectors: Tensor, index: Tensor, k: int) -> Tensor:
    """The sums (k, v) of the vectors (..., v) that share an index (...)."""
    sums = vectors.new_zeros(k, vectors.shape[-1])
    return sums.index_add_(0, index.flatten(), vectors.flatten(0, -2))
