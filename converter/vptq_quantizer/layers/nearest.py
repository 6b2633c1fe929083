"""The centroids nearest to vectors: faiss on the CPU, torch on a GPU."""

from __future__ import annotations

import faiss
import torch
from torch import Tensor

MOST_DISTANCES = 1 << 28  # held at a time on a GPU: 1 GiB
# From so many centroids on they are searched through an inverted file on the CPU: sqrt(k) lists of centroids
# that lie together, of which one in PROBED is looked into. Of 65536 normally distributed centroids of length
# 8 that finds the nearest in all of 1024 cases and takes an eighth of the time of a full search; the 8
# nearest are 0.1 % further away.
MANY_CENTROIDS = 4096
PROBED = 16


class CentroidIndex:
    """Searches one codebook (k, v), again and again."""

    def __init__(self, centroids: Tensor) -> None:
        self.centroids = centroids
        self.inverted = None
        if not centroids.is_cuda and len(centroids) >= MANY_CENTROIDS:
            self.inverted = inverted_file(*centroids.shape)
            self.inverted.train(centroids.detach().numpy())
            self.inverted.add(centroids.detach().numpy())

    def nearest(self, vectors: Tensor, n: int) -> Tensor:
        """The n nearest centroids of each of vectors (m, v), the nearest first: (m, n)."""
        if self.inverted is None:
            return nearest(vectors, self.centroids, n)
        found = torch.from_numpy(self.inverted.search(vectors.contiguous().numpy(), n)[1])
        short = (found < 0).any(1)  # the lists that were looked into had less than n
        if short.any():
            found[short] = nearest(vectors[short], self.centroids, n)
        return found


def inverted_file(k: int, v: int) -> faiss.Index:
    """An empty index for k centroids (k, v)."""
    n_lists = int(k**0.5)
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(v), v, n_lists)
    index.nprobe = n_lists // PROBED
    index.cp.max_points_per_centroid = k  # all centroids train the lists
    return index


def nearest(vectors: Tensor, centroids: Tensor, n: int) -> Tensor:
    """The n nearest of centroids (k, v) to each of vectors (m, v), the nearest first: (m, n)."""
    if not vectors.is_cuda:
        _, indices = faiss.knn(vectors.contiguous().numpy(), centroids.contiguous().numpy(), n)
        return torch.from_numpy(indices).clamp_(min=0)  # -1: to what is not finite, none is near
    lengths = (centroids * centroids).sum(1)
    step = max(1, MOST_DISTANCES // len(centroids))
    found = []
    for start in range(0, len(vectors), step):
        distances = torch.addmm(lengths, vectors[start : start + step], centroids.T, alpha=-2)
        best = distances.argmin(1, keepdim=True) if n == 1 else distances.topk(n, largest=False).indices
        found.append(best)
    return torch.cat(found)
