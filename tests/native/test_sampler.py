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


# The draws of numpy in float64, the slow way.


def uniform(seed: int, n: int) -> float:
    words = _native.philox([n % 2**32, n >> 32, 0, 0], [seed % 2**32, seed >> 32])
    return ((words[1] << 32 | words[0]) >> 11) / 2**53


def slow_draw(logits: NDArray[np.float32], at: float, options: dict[str, float]) -> int:
    """From the likeliest on where there is a top_k, else in the order of the tokens."""
    x = logits.astype(np.float64)
    order = np.lexsort((np.arange(x.size), -x))
    order = order[: int(options["top_k"]) or None]
    p = np.exp(x[order] - x[order[0]])
    n = (
        1 + np.count_nonzero(np.cumsum(p)[:-1] < options["top_p"] * p.sum())
        if options["top_p"] < 1
        else p.size
    )
    order = order[: min(n, np.count_nonzero(p >= options["min_p"]))]
    if not options["top_k"]:
        order = np.sort(order)
    p = np.exp((x[order] - x.max()) / options["temperature"])
    return int(order[np.count_nonzero(np.cumsum(p) <= at * p.sum())])


@pytest.mark.parametrize("n_vocab", [1, 2, 15, 16, 17, 500, 40000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 300, "top_p": 0.8},
        {"top_p": 0.3},
        {"top_p": 0.97},
        {"min_p": 0.01},
        {"top_p": 0.9, "min_p": 0.2},
        {"top_k": 50, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_as_the_slow_way(filters: dict[str, float], temperature: float, n_vocab: int) -> None:
    rng = np.random.default_rng(n_vocab)
    options = OFF | filters | {"temperature": temperature, "seed": 2**40 + 7}
    sampler = _native.Sampler(**options)
    for n in range(20):
        logits = (3 * rng.normal(size=n_vocab)).astype(np.float32)
        if n % 4 == 0:  # many ties
            logits = np.round(logits)
        at = uniform(2**40 + 7, n)
        assert sampler.sample(logits) == slow_draw(logits, at, options)


def test_extreme_logits() -> None:
    """Weights that float32 does not hold are not drawn, and do no harm."""
    largest = float(np.finfo(np.float32).max)
    assert draws(50, np.array([-largest, largest, -largest], np.float32)) == {1: 50}
    assert draws(50, np.array([-largest, largest], np.float32), temperature=1e-30, top_p=0.5) == {1: 50}
    assert set(draws(200, np.array([largest, largest], np.float32), temperature=1e-30)) == {0, 1}
    assert set(draws(200, np.array([0, largest], np.float32), temperature=largest, top_k=2)) == {0, 1}


@pytest.mark.parametrize("logits", [[], [1, np.nan], [np.inf, 0], [-np.inf]])
def test_candidates_that_cannot_be_sampled(logits: list[float]) -> None:
    with pytest.raises(OptionError, match="expected finite numbers"):
        _native.Sampler(**OFF).sample_candidates(list(range(len(logits))), logits)
