"""What a sampler makes of the tokens before: penalties, bias, bans, masks; and that it can go on anywhere."""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vptq_runtime import _native
from vptq_runtime.errors import OptionError

GREEDY: dict[str, Any] = dict(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0, seed=0)
FILTERS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 3.0, "top_k": 5},
    {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 1000},
]
N_VOCAB = 500
BIAS = {3: 2.5, 77: -4.0, 78: 1e300, 79: -1e300, N_VOCAB: 9.0, -1: 9.0}
END_TOKENS = [78, 3, 200, N_VOCAB + 3]
ADJUSTMENTS: list[dict[str, Any]] = [
    {},
    *({"repeat_penalty": penalty} for penalty in (1.3, 0.7, 1e30)),
    {"presence_penalty": 0.8},
    {"frequency_penalty": 0.3},
    {"presence_penalty": -0.5, "frequency_penalty": -0.1},
    {"logit_bias": BIAS},
    {"min_tokens": 20, "end_tokens": END_TOKENS},
    {
        "repeat_penalty": 1.1,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.1,
        "logit_bias": BIAS,
        "min_tokens": 30,
        "end_tokens": END_TOKENS,
    },
]


def bits(allowed: Iterable[int], n_vocab: int = N_VOCAB) -> NDArray[np.int32]:
    mask = np.zeros((n_vocab + 31) // 32, np.uint32)
    for token in allowed:
        mask[token // 32] |= np.uint32(1 << token % 32)
    return mask.view(np.int32)


@dataclass
class Slow:
    """The adjusted logits, the slow way; -inf is banned."""

    options: dict[str, Any]
    window: deque[int] = field(default_factory=lambda: deque(maxlen=64))
    generated: list[int] = field(default_factory=list)

    def accept(self, tokens: Sequence[int], generated: bool = False) -> None:
        self.window += tokens
        if generated:
            self.generated += tokens

    def adjusted(
        self, logits: NDArray[np.float32], mask: NDArray[np.int32] | None = None
    ) -> NDArray[np.float32]:
        out = logits.astype(np.float64)
        tokens = range(logits.size)
        for token in set(self.window) & set(tokens):
            penalty = float(np.float32(self.options.get("repeat_penalty", 1.0)))
            out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
        for token, count in Counter(self.generated).items():
            presence, frequency = (self.options.get(f"{p}_penalty", 0.0) for p in ("presence", "frequency"))
            out[token] -= presence + frequency * count
        for token, bias in self.options.get("logit_bias", {}).items():
            if token in tokens:
                out[token] += bias
        largest = np.finfo(np.float32).max
        found = out.clip(-largest, largest).astype(np.float32)
        allowed = np.full(logits.size, True)
        if mask is not None:
            allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[: logits.size].astype(bool)
        ends = [t for t in self.options.get("end_tokens", []) if t in tokens]
        if len(self.generated) < self.options.get("min_tokens", 0) and set(np.flatnonzero(allowed)) - set(
            ends
        ):
            allowed[ends] = False
        found[~allowed] = -np.inf
        return found


def draw_adjusted(sampler: _native.Sampler, adjusted: NDArray[np.float32]) -> int:
    """With a sampler that adjusts nothing, among the tokens that are not banned."""
    allowed = np.flatnonzero(adjusted > -np.inf)
    return int(allowed[sampler.sample(adjusted[allowed])])


@pytest.mark.parametrize("adjustments", ADJUSTMENTS)
@pytest.mark.parametrize("filters", [*FILTERS, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.7}])
def test_as_the_slow_way(filters: dict[str, Any], adjustments: dict[str, Any]) -> None:
    """All logits, with a mask or without, and where there is a top_k, candidates."""
    rng = np.random.default_rng(1)
    options = GREEDY | filters | {"seed": 5}
    sampler, by_candidates = (_native.Sampler(**options | adjustments) for _ in range(2))
    slow, plain = Slow(adjustments), _native.Sampler(**options)
    for each in (sampler, by_candidates, slow):
        each.accept([-1, N_VOCAB - 1, N_VOCAB, 2**31 - 1])
    for step in range(60):
        logits = (2 * rng.normal(size=N_VOCAB)).astype(np.float32)
        if step % 2:  # many ties, 0 and -0 among them
            logits = np.round(logits)
        mask = None if step % 3 else bits(rng.choice(N_VOCAB, size=[200, 5][step % 2], replace=False))
        expected = draw_adjusted(plain, slow.adjusted(logits, mask))
        found = sampler.sample(logits, mask)
        assert found == expected
        if mask is None and by_candidates.n_candidates:
            assert from_candidates(by_candidates, logits, rng) == expected
        else:
            by_candidates.accept([expected], generated=True)
        slow.accept([expected], generated=True)


def from_candidates(sampler: _native.Sampler, logits: NDArray[np.float32], rng: np.random.Generator) -> int:
    """What sample(logits) is to draw: from the logits that the sampler asks for, in any order."""
    largest = np.lexsort((np.arange(logits.size), -logits))[: sampler.n_candidates]
    adjusted = [token for token in sampler.adjusted_tokens if 0 <= token < logits.size]
    tokens = rng.permutation([*largest.tolist(), *adjusted]).tolist()
    return sampler.sample_candidates(tokens, logits[tokens].tolist())


def test_how_many_candidates() -> None:
    def sampler(**options: Any) -> _native.Sampler:
        return _native.Sampler(**GREEDY | {"temperature": 1.0} | options)

    assert sampler().n_candidates == sampler(repeat_penalty=1.1).n_candidates == 0  # all
    assert sampler(temperature=0.0).n_candidates == sampler(top_k=1).n_candidates == 1
    penalised = sampler(top_k=40, repeat_penalty=1.1, logit_bias={7: 1.0}, end_tokens=[2], min_tokens=1)
    assert (penalised.n_candidates, penalised.adjusted_tokens) == (42, [2, 7])
    penalised.accept(range(100))
    assert penalised.adjusted_tokens == [2, 7, *range(36, 100)]
    penalised.accept([7], generated=True)
    assert penalised.adjusted_tokens == [7, *range(37, 100)]
    assert penalised.n_candidates == 40 + 64
    counting = sampler(top_k=1, presence_penalty=0.1)
    counting.accept([5, 6])
    counting.accept([8, 7, 8], generated=True)
    assert counting.adjusted_tokens == [7, 8]


def test_repeat_penalty_looks_at_prompts_the_others_do_not() -> None:
    logits = np.array([2.0, 1.9], np.float32)
    for penalty, expected in (("repeat_penalty", 1), ("presence_penalty", 0), ("frequency_penalty", 0)):
        sampler = _native.Sampler(**GREEDY | {penalty: 1.5})
        sampler.accept([0])
        assert sampler.sample(logits) == expected
        sampler = _native.Sampler(**GREEDY | {penalty: 1.5})
        sampler.accept([0], generated=True)
        assert sampler.sample(logits) == 1


def test_generated_tokens_are_counted_without_end() -> None:
    """Not those of a window only."""
    sampler = _native.Sampler(**GREEDY | {"presence_penalty": 1.0})
    sampler.accept([0, *range(2, 200)], generated=True)
    logits = np.zeros(200, np.float32)
    logits[0] = 0.5
    assert sampler.sample(logits) == 1


def test_frequency_grows_with_each_one() -> None:
    logits = np.array([1.0, 0.0], np.float32)
    sampler = _native.Sampler(**GREEDY | {"frequency_penalty": 0.3})
    assert [sampler.sample(logits) for _ in range(8)] == [
        0,
        0,
        0,
        0,
        1,
        0,
        1,
        0,
    ]  # 1, .7, .4, .1 | -.2 to 0, ...


def test_min_tokens() -> None:
    logits = np.array([3.0, 2.0, 1.0], np.float32)
    sampler = _native.Sampler(**GREEDY | {"min_tokens": 3, "end_tokens": [1, 0, 99, -5]})
    sampler.accept([0, 1, 2])  # a prompt's do not count
    assert [sampler.sample(logits) for _ in range(4)] == [2, 2, 2, 0]


def test_a_mask_wins_over_min_tokens() -> None:
    logits = np.array([3.0, 2.0, 1.0], np.float32)
    sampler = _native.Sampler(**GREEDY | {"min_tokens": 3, "end_tokens": [0, 1]})
    assert sampler.sample(logits, bits([0, 2], 3)) == 2
    assert sampler.sample(logits, bits([1], 3)) == 1
    assert sampler.sample(logits, bits([0, 1], 3)) == 0


def test_nothing_is_left() -> None:
    logits = np.array([3.0, 2.0, 1.0], np.float32)
    sampler = _native.Sampler(**GREEDY)
    beyond = np.array([-8], np.int32)  # bits of tokens 3 and more, that the model does not have
    for mask in (bits([], 3), beyond):
        with pytest.raises(OptionError, match="found no token to draw from, expected one that is not banned"):
            sampler.sample(logits, mask)
    assert sampler.n_generated == 0
    sampler = _native.Sampler(**GREEDY | {"min_tokens": 1, "end_tokens": [0, 1, 2]})
    for sample in (
        lambda: sampler.sample(logits),
        lambda: sampler.sample_candidates([0, 1, 2], logits.tolist()),
    ):
        with pytest.raises(OptionError, match="found no token to draw from"):
            sample()


@pytest.mark.parametrize("n_words", [0, 1, 3])
def test_masks_of_another_size(n_words: int) -> None:
    with pytest.raises(OptionError, match=r"^mask: found (\d|no) words, expected "):
        _native.Sampler(**GREEDY).sample(np.zeros(40, np.float32), np.full(n_words, -1, np.int32))


@pytest.mark.parametrize("n_vocab", [1, 31, 32, 33, 64, 1000])
def test_only_what_the_mask_allows(n_vocab: int) -> None:
    rng = np.random.default_rng(n_vocab)
    for options in ({"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}, {}):
        sampler = _native.Sampler(**GREEDY | options)
        for _ in range(50):
            allowed = rng.choice(n_vocab, size=rng.integers(1, n_vocab + 1), replace=False)
            assert (
                sampler.sample(rng.normal(size=n_vocab).astype(np.float32), bits(allowed, n_vocab)) in allowed
            )


@pytest.mark.parametrize("n", [1, 2, 64, 65, 300])
def test_it_goes_on_anywhere(n: int) -> None:
    """A new sampler with the tokens so far draws what the first one went on with."""
    options = GREEDY | {"temperature": 1.0, "seed": 2**63 + 1} | ADJUSTMENTS[-1]
    rng = np.random.default_rng(0)
    all_logits = rng.normal(size=(n + 20, N_VOCAB)).astype(np.float32)
    first = _native.Sampler(**options)
    first.accept([1, 2, 3])
    tokens = [first.sample(logits) for logits in all_logits]
    second = _native.Sampler(**options)
    second.accept([1, 2, 3])
    second.accept(tokens[: n // 2], generated=True)
    for token in tokens[n // 2 : n]:
        second.accept([token], generated=True)
    assert second.n_generated == n
    assert [second.sample(logits) for logits in all_logits[n:]] == tokens[n:]
    assert second.n_generated == first.n_generated == n + 20


def test_a_greedy_token_is_a_draw() -> None:
    sampler = _native.Sampler(**GREEDY)
    for n in range(3):
        assert sampler.n_generated == n
        sampler.sample(np.zeros(5, np.float32))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("presence_penalty", float("nan")),
        ("frequency_penalty", float("inf")),
        ("min_tokens", -1),
        ("logit_bias", {4: float("inf")}),
        ("logit_bias", {4: float("nan")}),
    ],
)
def test_options_out_of_range(option: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"^{option}: found [-a-z0-9.]+, expected a number"):
        _native.Sampler(**GREEDY | {option: value})
