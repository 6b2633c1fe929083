"""Weighted k-means: of many centroids on a CPU by faiss and an inverted file, else by torch."""

from __future__ import annotations

from collections.abc import Callable

import faiss
import torch
from torch import Tensor

from vptq_quantizer.layers.nearest import MANY_CENTROIDS, inverted_file, nearest

ITERATIONS = 25
# At most so many vectors train a codebook, drawn at random: more cost time and move the centroids little.
MOST_VECTORS = 1 << 20


def sample(vectors: Tensor, weights: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """At most MOST_VECTORS of the vectors (n, v), and their weights (n,)."""
    if len(vectors) <= MOST_VECTORS:
        return vectors, weights
    chosen = torch.randperm(len(vectors), generator=generator)[:MOST_VECTORS].to(vectors.device)
    return vectors[chosen], weights[chosen]


def k_means(
    vectors: Tensor,
    weights: Tensor,
    k: int,
    generator: torch.Generator,
    show: Callable[[str], object] = lambda at: None,
) -> Tensor:
    """k centroids (k, v) that make the weighted squared distance of vectors (n, v) to the nearest small.

    weights (n,) are not negative. The first centroids are vectors drawn with probability in proportion to
    their weight; a centroid that loses all its vectors is moved to where there are many. show is told
    which iteration it is at.
    """
    weights = weights / weights.mean().clamp_min(torch.finfo(torch.float32).tiny)
    # A vector of no weight is drawn when the others are used up: with few vectors, or dead inputs.
    first = _draw(weights.double().cpu() + 1e-12, k, generator).to(vectors.device)
    if vectors.is_cuda or k < MANY_CENTROIDS:
        return lloyd(vectors, weights, vectors[first].clone(), show)
    seed = int(torch.randint(2**31 - 1, (1,), generator=generator))
    clustering = faiss.Clustering(vectors.shape[1], k)
    clustering.niter = 1  # at a time: it goes on from its centroids
    clustering.seed = seed
    clustering.min_points_per_centroid = 1  # no advice
    clustering.max_points_per_centroid = len(vectors)  # no further sampling
    clustering.update_index = True  # an inverted file is made anew with the centroids
    faiss.copy_array_to_vector(vectors[first].numpy().ravel(), clustering.centroids)
    index = inverted_file(k, vectors.shape[1])
    for n in range(ITERATIONS):
        show(f"{n + 1}/{ITERATIONS}")
        clustering.train(vectors.numpy(), index, weights.numpy())
    return torch.from_numpy(faiss.vector_to_array(clustering.centroids).reshape(k, -1))


def _draw(chances: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k different numbers, each with probability in proportion to its chance (the exponential race)."""
    times = torch.empty_like(chances).exponential_(generator=generator) / chances
    return times.topk(k, largest=False).indices


def lloyd(
    vectors: Tensor, weights: Tensor, centroids: Tensor, show: Callable[[str], object] = lambda at: None
) -> Tensor:
    """k-means from these centroids (k, v) on, as torch does it on any device; ends where nothing changes."""
    before = None
    for n in range(ITERATIONS):
        show(f"{n + 1}/{ITERATIONS}")
        code = nearest(vectors, centroids, 1)[:, 0]
        if before is not None and torch.equal(code, before):
            break
        before = code
        total = torch.bincount(code, weights, len(centroids))
        # An empty centroid goes beside one of the greatest weight: the next round divides its vectors.
        empty = (total == 0).nonzero()[:, 0]
        centroids = weighted_means(vectors, weights, code, centroids)
        heaviest = total.topk(len(empty)).indices
        centroids[empty] = centroids[heaviest] * (1 + 1e-3)
    return centroids


def weighted_means(vectors: Tensor, weights: Tensor, code: Tensor, previous: Tensor) -> Tensor:
    """The weighted mean (k, v) of the vectors (n, v) of each code (n,); previous (k, v) where it has none."""
    weights = weights.double()
    total = torch.bincount(code, weights, len(previous))
    means = sums(vectors * weights[:, None], code, len(previous)) / total[:, None]
    return torch.where(total[:, None] > 0, means.to(previous.dtype), previous)


def sums(vectors: Tensor, code: Tensor, k: int) -> Tensor:
    """The sum (k, v) of the vectors (n, v) of each code (n,)."""
    return torch.stack([torch.bincount(code, column, k) for column in vectors.T.contiguous()], 1)
