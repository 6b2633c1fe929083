"""Which centroid a vector has, chosen again while the whole model is trained.

Each weight has an offset: how far the training would have moved it from what it stands for, were it free. A
vector whose offset carries it nearer to another centroid may take that one; the offset is then what is left.
Codebooks so follow the loss, and not the proxy error that chose the indices first. The idea is PV-Tuning's
(arXiv 2405.14852, section 3.2): few vectors a step, those that gain most, instead of all of them a little.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vptq_quantizer.layers.codebook import Codebook
from vptq_quantizer.layers.nearest import nearest
from vptq_quantizer.layers.quantized_linear import QuantizedLinear, Segment
from vptq_quantizer.training.decode import segment_vectors

SHARE = 0.01  # of a matrix's vectors may change at a time
DECAY = 0.95  # of the means of squared gradients, a step
OFFSET_DTYPE = torch.float16  # offsets are in units of a codebook's spacing, far from its limits


@dataclass
class Offsets:
    """One matrix's offsets (in_features, out_features), as its columns stand, in units of `unit`.

    unit (1,): the layer's spacing when the training began. rows (in_features,), outs (out_features,): running
    means of squared gradients, whose product over their mean stands for each weight's own (Adafactor, arXiv
    1804.04235): a number a row instead of one a weight.
    """

    unit: Tensor
    values: Tensor
    rows: Tensor
    outs: Tensor

    @classmethod
    def none(cls, layer: QuantizedLinear) -> Offsets:
        c, unit = layer.config, spacing(layer)[None]
        values = unit.new_zeros(c.in_features, c.out_features, dtype=OFFSET_DTYPE)
        return cls(unit, values, unit.new_zeros(c.in_features), unit.new_zeros(c.out_features))

    def tensors(self) -> dict[str, Tensor]:
        return {"unit": self.unit, "values": self.values, "rows": self.rows, "outs": self.outs}

    def descend(self, gradient: Tensor, step: int, rate: float) -> None:
        """Moves all offsets against the gradient (in_features, out_features) at the columns.

        step: how many came before; rate: of a gradient of usual size, in units.
        """
        squares = gradient.square()
        self.rows.lerp_(squares.mean(1), 1 - DECAY)
        self.outs.lerp_(squares.mean(0), 1 - DECAY)
        mean = self.rows.mean()
        if not mean > 0:  # nothing to go by, as for a layer that no token reaches
            return
        bias = 1 - DECAY ** (step + 1)
        scale = (self.rows / mean).rsqrt()[:, None].clamp(max=1e3) * (self.outs / bias).rsqrt().clamp(
            max=1e30
        )
        # One gradient far above its row's moves its weight no further than a few usual ones.
        moved = (gradient * scale).nan_to_num_(0.0).clamp_(-3, 3)
        self.values = self.values.float().sub_(moved, alpha=rate).to(OFFSET_DTYPE)


@torch.no_grad()
def spacing(layer: QuantizedLinear) -> Tensor:
    """How far a weight is from half way to another centroid: the root mean square, as layer.columns() count.

    It goes down with the bits, and so must what a step of training moves.
    """
    squares = [
        _half_way(_last(segment.codebook))[_last_index(segment)].flatten() for segment in layer.segments
    ]
    lengths = sum(len(part) * s.codebook.v for part, s in zip(squares, layer.segments, strict=True))
    return (torch.stack([part.sum() for part in squares]).sum() / lengths).sqrt()


@torch.no_grad()
def update_indices(layer: QuantizedLinear, offsets: Offsets) -> int:
    """Gives at most SHARE of the layer's vectors another centroid (in place); returns how many."""
    values = offsets.values.float() * offsets.unit
    changed = sum(_update(segment, values) for segment in layer.segments)
    if changed:
        offsets.values = (values / offsets.unit).to(OFFSET_DTYPE)
    return changed


def _update(segment: Segment, offsets: Tensor) -> int:
    """One segment's indices, given the layer's offsets (in_features, out_features): both in place."""
    width, n_blocks = segment.index.shape
    book = replace(segment.codebook)  # without what it remembers of centroids that have moved since
    offset = segment_vectors(segment, offsets).reshape(-1, book.v)
    length = offset.square().sum(1)
    # A vector is nearest to its own centroid at least until half way to the next one.
    reach = length / _half_way(_last(book))[_last_index(segment).flatten()]
    n_most = max(1, int(SHARE * len(reach)))
    candidates = (reach > 1).nonzero()[:, 0]
    if len(candidates) > 4 * n_most:  # those furthest beyond half way: a search costs more than a comparison
        candidates = candidates[reach[candidates].topk(4 * n_most).indices]
    if not len(candidates):
        return 0
    old, old_res = _picked(segment, candidates)
    before = book.decode(old, old_res)
    wanted = before + offset[candidates]
    new, new_res = book.encode(wanted)
    left = wanted - book.decode(new, new_res)
    gain = length[candidates] - left.square().sum(1)
    same = new == old
    if old_res is not None and new_res is not None:
        same &= new_res == old_res
    gain[same] = 0  # but for rounding
    best = gain.topk(min(n_most, len(gain))).indices
    best = best[gain[best] > 0]
    chosen = candidates[best]
    segment.index.view(-1)[chosen] = new[best]
    if segment.res_index is not None and new_res is not None:
        segment.res_index.view(-1)[chosen] = new_res[best]
    offset[chosen] = left[best]
    part = offsets[segment.start : segment.start + width]
    part.copy_(offset.view(width, n_blocks * book.v)[:, : part.shape[1]])
    return len(chosen)


def _picked(segment: Segment, places: Tensor) -> tuple[Tensor, Tensor | None]:
    res_index = None if segment.res_index is None else segment.res_index.flatten()[places]
    return segment.index.flatten()[places], res_index


def _last(book: Codebook) -> Tensor:
    """The codebook that decides how near another vector is: the residual one where there is one."""
    return book.centroids if book.res_centroids is None else book.res_centroids


def _last_index(segment: Segment) -> Tensor:
    return segment.index if segment.res_index is None else segment.res_index


def _half_way(centroids: Tensor) -> Tensor:
    """The square of half the distance from each of centroids (k, v) to the one nearest to it: (k,)."""
    other = nearest(centroids, centroids, 2)
    distances = (centroids[:, None] - centroids[other]).square().sum(2)
    return distances.max(1).values / 4 if len(centroids) > 1 else distances.new_full((1,), torch.inf)
