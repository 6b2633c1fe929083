"""k-means and codebooks: weights count, seeds decide, sums of two centroids are chosen together."""

import pytest
import torch
from torch import Tensor
from vptq_quantizer.layers import kmeans
from vptq_quantizer.layers.codebook import Codebook, train
from vptq_quantizer.layers.kmeans import k_means
from vptq_quantizer.layers.nearest import MANY_CENTROIDS, CentroidIndex, nearest


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def error(vectors: Tensor, weights: Tensor, codebook: Codebook) -> float:
    left = (vectors - codebook.decode(*codebook.encode(vectors))).square().sum(1)
    return float((left * weights).sum() / (vectors.square().sum(1) * weights).sum())


def test_nearest_are_the_nearest() -> None:
    vectors, centroids = random(50, 3), random(20, 3, seed=1)
    distances = torch.cdist(vectors.double(), centroids.double())
    assert torch.equal(nearest(vectors, centroids, 4), distances.argsort(1)[:, :4])


@pytest.mark.parametrize("k", [8, MANY_CENTROIDS])
def test_of_what_is_not_finite_some_centroid_is_found(k: int) -> None:
    """So that a hopeless attempt ends, and is not kept."""
    found = CentroidIndex(random(k, 2)).nearest(torch.tensor([[torch.nan, 0.0], [0.0, torch.inf]]), 2)
    assert found.min() >= 0 and found.max() < k


def test_of_many_centroids_nearly_the_nearest_are_found() -> None:
    vectors, centroids = random(300, 4), random(MANY_CENTROIDS, 4, seed=1)
    best, found = nearest(vectors, centroids, 2), CentroidIndex(centroids).nearest(vectors, 2)
    assert (found[:, 0] == best[:, 0]).double().mean() > 0.9
    distances = [(vectors - centroids[indices[:, 1]]).norm(dim=1).mean() for indices in (found, best)]
    assert distances[0] < 1.02 * distances[1]


def test_centroids_that_are_all_alike() -> None:
    """They lie in one list, and the others are empty."""
    centroids = torch.ones(MANY_CENTROIDS, 2)
    centroids[7] = -1
    found = CentroidIndex(centroids).nearest(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), 3)
    assert found.min() >= 0 and found[0, 0] == 7


def test_many_centroids_are_trained() -> None:
    vectors, weights = random(2 * MANY_CENTROIDS, 4), torch.ones(2 * MANY_CENTROIDS)
    codebook = train(vectors, weights, MANY_CENTROIDS, 0, generator())
    assert error(vectors, weights, codebook) < 0.05


def test_clusters_are_found() -> None:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    vectors = centres.repeat_interleave(100, 0) + 0.1 * random(300, 2)
    centroids = k_means(vectors, torch.ones(300), 3, generator())
    assert (torch.cdist(centres, centroids).min(1).values < 0.1).all()


def test_weights_decide_where_centroids_go() -> None:
    vectors = random(2000, 2)
    weights = torch.where(vectors[:, 0] > 0, 100.0, 1.0)
    centroids = k_means(vectors, weights, 16, generator())
    heavy, light = vectors[:, 0] > 0.2, vectors[:, 0] < -0.2
    distance = torch.cdist(vectors, centroids).min(1).values
    assert distance[heavy].mean() < 0.7 * distance[light].mean()
    plain = k_means(vectors, torch.ones(2000), 16, generator())
    distance = torch.cdist(vectors, plain).min(1).values
    assert distance[heavy].mean() > 0.8 * distance[light].mean()


def test_a_vector_without_weight_moves_nothing() -> None:
    vectors, weights = random(200, 2), torch.ones(200)
    vectors[0], weights[0] = 1e4, 0
    assert k_means(vectors, weights, 8, generator()).abs().max() < 10


def test_as_many_centroids_as_vectors() -> None:
    vectors = random(32, 4)
    codebook = train(vectors, torch.ones(32), 32, 0, generator())
    assert error(vectors, torch.ones(32), codebook) < 1e-10


@pytest.mark.parametrize("r", [0, 16])
def test_same_seed_same_codebook(r: int) -> None:
    vectors, weights = random(800, 4), random(800, seed=1).exp()
    first, second = (train(vectors, weights, 32, r, generator()) for _ in range(2))
    other = train(vectors, weights, 32, r, torch.Generator().manual_seed(8))
    assert torch.equal(first.centroids, second.centroids)
    assert not torch.equal(first.centroids, other.centroids)
    if r:
        assert first.res_centroids is not None and second.res_centroids is not None
        assert torch.equal(first.res_centroids, second.res_centroids)


def test_more_centroids_are_closer() -> None:
    vectors, weights = random(3000, 4), random(3000, seed=1).exp()
    errors = [
        error(vectors, weights, train(vectors, weights, *k, generator()))
        for k in ((32, 0), (32, 4), (32, 32))
    ]
    assert errors[2] < 0.6 * errors[1] < 0.6 * 0.9 * errors[0]


def test_pairs_are_chosen_together() -> None:
    """(1, 0) is nearer to 0.9 than (0, 1) is, but 0.9 = 0 + 0.9 exactly."""
    codebook = Codebook(torch.tensor([[1.0], [0.0], [5.0]]), torch.tensor([[0.9], [0.0]]))
    index, res_index = codebook.encode(torch.tensor([[0.9]]))
    assert res_index is not None
    assert (index.item(), res_index.item()) == (1, 0)


def test_pairs_are_the_best_of_all_where_all_centroids_are_tried() -> None:
    codebook = Codebook(random(8, 3, seed=1), random(5, 3, seed=2))
    assert codebook.res_centroids is not None
    vectors = random(100, 3)
    index, res_index = codebook.encode(vectors)
    sums = (codebook.centroids[:, None] + codebook.res_centroids).flatten(0, 1)
    best = torch.cdist(vectors.double(), sums.double()).min(1).values
    found = (vectors - codebook.decode(index, res_index)).double().norm(dim=1)
    torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-6)


def test_a_short_vector_is_compared_by_what_it_has() -> None:
    codebook = Codebook(torch.tensor([[1.0, 100.0], [1.2, 0.0]]))
    index, _ = codebook.encode(torch.tensor([[1.05]]))
    assert index.item() == 0


def test_many_vectors_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "MOST_VECTORS", 100)
    vectors, weights = random(500, 2), torch.ones(500)
    chosen, _ = kmeans.sample(vectors, weights, generator())
    assert chosen.shape == (100, 2)
    assert len({tuple(row) for row in chosen.tolist()}) == 100


def test_the_gpus_k_means_is_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch rounds, run on the CPU."""
    vectors, weights = random(3000, 4), random(3000, seed=1).exp()
    by_faiss = Codebook(k_means(vectors, weights, 64, generator()))
    by_torch = Codebook(kmeans.lloyd(vectors, weights, vectors[:64].clone()))
    assert error(vectors, weights, by_torch) < 1.1 * error(vectors, weights, by_faiss)


def test_the_gpus_k_means_leaves_no_centroid_empty() -> None:
    vectors = random(400, 2)
    far = torch.cat([vectors[:8], torch.full((8, 2), 1e3)])
    centroids = kmeans.lloyd(vectors, torch.ones(400), far)
    assert len(nearest(vectors, centroids, 1).unique()) == 16
