"""Column by column: what the other columns' errors ask of a column is added to it before it is quantised.

D = W - Q (out_features, in_features) is the error, H the (damped) Hessian, tr(D H D^T) what is to be small.
Both passes here quantise, for column j, the target

    w_j + sum over i != j of d_i F_ij         F: feedback (in_features, in_features)

First pass: let H = U S U^T with U unit upper triangular and S diagonal. Then

    tr(D H D^T) = sum_j S_jj |(D U)_j|^2      (D U)_j = w_j - q_j + sum over i < j of d_i U_ij

so with F = U every column is quantised to what is best given those before it. This is the error pushed
through the Cholesky factor of the inverse Hessian, as GPTQ and VPTQ have it: that factor is S^(-1/2) U^(-1),
and nothing has to be inverted here (the equivalence: QuIP, arXiv 2307.13304, theorem 6).

Later passes: given all other columns, tr(D H D^T) is least at the target above with F_ij = H_ij / H_jj
(coordinate descent), and so every column is quantised again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vptq_runtime.errors import OptionError

BLOCK = 128  # columns between two updates from all other columns


def column_pass(
    columns: Tensor,
    quantised: Tensor,
    feedback: Tensor,
    encode: Callable[[int, Tensor], Tensor],
    show: Callable[[str], object] = lambda at: None,
    *,
    triangular: bool,
) -> None:
    """Quantises each column j to encode(j, target), which returns the column that it has chosen.

    columns, quantised (in_features, out_features): a column of the weight is a row here, and quantised is
    overwritten. triangular: feedback is upper triangular, and at first quantised holds the columns. show is
    told, now and then, at which column it is.
    """
    n_columns = len(columns)
    for start in range(0, n_columns, BLOCK):
        stop = min(start + BLOCK, n_columns)
        show(f"{start}/{n_columns}")
        known = slice(0, start if triangular else n_columns)
        # What columns outside of the block ask for, all at once; those in the block follow one by one.
        errors = columns[known] - quantised[known]
        targets = torch.addmm(columns[start:stop], feedback[known, start:stop].T, errors)
        for j in range(start, stop):
            chosen = encode(j, targets[j - start])
            change = quantised[j] - chosen  # of the error d_j
            quantised[j] = chosen
            targets[j - start + 1 :].addr_(feedback[j, j + 1 : stop], change)


def sweep_feedback(hessian: Tensor) -> Tensor:
    """U of H = U S U^T, unit upper triangular; the diagonal, which is never used, is 0."""
    # Cholesky factors are lower triangular: turned around by both axes, so is the problem.
    factor, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if failed:
        raise OptionError("--damping: found a Hessian that is singular in float32, expected more damping")
    feedback: Tensor = factor.flip(0, 1)
    feedback /= feedback.diagonal().clone()
    feedback.diagonal().zero_()
    return feedback


def coordinate_feedback(hessian: Tensor) -> Tensor:
    """H_ij / H_jj, 0 on the diagonal."""
    feedback = hessian / hessian.diagonal()
    feedback.diagonal().zero_()
    return feedback
