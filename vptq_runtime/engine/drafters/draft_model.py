"""Drafts by a small model with the same tokens, on a context of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vptq_runtime.engine.speculation import Drafts, RightSoFar
from vptq_runtime.engine.step_costs import StepCosts
from vptq_runtime.errors import VPTQError

if TYPE_CHECKING:
    from vptq_runtime.engine.batch import Context
    from vptq_runtime.engine.request import Request

MOST_DRAFTS = 8  # of a request in a step: each takes a step of the small model
PROBE_EVERY = 32  # steps without drafts, after which one draft shows whether they would be right by now
PRIOR = ((0, 0.7),)


class DraftModel:
    """A small model that drafts for requests of another one, in that one's thread.

    Each request has a sequence in the context, which is cut back to what became of its drafts and goes on
    from there. Drafts are drawn with the random numbers that the tokens themselves will be drawn with: two
    models that agree draw the same token more often so than with numbers of their own.

    n_vocab: ids from there on are not this model's.
    clock: seconds, for what its steps take.
    """

    def __init__(self, context: Context, n_vocab: int, clock: Callable[[], float]) -> None:
        self._context = context
        self._n_vocab = n_vocab
        self._clock = clock
        self._costs = StepCosts(context.n_layer)
        self._right = RightSoFar(PRIOR)
        self._n_without = 0  # steps since the last draft
        self._texts: dict[Request, DraftedText] = {}

    def draft(self, requests: Sequence[Request], most: Sequence[int], costs: StepCosts) -> list[Drafts]:
        texts = [self._texts.setdefault(request, DraftedText(request)) for request in requests]
        try:
            ready = [text for text, n in zip(texts, most, strict=True) if self._catch_up(text, n)]
            self._draw(ready, self._n_drafts(len(ready), costs))
        except VPTQError:  # no memory, say: what was asked for can be done without
            for request in requests:
                self.end(request)
            return [Drafts([], []) for _ in requests]
        probability = self._right.probability(0)
        return [Drafts(text.drafts, [probability] * len(text.drafts)) for text in texts]

    def end(self, request: Request) -> None:
        text = self._texts.pop(request, None)
        if text is not None and text.sequence >= 0:
            self._context.free_sequence(text.sequence)

    def _catch_up(self, text: DraftedText, most: int) -> bool:
        """Brings a sequence to where its request is, but for what a draft feeds; False: it takes longer, or
        drafts are of no use."""
        ids = text.request.ids
        self._right.learn(ids, text.n_ids, [0] * len(text.drafts), text.drafts)
        text.drafts, text.most = [], min(most, MOST_DRAFTS, self._context.n_ctx - len(ids))
        n_right = text.n_right()
        if n_right < len(text.fed):
            self._context.truncate(text.sequence, n_right)
            del text.fed[n_right:]
        if text.most < 1 or any(token >= self._n_vocab for token in ids[n_right:]):
            return False
        if text.sequence < 0:
            text.sequence = self._context.new_sequence()
        if len(ids) - n_right > 1 + MOST_DRAFTS:
            piece = ids[n_right : len(ids) - 1][: self._context.n_batch]
            self._context.forward([text.sequence], [piece], [True], ["none"])
            text.fed += piece
        return len(ids) - len(text.fed) <= 1 + MOST_DRAFTS

    def _n_drafts(self, n_requests: int, costs: StepCosts) -> int:
        """As many as bring the most tokens for the time of both models' steps."""
        if n_requests == 0:
            return 0
        probability = self._right.probability(0)
        best, n_best, tokens, right = 1 / costs.step(n_requests), 0, 1.0, 1.0
        for n in range(1, MOST_DRAFTS + 1):
            right *= probability
            tokens += right
            seconds = costs.step(n_requests * (n + 1)) + n * self._costs.step(n_requests)
            if tokens / seconds > best:
                best, n_best = tokens / seconds, n
        self._n_without = 0 if n_best else self._n_without + 1
        return n_best or int(not self._costs.knows_step() or self._n_without % PROBE_EVERY == 0)

    def _draw(self, texts: Sequence[DraftedText], n_drafts: int) -> None:
        """Makes the drafts of all texts, one more for each in every step of the small model."""
        for text in texts:
            text.n_ids = len(text.request.ids)
        samplers = {text: text.request.draft_sampler(text.request.n_sampled) for text in texts}
        for _ in range(n_drafts):
            going = [text for text in texts if len(text.drafts) < text.most]
            feeds = [text.lacking() for text in going]
            n_tokens = sum(map(len, feeds))
            if not going or n_tokens > self._context.n_batch:
                break
            begin = self._clock()
            its = [samplers[text] for text in going]
            sequences = [text.sequence for text in going]
            self._context.forward(sequences, feeds, [False] * len(going), ["last"] * len(going), its)
            drawn = self._context.sample(its)
            self._costs.saw_step(n_tokens, self._clock() - begin)
            for text, feed, tokens in zip(going, feeds, drawn, strict=True):
                text.fed += feed
                text.drafts += tokens


class DraftedText:
    """One request's sequence in the context of a DraftModel."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.sequence = -1
        self.fed: list[int] = []  # the tokens in the sequence: the request's, and drafts behind them
        self.most = 0  # drafts that are of use in this step
        self.drafts: list[int] = []  # the latest,
        self.n_ids = 0  # made when the request had so many tokens

    def n_right(self) -> int:
        """How many tokens of the sequence are the request's; the last one is fed again, for its logits."""
        ids, fed = self.request.ids, self.fed
        n = min(self.n_ids, len(fed))  # those were
        while n < min(len(fed), len(ids)) and fed[n] == ids[n]:
            n += 1
        return min(n, len(ids) - 1)

    def lacking(self) -> list[int]:
        """What the sequence lacks of the request's tokens and the drafts so far."""
        n = len(self.fed)
        return self.request.ids[n:] + self.drafts[max(0, n - len(self.request.ids)) :]
