"""Layer-wise fine-tuning: what stands for a weight is fitted to it again, as the Hessian sees the error.

In turn, with the indices fixed, tr(D H D^T) is made small over scale, centroids, residual centroids and shift
(in each of them it is quadratic), and with those fixed, indices are chosen again column by column
(second_order.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from vptq_quantizer.layers.kmeans import sums
from vptq_quantizer.layers.layer_quantizer import LEAST_SCALE, Problem
from vptq_quantizer.layers.quantized_linear import QuantizedLinear
from vptq_quantizer.layers.second_order import column_pass, coordinate_feedback

ROUNDS = 3
FIT_STEPS = 8  # of conjugate gradients, each a product of a weight and the Hessian
LEAST_GAIN = 1e-4  # of what the first step promised: less ends the fit
LEAST_CURVATURE = 1e-6  # along a number, in units of the largest or the mean


def finetune_linear(
    problem: Problem,
    layer: QuantizedLinear,
    dtype: torch.dtype,
    step: Callable[[str, QuantizedLinear], None],
    show: Callable[[str], object] = lambda what: None,
) -> QuantizedLinear:
    """The layer fitted in ROUNDS rounds, in numbers that dtype holds; what does not lower the damped error is
    not kept. step("fine-tuning", layer) is told the state at the end; show, in words, what is being done.
    """
    error = float(problem.objective(layer.weight()))
    for n in range(ROUNDS):
        for name, improve in (("centroids", _fit), ("indices", _choose_again)):
            show(f"fine-tuning {n + 1}/{ROUNDS}, {name}")
            candidate = improve(problem, layer, dtype)
            candidate_error = float(problem.objective(candidate.weight()))
            if candidate_error < error:
                layer, error = candidate, candidate_error
    step("fine-tuning", layer)
    return layer


@torch.no_grad()
def _fit(problem: Problem, layer: QuantizedLinear, dtype: torch.dtype) -> QuantizedLinear:
    """The layer with the same indices and better scale, centroids and shift, in numbers that dtype holds.

    One after the other, so that each makes up for the rounding of those before.
    """
    if layer.scale is not None:
        scale = _best_scale(problem, layer).to(dtype).float()
        usable = scale.abs() >= LEAST_SCALE  # columns are divided by it
        layer = replace(layer, scale=torch.where(usable, scale, layer.scale))
        layer = _with_best_shift(problem, layer, dtype)
    books = {name: book.to(dtype).float() for name, book in _best_codebooks(problem, layer).items()}
    layer = layer.with_parameters(layer.parameters_by_name() | books)
    return layer if layer.scale is None else _with_best_shift(problem, layer, dtype)


def _with_best_shift(problem: Problem, layer: QuantizedLinear, dtype: torch.dtype) -> QuantizedLinear:
    """With every column's mean error at 0, which is best whatever the Hessian is."""
    assert layer.shift is not None
    mean_error = (problem.weight - layer.weight()).mean(0)
    return replace(layer, shift=(layer.shift + mean_error).to(dtype).float())


def _best_scale(problem: Problem, layer: QuantizedLinear) -> Tensor:
    """The scale (in_features,) of least error, each column's mean error being 0.

    With the columns C (in_features, out_features) and the weight W less their means over the outputs, that is
    where ((C C^T) * H) s = diagonal(C W H), * by elements.
    """
    assert layer.scale is not None
    columns = layer.columns()[layer.perm.argsort()]
    columns -= columns.mean(1, keepdim=True)
    weight = problem.weight - problem.weight.mean(0)
    right = ((weight @ problem.damped).T * columns).sum(1)
    matrix = (columns @ columns.T).mul_(problem.damped)
    # A column of one centroid alone has any scale: a little pulls each towards what it is.
    pull = LEAST_CURVATURE * float(matrix.diagonal().mean())
    matrix.diagonal().add_(pull)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return layer.scale
    return torch.cholesky_solve((right + pull * layer.scale)[:, None], factor)[:, 0]


def _best_codebooks(problem: Problem, layer: QuantizedLinear) -> dict[str, Tensor]:
    """Centroids and residual centroids by their names in the layer, after FIT_STEPS of conjugate gradients.

    The weight is linear in them, so the error is quadratic. Each number is measured in units in which that is
    equally curved along it (Jacobi).
    """
    curvatures = _curvatures(problem, layer)
    least = LEAST_CURVATURE * max(float(value.max()) for value in curvatures.values())
    if not 0 < least < math.inf:
        return {}
    inverses = {name: 1 / value.clamp_min(least) for name, value in curvatures.items()}
    found = {name: layer.parameters_by_name()[name].clone() for name in curvatures}
    linear = replace(layer, shift=None if layer.shift is None else torch.zeros_like(layer.shift))
    # The error's gradient by the numbers, times -1/2, and where to go.
    left = _gathered(layer, (problem.weight - layer.weight()) @ problem.damped)
    direction = {name: inverses[name] * left[name] for name in left}
    size = first = _dot(left, direction)
    for _ in range(FIT_STEPS):
        if not size > LEAST_GAIN * first:
            break
        moved = linear.with_parameters(linear.parameters_by_name() | direction)
        product = _gathered(layer, moved.weight() @ problem.damped)
        length = size / _dot(direction, product)
        for name in found:
            found[name].add_(direction[name], alpha=length)
            left[name].sub_(product[name], alpha=length)
        scaled = {name: inverses[name] * left[name] for name in left}
        before, size = size, _dot(left, scaled)
        direction = {name: scaled[name].add_(direction[name], alpha=size / before) for name in left}
    return found


def _dot(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return sum(float((a[name] * b[name]).sum(dtype=torch.float64)) for name in a)


def _gathered(layer: QuantizedLinear, gradient: Tensor) -> dict[str, Tensor]:
    """The gradient by the weight (out_features, in_features) as one by the codebooks' numbers, by name."""
    columns = gradient.T if layer.scale is None else gradient.T * layer.scale[:, None]
    columns = columns[layer.perm]
    found = {}
    for name, start, centroids, index in _books(layer):
        width, n_blocks = index.shape
        k, v = centroids.shape
        vectors = columns[start : start + width]
        vectors = functional.pad(vectors, (0, n_blocks * v - vectors.shape[1])).view(-1, v)
        found[name] = sums(vectors, index.flatten(), k)
    return found


def _curvatures(problem: Problem, layer: QuantizedLinear) -> dict[str, Tensor]:
    """Half the objective's second derivative by the codebooks' numbers, as if H were diagonal: (k, 1).

    It is the sum of h_ii s_i^2 over the vectors that use a centroid, without the 2 h_ij s_i s_j of pairs of
    these vectors in the same rows.
    """
    importance = problem.damped.diagonal()
    if layer.scale is not None:
        importance = importance * layer.scale.square()
    importance = importance[layer.perm]
    curvatures = {}
    for name, start, centroids, index in _books(layer):
        width, n_blocks = index.shape
        weights = importance[start : start + width].repeat_interleave(n_blocks)
        curvatures[name] = torch.bincount(index.flatten(), weights, len(centroids))[:, None]
    return curvatures


def _books(layer: QuantizedLinear) -> Iterator[tuple[str, int, Tensor, Tensor]]:
    """Each codebook's name, first column, centroids (k, v) and indices (width, n_blocks)."""
    for n, segment in enumerate(layer.segments):
        yield f"{n}.centroids", segment.start, segment.codebook.centroids, segment.index
        if segment.codebook.res_centroids is not None and segment.res_index is not None:
            yield f"{n}.res_centroids", segment.start, segment.codebook.res_centroids, segment.res_index


@torch.no_grad()
def _choose_again(problem: Problem, layer: QuantizedLinear, dtype: torch.dtype) -> QuantizedLinear:
    """The layer with every column's indices chosen again, given all other columns."""
    layer = layer.with_own_indices()
    normalised, hessian = problem.normalised(layer.perm, layer.scale, layer.shift)
    feedback = coordinate_feedback(hessian)
    column_pass(normalised, layer.columns(), feedback, layer.encode_column, triangular=False)
    return layer
