"""The sampler: what each option keeps, and that a seed decides the rest."""

from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from vptq_runtime import _native
from vptq_runtime.errors import OptionError

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0, "seed": 0}
# Probabilities 0.5, 0.25, 0.125, ... of tokens 3, 1, 4, 0, 2, 5
LOGITS = np.log(np.array([1, 4, 0.5, 8, 2, 0.5], np.float32) / 16)


def draws(n: int, logits: NDArray[np.float32] = LOGITS, **options: float) -> Counter[int]:
    sampler = _native.Sampler(**(OFF | options))
    return Counter(sampler.sample(logits) for _ in range(n))


def test_greedy_takes_the_largest_and_of_equals_the_first() -> None:
    assert draws(3, temperature=0.0) == {3: 3}
    assert draws(1, np.array([1, 7, 7], np.float32), temperature=0.0) == {1: 1}


def test_draws_follow_the_probabilities() -> None:
    n = 20000
    found = draws(n)
    expected = np.exp(LOGITS.astype(np.float64))
    # Each count is binomial: five standard deviations.
    for token, p in enumerate(expected):
        assert abs(found[token] - n * p) < 5 * np.sqrt(n * p * (1 - p))


def test_temperature_sharpens() -> None:
    n = 20000
    weights = np.exp(LOGITS.astype(np.float64) / 0.5)
    p = weights[3] / weights.sum()
    assert abs(draws(n, temperature=0.5)[3] - n * p) < 5 * np.sqrt(n * p * (1 - p))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, {3}),
        ({"top_k": 3}, {3, 1, 4}),
        ({"top_p": 0.5}, {3}),
        ({"top_p": 0.51}, {3, 1}),
        ({"top_p": 0.875}, {3, 1, 4}),
        ({"min_p": 0.24}, {3, 1, 4}),
        ({"min_p": 1.0}, {3}),
        ({"top_k": 2, "min_p": 0.2}, {3, 1}),
        ({"top_k": 100}, {0, 1, 2, 3, 4, 5}),
    ],
)
def test_what_is_kept(options: dict[str, float], kept: set[int]) -> None:
    assert set(draws(2000, **options)) == kept


def test_filters_look_at_the_probabilities_before_temperature() -> None:
    assert set(draws(2000, temperature=5.0, top_p=0.51)) == {3, 1}


def test_repeat_penalty() -> None:
    """Divides positive logits, multiplies negative ones, once a token, of the last 64 only."""
    logits = np.array([2.0, 1.9, -1.0, -1.05], np.float32)
    sampler = _native.Sampler(**(OFF | {"temperature": 0.0, "repeat_penalty": 1.1}))
    sampler.accept([0, 0])
    assert sampler.sample(logits) == 1  # 2.0 / 1.1 < 1.9
    assert sampler.sample(logits) == 0  # both penalised
    sampler.accept([3] * 64)
    assert sampler.sample(logits) == 0  # forgotten
    negative = np.array([-1.0, -1.05], np.float32)
    sampler = _native.Sampler(**(OFF | {"temperature": 0.0, "repeat_penalty": 1.1}))
    assert [sampler.sample(negative) for _ in range(2)] == [0, 1]


def test_the_same_seed_draws_the_same() -> None:
    def sequence(seed: int) -> list[int]:
        sampler = _native.Sampler(**(OFF | {"seed": seed}))
        return [sampler.sample(LOGITS) for _ in range(50)]

    assert sequence(7) == sequence(7)
    assert sequence(7) != sequence(8)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repeat_penalty", 0.0),
        ("repeat_penalty", float("inf")),
    ],
)
def test_options_out_of_range(option: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"^{option}: found [-a-z0-9.]+, expected a number"):
        _native.Sampler(**(OFF | {option: value}))


@pytest.mark.parametrize("logits", [[], [1, np.nan], [np.inf, 0], [-np.inf]])
def test_logits_that_cannot_be_sampled(logits: list[float]) -> None:
    with pytest.raises(OptionError, match="expected finite numbers"):
        _native.Sampler(**OFF).sample(np.array(logits, np.float32))


def from_candidates(sampler: _native.Sampler, logits: NDArray[np.float32], rng: np.random.Generator) -> int:
    """What sample(logits) is to draw: from the logits that the sampler asks for, in any order."""
    largest = np.lexsort((np.arange(logits.size), -logits))[: sampler.n_candidates]
    penalised = [token for token in sampler.penalised_tokens if 0 <= token < logits.size]
    tokens = rng.permutation([*largest.tolist(), *penalised]).tolist()
    return sampler.sample_candidates(tokens, logits[tokens].tolist())


@pytest.mark.parametrize("repeat_penalty", [1.0, 1.3, 0.7, 1e30])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"top_k": 1},
        {"top_k": 5, "temperature": 3.0},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.02},
        {"top_k": 1000},
    ],
)
def test_candidates_draw_what_all_logits_draw(options: dict[str, float], repeat_penalty: float) -> None:
    rng = np.random.default_rng(1)
    for seed in range(4):
        a, b = (
            _native.Sampler(**(OFF | options | {"repeat_penalty": repeat_penalty, "seed": seed}))
            for _ in range(2)
        )
        for sampler in (a, b):
            sampler.accept([-1, 499, 500, 2**31 - 1])
        for _ in range(50):
            logits = rng.normal(size=500).astype(np.float32)
            if seed % 2:  # many ties, 0 and -0 among them
                logits = np.round(logits)
            assert a.sample(logits) == from_candidates(b, logits, rng)


def test_how_many_candidates() -> None:
    def n(**options: float) -> int:
        return _native.Sampler(**(OFF | options)).n_candidates

    assert n() == n(repeat_penalty=1.1) == 0  # all
    assert n(temperature=0.0) == n(top_k=1) == 1
    assert n(top_k=40, repeat_penalty=1.1) == 40 + 64


@pytest.mark.parametrize("logits", [[], [1, np.nan], [np.inf, 0], [-np.inf]])
def test_candidates_that_cannot_be_sampled(logits: list[float]) -> None:
    with pytest.raises(OptionError, match="expected finite numbers"):
        _native.Sampler(**OFF).sample_candidates(list(range(len(logits))), logits)
