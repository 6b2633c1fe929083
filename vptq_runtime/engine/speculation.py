"""Guesses at the next tokens, so that one step computes several of them.

Guesses, "drafts", are fed as generated tokens; then each token is drawn from its own logits, with the random
number that it would have had, and a draft was right if it is that token. So the text is the same without
them. This is about which drafts pay: a step of more tokens takes longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from vptq_runtime.engine.step_costs import StepCosts

if TYPE_CHECKING:
    from vptq_runtime.engine.request import Request

MOST_DRAFTS = 31  # of a request in a step
LEAST_GAIN = 1.02  # what drafts are expected to win, that they are worth their trouble
FORCED = 0.98  # how likely a token that a grammar forces is right: it may be spelt in several ways


class Drafts(NamedTuple):
    """Tokens, and how likely each is right, given that those before it are."""

    tokens: list[int]
    probabilities: list[float]


class Drafter(Protocol):
    """Who makes the drafts of one request."""

    def draft(self, ids: Sequence[int], most: int) -> Drafts:
        """At most so many tokens that may follow; ids: all tokens of the request so far."""


class Speculator:
    """Drafts for all requests of a step, as many as pay.

    A step is worth the tokens that it is expected to bring, over its time: the likeliest drafts of all
    requests are taken, as long as they raise that.
    """

    def __init__(self, costs: StepCosts, n_batch: int) -> None:
        self._costs = costs
        self._n_batch = n_batch

    def drafts(self, requests: Sequence[Request], n_ctx: int) -> list[list[int]]:
        """For each request its drafts; each of them feeds one token besides."""
        made = [self._made(request, n_ctx) for request in requests]
        lengths = self._lengths([drafts.probabilities for drafts in made])
        return [drafts.tokens[:n] for drafts, n in zip(made, lengths, strict=True)]

    def _made(self, request: Request, n_ctx: int) -> Drafts:
        n_tokens = len(request.ids) - len(request.prompt)
        most = min(MOST_DRAFTS, request.max_tokens - n_tokens - 1, n_ctx - request.n_fed - 1)
        if most < 1 or request.drafter is None:
            return Drafts([], [])
        if request.constraint is not None:
            forced = request.constraint.forced(most)
            if forced:
                return Drafts(forced, [FORCED] * len(forced))
        drafts = request.drafter.draft(request.ids, most)
        if request.constraint is None:
            return drafts
        n = len(request.constraint.allowed(drafts.tokens))
        return Drafts(drafts.tokens[:n], drafts.probabilities[:n])

    def _lengths(self, probabilities: Sequence[Sequence[float]]) -> list[int]:
        """How many of each request's drafts to take."""
        # (how likely the draft and all before it are right, whose it is)
        gains: list[tuple[float, int]] = []
        for i, each in enumerate(probabilities):
            right = 1.0
            for probability in each:
                right *= probability
                gains.append((right, i))
        gains.sort(key=lambda gain: -gain[0])  # stable: of one request's the earlier ones first
        n = len(probabilities)
        del gains[max(0, self._n_batch - n) :]
        tokens = float(n)
        best, n_taken = LEAST_GAIN * tokens / self._costs.step(n), 0
        for n_drafts, (right, _) in enumerate(gains, 1):
            tokens += right
            worth = tokens / self._costs.step(n + n_drafts)
            if worth > best:
                best, n_taken = worth, n_drafts
        lengths = [0] * n
        for _, i in gains[:n_taken]:
            lengths[i] += 1
        return lengths


class NgramDrafter:
    """Drafts from the request's own text: what followed when it last went as it goes now.

    Where text is copied (an edit of code, a summary with quotes) that is mostly right, elsewhere seldom. How
    often it was right after a match of so many tokens is counted for each request, whether its drafts were
    fed or not.
    """

    N = 2  # least tokens of a match
    MOST_MATCH = 32  # a longer one says no more
    MOST_TRIED = 8  # places, the latest first, of which the longest match is taken
    PRIOR = ((2, 0.2), (3, 0.3), (4, 0.45), (6, 0.6), (10, 0.75), (20, 0.85))  # from so many tokens on
    PRIOR_WEIGHT = 4.0  # drafts that the prior counts as
    MEMORY = 64.0  # drafts after which the counts are halved: texts change

    def __init__(self) -> None:
        self._n_indexed = 0  # tokens whose n-grams are in the index
        self._last: dict[tuple[int, ...], int] = {}  # of an n-gram: the place behind its latest occurrence
        self._before: dict[int, int] = {}  # of such a place: the one before
        self._right = [p * self.PRIOR_WEIGHT for _, p in self.PRIOR]
        self._tried = [self.PRIOR_WEIGHT] * len(self.PRIOR)
        self._at = 0  # the place that the latest drafts were made for,
        self._match = 0  # the length of their match,
        self._made: list[int] = []  # and they

    def draft(self, ids: Sequence[int], most: int) -> Drafts:
        self._learn(ids)
        self._index(ids)
        place, match = self._longest_match(ids)
        self._at, self._match = len(ids), match
        # A match that reaches to the end repeats itself: what it says goes on with what it has said.
        made: list[int] = []
        for i in range(most if match else 0):
            at = place + i
            made.append(ids[at] if at < len(ids) else made[at - len(ids)])
        self._made = made
        return Drafts(made, [self._probability(match + i) for i in range(len(made))])

    def _learn(self, ids: Sequence[int]) -> None:
        """Looks which of the latest drafts were right."""
        for i, token in enumerate(self._made):
            if self._at + i >= len(ids):
                break
            bucket = self._bucket(self._match + i)
            right = ids[self._at + i] == token
            self._right[bucket] += right
            self._tried[bucket] += 1
            if self._tried[bucket] > self.MEMORY:
                self._right[bucket] /= 2
                self._tried[bucket] /= 2
            if not right:
                break

    def _index(self, ids: Sequence[int]) -> None:
        # The n-gram at the end is left out: it would match itself.
        for end in range(max(self._n_indexed, self.N), len(ids)):
            ngram = tuple(ids[end - self.N : end])
            if ngram in self._last:
                self._before[end] = self._last[ngram]
            self._last[ngram] = end
        self._n_indexed = max(self._n_indexed, len(ids))

    def _longest_match(self, ids: Sequence[int]) -> tuple[int, int]:
        """The place behind it, and its length; 0 for none."""
        place = self._last.get(tuple(ids[-self.N :]))
        best, longest = 0, 0
        for _ in range(self.MOST_TRIED):
            if place is None:
                break
            length = self.N
            most = min(self.MOST_MATCH, place)
            while length < most and ids[place - length - 1] == ids[-length - 1]:
                length += 1
            if length > longest:
                best, longest = place, length
            place = self._before.get(place)
        return best, longest

    def _probability(self, match: int) -> float:
        bucket = self._bucket(match)
        return self._right[bucket] / self._tried[bucket]

    def _bucket(self, match: int) -> int:
        bucket = 0
        while bucket + 1 < len(self.PRIOR) and match >= self.PRIOR[bucket + 1][0]:
            bucket += 1
        return bucket
