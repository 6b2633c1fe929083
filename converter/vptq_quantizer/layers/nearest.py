"""The centroids nearest to vectors: by all distances, or, of many on the CPU, faiss's inverted file."""

from __future__ import annotations

import faiss
import numpy as np
import torch
from torch import Tensor

MOST_DISTANCES = 1 << 28  # held at a time on a GPU: 1 GiB
CACHED_DISTANCES = 1 << 17  # on a CPU, where they do not leave a core's cache: 512 KiB
# From so many centroids on they are searched through an inverted file on the CPU: sqrt(k) lists of centroids
# that lie together, of which one in PROBED is looked into. Of 65536 normally distributed centroids of length
# 8 that finds the nearest in all of 1024 cases and takes an eighth of the time of a full search; the 8
# nearest are 0.1 % further away.
MANY_CENTROIDS = 8192
PROBED = 16


class CentroidIndex:
    """Searches one codebook (k, v), again and again."""

    def __init__(self, centroids: Tensor) -> None:
        self.centroids = centroids
        self.lengths = (centroids * centroids).sum(1)
        self.inverted = None
        if not centroids.is_cuda and len(centroids) >= MANY_CENTROIDS:
            self.inverted = inverted_file(*centroids.shape)
            self.inverted.train(centroids.detach().numpy())
            self.inverted.add(centroids.detach().numpy())

    def nearest(self, vectors: Tensor, n: int) -> Tensor:
        """The n nearest centroids of each of vectors (m, v), the nearest first: (m, n)."""
        if self.inverted is None:
            return _nearest(vectors, self.centroids, self.lengths, n)
        found = torch.from_numpy(self.inverted.search(vectors.contiguous().numpy(), n)[1])
        short = (found < 0).any(1)  # the lists that were looked into had less than n
        if short.any():
            found[short] = _nearest(vectors[short], self.centroids, self.lengths, n)
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
    return _nearest(vectors, centroids, (centroids * centroids).sum(1), n)


def _nearest(vectors: Tensor, centroids: Tensor, lengths: Tensor, n: int) -> Tensor:
    """lengths (k,): the squares of the centroids'. Of vectors that are not finite, some centroid."""
    most = MOST_DISTANCES if vectors.is_cuda else CACHED_DISTANCES
    step = max(1, most // len(centroids))
    chunks = (
        _least(torch.addmm(lengths, chunk, centroids.T, alpha=-2), n) for chunk in torch.split(vectors, step)
    )
    return torch.cat(list(chunks)) if len(vectors) > step else next(chunks)


def _least(distances: Tensor, n: int) -> Tensor:
    """The columns (m, n) of the n least of each row of distances (m, k), which are overwritten."""
    if distances.is_cuda:
        return distances.argmin(1, keepdim=True) if n == 1 else distances.topk(n, largest=False).indices
    # NumPy's argmin is vectorised, PyTorch's is not: it takes ten times as long.
    values = distances.numpy()
    found = np.empty((len(values), n), np.int64)
    for i in range(n):
        found[:, i] = values.argmin(1)
        if i + 1 < n:
            np.put_along_axis(values, found[:, i, None], np.inf, 1)
    return torch.from_numpy(found)
