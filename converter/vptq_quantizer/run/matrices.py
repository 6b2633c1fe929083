"""The embedding and the output matrix as VPTQ layers.

A row of the output matrix makes one token's logit, a row of the embedding one token's hidden state. So an
error in a row costs the more, the likelier its token is: of a logit 1/2 E[p (1 - p)], of a hidden state in
proportion to the token's mean probability (planning/sensitivity.py). Columns of the output matrix count by
the Hessian of the final norm's outputs; those of the embedding, which is multiplied with nothing, all alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from vptq_converter.architectures import EMBEDDING, OUTPUT

from vptq_quantizer.dense_model import DenseModel
from vptq_quantizer.layers.layer_quantizer import Problem, quantize_linear
from vptq_quantizer.layers.quantized_linear import QuantizedLinear
from vptq_quantizer.options import QuantizeOptions
from vptq_quantizer.planning.plan import Plan
from vptq_quantizer.planning.sensitivity import LOGIT_TOKENS, output_matrix
from vptq_quantizer.run.checkpoint_writer import Part
from vptq_quantizer.run.report import layer_bits

LEAST_ROW = 1e-3  # of the rows' mean weight: a token that the text lacks may still come


@dataclass(frozen=True)
class Use:
    """hessian (n_embd, n_embd): 2 E[x x^T] of what rows are multiplied with, the identity without that; rows
    (n_vocab,): what errors in each count, 1 in the mean."""

    hessian: Tensor
    rows: Tensor


def quantize_matrices(
    dense: DenseModel,
    plan: Plan,
    options: QuantizeOptions,
    dtype: torch.dtype,
    windows: NDArray[np.int64],
    show: Callable[[str], object] = lambda what: None,
) -> Part:
    """The plan's matrices, quantised by what windows (n, seq_len) of text show of their use, in numbers that
    `dtype` holds; the report is by module path, as those of linear layers are."""
    uses = measure_uses(dense, windows, show)
    tensors: dict[str, Tensor] = {}
    reports: dict[str, Any] = {}
    for n, module in enumerate(plan.matrices):
        seed = int(np.random.SeedSequence([options.seed, dense.n_layers, n]).generate_state(1)[0])
        begin = time.monotonic()
        layer, errors = _quantize(dense, module, plan, uses[module], options, dtype, seed, show)
        fields = layer.tensors(dtype)
        tensors |= {f"{module}.{name}": tensor for name, tensor in fields.items()}
        seconds = time.monotonic() - begin
        reports[module] = {"proxy_error": errors, "seconds": seconds, **layer_bits(fields, layer.config)}
    return Part(tensors, reports)


def _quantize(
    dense: DenseModel,
    module: str,
    plan: Plan,
    use: Use,
    options: QuantizeOptions,
    dtype: torch.dtype,
    seed: int,
    show: Callable[[str], object],
) -> tuple[QuantizedLinear, dict[str, float]]:
    """One matrix, and its proxy error after each step."""
    stored = dense.checkpoint.tensor(f"{module}.weight")
    weight = torch.from_numpy(stored.finite()).to(dense.device)
    stored.release()
    problem = Problem.of(weight, use.hessian, options.damping, f"tensor {module}.weight", use.rows)
    errors: dict[str, float] = {}

    def step(done: str, layer: QuantizedLinear) -> None:
        errors[done] = problem.relative_error(layer.weight())

    generator = torch.Generator().manual_seed(seed)
    layer = quantize_linear(
        problem, plan.matrices[module], options, dtype, generator, step, lambda at: show(f"{module}, {at}")
    )
    return layer, errors


@torch.no_grad()
def measure_uses(
    dense: DenseModel,
    windows: NDArray[np.int64],
    show: Callable[[str], object] = lambda what: None,
) -> dict[str, Use]:
    """By module path, from windows (n, seq_len) that go through the dense model. An embedding that is the
    output matrix, too, is taken for that."""
    hidden = dense.embed(windows)
    for n in range(dense.n_layers):
        show(f"layer {n}: calibration of embedding and output")
        dense.advance(n, dense.load_layer(n), hidden)
    weight = torch.from_numpy(output_matrix(dense).finite()).to(dense.device)
    norm = torch.from_numpy(dense.checkpoint.tensor("model.norm.weight").finite()).to(dense.device)
    eps = dense.model.hyperparameters.norm_rms_eps
    total, squares = torch.zeros(2, len(weight), device=dense.device)
    hessian = torch.zeros(weight.shape[1], weight.shape[1], device=dense.device)
    for piece in torch.split(hidden.flatten(0, 1), LOGIT_TOKENS):
        x = functional.rms_norm(piece.to(dense.device), norm.shape, norm, eps)
        p = (x @ weight.T).softmax(1)
        total += p.sum(0)
        squares += p.square().sum(0)
        hessian.addmm_(x.T, x, alpha=2)
    output = Use(hessian / windows.size, _rows(total - squares))
    if dense.model.weights[-1].name != "output":
        return {EMBEDDING: output}
    return {EMBEDDING: Use(torch.eye(len(hessian), device=dense.device), _rows(total)), OUTPUT: output}


def _rows(weights: Tensor) -> Tensor:
    """With a mean of 1, and none near 0."""
    rows = (weights / weights.mean()).clamp_min(LEAST_ROW)
    return rows / rows.mean()
