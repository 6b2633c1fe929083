"""What training makes of a weight's gradient: codebooks' and norms' own, and indices chosen again."""

from dataclasses import replace

import pytest
import torch
from linear_problems import OPTIONS, problem, quantise
from torch import Tensor
from vptq_quantizer.layers.quantized_linear import QuantizedLinear
from vptq_quantizer.training.decode import column_gradient, parameter_gradients
from vptq_quantizer.training.divergence import divergence, divergence_gradient
from vptq_quantizer.training.index_updates import SHARE, Offsets, spacing, update_indices


@pytest.fixture(params=OPTIONS)
def layer(request: pytest.FixtureRequest) -> QuantizedLinear:
    return quantise(problem(62, 96), OPTIONS[request.param])[0]


def test_gradients_are_those_of_autograd(layer: QuantizedLinear) -> None:
    gradient = torch.randn(62, 96, generator=torch.Generator().manual_seed(1))
    values = {name: v.clone().requires_grad_() for name, v in layer.parameters_by_name().items()}
    layer.with_parameters(values).weight().backward(gradient)
    found = parameter_gradients(layer, gradient, column_gradient(layer, gradient))
    assert found.keys() == values.keys()
    for name, value in values.items():
        torch.testing.assert_close(found[name], value.grad, rtol=1e-4, atol=1e-4)


def test_an_index_changes_for_a_nearer_centroid_only(layer: QuantizedLinear) -> None:
    """A vector that changes comes nearer to what its offsets ask for, and keeps the rest as offset."""
    offsets = Offsets.none(layer)
    shape = offsets.values.shape
    offsets.values = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(2)).half()
    before, left = layer.columns().clone(), offset_of(offsets)
    wanted = before + left
    n = update_indices(layer, offsets)
    after = layer.columns()
    moved = (after != before).any(1).sum()
    assert 0 < moved <= n <= sum(max(1, int(SHARE * s.index.numel())) for s in layer.segments)
    changed = after != before
    torch.testing.assert_close(after + offset_of(offsets), wanted, rtol=0, atol=2e-3 * float(offsets.unit))
    assert (wanted - after)[changed].square().sum() < (wanted - before)[changed].square().sum()
    assert (wanted - after).square().sum() < (wanted - before).square().sum()


def test_no_index_changes_without_offsets(layer: QuantizedLinear) -> None:
    """Every vector is nearest to its own centroid: there is nothing to gain."""
    before = layer.columns().clone()
    assert update_indices(layer, Offsets.none(layer)) == 0
    assert torch.equal(layer.columns(), before)


def test_indices_follow_the_gradient() -> None:
    """Gradients that pull a layer to another one's weights bring it there by indices alone."""
    layer = quantise(problem(62, 96), OPTIONS["plain"])[0].with_own_indices()
    target = layer.with_own_indices()
    generator = torch.Generator().manual_seed(3)
    index = target.segments[0].index
    index[:, :5] = torch.randint(32, index[:, :5].shape, generator=generator)
    offsets, wanted = Offsets.none(layer), target.columns()
    first = (layer.columns() - wanted).square().sum()
    for step in range(100):
        offsets.descend(layer.columns() - wanted, step, 0.1)
        update_indices(layer, offsets)
    assert (layer.columns() - wanted).square().sum() < 0.01 * first


def test_spacing_is_half_the_distance_to_the_next_centroid(layer: QuantizedLinear) -> None:
    """The slow twin: every vector's own codebook, all distances."""
    squares, n = 0.0, 0
    for s in layer.segments:
        book = s.codebook.centroids if s.codebook.res_centroids is None else s.codebook.res_centroids
        index = s.index if s.res_index is None else s.res_index
        distances = torch.cdist(book.double(), book.double()).fill_diagonal_(torch.inf)
        squares += float((distances.min(1).values[index] / 2).square().sum())
        n += index.numel() * s.codebook.v
    assert float(spacing(layer)) == pytest.approx((squares / n) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("n_tokens, n_vocab", [(1, 3), (7, 100), (65, 33)])
def test_the_gradient_of_the_divergence(n_tokens: int, n_vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of autograd in float64, of all tokens at once and piece by piece."""
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    expected, found = random(n_tokens, 8), random(n_tokens, 8)
    output, other = random(n_vocab, 8), random(n_vocab, 8)
    states = found.double().requires_grad_()
    p, q = (
        (expected.double() @ output.double().T).log_softmax(-1),
        (states @ other.double().T).log_softmax(-1),
    )
    whole = (p.exp() * (p - q)).sum()
    whole.backward()
    for most in (1 << 24, 2 * n_vocab):
        monkeypatch.setattr("vptq_quantizer.training.divergence.MOST_LOGITS", most)
        total, gradient = divergence_gradient((expected, output), (found, other))
        assert total.item() == pytest.approx(whole.item(), rel=1e-5)
        assert divergence((expected, output), (found, other)).item() == pytest.approx(whole.item(), rel=1e-5)
        torch.testing.assert_close(gradient.double(), states.grad, rtol=1e-4, atol=1e-5)


def test_a_gradient_of_zero_moves_nothing() -> None:
    layer = quantise(problem(62, 96), replace(OPTIONS["plain"], centroids=2))[0]
    offsets = Offsets.none(layer)
    offsets.descend(torch.zeros(96, 62), 0, 1.0)
    assert not offsets.values.any()
    assert update_indices(layer, offsets) == 0


def offset_of(offsets: Offsets) -> Tensor:
    return offsets.values.float() * offsets.unit
