"""Log-probabilities against numpy in float64."""

from pathlib import Path

import numpy as np
import pytest
from feeding import all_logits
from numpy.typing import NDArray
from tiny_gguf import KEYS, N_VOCAB, tensors, write, write_tiny

from vptq_runtime import _native
from vptq_runtime.errors import OptionError

TOKENS = [1, 5, 9, 2, 6, 3]


def make(path: Path, device: str) -> _native.Context:
    return _native.Context(_native.Model(str(path)), device=device, n_ctx=64, n_threads=2, kv_type="f32")


@pytest.fixture
def context(device: str, tmp_path: Path) -> _native.Context:
    return make(write_tiny(tmp_path / "model.gguf"), device)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    largest = x.max(-1, keepdims=True)
    return x - largest - np.log(np.exp(x - largest).sum(-1, keepdims=True))


def check(context: _native.Context, feed: int, tokens: list[int], n_top: int) -> None:
    """Of the batch that came to its end last."""
    expected = log_softmax(context.logits(feed))
    found, top = context.log_probs(feed, tokens, n_top)
    assert len(found) == len(top) == len(tokens)
    for row, token, log_prob, best in zip(expected, tokens, found, top, strict=False):
        assert abs(log_prob - row[token]) < 1e-12 * max(1, abs(row[token]))
        order = np.lexsort((np.arange(row.size), -row))[:n_top]
        assert [each for each, _ in best] == order.tolist()
        assert np.allclose([each for _, each in best], row[order], rtol=1e-12, atol=1e-12)
        assert all(each == log_prob for other, each in best if other == token)  # the very same number


@pytest.mark.parametrize("n_vocab", [2, 15, 16, 17, 255, 257, 5000])
def test_as_numpy(device: str, tmp_path: Path, n_vocab: int) -> None:
    context = make(write_tiny(tmp_path / "model.gguf", n_vocab=n_vocab), device)
    tokens = [token % n_vocab for token in TOKENS]
    context.forward([context.new_sequence()], [tokens], [], ["all"])
    for n_top in (0, 1, 5, 64):
        check(context, 0, tokens, n_top)
        check(context, 0, tokens[:2], n_top)
    check(context, 0, [], 1)


def test_equal_and_extreme_logits(device: str, tmp_path: Path) -> None:
    """Rows of the embedding that are there twice; logits of some ten thousands."""
    arrays = tensors()
    embedding = arrays["token_embd.weight"]
    embedding[20:] = embedding[:20]
    embedding *= 1000
    context = make(write(tmp_path / "model.gguf", KEYS, arrays), device)
    logits = all_logits(context, context.new_sequence(), TOKENS)
    assert np.abs(logits).max() > 1e4 and np.array_equal(logits[:, 20:], logits[:, :20])
    for n_top in (1, 2, 7, 40):
        check(context, 0, TOKENS, n_top)


def test_the_same_in_company(context: _native.Context) -> None:
    context.forward([context.new_sequence()], [TOKENS], [True], ["all"])
    alone = context.log_probs(0, TOKENS, 5)
    sequences = [context.new_sequence() for _ in range(4)]
    context.forward(
        sequences, [[7], TOKENS, [1, 2], [3]], [False, True, True, False], ["all", "all", "none", "last"]
    )
    assert context.log_probs(1, TOKENS, 5) == alone
    check(context, 0, [4], 3)
    check(context, 3, [N_VOCAB - 1], 3)


def test_what_is_out_of_range(context: _native.Context) -> None:
    sequences = [context.new_sequence(), context.new_sequence()]
    context.forward(sequences, [[1, 2], [3]], [], ["all", "none"])
    for n_top in (-1, 65):
        with pytest.raises(OptionError, match=f"^n_top: found {n_top}, expected 0 to 64$"):
            context.log_probs(0, [1], n_top)
    for token in (-1, N_VOCAB):
        with pytest.raises(OptionError, match=f"^token {token}, expected 0 to {N_VOCAB - 1}$"):
            context.log_probs(0, [1, token], 1)
    with pytest.raises(OptionError, match=r"^feed 0: found 3 tokens, expected at most one for each "):
        context.log_probs(0, [1, 2, 3], 1)
    with pytest.raises(OptionError, match=r"^feed 1: found 1 tokens, expected at most one for each "):
        context.log_probs(1, [1], 1)
    with pytest.raises(OptionError, match=r"^feed 2, expected 0 to 1$"):
        context.log_probs(2, [1], 1)
