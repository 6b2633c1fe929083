"""Layer-wise fine-tuning: what stands for a weight is fitted to it again, as the Hessian sees the error.

In turn, with the indices fixed, tr(D H D^T) is made small over centroids, residual centroids, scale and shift
(in each of them it is quadratic), and with those fixed, indices are chosen again column by column
(second_order.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vptq_quantizer.layers.layer_quantizer import LEAST_SCALE, Problem
from vptq_quantizer.layers.quantized_linear import QuantizedLinear
from vptq_quantizer.layers.second_order import column_pass, coordinate_feedback

ROUNDS = 3
FIT_STEPS = 40  # of L-BFGS, each about one product of a weight and the Hessian


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


def _fit(problem: Problem, layer: QuantizedLinear, dtype: torch.dtype) -> QuantizedLinear:
    """The layer with the same indices and better centroids, scale and shift, in numbers that dtype holds."""
    start = layer.parameters_by_name()
    # L-BFGS ends by absolute tolerances: what it sees is 1 at first, whatever size weight and Hessian have.
    whole = float(problem.objective(layer.weight()))
    if not 0 < whole < math.inf:
        return layer
    # Each parameter is measured in units in which that is equally curved along it (Jacobi).
    units = {
        name: (curvature / whole).clamp_min(1e-20).rsqrt()
        for name, curvature in _curvatures(problem, layer).items()
    }
    changes = {name: torch.zeros_like(value, requires_grad=True) for name, value in start.items()}
    optimizer = torch.optim.LBFGS(
        list(changes.values()), max_iter=FIT_STEPS, history_size=10, line_search_fn="strong_wolfe"
    )

    def changed() -> QuantizedLinear:
        return layer.with_parameters({name: start[name] + units[name] * changes[name] for name in start})

    def closure() -> Tensor:
        optimizer.zero_grad()
        weight = changed().weight()
        difference = problem.weight - weight.detach()
        product = difference @ problem.damped / whole
        weight.backward(-2 * product)  # type: ignore[no-untyped-call]
        return (product * difference).sum()

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        fitted = changed().parameters_by_name()
        if "scale" in fitted:  # best 0 where the weights are all alike, but columns are divided by it
            small = fitted["scale"].abs() < LEAST_SCALE
            fitted["scale"] = torch.where(small, start["scale"], fitted["scale"])
    return layer.with_parameters({name: value.to(dtype).float() for name, value in fitted.items()})


@torch.no_grad()
def _curvatures(problem: Problem, layer: QuantizedLinear) -> dict[str, Tensor]:
    """Half the objective's second derivative by each parameter, in its shape, as if H were diagonal.

    For scale and shift that is exact. For a centroid's numbers it is the sum of h_ii s_i^2 over the vectors
    that use it, without the 2 h_ij s_i s_j of pairs of these vectors in the same rows.
    """
    importance = problem.damped.diagonal()
    columns = layer.columns()
    curvatures = {}
    if layer.scale is not None:
        squares = columns.square().sum(1)[layer.perm.argsort()]
        curvatures = {"scale": importance * squares, "shift": importance * problem.weight.shape[0]}
        importance = importance * layer.scale.square()
    importance = importance[layer.perm]
    for n, segment in enumerate(layer.segments):
        width, n_blocks = segment.index.shape
        weights = importance[segment.start : segment.start + width].repeat_interleave(n_blocks)
        books = {"centroids": (segment.codebook.centroids, segment.index)}
        if segment.codebook.res_centroids is not None and segment.res_index is not None:
            books["res_centroids"] = (segment.codebook.res_centroids, segment.res_index)
        for name, (centroids, index) in books.items():
            used = torch.bincount(index.flatten(), weights, len(centroids))
            curvatures[f"{n}.{name}"] = used.float()[:, None].expand_as(centroids)
    return curvatures


@torch.no_grad()
def _choose_again(problem: Problem, layer: QuantizedLinear, dtype: torch.dtype) -> QuantizedLinear:
    """The layer with every column's indices chosen again, given all other columns."""
    layer = layer.with_own_indices()
    normalised, hessian = problem.normalised(layer.perm, layer.scale, layer.shift)
    feedback = coordinate_feedback(hessian)
    column_pass(normalised, layer.columns(), feedback, layer.encode_column, triangular=False)
    return layer
