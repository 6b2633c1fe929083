"""Perplexity and KL divergence against the obvious way: transformers on whole windows, torch's functions."""

import math
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from configurations import BOS, VOCAB_SIZE
from numpy.typing import NDArray
from reference import Reference

from vptq_runtime import OptionError, Runtime
from vptq_runtime.evaluate.scored_windows import METHODS, ScoredWindows
from vptq_runtime.evaluate.scoring import (
    Estimate,
    compare,
    perplexity,
    running_comparison,
    running_perplexity,
    windows_of,
)

TOKENS = np.random.default_rng(0).integers(VOCAB_SIZE, size=1000).tolist()
EXACT = {"device": "cpu", "kv_type": "f32", "precision": "f32"}


@pytest.fixture(scope="module")
def exact(model: Path) -> Generator[Runtime]:
    with Runtime(model, **EXACT) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


class Scripted:
    """A language model whose logits (n_tokens, n_vocab) are a function of the tokens."""

    def __init__(self, n_vocab: int, logits: Callable[[list[int]], NDArray[np.floating]]) -> None:
        self.n_vocab = n_vocab
        self.logits = logits

    def logits_in_pieces(self, tokens: Sequence[int], *, first: int = 0) -> Generator[NDArray[np.float32]]:
        logits = self.logits(list(tokens)).astype(np.float32)
        for start in range(first, len(tokens), 128):
            yield logits[start : start + 128]


def windows_by_hand(method: str, n_ctx: int) -> list[tuple[list[int], int]]:
    """Windows of TOKENS, and the index of the first token of each that is scored."""
    windows = [TOKENS[start : start + n_ctx] for start in range(0, len(TOKENS) - n_ctx + 1, n_ctx)]
    if method == "papers":
        return [(window, 1) for window in windows]
    return [([BOS, *window[1:]], n_ctx // 2 + 1) for window in windows]


def losses_by_hand(reference: Reference, windows: list[tuple[list[int], int]]) -> list[NDArray[np.float64]]:
    """Cross-entropies of the scored tokens of each window."""
    losses = []
    for tokens, first in windows:
        logits = torch.from_numpy(reference.logits(tokens)).double()
        loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:]), reduction="none")
        losses.append(loss[first - 1 :].numpy())
    return losses


@pytest.mark.parametrize("n_ctx", [3, 64, 301])
@pytest.mark.parametrize("method", METHODS)
def test_perplexity_is_that_of_transformers(
    exact: Runtime, reference: Reference, method: str, n_ctx: int
) -> None:
    """Windows shorter than a batch and longer, of an even and an odd number of tokens; a rest is left."""
    result = perplexity(exact, TOKENS, method=method, n_ctx=n_ctx)
    losses = losses_by_hand(reference, windows_by_hand(method, n_ctx))
    assert result.n_windows == result.windows.n_windows == 1000 // n_ctx == len(losses)
    np.testing.assert_allclose(result.nll, np.concatenate(losses), rtol=0, atol=1e-4)
    expected = math.exp(np.concatenate(losses).mean())
    assert result.perplexity.value == pytest.approx(expected, rel=1e-5)
    # Of the mean of independent means, and to first order of its exponential.
    independent = [loss.mean() for loss in losses] if method == "papers" else np.concatenate(losses)
    error = np.std(independent, ddof=1) / math.sqrt(len(independent))
    assert result.mean_nll.standard_error == pytest.approx(error, rel=1e-4)
    assert result.perplexity.standard_error == pytest.approx(expected * error, rel=1e-4)


def test_the_default_is_the_papers_on_the_whole_context(runtime: Runtime) -> None:
    result = perplexity(runtime, [*TOKENS, *TOKENS, *TOKENS])
    assert (result.windows.method, result.windows.n_ctx, result.n_windows) == ("papers", 1024, 2)
    again = perplexity(runtime, [*TOKENS, *TOKENS, *TOKENS], n_ctx=1024, method="papers", stride=1024)
    np.testing.assert_array_equal(result.nll, again.nll)


def test_logits_in_pieces_are_the_logits(runtime: Runtime) -> None:
    whole = runtime.logits(TOKENS)
    pieces = list(runtime.logits_in_pieces(TOKENS))
    assert all(len(piece) % 128 == 0 for piece in pieces[:-1]) and len(pieces) > 1
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    for first in (1, 200, 999):
        np.testing.assert_array_equal(
            np.concatenate(list(runtime.logits_in_pieces(TOKENS, first=first))), whole[first:]
        )
    with pytest.raises(OptionError, match=r"first: found 1000, expected .* at most 999"):
        runtime.logits_in_pieces(TOKENS, first=1000)


def test_a_stride_scores_every_token_once(exact: Runtime, reference: Reference) -> None:
    """From the second window on each token has at least 64 - 10 before it."""
    result = perplexity(exact, TOKENS[:200], n_ctx=64, stride=10)
    windows = [(TOKENS[start : start + 64], 54 if start else 1) for start in range(0, 137, 10)]
    losses = losses_by_hand(reference, windows)
    assert (result.n_windows, len(result.nll)) == (14, 193)  # tokens 1 ... 193
    np.testing.assert_allclose(result.nll, np.concatenate(losses), rtol=0, atol=1e-4)


def test_overlapping_windows_are_no_observations(exact: Runtime) -> None:
    """As many of them as score a context are one: else a smaller stride would make the error smaller."""
    result = perplexity(exact, TOKENS[:200], n_ctx=64, stride=10)
    parts = [result.nll[start:end] for start, end in ((0, 113), (113, 173), (173, 193))]  # 6, 6, 2 windows
    # Parts of unequal weight: the error of a ratio of two means, the sums of losses and their numbers.
    residuals = np.array([part.sum() - result.nll.mean() * len(part) for part in parts])
    error = np.std(residuals, ddof=1) / math.sqrt(3) / (193 / 3)
    assert result.mean_nll.standard_error == pytest.approx(error, rel=1e-4)
    assert perplexity(exact, TOKENS[:100], n_ctx=64, stride=10).mean_nll.standard_error is None


def test_stop_early(runtime: Runtime) -> None:
    whole, early = (perplexity(runtime, TOKENS, n_ctx=100, max_windows=n) for n in (None, 3))
    assert (whole.n_windows, early.n_windows) == (10, 3)
    np.testing.assert_array_equal(early.nll, whole.nll[: 3 * 99])


def test_a_short_text_is_one_window(exact: Runtime, reference: Reference) -> None:
    for method, n_tokens in (("papers", 2), ("papers", 40), ("llama.cpp", 3), ("llama.cpp", 40)):
        result = perplexity(exact, TOKENS[:n_tokens], method=method, max_windows=5)
        assert (result.windows.n_ctx, result.n_windows) == (n_tokens, 1)
        (window, first) = windows_by_hand(method, n_tokens)[0]
        np.testing.assert_allclose(result.nll, losses_by_hand(reference, [(window, first)])[0], atol=1e-4)
        if method == "papers" or n_tokens == 3:  # one window, or one token
            assert result.perplexity.standard_error is None


@pytest.mark.parametrize(
    ("n_tokens", "options", "message"),
    [
        (0, {}, "text: found 0 tokens, expected at least 2"),
        (1, {}, "text: found 1 token, expected at least 2"),
        (2, {"method": "llama.cpp"}, "text: found 2 tokens, expected at least 3"),
        (9, {"n_ctx": 1}, "n_ctx: found 1, expected a whole number, at least 2"),
        (9, {"n_ctx": 2, "method": "llama.cpp"}, "n_ctx: found 2, expected a whole number, at least 3"),
        (9, {"n_ctx": 1025}, "n_ctx: found 1025, expected a whole number, at least 1 and at most 1024"),
        (9, {"n_ctx": 8.0}, "n_ctx: found 8.0"),
        (9, {"method": "gptq"}, "method: found 'gptq', expected one of papers, llama.cpp"),
        (9, {"stride": 0}, "stride: found 0, expected a whole number, at least 1"),
        (9, {"stride": 6, "n_ctx": 5}, "stride: found 6, expected a whole number, at least 1 and at most 5"),
        (9, {"stride": 5, "method": "llama.cpp"}, "stride: found 5 with the method llama.cpp, expected none"),
        (9, {"max_windows": 0}, "max_windows: found 0, expected a whole number, at least 1"),
    ],
    ids=str,
)
def test_options_out_of_range(runtime: Runtime, n_tokens: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as error:
        perplexity(runtime, TOKENS[:n_tokens], **options)
    assert str(error.value).startswith(message)


def test_tokens_that_the_model_has_not(runtime: Runtime) -> None:
    with pytest.raises(OptionError, match=rf"tokens\[1\]: found {VOCAB_SIZE}, expected"):
        perplexity(runtime, [0, VOCAB_SIZE, 0])


@pytest.mark.parametrize("method", METHODS)
def test_comparison_is_that_of_torch(exact: Runtime, reference: Reference, method: str) -> None:
    """With a model that likes some tokens more than this one does, whatever stands before them."""
    bonus = np.random.default_rng(1).normal(0, 3, VOCAB_SIZE)
    other = Scripted(VOCAB_SIZE, lambda tokens: reference.logits(tokens) + bonus)
    result = compare(exact, other, TOKENS, method=method, n_ctx=90)
    p_of_windows, q_of_windows, targets = [], [], []
    windows = windows_by_hand(method, 90)
    for tokens, first in windows:
        logits = torch.from_numpy(reference.logits(tokens))[first - 1 : -1].double()
        p_of_windows.append((logits + torch.from_numpy(bonus)).log_softmax(-1))
        q_of_windows.append(logits.log_softmax(-1))
        targets += tokens[first:]
    log_p, log_q = torch.cat(p_of_windows), torch.cat(q_of_windows)

    kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).numpy()
    np.testing.assert_allclose(result.kl_divergence, kl, rtol=0, atol=1e-4)
    assert result.mean_kl_divergence.value == pytest.approx(kl.mean(), rel=1e-5)
    assert kl.mean() > 0.1
    assert result.kl_quantile(0.5) == pytest.approx(np.median(kl), abs=1e-4)
    assert result.kl_quantile(0.99) == pytest.approx(np.percentile(kl, 99), abs=1e-4)
    assert result.kl_quantile(1) == pytest.approx(kl.max(), abs=1e-4)

    same = (log_p.argmax(-1) == log_q.argmax(-1)).numpy()
    np.testing.assert_array_equal(result.same_top, same)
    assert result.top_token_agreement.value == pytest.approx(same.mean(), abs=1e-12)
    assert 0.1 < same.mean() < 0.9

    theirs, ours = (-x[range(len(targets)), targets].numpy() for x in (log_p, log_q))
    np.testing.assert_allclose(result.reference.nll, theirs, rtol=0, atol=1e-4)
    np.testing.assert_allclose(result.model.nll, ours, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(result.model.nll, perplexity(exact, TOKENS, method=method, n_ctx=90).nll)
    ratio = math.exp(ours.mean() - theirs.mean())
    assert result.perplexity_ratio.value == pytest.approx(ratio, rel=1e-5)

    # Over windows, or over tokens, of which by this method each window has the same number.
    def standard_error(values: NDArray[np.floating]) -> float:
        independent = values if method == "llama.cpp" else values.reshape(len(windows), -1).mean(axis=1)
        return float(np.std(independent, ddof=1)) / math.sqrt(len(independent))

    for estimate, expected in (
        (result.mean_kl_divergence, standard_error(kl)),
        (result.top_token_agreement, standard_error(same)),
        (result.perplexity_ratio, ratio * standard_error(ours - theirs)),
    ):
        assert estimate.standard_error == pytest.approx(expected, rel=1e-4)


def test_beside_itself(runtime: Runtime, model: Path) -> None:
    with Runtime(model, device="cpu") as again:
        result = compare(runtime, again, TOKENS, n_ctx=300)
    assert not result.kl_divergence.any()
    assert result.mean_kl_divergence == Estimate(0.0, 0.0)
    assert result.top_token_agreement == result.perplexity_ratio == Estimate(1.0, 0.0)
    assert result.model.perplexity == result.reference.perplexity


def test_the_windows_so_far(runtime: Runtime, model: Path) -> None:
    windows = ScoredWindows.of(TOKENS, 200)
    results = list(running_comparison(runtime, runtime, windows))
    assert [result.model.n_windows for result in results] == [1, 2, 3, 4, 5]
    for n, result in enumerate(results, 1):
        expected = perplexity(runtime, TOKENS, n_ctx=200, max_windows=n)
        assert result.model.perplexity == result.reference.perplexity == expected.perplexity


def test_vocabularies_of_different_sizes(runtime: Runtime) -> None:
    other = Scripted(5, lambda tokens: np.zeros((len(tokens), 5)))
    message = f"reference: found a vocabulary of 5 tokens, expected the model's {VOCAB_SIZE}"
    with pytest.raises(OptionError, match=message):
        compare(runtime, other, TOKENS)


def test_what_float32_has_not() -> None:
    """Probabilities of 1 - 2e-9 and of e^-800, and how far two models with these are from each other."""
    windows = ScoredWindows.of([0] * 100 + [1], 101)
    sure = Scripted(2, lambda tokens: np.tile([20.0, 0.0], (len(tokens), 1)))
    surer = Scripted(2, lambda tokens: np.tile([800.0, 0.0], (len(tokens), 1)))
    (result,) = running_perplexity(sure, windows)
    p = 1 / (1 + math.exp(20))
    np.testing.assert_allclose(result.nll, [-math.log1p(-p)] * 99 + [-math.log(p)], rtol=1e-6)
    (result,) = running_perplexity(surer, windows)
    np.testing.assert_array_equal(result.nll, [0.0] * 99 + [800.0])
    assert result.perplexity.value == math.exp(8)
    (comparison,) = running_comparison(surer, sure, windows)
    expected = p * (math.log(p) + 800) + (1 - p) * math.log1p(-p)
    np.testing.assert_allclose(comparison.kl_divergence, expected, rtol=1e-6)


def test_a_perplexity_past_all_floats() -> None:
    hopeless = Scripted(2, lambda tokens: np.tile([1e30, 0.0], (len(tokens), 1)))
    (result,) = running_perplexity(hopeless, ScoredWindows.of([1, 1, 1], 3))
    assert result.mean_nll.value == pytest.approx(1e30)
    assert result.perplexity.value == math.inf


def test_a_vocabulary_larger_than_a_block() -> None:
    n_vocab = 200_000
    uniform = Scripted(n_vocab, lambda tokens: np.zeros((len(tokens), n_vocab)))
    (result,) = running_comparison(uniform, uniform, ScoredWindows.of([0, 7, n_vocab - 1], 3))
    np.testing.assert_allclose(result.model.nll, math.log(n_vocab), rtol=1e-12)
    assert not result.kl_divergence.any()


def test_bos_only_where_the_tokenizer_adds_it(
    runtime: Runtime, changed_model: Callable[[dict[str, dict[str, Any]]], Path]
) -> None:
    assert windows_of(runtime, TOKENS, method="llama.cpp").bos == runtime.bos_token == BOS
    assert windows_of(runtime, TOKENS, method="papers").bos is None
    with Runtime(changed_model({"tokenizer.json": {"post_processor": None}}), device="cpu") as without:
        assert without.tokenize("the")[0] != BOS
        windows = windows_of(without, TOKENS, method="llama.cpp")
    assert windows.bos is None
    assert [window for window, _ in windows] == [TOKENS]
