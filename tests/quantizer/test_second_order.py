"""The column passes: what they compute, and that the error shrinks."""

import torch
from linear_problems import hessian
from torch import Tensor
from vptq_quantizer.layers.second_order import column_pass, coordinate_feedback, sweep_feedback

STEP = 0.5  # of the grid that stands for a codebook here


def on_grid(_: int, column: Tensor) -> Tensor:
    return (column / STEP).round() * STEP


def error(columns: Tensor, quantised: Tensor, h: Tensor) -> float:
    difference = (columns - quantised).double()
    return float((difference.T @ h.double() * difference.T).sum())


def swept(columns: Tensor, h: Tensor) -> Tensor:
    quantised = columns.clone()
    column_pass(columns, quantised, sweep_feedback(h), on_grid, triangular=True)
    return quantised


def test_the_sweep_is_the_papers() -> None:
    """Error of column j over U_jj times row j of U into the columns after it, U^T U = H^-1 (in float64)."""
    h = hessian(200)
    columns = torch.randn(200, 12, generator=torch.Generator().manual_seed(1))
    upper = torch.linalg.cholesky(torch.linalg.inv(h.double()), upper=True)
    left, expected = columns.double(), torch.empty_like(columns)
    for j in range(200):
        expected[j] = on_grid(j, left[j])
        scaled = (left[j] - expected[j]) / upper[j, j]
        left[j + 1 :] -= upper[j, j + 1 :, None] * scaled
    # Blocks of 128 are crossed. In float32, a value in the middle of two grid points may fall to either.
    differs = (swept(columns, h) != expected).any(0)
    assert differs.double().mean() < 0.2


def test_the_sweep_beats_the_nearest_values() -> None:
    h = hessian(200)
    columns = torch.randn(200, 12, generator=torch.Generator().manual_seed(1))
    assert error(columns, swept(columns, h), h) < 0.5 * error(columns, on_grid(0, columns), h)


def test_without_correlations_the_sweep_is_the_nearest_values() -> None:
    h = hessian(150).diagonal().diag()
    columns = torch.randn(150, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(swept(columns, h), on_grid(0, columns))


def test_choosing_again_only_lowers_the_error() -> None:
    h = hessian(200)
    columns = torch.randn(200, 12, generator=torch.Generator().manual_seed(1))
    quantised = swept(columns, h)
    errors = [error(columns, quantised, h)]
    for _ in range(3):
        column_pass(columns, quantised, coordinate_feedback(h), on_grid, triangular=False)
        errors.append(error(columns, quantised, h))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.95 * errors[0]


def test_choosing_again_ends_where_no_column_could_do_better() -> None:
    h = hessian(40)
    columns = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    quantised = swept(columns, h)
    for _ in range(20):
        column_pass(columns, quantised, coordinate_feedback(h), on_grid, triangular=False)
    least = error(columns, quantised, h)
    for j in range(40):
        for change in (-STEP, STEP):
            for o in range(6):
                other = quantised.clone()
                other[j, o] += change
                assert error(columns, other, h) > least
