"""How much of the model's predictions an error in each matrix costs, measured on a little text.

For a small change D = W - Q of one linear layer y = W x, the KL divergence of the next-token distribution is
quadratic in D, with the Fisher information as its matrix. Taking inputs and gradients for independent of each
other, and tokens of each other, as K-FAC does (arXiv 1503.05671, section 3),

    KL = 1/2 tr(G D A D^T)      A = E[x x^T] = H / 2,  G = E[g g^T],  in nats a token

where g is the gradient, by y, of the log-probability of labels that are drawn from the model itself. Errors
of rows come from a codebook that all rows share, so they are taken for alike: G becomes its mean diagonal
gamma = E[g^2], and

    KL = 1/4 gamma tr(D H D^T).

What the second-order pass leaves of tr(D H D^T) is sum_j S_jj |e_j|^2 (layers/second_order.py: H = U S U^T,
e_j what the codebook gets wrong of column j). Several matrices' divergences add up, for small errors; that
the sum stays a guide for larger ones is the linearity theorem of HIGGS (arXiv 2411.17525).

A row i of the embedding changes the hidden states of its tokens: 1/2 E[g^2] f_i |e_i|^2, f_i its frequency.
A row i of the output matrix changes logit i: 1/2 E[p_i (1 - p_i)] sum_j E[x_j^2] e_ij^2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from vptq_converter.checkpoint import Tensor as StoredTensor

from vptq_quantizer.calibration.hessians import HESSIAN_OF
from vptq_quantizer.dense_model import DenseModel, linears

MOST_TOKENS = 8192  # of text; and at least twice as many as the largest matrix has inputs, if that is fewer
LOGIT_TOKENS = 512  # whose logits are in memory at a time


@dataclass(frozen=True)
class Columns:
    """Of one linear layer: what an error of a weight costs, by its input column (in_features,).

    cost: nats a token for a squared error of 1, after the second-order pass has done its part; diagonal:
    of the Hessian, by which k-means weighs.
    """

    cost: Tensor
    diagonal: Tensor


@dataclass(frozen=True)
class Sensitivity:
    """linears by module path; embedding: nats a token for a squared error of 1 in a weight, by token;
    output: that for a logit, by token, and output_columns: E[x_j^2], which it is to be multiplied with."""

    linears: dict[str, Columns]
    embedding: Tensor
    output: Tensor
    output_columns: Tensor


def tokens_needed(dense: DenseModel) -> int:
    """Of text, for a measurement."""
    widest = max(in_features for _, in_features in dense.linear_shapes().values())
    return min(MOST_TOKENS, max(MOST_TOKENS // 2, 2 * widest))


def measure_sensitivity(
    dense: DenseModel,
    windows: NDArray[np.int64],
    damping: float,
    second_order: bool,
    seed: int,
    show: Callable[[str], object] = lambda what: None,
) -> Sensitivity:
    """From one pass forwards and one backwards of windows (n, seq_len), a decoder layer in memory at a time.

    Hidden states before every layer are kept, in bfloat16.
    """
    generator = torch.Generator(dense.device).manual_seed(seed)
    hidden = dense.embed(windows)
    before = []
    for n in range(dense.n_layers):
        show(f"what errors cost: layer {n}, forwards")
        before.append(hidden.bfloat16())
        dense.advance(n, dense.load_layer(n), hidden)
    show("what errors cost: output")
    gradient, frequency, output, output_columns = _head(dense, hidden, generator)
    result: dict[str, Columns] = {}
    for n in reversed(range(dense.n_layers)):
        show(f"what errors cost: layer {n}, backwards")
        layer = dense.load_layer(n)
        inputs, squares = _backward(dense, n, layer, before.pop(), gradient)
        for name, linear in linears(layer).items():
            hessian = inputs[HESSIAN_OF[name]]
            columns = _columns(linear.weight, hessian, squares[name], damping, second_order, windows.size)
            result[f"model.layers.{n}.{name}"] = columns
    in_order = {name: result[name] for n in range(dense.n_layers) for name in _modules(n)}
    embedding = 0.5 * gradient.square().mean() * frequency
    return Sensitivity(in_order, embedding, output, output_columns)


def _modules(n: int) -> list[str]:
    return [f"model.layers.{n}.{name}" for name in HESSIAN_OF]


def _head(
    dense: DenseModel, hidden: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient by the last hidden states (n_windows, seq_len, n_embd) of the sum of log-probabilities of
    drawn labels; tokens' mean probabilities (n_vocab,); 1/2 E[p (1 - p)] (n_vocab,); E[x^2] (n_embd,)."""
    weight = torch.from_numpy(output_matrix(dense).finite()).to(dense.device)
    norm = torch.from_numpy(dense.checkpoint.tensor("model.norm.weight").finite()).to(dense.device)
    eps = dense.model.hyperparameters.norm_rms_eps
    gradient, n_tokens = torch.empty_like(hidden), hidden.shape[0] * hidden.shape[1]
    total, squares = torch.zeros(2, len(weight), device=dense.device)
    columns = torch.zeros(hidden.shape[2], device=dense.device)
    pieces = zip(
        torch.split(hidden.flatten(0, 1), LOGIT_TOKENS),
        torch.split(gradient.flatten(0, 1), LOGIT_TOKENS),
        strict=True,
    )
    for piece, result in pieces:
        states = piece.to(dense.device).requires_grad_()
        x = functional.rms_norm(states, states.shape[1:], norm, eps)
        with torch.no_grad():
            p = (x @ weight.T).softmax(1)
            labels = torch.multinomial(p, 1, generator=generator)
            total += p.sum(0)
            squares += p.square().sum(0)
            columns += x.square().sum(0)
            p.neg_()
            p.scatter_add_(1, labels, torch.ones_like(labels, dtype=p.dtype))
            by_x = p @ weight
        x.backward(by_x)  # type: ignore[no-untyped-call]
        assert states.grad is not None
        result.copy_(states.grad)
    total, squares = total / n_tokens, squares / n_tokens
    return gradient, total, 0.5 * (total - squares), columns / n_tokens


def output_matrix(dense: DenseModel) -> StoredTensor:
    """The matrix that gives the logits: the embedding's where both are one."""
    last = dense.model.weights[-1]
    tensor = last.weight if last.name == "output" else dense.checkpoint.tensor("model.embed_tokens.weight")
    assert isinstance(tensor, StoredTensor)
    return tensor


def _backward(
    dense: DenseModel, n: int, layer: nn.Module, before: Tensor, gradient: Tensor
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Takes the gradient (n_windows, seq_len, n_embd) back through decoder layer n, in place.

    Returns H by HESSIAN_OF's names, and E[g^2] of each linear layer's output.
    """
    modules = linears(layer)
    hessians = {name: torch.zeros(modules[name].in_features, modules[name].in_features, device=dense.device)
                for name in dict.fromkeys(HESSIAN_OF.values())}  # fmt: skip
    squares = dict.fromkeys(modules, 0.0)

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if name in hessians:
                x = inputs[0].detach().flatten(0, -2)
                hessians[name].addmm_(x.T, x, alpha=2)

            def add(gradient: Tensor) -> None:
                squares[name] += float(gradient.square().sum())

            output.register_hook(add)  # type: ignore[no-untyped-call]

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    for window, g in zip(before, gradient, strict=True):
        states = window[None].float().to(dense.device).requires_grad_()
        dense.call(n, layer, states).backward(g[None].to(dense.device))  # type: ignore[no-untyped-call]
        assert states.grad is not None
        g.copy_(states.grad[0])
    for handle in handles:
        handle.remove()
    n_tokens = before.shape[0] * before.shape[1]
    for hessian in hessians.values():
        hessian /= n_tokens
    return hessians, {
        name: square / n_tokens / modules[name].out_features for name, square in squares.items()
    }


@torch.no_grad()
def _columns(
    weight: Tensor, hessian: Tensor, gamma: float, damping: float, second_order: bool, n_tokens: int
) -> Columns:
    diagonal = hessian.diagonal().clone()
    cost = diagonal
    if second_order:
        cost = diagonal * left_by_second_order(weight, hessian, damping, n_tokens)
    return Columns(0.25 * gamma * cost, diagonal)


def left_by_second_order(weight: Tensor, hessian: Tensor, damping: float, n_tokens: int) -> Tensor:
    """S_jj / h_jj (in_features,): the share of a column's error that no later column makes up for.

    A pivot is what is left of a column after a regression on p others; with n tokens it comes out too small
    by the factor 1 - p / n, which is put right. Beyond p = n / 2 that is noise: there stands the mean of
    those before.
    """
    size = len(hessian)
    damped = hessian.clone()
    damped.diagonal().add_(damping * float(hessian.diagonal().mean()) or 1.0)
    order = (damped.diagonal() * weight.var(0, correction=0)).argsort()  # the last to be quantised first
    ordered = damped[order][:, order]
    factor, failed = torch.linalg.cholesky_ex(ordered)
    if failed:
        return torch.ones(size, device=weight.device)
    share = factor.diagonal().square() / ordered.diagonal()
    n_known = max(1, min(size, n_tokens // 2))
    share /= (1 - torch.arange(size, device=weight.device) / n_tokens).clamp_min(0.5)
    share[n_known:] = share[n_known // 2 : n_known].mean()
    in_order: Tensor = share.clamp(max=1)[order.argsort()]
    return in_order
