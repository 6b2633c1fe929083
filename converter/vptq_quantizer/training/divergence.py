"""KL divergence of next-token distributions, with its gradient, and few logits in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Of one model at a time: 64 MB in float32, and some four times that while they are used.
MOST_LOGITS = 1 << 24


def divergence(expected: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> Tensor:
    """The sum over tokens of KL(expected || found) in nats, a scalar in float64.

    Each of both is the last hidden states (n_tokens, n_embd) of a model and its output matrix (n_vocab,
    n_embd): logits are products of the two.
    """
    return sum(
        (_divergence(*logits) for _, logits in _chunks(expected, found)),
        torch.zeros((), dtype=torch.float64, device=found[0].device),
    )


def divergence_gradient(
    expected: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """As `divergence`, and its gradient (n_tokens, n_embd) at the hidden states of `found`, in their type.

    The gradient at a token's logits is softmax(found) - softmax(expected). It is made while they are there,
    so backward need not compute them again.
    """
    total = torch.zeros((), dtype=torch.float64, device=found[0].device)
    gradient = torch.empty_like(found[0])
    for rows, (p, q) in _chunks(expected, found):
        total += _divergence(p, q)
        gradient[rows] = (q.exp_() - p.exp_()).to(found[1].dtype) @ found[1]
    return total, gradient


def comparison(expected: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
    """As `divergence`, and both models' cross-entropy: sums over tokens in nats, (3,) in float64.

    labels (n_tokens,): the tokens that did follow; -1 where none is known, and no cross-entropy counted.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=found[0].device)
    for rows, both in _chunks(expected, found):
        totals[0] += _divergence(*both)
        known = labels[rows] >= 0
        for n, log_probabilities in enumerate(both, 1):
            totals[n] -= log_probabilities[known, labels[rows][known]].double().sum()
    return totals


def _chunks(
    expected: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]
) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
    """Slices of the tokens, and both models' log-probabilities (n, n_vocab) of each slice, in float32."""
    n = max(1, MOST_LOGITS // len(found[1]))
    for start in range(0, len(found[0]), n):
        rows = slice(start, start + n)
        yield rows, (_log_probabilities(rows, *expected), _log_probabilities(rows, *found))


def _log_probabilities(rows: slice, hidden: Tensor, output: Tensor) -> Tensor:
    return (hidden[rows].to(output.dtype) @ output.T).float().log_softmax(-1)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1).double().sum()
