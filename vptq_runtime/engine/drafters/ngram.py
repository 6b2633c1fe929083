"""Drafts from a request's own text: what followed when it last went as it goes now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vptq_runtime.engine.speculation import Drafts, RightSoFar

if TYPE_CHECKING:
    from vptq_runtime.engine.request import Request
    from vptq_runtime.engine.step_costs import StepCosts

N = 2  # least tokens of a match
MOST_MATCH = 32  # a longer one says no more
MOST_TRIED = 8  # places, the latest first, of which the longest match is taken
PRIOR = ((0, 0.2), (3, 0.3), (4, 0.45), (6, 0.6), (10, 0.75), (20, 0.85))  # by the length of the match


class NgramDrafter:
    """Drafts for each request from its own tokens.

    Where text is copied (an edit of code, a summary with quotes) that is mostly right, elsewhere seldom: how
    often, is counted for each request, whether its drafts were fed or not.
    """

    def __init__(self) -> None:
        self._texts: dict[Request, NgramText] = {}

    def draft(self, requests: Sequence[Request], most: Sequence[int], costs: StepCosts) -> list[Drafts]:
        return [
            self._texts.setdefault(request, NgramText()).draft(request.ids, n)
            for request, n in zip(requests, most, strict=True)
        ]

    def end(self, request: Request) -> None:
        self._texts.pop(request, None)


class NgramText:
    """The n-grams of one text, and what became of the drafts for it."""

    def __init__(self) -> None:
        self._n_indexed = 0  # tokens whose n-grams are in the index
        self._last: dict[tuple[int, ...], int] = {}  # of an n-gram: the place behind its latest occurrence
        self._before: dict[int, int] = {}  # of such a place: the one before
        self._right = RightSoFar(PRIOR)
        self._at = 0  # the place that the latest drafts were made for,
        self._match = 0  # the length of their match,
        self._made: list[int] = []  # and they

    def draft(self, ids: Sequence[int], most: int) -> Drafts:
        """At most so many tokens that may follow ids, which go on from those of the call before."""
        self._right.learn(ids, self._at, self._match, self._made)
        self._index(ids)
        place, match = self._longest_match(ids)
        # A match that reaches to the end repeats itself: what it says goes on with what it has said.
        made: list[int] = []
        for at in range(place, place + most if match else place):
            made.append(ids[at] if at < len(ids) else made[at - len(ids)])
        self._at, self._match, self._made = len(ids), match, made
        return Drafts(made, [self._right.probability(match + i) for i in range(len(made))])

    def _index(self, ids: Sequence[int]) -> None:
        # The n-gram at the end is left out: it would match itself.
        for end in range(max(self._n_indexed, N), len(ids)):
            ngram = tuple(ids[end - N : end])
            if ngram in self._last:
                self._before[end] = self._last[ngram]
            self._last[ngram] = end
        self._n_indexed = max(self._n_indexed, len(ids))

    def _longest_match(self, ids: Sequence[int]) -> tuple[int, int]:
        """The place behind it, and its length; 0 for none."""
        place = self._last.get(tuple(ids[-N:]))
        best, longest = 0, 0
        for _ in range(MOST_TRIED):
            if place is None:
                break
            length, most = N, min(MOST_MATCH, place)
            while length < most and ids[place - length - 1] == ids[-length - 1]:
                length += 1
            if length > longest:
                best, longest = place, length
            place = self._before.get(place)
        return best, longest
