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
COPY = 4  # tokens of a match from which on a text is taken for a copy
PATIENCE = 6  # tokens without such a match after which it is one no longer
NEAR = 4  # tokens around a copy's place in which it is looked for again
# By the length of the match. 0: of a copy behind a change; what follows there counts as a match of COPY.
PRIOR = ((0, 0.4), (2, 0.2), (3, 0.3), (4, 0.45), (6, 0.6), (10, 0.75), (20, 0.85))


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
        self._made: list[int] = []  # they,
        self._n_for: list[int] = []  # and the length of the match that spoke for each
        self._source = 0  # the place that they were copied from; 0: there are none
        self._copied = -PATIENCE  # the place that the latest match of COPY tokens spoke for

    def draft(self, ids: Sequence[int], most: int) -> Drafts:
        """At most so many tokens that may follow ids, which go on from those of the call before."""
        self._right.learn(ids, self._at, self._n_for, self._made)
        self._index(ids)
        place, match = self._longest_match(ids)
        if match >= COPY:
            self._copied = len(ids)
        elif len(ids) - self._copied < PATIENCE:
            place, match = self._behind_change(ids)
        # A match that reaches to the end repeats itself: what it says goes on with what it has said.
        made: list[int] = []
        for at in range(place, place + most if place else place):
            made.append(ids[at] if at < len(ids) else made[at - len(ids)])
        first = match or COPY
        self._n_for = [match, *range(first + 1, first + len(made))]
        self._at, self._made, self._source = len(ids), made, place
        return Drafts(made, [self._right.probability(n) for n in self._n_for[: len(made)]])

    def _behind_change(self, ids: Sequence[int]) -> tuple[int, int]:
        """Where a copy goes on behind tokens that were put for others, and the length of the match there.

        Where the same token stands near; or else so many tokens on as have come.
        """
        if not self._source:
            return 0, 0
        source = self._source + len(ids) - self._at
        for place in sorted(range(source - NEAR, source + NEAR + 1), key=lambda place: abs(place - source)):
            if N <= place < len(ids) and ids[place - 1] == ids[-1]:
                return place, N if ids[place - 2] == ids[-2] else 0
        return (source, 0) if source < len(ids) else (0, 0)

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
