"""How large an error each configuration leaves in a matrix of a kind: measured with small codebooks.

Codebooks of the sizes MEASURED are trained on a sample of the matrix's own vectors, weighed as in the run.
In log2 of both, the error over the size of a codebook is nearly a straight line. At high rate its slope is
-2 / v (Zador; Gersho and Gray, "Vector Quantization and Signal Compression", chapter 5); at low rate it is
flatter. So beyond the largest codebook that was measured it goes on with the mean of the last measured slope
and that. A residual codebook of r on top of k is worth less than one codebook of k r: by how much, for each
bit of r, is measured with one pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log2

import numpy as np
import torch
from torch import Tensor
from vptq_converter.layer import LayerConfig

from vptq_quantizer.layers.codebook import Codebook, train
from vptq_quantizer.planning.plan import VECTOR_LENS

MEASURED = (4, 16, 64, 256)  # centroids
RESIDUAL = (64, 16)  # centroids and residual centroids, or as many as there are vectors for
SAMPLE = 4096  # vectors
VECTORS_A_CENTROID = 8  # at least, in a sample and in a matrix: with fewer a codebook learns them by heart


@dataclass(frozen=True)
class Curve:
    """Of one vector length: log2 of the relative error at log2 k = `sizes`; penalty: for a bit of r."""

    v: int
    sizes: tuple[float, ...]
    errors: tuple[float, ...]
    penalty: float

    def error(self, k: int, r: int) -> float:
        """The relative squared error of k centroids and r residual ones (0: none)."""
        bits = log2(k) + (log2(r) if r else 0)
        if bits <= self.sizes[-1]:
            value = float(np.interp(bits, self.sizes, self.errors))
        else:
            last = (self.errors[-1] - self.errors[-2]) / (self.sizes[-1] - self.sizes[-2])
            value = self.errors[-1] + (bits - self.sizes[-1]) * (last - 2 / self.v) / 2
        return float(2 ** (value + (self.penalty * log2(r) if r else 0)))


@dataclass(frozen=True)
class Distortion:
    """The curves of one kind of matrix, by (v, normalised)."""

    curves: Mapping[tuple[int, bool], Curve]

    def error(self, config: LayerConfig) -> float | None:
        """What is left, relative to the weight itself, as the second-order pass weighs columns; None where it
        cannot be told."""
        curve = self.curves.get((config.v, config.norm_dim is not None))
        return None if curve is None else curve.error(config.k, config.r)


@torch.no_grad()
def measure_distortion(
    weight: Tensor,
    cost: Tensor,
    diagonal: Tensor,
    generator: torch.Generator,
    show: Callable[[str], object] = lambda what: None,
) -> Distortion:
    """Of a weight (out_features, in_features); cost, diagonal (in_features,): sensitivity.py's Columns."""
    whole = float((weight.square() * cost).sum())
    curves = {}
    for normalised in (True, False):
        columns, scale = weight.T.contiguous(), torch.ones(len(cost), device=weight.device)
        if normalised:
            scale = weight.std(0, correction=0).clamp_min(1e-4)
            columns = (columns - weight.mean(0)[:, None]) / scale[:, None]
        for v in VECTOR_LENS:
            show(f"v {v}, {'normalised' if normalised else 'as they are'}")
            sample = _Sample.draw(columns, v, cost * scale.square(), diagonal * scale.square(), generator)
            curve = sample and sample.curve(whole, generator)
            if curve:
                curves[v, normalised] = curve
    return Distortion(curves)


@dataclass(frozen=True)
class _Sample:
    """Vectors (n, v), what an error in each costs (n,), how much each trains (n,); of n_all in the matrix."""

    vectors: Tensor
    cost: Tensor
    weights: Tensor
    n_all: int

    @classmethod
    def draw(
        cls, columns: Tensor, v: int, cost: Tensor, weights: Tensor, generator: torch.Generator
    ) -> _Sample | None:
        """From columns (in_features, out_features); None where they are shorter than a vector."""
        n_blocks = columns.shape[1] // v
        n_all = n_blocks * len(columns)
        if not n_all:
            return None
        chosen = torch.randperm(n_all, generator=generator)[:SAMPLE].to(columns.device)
        column, block = chosen // n_blocks, chosen % n_blocks
        vectors = columns[column[:, None], block[:, None] * v + torch.arange(v, device=columns.device)]
        return cls(vectors, cost[column], weights[column], n_all)

    def curve(self, whole: float, generator: torch.Generator) -> Curve | None:
        """None with too few vectors for two sizes. whole: the cost of losing the weight altogether."""
        sizes = [k for k in MEASURED if k * VECTORS_A_CENTROID <= len(self.vectors)]
        if len(sizes) < 2:
            return None
        errors = [self._error(k, 0, generator) / whole for k in sizes]
        errors = [float(log2(max(error, 1e-12))) for error in errors]
        curve = Curve(self.vectors.shape[1], tuple(map(log2, sizes)), tuple(errors), 0.0)
        k, r = RESIDUAL if len(sizes) == len(MEASURED) else (sizes[-1], sizes[0])
        left = log2(max(self._error(k, r, generator) / whole, 1e-12)) - log2(max(curve.error(k, r), 1e-12))
        return Curve(curve.v, curve.sizes, curve.errors, max(0.0, left / log2(r)))

    def _error(self, k: int, r: int, generator: torch.Generator) -> float:
        """Of the whole matrix. A codebook errs less on vectors that it was trained on, by some 1 - k / n: put
        right."""
        codebook: Codebook = train(self.vectors, self.weights, k, r, generator)
        squares = (self.vectors - codebook.decode(*codebook.encode(self.vectors))).square().sum(1)
        n = len(self.vectors)
        return float((squares * self.cost).sum()) * self.n_all / n / (1 - (k + r) / n)
