"""Guesses at the next tokens, so that one step computes several of them.

Guesses, "drafts", are fed as generated tokens; then each token is drawn from its own logits, with the random
number that it would have had, and a draft was right if it is that token. So the text is the same without
them. This is about which drafts pay: a step of more tokens takes longer.
"""

from __future__ import annotations

from bisect import bisect_right
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
    """Who makes drafts, for any number of requests."""

    def draft(self, requests: Sequence[Request], most: Sequence[int], costs: StepCosts) -> list[Drafts]:
        """For each request at most so many tokens that may follow; costs: of the steps that they are for."""

    def end(self, request: Request) -> None:
        """Forgets a request, if it has drafted for it."""


class RightSoFar:
    """How often a draft was right, by how many tokens before it spoke for it.

    prior: (least tokens, probability) of each class of drafts, from 0 tokens on.
    """

    WEIGHT = 4.0  # drafts that the prior counts as
    MEMORY = 64.0  # drafts after which the counts are halved: texts change

    def __init__(self, prior: Sequence[tuple[int, float]]) -> None:
        self._least = [least for least, _ in prior]
        self._right = [probability * self.WEIGHT for _, probability in prior]
        self._tried = [self.WEIGHT] * len(prior)

    def probability(self, n_for: int) -> float:
        """That a draft is right for which so many tokens speak."""
        at = bisect_right(self._least, n_for) - 1
        return self._right[at] / self._tried[at]

    def learn(self, ids: Sequence[int], start: int, n_for: Sequence[int], drafts: Sequence[int]) -> None:
        """Compares drafts of ids[start:], fed or not, with what came; n_for: of each of them."""
        for draft, each, token in zip(drafts, n_for, ids[start : start + len(drafts)], strict=False):
            at = bisect_right(self._least, each) - 1
            self._right[at] += draft == token
            self._tried[at] += 1
            if self._tried[at] > self.MEMORY:
                self._right[at] /= 2
                self._tried[at] /= 2
            if draft != token:
                break


class Speculator:
    """Drafts for all requests of a step, as many as pay.

    A step is worth the tokens that it is expected to bring, over its time: the likeliest drafts of all
    requests are taken, as long as they raise that.
    """

    def __init__(self, costs: StepCosts, n_batch: int) -> None:
        self._costs = costs
        self._n_batch = n_batch

    def drafts(self, requests: Sequence[Request], n_ctx: int) -> list[list[int]]:
        """For each request its drafts, to be fed behind the one token that it feeds in any case."""
        most = [_most(request, n_ctx) for request in requests]
        made = [_forced(request, n) for request, n in zip(requests, most, strict=True)]
        by_drafter: dict[Drafter, list[int]] = {}
        for i, request in enumerate(requests):
            if request.drafter is not None and not made[i].tokens:
                by_drafter.setdefault(request.drafter, []).append(i)
        for drafter, its in by_drafter.items():
            try:
                drafts = drafter.draft([requests[i] for i in its], [most[i] for i in its], self._costs)
            except Exception:  # a draft model that has failed, or is closed: the text is the same without it
                for i in its:
                    requests[i].drafter = None
                continue
            for i, each in zip(its, drafts, strict=True):
                made[i] = _allowed(requests[i], each)
        lengths = self._lengths([drafts.probabilities for drafts in made])
        return [drafts.tokens[:n] for drafts, n in zip(made, lengths, strict=True)]

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


def _most(request: Request, n_ctx: int) -> int:
    """Drafts that can be of use to a request."""
    n_tokens = len(request.ids) - len(request.prompt)
    return max(0, min(MOST_DRAFTS, request.max_tokens - n_tokens - 1, n_ctx - request.n_fed - 1))


def _forced(request: Request, most: int) -> Drafts:
    """What a grammar leaves no choice about."""
    if request.drafter is None or request.constraint is None or most == 0:
        return Drafts([], [])
    tokens = request.constraint.forced(most)
    return Drafts(tokens, [FORCED] * len(tokens))


def _allowed(request: Request, drafts: Drafts) -> Drafts:
    """Drafts up to the first one that the request's grammar excludes."""
    if request.constraint is None:
        return drafts
    n = len(request.constraint.allowed(drafts.tokens))
    return Drafts(drafts.tokens[:n], drafts.probabilities[:n])
