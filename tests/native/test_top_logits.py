"""The largest logits that a GPU finds, against sorting them all."""

import numpy as np
import pytest
from gpu import need_gpu
from numpy.typing import NDArray

from vptq_runtime import _native

pytestmark = pytest.mark.gpu


@pytest.fixture
def operations() -> _native.Operations:
    need_gpu()
    return _native.Operations("cuda", 1)


def largest(row: NDArray[np.float32], n: int) -> list[tuple[int, float]]:
    """Of equal ones, 0 and -0 among them, the lower tokens."""
    tokens = np.lexsort((np.arange(row.size), -row))[:n]
    return sorted((int(token), float(row[token])) for token in tokens)


def check(operations: _native.Operations, logits: NDArray[np.float32], n_largest: int) -> None:
    tokens = np.random.default_rng(0).integers(logits.shape[1], size=(len(logits), 3)).tolist()
    found = operations.top_logits(logits, n_largest, tokens)
    for row, row_tokens, row_found in zip(logits, tokens, found, strict=True):
        assert sorted(row_found[:n_largest]) == largest(row, n_largest)
        assert row_found[n_largest:] == [(token, row[token]) for token in row_tokens]


@pytest.mark.parametrize(
    ("n", "n_vocab", "n_largest"),
    [(1, 1, 1), (3, 5, 5), (2, 4096, 40), (2, 4097, 512), (9, 5000, 1), (1, 8192 + 3, 104), (1, 128256, 104)],
)
def test_largest(operations: _native.Operations, n: int, n_vocab: int, n_largest: int) -> None:
    rng = np.random.default_rng(n_vocab)
    check(operations, (10 * rng.normal(size=(n, n_vocab))).astype(np.float32), n_largest)


@pytest.mark.parametrize("n_largest", [1, 7, 300, 512])
def test_ties_go_to_the_lower_tokens(operations: _native.Operations, n_largest: int) -> None:
    rng = np.random.default_rng(n_largest)
    logits = rng.normal(size=(4, 9000))
    rows = [np.zeros(9000), np.copysign(0, logits[0]), np.round(logits[1]), -np.abs(np.round(3 * logits[2]))]
    check(operations, np.array(rows, np.float32), n_largest)


def test_extremes(operations: _native.Operations) -> None:
    """The largest and smallest numbers, subnormal ones, and neighbours."""
    info = np.finfo(np.float32)
    values = [0, 1, info.max, info.tiny, info.smallest_subnormal, np.nextafter(np.float32(1), np.float32(2))]
    values += [-value for value in values[1:]] + [-0.0]
    logits = np.random.default_rng(0).permutation(np.repeat(np.array(values, np.float32), 400))
    for n_largest in (1, 399, 401, 512):
        check(operations, logits[None], n_largest)
    check(operations, np.array([values], np.float32), len(values))


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_found(operations: _native.Operations, value: float) -> None:
    logits = np.random.default_rng(1).normal(size=(3, 9000)).astype(np.float32)
    logits[1, 8190] = value
    found = operations.top_logits(logits, 1, [[], [], []])
    assert [row[0][0] for row in found] == [logits[0].argmax(), 8190, logits[2].argmax()]
    assert not np.isfinite(found[1][0][1])
