"""A codebook, with or without a residual one: trained on vectors, and what stands for a vector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vptq_quantizer.layers.kmeans import k_means, sample, weighted_means
from vptq_quantizer.layers.nearest import CentroidIndex, nearest

# With a residual, all sums of two centroids are tried where there are at most MOST_SUMS; else so many of a
# vector's nearest centroids, each with its best residual centroid.
MOST_SUMS = 4096
CANDIDATES = 8
CHUNK = 1 << 16  # vectors encoded at a time: bounds the memory of what is left of them, some 100 MB
JOINT_ROUNDS = 3  # in which centroids and residual centroids are fitted to each other in turn


@dataclass(frozen=True)
class Codebook:
    """centroids (k, v) and, where there is a residual, res_centroids (r, v): a vector is a sum of two."""

    centroids: Tensor
    res_centroids: Tensor | None = None

    @property
    def v(self) -> int:
        return self.centroids.shape[1]

    @cached_property
    def _index(self) -> CentroidIndex:
        return CentroidIndex(self.centroids)

    def _nearest(self, vectors: Tensor, n: int) -> Tensor:
        """The n nearest centroids (m, n) of vectors (m, length), by as many numbers as those have."""
        length = vectors.shape[1]
        if length < self.v:
            return nearest(vectors, self.centroids[:, :length], n)
        return self._index.nearest(vectors, n)

    @cached_property
    def _sums(self) -> CentroidIndex | None:
        """Of all pairs, (k * r, v), the residual centroids the inner; None where there are too many."""
        if self.res_centroids is None or len(self.centroids) * len(self.res_centroids) > MOST_SUMS:
            return None
        return CentroidIndex((self.centroids[:, None] + self.res_centroids).flatten(0, 1))

    def encode(self, vectors: Tensor) -> tuple[Tensor, Tensor | None]:
        """The pair of indices (m,), (m,) whose sum is nearest to each of vectors (m, length): of CANDIDATES.

        length may be less than v: the last vectors of a matrix may reach past its last row, and what they
        have there carries no weight.
        """
        if len(vectors) <= CHUNK:
            return self._encode(vectors)
        chunks = [self._encode(chunk) for chunk in torch.split(vectors, CHUNK)]
        residuals = [res_index for _, res_index in chunks if res_index is not None]
        return torch.cat([index for index, _ in chunks]), torch.cat(residuals) if residuals else None

    def _encode(self, vectors: Tensor) -> tuple[Tensor, Tensor | None]:
        length = vectors.shape[1]
        if self.res_centroids is None:
            return self._nearest(vectors, 1)[:, 0], None
        if self._sums is not None and length == self.v:
            pair = self._sums.nearest(vectors, 1)[:, 0]
            return pair // len(self.res_centroids), pair % len(self.res_centroids)
        centroids, res_centroids = self.centroids[:, :length], self.res_centroids[:, :length]
        candidates = self._nearest(vectors, min(CANDIDATES, len(centroids)))  # (m, CANDIDATES)
        left = vectors[:, None] - centroids[candidates]
        residuals = nearest(left.flatten(0, 1), res_centroids, 1).view(candidates.shape)
        errors = (left - res_centroids[residuals]).square().sum(2)
        best = errors.argmin(1, keepdim=True)
        return candidates.gather(1, best)[:, 0], residuals.gather(1, best)[:, 0]

    def decode(self, index: Tensor, res_index: Tensor | None) -> Tensor:
        """The vectors (..., v) of indices (...)."""
        vectors = torch.nn.functional.embedding(index, self.centroids)
        if self.res_centroids is not None and res_index is not None:
            vectors = vectors + torch.nn.functional.embedding(res_index, self.res_centroids)
        return vectors

    def rounded(self, dtype: torch.dtype) -> Codebook:
        """Itself in the values that `dtype` can hold, in float32."""
        res = None if self.res_centroids is None else self.res_centroids.to(dtype).float()
        return Codebook(self.centroids.to(dtype).float(), res)


def train(
    vectors: Tensor,
    weights: Tensor,
    k: int,
    r: int,
    generator: torch.Generator,
    show: Callable[[str], object] = lambda what: None,
) -> Codebook:
    """k centroids and r residual ones (0: none) for vectors (n, v) that count by weights (n,).

    k-means gives the centroids, k-means of what they leave the residual ones, and a few rounds fit both.
    show is told what is being done.
    """
    vectors, weights = sample(vectors, weights, generator)
    centroids = k_means(vectors, weights, k, generator, lambda at: show(f"k-means {at}"))
    if not r:
        return Codebook(centroids)
    left = vectors - centroids[nearest(vectors, centroids, 1)[:, 0]]
    res_centroids = k_means(left, weights, r, generator, lambda at: show(f"residual k-means {at}"))
    codebook = Codebook(centroids, res_centroids)
    for n in range(JOINT_ROUNDS):
        show(f"k-means, both codebooks {n + 1}/{JOINT_ROUNDS}")
        assert codebook.res_centroids is not None
        index, res_index = codebook.encode(vectors)
        assert res_index is not None
        centroids = weighted_means(
            vectors - codebook.res_centroids[res_index], weights, index, codebook.centroids
        )
        left = vectors - centroids[index]
        codebook = Codebook(centroids, weighted_means(left, weights, res_index, codebook.res_centroids))
    return codebook
