"""One linear layer, quantised: codebooks, then column after column, each column's error moved into the next.

Everything here is in normalised, permuted coordinates: columns have mean 0 and variance 1, and stand in the
order in which they are quantised, by falling h_ii. With W = V diag(s) + b, the proxy error tr(dW H dW^T) of
W is that of V under diag(s) H diag(s).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from vptq_converter.layer import LayerConfig

from vptq_quantizer.layers.codebook import Codebook, train
from vptq_quantizer.layers.quantized_linear import QuantizedLinear, Segment
from vptq_quantizer.layers.second_order import column_pass, sweep_feedback
from vptq_quantizer.options import QuantizeOptions
from vptq_runtime.errors import FileError

LEAST_SCALE = 1e-4  # of a column whose weights are all alike; float16 holds it
MOST_WEIGHT = 1e15  # normalised; squares of such, added up, stay finite in float32


@dataclass
class Problem:
    """A weight (out_features, in_features) in float32, and the Hessian that its error is measured with.

    damped is (in_features, in_features), `damping` on its diagonal included. name: the layer's, for errors.
    rows (out_features,): what errors of an output count, None: all alike. Of a vector's outputs it is their
    mean, by which k-means weighs; the nearest centroid is that of all alike.
    """

    weight: Tensor
    damped: Tensor
    damping: float
    name: str = "layer"
    rows: Tensor | None = None

    @classmethod
    def of(
        cls,
        weight: Tensor,
        hessian: Tensor,
        relative_damping: float,
        name: str = "layer",
        rows: Tensor | None = None,
    ) -> Problem:
        """damping: relative_damping times the mean diagonal; 1 where that is 0, without any input."""
        damping = relative_damping * float(hessian.diagonal().mean()) or 1.0
        damped = hessian.clone()
        damped.diagonal().add_(damping)
        return cls(weight, damped, damping, name, rows)

    def normalised(self, perm: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """The weight's columns, as rows: (in_features, out_features), and the damped Hessian, in normalised,
        permuted coordinates."""
        columns, hessian = self.weight.T[perm], self.damped[perm][:, perm]
        if scale is not None and shift is not None:
            s = scale[perm]
            columns = (columns - shift[perm, None]) / s[:, None]
            hessian = hessian.mul_(s).mul_(s[:, None])
        return columns.contiguous(), hessian

    def check(self, what: str, values: Tensor | None, most: float) -> None:
        """Refuses numbers that are not from -most to most; raises FileError."""
        if values is not None and not bool((values.abs() <= most).all()):  # a NaN is not, either
            found = float(values.abs().max())
            raise FileError(f"{self.name}: {what}: found {found:.6g}, expected numbers up to {most:.6g}")

    def objective(self, quantised: Tensor) -> Tensor:
        """tr(D H D^T) with the damped H and D = weight - quantised."""
        difference = self.weight - quantised
        return ((difference @ self.damped) * difference).sum()

    def relative_error(self, quantised: Tensor) -> float:
        """The proxy error tr(R D H D^T) / tr(R W H W^T), without damping; R has `rows` on its diagonal."""
        difference = self.weight - quantised
        errors = []
        for w in (difference, self.weight):
            of_rows = ((w @ self.damped) * w).sum(1, dtype=torch.float64)
            of_rows -= self.damping * w.square().sum(1, dtype=torch.float64)
            errors.append(float((of_rows if self.rows is None else of_rows * self.rows).sum()))
        return errors[0] / errors[1] if errors[1] > 0 else 0.0


@torch.no_grad()
def quantize_linear(
    problem: Problem,
    config: LayerConfig,
    options: QuantizeOptions,
    dtype: torch.dtype,
    generator: torch.Generator,
    step: Callable[[str, QuantizedLinear], None],
    show: Callable[[str], object] = lambda what: None,
) -> QuantizedLinear:
    """Quantises problem.weight by `config`, in numbers that `dtype` (float16 or bfloat16) holds.

    step(name, layer) is told the state after each step: "k-means", "second order"; show, in words, what is
    being done. Raises FileError for weights that come out larger than `dtype` holds.
    """
    most = torch.finfo(dtype).max
    weight, damped = problem.weight, problem.damped
    scale = shift = None
    if config.norm_dim == 0:
        shift = weight.mean(0).to(dtype).float()
        scale = weight.std(0, correction=0).clamp_min(LEAST_SCALE).to(dtype).float()
    problem.check("deviations of its columns", scale, most)
    problem.check("means of its columns", shift, most)
    importance = damped.diagonal() if scale is None else damped.diagonal() * scale.square()
    perm = importance.argsort(descending=True, stable=True)
    normalised, hessian = problem.normalised(perm, scale, shift)
    problem.check("weights", normalised, MOST_WEIGHT)
    problem.check("Hessian", hessian, torch.finfo(torch.float32).max)

    column_weights = hessian.diagonal() if options.hessian_weights else torch.ones_like(hessian.diagonal())
    segments = []
    start = 0
    parts = [(config.n0, config.v0, config.k0, 0)] if config.n0 else []
    parts += [(config.group_size, config.v, config.k, config.r)] * config.g
    for width, v, k, r in parts:
        columns = slice(start, start + width)
        weights = _vector_weights(column_weights[columns], problem.rows, config.out_features // v, v)
        codebook = _train_codebook(normalised[columns], weights, v, k, r, generator, show)
        codebook = codebook.rounded(dtype)
        problem.check("centroids", codebook.centroids, most)
        problem.check("residual centroids", codebook.res_centroids, most)
        show("k-means, nearest centroids")
        segments.append(Segment.encode(normalised[columns], start, codebook))
        start += width
    layer = QuantizedLinear(config, segments, perm, scale, shift)
    step("k-means", layer)
    if options.second_order:
        undecided = normalised.clone()  # no error yet
        show("second order")
        feedback = sweep_feedback(hessian)
        column_pass(
            normalised, undecided, feedback, layer.encode_column, lambda at: show(f"second order {at}"),
            triangular=True,
        )  # fmt: skip
        step("second order", layer)
    return layer


def _train_codebook(
    columns: Tensor,
    weights: Tensor,
    v: int,
    k: int,
    r: int,
    generator: torch.Generator,
    show: Callable[[str], object],
) -> Codebook:
    """Of columns (width, out_features), cut into vectors that count by weights (width * n_blocks,); a rest
    that fills none trains nothing."""
    width, out_features = columns.shape
    n_blocks = out_features // v
    vectors = columns[:, : n_blocks * v].reshape(width * n_blocks, v)
    return train(vectors, weights, k, r, generator, show)


def _vector_weights(columns: Tensor, rows: Tensor | None, n_blocks: int, v: int) -> Tensor:
    """What each vector counts (width * n_blocks,), from its column's weight (width,) and its rows'."""
    if rows is None:
        return columns.repeat_interleave(n_blocks)
    return torch.outer(columns, rows[: n_blocks * v].view(n_blocks, v).mean(1)).flatten()
