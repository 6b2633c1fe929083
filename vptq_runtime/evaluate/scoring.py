"""How well a model predicts a text, and how far its predictions are from another model's.

Logits come in float32, a piece of a window at a time; everything made of them is float64.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from vptq_runtime.checks import check_int
from vptq_runtime.errors import OptionError
from vptq_runtime.evaluate.scored_windows import METHODS, ScoredWindows, WindowOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from vptq_runtime.runtime import Runtime

T = TypeVar("T")
PIECE = 128  # tokens; what a model's pieces are a multiple of
BLOCK = 1 << 17  # log-probabilities at a time: 1 MB of float64, which stays in a core's cache


class LanguageModel(Protocol):
    """What a perplexity is measured of: a Runtime, or a DenseModel."""

    @property
    def n_vocab(self) -> int: ...

    def logits_in_pieces(self, tokens: Sequence[int], *, first: int = 0) -> Generator[NDArray[np.float32]]:
        """Logits of the token after each of tokens[first:], from an empty context: float32 (n, n_vocab), n a
        multiple of PIECE but for the last. All are finite."""


@dataclass(frozen=True)
class Estimate:
    """A mean over the scored tokens, or what follows from one; no standard error (None) of a single part."""

    value: float
    standard_error: float | None

    @classmethod
    def of_mean(cls, values: NDArray[np.float64] | NDArray[np.bool_], parts: NDArray[np.int64]) -> Estimate:
        """Of values (n,), in parts that are independent of each other and begin at the indices `parts`.

        For m parts the error is the root of m / (m - 1) sum_k (sum over part k of value - mean)^2, over n: of
        parts of one size that of a mean of m means, of single values the usual one.
        """
        mean, m = float(np.mean(values, dtype=np.float64)), len(parts)
        if m == 1:
            return cls(mean, None)
        deviations = np.add.reduceat(values - mean, parts)
        return cls(mean, math.sqrt(m / (m - 1) * float(deviations @ deviations)) / len(values))

    def exp(self) -> Estimate:
        """Of e to the value: the error to first order. Infinite past what a float can hold."""
        with np.errstate(over="ignore"):
            value = float(np.exp(self.value))
        return Estimate(value, None if self.standard_error is None else value * self.standard_error)


@dataclass(frozen=True)
class Perplexity:
    """Of a model on the windows of a text, or the first n_windows of them.

    nll: float64 (n_scored,), negative log-likelihood of each scored token in nats, in the text's order.
    """

    windows: ScoredWindows
    n_windows: int
    nll: NDArray[np.float64]

    def mean(self, values: NDArray[np.float64] | NDArray[np.bool_]) -> Estimate:
        """Of one value for each scored token; its error is over `windows.error_over`."""
        if self.windows.error_over == "tokens":
            return Estimate.of_mean(values, np.arange(len(values)))
        # Of windows that overlap, as many together as score a context of new tokens: what each of them adds
        # may be a few tokens, which depend on those before them as the others of a window do.
        together = self.windows.n_ctx // self.windows.stride
        begins = [self.windows.n_scored_of(n) for n in range(0, self.n_windows, together)]
        return Estimate.of_mean(values, np.array(begins))

    @property
    def mean_nll(self) -> Estimate:
        """Cross-entropy in nats a token."""
        return self.mean(self.nll)

    @property
    def perplexity(self) -> Estimate:
        """exp(mean_nll)"""
        return self.mean_nll.exp()


@dataclass(frozen=True)
class Comparison:
    """A model beside a reference, which stands for the truth, on the same windows.

    kl_divergence: float64 (n_scored,), KL(reference || model) of the predictions of each scored token in
        nats: sum over the vocabulary of p (log p - log q), at least 0.
    same_top: bool (n_scored,), whether both give the same token the largest probability.
    """

    model: Perplexity
    reference: Perplexity
    kl_divergence: NDArray[np.float64]
    same_top: NDArray[np.bool_]

    @property
    def mean_kl_divergence(self) -> Estimate:
        """In nats a token."""
        return self.model.mean(self.kl_divergence)

    def kl_quantile(self, fraction: float) -> float:
        """0.5 for the median, 1 for the largest; between two tokens' values on a straight line."""
        return float(np.quantile(self.kl_divergence, fraction))

    @property
    def top_token_agreement(self) -> Estimate:
        """Share of the tokens where same_top."""
        return self.model.mean(self.same_top)

    @property
    def perplexity_ratio(self) -> Estimate:
        """The model's perplexity over the reference's.

        Both are of the same tokens: its error is that of the differences of their log-likelihoods, and much
        smaller than that of each.
        """
        return self.model.mean(self.model.nll - self.reference.nll).exp()


Result: TypeAlias = Perplexity | Comparison


def perplexity(runtime: Runtime, tokens: Sequence[int], **options: Unpack[WindowOptions]) -> Perplexity:
    """Perplexity of a model on a text's tokens (`runtime.tokenize(text)`).

    n_ctx: tokens of a window; at most, and by default, runtime.n_ctx.
    method: "papers" (the default) or "llama.cpp", stride: see ScoredWindows.
    max_windows: stop after so many.

    Raises OptionError for options out of range and for too few tokens, FileError where the logits are not
    finite.
    """
    return _last(running_perplexity(runtime, windows_of(runtime, tokens, **options)))


def compare(
    runtime: Runtime, reference: LanguageModel, tokens: Sequence[int], **options: Unpack[WindowOptions]
) -> Comparison:
    """A model beside a reference, another Runtime or a DenseModel, on the same tokens.

    Options and errors as of `perplexity`; OptionError, too, where the two have not the same number of tokens
    in their vocabularies.
    """
    return _last(running_comparison(runtime, reference, windows_of(runtime, tokens, **options)))


def windows_of(
    runtime: Runtime,
    tokens: Sequence[int],
    *,
    n_ctx: int | None = None,
    method: str = METHODS[0],
    stride: int | None = None,
    max_windows: int | None = None,
) -> ScoredWindows:
    """What `perplexity` scores with these options."""
    if n_ctx is None:
        n_ctx = runtime.n_ctx
    check_int("n_ctx", n_ctx, 1, runtime.n_ctx)
    return ScoredWindows.of(
        tokens, n_ctx, method=method, stride=stride, max_windows=max_windows, bos=runtime.bos_token
    )


def running_perplexity(model: LanguageModel, windows: ScoredWindows) -> Iterator[Perplexity]:
    """The perplexity of the first window, of the first two, ... of all."""
    nll = np.empty(windows.n_scored)
    n = 0
    for n_windows, (tokens, first) in enumerate(windows, 1):
        for targets, (log_q,) in log_probabilities([model], tokens, first):
            nll[n : n + len(targets)] = -log_q[np.arange(len(targets)), targets]
            n += len(targets)
        yield Perplexity(windows, n_windows, nll[:n])


def running_comparison(
    model: LanguageModel, reference: LanguageModel, windows: ScoredWindows
) -> Iterator[Comparison]:
    """The comparison on the first window, on the first two, ... on all."""
    if model.n_vocab != reference.n_vocab:
        found = f"found a vocabulary of {reference.n_vocab} tokens"
        raise OptionError(f"reference: {found}, expected the model's {model.n_vocab}")
    nll, reference_nll, kl = np.empty((3, windows.n_scored))
    same_top = np.empty(windows.n_scored, np.bool_)
    n = 0
    for n_windows, (tokens, first) in enumerate(windows, 1):
        for targets, (log_p, log_q) in log_probabilities([reference, model], tokens, first):
            at, rows = slice(n, n + len(targets)), np.arange(len(targets))
            reference_nll[at], nll[at] = -log_p[rows, targets], -log_q[rows, targets]
            same_top[at] = log_p.argmax(axis=-1) == log_q.argmax(axis=-1)
            log_q -= log_p
            # What is 0 may come out as -1e-15.
            kl[at] = np.maximum(-np.einsum("nv,nv->n", np.exp(log_p, out=log_p), log_q), 0)
            n += len(targets)
        yield Comparison(
            Perplexity(windows, n_windows, nll[:n]),
            Perplexity(windows, n_windows, reference_nll[:n]),
            kl[:n],
            same_top[:n],
        )


def log_probabilities(
    models: Sequence[LanguageModel], tokens: list[int], first: int
) -> Iterator[tuple[list[int], list[NDArray[np.float64]]]]:
    """Of tokens[first:], some n at a time: themselves, and each model's log-probabilities (n, n_vocab)."""
    # A power of two, so that the blocks of all models' pieces begin at the same tokens.
    n_block = 1 << max(0, (min(BLOCK // models[0].n_vocab, PIECE)).bit_length() - 1)
    with ExitStack() as stack:
        logits = [
            stack.enter_context(closing(model.logits_in_pieces(tokens[:-1], first=first - 1)))
            for model in models
        ]
        for blocks in zip(*(_blocks(pieces, n_block) for pieces in logits), strict=True):
            targets = tokens[first : first + n_block]
            yield targets, [_log_softmax(block) for block in blocks]
            first += n_block


def _blocks(pieces: Iterator[NDArray[np.float32]], n_block: int) -> Iterator[NDArray[np.float32]]:
    for piece in pieces:
        for start in range(0, len(piece), n_block):
            yield piece[start : start + n_block]


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def _last(values: Iterable[T]) -> T:
    return deque(values, maxlen=1)[0]
