"""Which tokens the context computes next, and for whom.

A round is a decode step of all requests that generate, then prompts for their share of the time. Prompts go
through the context a few layers at a time, so that a long one delays a decode step by a part of such a step
and still is computed in large batches. Pure Python over the interface `batch.Context`: nothing here knows of
threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from vptq_runtime.engine.batch import Batch, Context, Drawn, Feed
from vptq_runtime.engine.counters import Counters
from vptq_runtime.engine.places import MOST_PASSED_OVER, Places
from vptq_runtime.engine.prefix_cache import CacheMode, PrefixCache
from vptq_runtime.engine.request import Request
from vptq_runtime.engine.speculation import Speculator
from vptq_runtime.engine.step_costs import StepCosts
from vptq_runtime.errors import DeviceError, OutOfMemoryError
from vptq_runtime.generation import TokenLogprob

PREFILL_SHARE = 1 / 3  # of the time, for prompts, while others generate
MOST_BURST = 4 / 3  # of that share in one round, when some was left over before
LEAST_SLICE = 16  # tokens of prompts in a pass: fewer are hardly faster
IDLE_SECONDS = 0.05  # of a prompt's layers at once while nobody generates: how long a cancellation may take
MOST_TRIED = 64  # waiting requests that are tried for a pass


class Scheduler:
    """Requests on their way through one context.

    parallel: most requests that have a place in the context; the others wait.
    clock: seconds, for how time is shared.
    """

    def __init__(
        self,
        context: Context,
        clock: Callable[[], float],
        *,
        parallel: int,
        cache: CacheMode = "shared",
    ) -> None:
        self.context = context
        self._clock = clock
        self.cache = PrefixCache(context, cache)
        self.costs = StepCosts(context.n_layer)
        self.counters = Counters()
        self._speculator = Speculator(self.costs, context.n_batch)
        self._places = Places(context, self.cache, self.counters, clock, parallel)
        self.waiting = self._places.waiting
        self.active = self._places.active
        self._pass: Batch | None = None  # of prompts, under way
        self._layers_left = 0  # of it
        self._credit = 0.0  # seconds that prompts may still take
        self._changed: dict[Request, None] = {}  # in order

    def add(self, request: Request) -> None:
        """Puts a request into the queue."""
        request.arrived = self._clock()
        self.waiting.append(request)
        self._places.look_up(request)

    def cancel(self, request: Request) -> None:
        """Ends a request as it is; its place is free, or will be when the pass that it shares has ended."""
        if not request.ended:
            self._end(request)

    def cancel_all(self) -> None:
        """Ends all requests as they are."""
        for request in [*self.active, *self.waiting]:
            self._end(request)

    def give_up(self, error: BaseException) -> None:
        """Ends all requests with an error, and asks nothing more of the context: it may have failed."""
        for request in [*self.active, *self.waiting]:
            request.error, request.ended = error, True
            self._changed[request] = None
        self.active.clear()
        self.waiting.clear()

    def round(self) -> bool:
        """Does a round's work; False: there is none, until somebody adds, cancels or takes something."""
        seconds = self._decode()
        any_work = self._compute_prompts(seconds) or seconds is not None
        return any_work or any(not request.rests for request in self.active)

    def take_changed(self) -> list[Request]:
        """The requests that have news or have ended since this was asked last."""
        changed, self._changed = self._changed, {}
        return list(changed)

    # Decoding

    def _decode(self) -> float | None:
        """A decode step of all that generate; its seconds, None if nobody does."""
        begin = self._clock()
        feeds = self._decode_feeds()
        if not feeds:
            return None
        for group in _groups(feeds, self.context.n_batch):
            start = self._clock()
            there = [feed for feed in group if feed.request.sequence >= 0]  # one before may have cost some
            if there and self._run(Batch(there)):
                self.costs.saw_step(sum(len(feed.tokens) for feed in there), self._clock() - start)
            self.counters.decode_steps += 1
        return self._clock() - begin

    def _decode_feeds(self) -> list[Feed]:
        while True:
            running = [request for request in self.active if request.decodes]
            if self._places.make_room(sum(self._places.lacking(request, 1) for request in running)):
                break
            self._preempt_youngest(self._places.no_room())
        drafts = self._drafts(running)
        return [
            Feed(request, [request.ids[-1], *draft], False, "all", len(draft))
            for request, draft in zip(running, drafts, strict=True)
        ]

    def _drafts(self, running: Sequence[Request]) -> list[list[int]]:
        none: list[list[int]] = [[] for _ in running]
        try:
            drafts = self._speculator.drafts(running, self.context.n_ctx)
        except Exception:  # of a grammar, which fails again when the token comes; drafts only save time
            return none
        lacking = sum(self._places.lacking(r, 1 + len(d)) for r, d in zip(running, drafts, strict=True))
        return drafts if not any(drafts) or self._places.make_room(lacking) else none

    # Prompts

    def _compute_prompts(self, decode_seconds: float | None) -> bool:
        """Runs prompts for their share of a round's time, or for a moment if nobody generates.

        False: there is nothing to run.
        """
        if decode_seconds is None:
            budget, left, self._credit = None, IDLE_SECONDS, 0.0
        else:
            budget = decode_seconds * PREFILL_SHARE / (1 - PREFILL_SHARE)
            self._credit += budget
            left = min(self._credit, MOST_BURST * budget)  # seconds
        any_work = False
        while left > 0:
            if self._pass is None and not self._begin_pass(budget):
                self._credit = 0.0  # nothing is saved for prompts that are still to come
                break
            if self._pass is None:
                any_work = True
                continue  # it has failed: there may be others
            layer = self.costs.layer(self._pass.n_tokens)
            if budget is not None and layer > left and (any_work or layer > self._credit):
                return True  # it has to save for it
            any_work = True
            # Of what was never measured one layer is tried.
            known = self.costs.knows_layer(self._pass.n_tokens)
            seconds = self._advance(max(1, min(int(left / layer), self._layers_left)) if known else 1)
            left -= seconds
            self._credit -= seconds
        return any_work

    def _advance(self, n_layers: int) -> float:
        """Computes so many layers of the pass under way, and what follows its end; the seconds it took."""
        batch = self._pass
        assert batch is not None
        begin = self._clock()
        self._layers_left -= n_layers
        if not self._succeeds(batch, lambda: self.context.advance(n_layers)):
            return self._clock() - begin
        if self._layers_left == 0:
            self._pass = None
            self._settle(batch.feeds, batch.draw(self.context))
        seconds = self._clock() - begin
        if self._layers_left:  # the last layer computes fewer tokens, and the output more
            self.costs.saw_layers(batch.n_tokens, n_layers, seconds)
        return seconds

    def _begin_pass(self, budget: float | None) -> bool:
        """Chooses the prompts, or their pieces, of the next pass; False: there are none."""
        feeds = self._next_feeds(self._pass_size(budget))
        while feeds and not self._places.make_room(
            sum(self._places.lacking(feed.request, len(feed.tokens)) for feed in feeds)
        ):
            self._preempt_youngest(self._places.no_room())
            feeds = [feed for feed in feeds if feed.request.sequence >= 0]
        if not feeds:
            return False
        batch = Batch(feeds)
        if self._succeeds(batch, lambda: batch.begin(self.context)):
            self._pass = batch
            self._layers_left = self.context.n_layer
        return True

    def _pass_size(self, budget: float | None) -> int:
        """Tokens of a pass: as many as let a layer of it take no longer than the budget."""
        n = self.context.n_batch
        while budget is not None and n > LEAST_SLICE and self.costs.layer(n) > budget:
            n //= 2
        return n

    def _next_feeds(self, most: int) -> list[Feed]:
        """The prompt with the shortest rest first, but nobody is passed over too often."""
        feeds: list[Feed] = []
        left = most
        reserved = False  # for one that has been passed over too often: nobody else takes what it needs
        for request in self._in_order():
            if left == 0 or (feeds and (request.alone or feeds[0].request.alone)):
                break
            if request.sequence < 0 and (reserved or not self._gets_place(request)):
                reserved |= request.n_passed_over >= MOST_PASSED_OVER and request.waits_for is None
                continue
            if request.decodes:
                continue  # the cache had all the rest of it
            feed = Feed.next_of(request, self.context.n_batch if request.alone else left)
            feeds.append(feed)
            left = max(0, left - len(feed.tokens))
        self._count_passes(feeds)
        return feeds

    def _in_order(self) -> list[Request]:
        def key(request: Request) -> tuple[int, int]:
            if request.n_passed_over >= MOST_PASSED_OVER:
                return -1, request.number
            return request.n_rest - request.n_found, request.number

        candidates = [request for request in self.active if not request.decodes and not request.rests]
        if self._places.any_free:
            candidates += sorted(filter(_ready, self.waiting), key=key)[:MOST_TRIED]
        return sorted(candidates, key=key)

    def _gets_place(self, request: Request) -> bool:
        try:
            return self._places.take(request)
        except OutOfMemoryError as error:
            self._fail(request, error)
            return False

    def _count_passes(self, feeds: Sequence[Feed]) -> None:
        """A pass of those that came earlier than one in it, and are not in it."""
        chosen = {feed.request for feed in feeds}
        last = max((request.number for request in chosen), default=-1)
        for request in (*self.active, *filter(_ready, self.waiting)):
            if request.number < last and request not in chosen and not request.decodes and not request.rests:
                request.n_passed_over += 1

    # Losing a place

    def _preempt_youngest(self, error: OutOfMemoryError) -> None:
        """Takes the place of the request that came last; the only one there is ends with the error."""
        youngest = max(self.active, key=lambda request: request.number)
        if len(self.active) == 1 and not youngest.ended:
            self._fail(youngest, error)
            return
        self._abandon_pass_with(youngest)
        if youngest.sequence >= 0:
            self._places.give_way(youngest)

    def _leave(self, request: Request) -> None:
        """Takes the place of a request that has ended; where it shares a pass, when that has ended."""
        if self._pass is not None and not all(feed.request.ended for feed in self._pass.feeds):
            if any(feed.request is request for feed in self._pass.feeds):
                return
        else:
            self._abandon_pass_with(request)
        if request.sequence >= 0:
            self._places.leave(request)

    def _abandon_pass_with(self, request: Request) -> None:
        """What others have in the pass is computed again."""
        batch = self._pass
        if batch is None or all(feed.request is not request for feed in batch.feeds):
            return
        self.context.abandon()
        batch.drop()
        self._pass = None
        self._leave_ended(batch.feeds)

    def _leave_ended(self, feeds: Sequence[Feed]) -> None:
        for feed in feeds:
            if feed.request.ended and feed.request.sequence >= 0:
                self._places.leave(feed.request)

    # What came of it

    def _run(self, batch: Batch) -> bool:
        """A batch from beginning to end; False if it had to be done in another way."""
        if not self._succeeds(batch, lambda: batch.forward(self.context)):
            return False
        self._settle(batch.feeds, batch.draw(self.context))
        return True

    def _succeeds(self, batch: Batch, call: Callable[[], object]) -> bool:
        """Calls the context; what fails there ends the batch, and the request whose fault it is."""
        try:
            call()
        except DeviceError:
            raise
        except Exception as error:
            batch.drop()
            if batch is self._pass:
                self._pass = None
            self._leave_ended(batch.feeds)
            self._isolate([feed for feed in batch.feeds if not feed.request.ended], error)
            return False
        return True

    def _isolate(self, feeds: Sequence[Feed], error: Exception) -> None:
        """After a failure, which has changed nothing: finds whose it is, so that only that request ends."""
        if not feeds:
            return
        if isinstance(error, OutOfMemoryError):  # the machine has less than was promised
            self._preempt_youngest(error)
        elif len(feeds) == 1:
            self._fail(feeds[0].request, error)
        elif any(feed.prompt for feed in feeds):
            for feed in feeds:
                feed.request.alone = True
        else:
            for feed in feeds:
                if not feed.request.ended and feed.request.sequence >= 0:
                    self._run(Batch([feed]))

    def _settle(self, feeds: Sequence[Feed], drawn: Sequence[Drawn]) -> None:
        now = self._clock()
        self._leave_ended(feeds)
        for feed, (tokens, logprobs, error) in zip(feeds, drawn, strict=True):
            request = feed.request
            if request.ended:  # cancelled meanwhile
                continue
            n_right = len(feed.tokens)
            if feed.n_drafts and error is None:
                n_right -= 1 + feed.n_drafts - len(tokens)
                if n_right < len(feed.tokens):
                    self.context.truncate(request.sequence, request.n_fed + n_right)
            request.n_fed += n_right
            self.counters.prompt_tokens_computed += len(feed.tokens) * feed.prompt
            if error is not None:
                self._fail(request, error)
                continue
            if tokens:
                self._accept(feed, tokens, logprobs, now)
            if request.ended:
                continue
            self._places.publish(request)
            if request.rests:
                self._changed[request] = None
            if request.finish_reason or (request.max_tokens == 0 and not request.scored):
                request.finish_reason = request.finish_reason or "length"
                self._end(request)

    def _accept(self, feed: Feed, tokens: list[int], logprobs: list[TokenLogprob], now: float) -> None:
        request = feed.request
        try:
            n_taken = request.accept(tokens, logprobs, now)
        except Exception as error:  # of the tokenizer, or of a grammar that has become too complex
            self._fail(request, error)
            return
        self._changed[request] = None
        n_accepted = min(len(tokens) - 1, n_taken)  # right drafts that have become text
        request.n_drafted += feed.n_drafts
        request.n_accepted += n_accepted
        self.counters.generated_tokens += n_taken
        self.counters.drafted += feed.n_drafts
        self.counters.accepted += n_accepted

    def _fail(self, request: Request, error: Exception) -> None:
        request.error = error
        self._end(request)

    def _end(self, request: Request) -> None:
        request.ended = True
        if request.sequence >= 0:
            self._leave(request)
        else:
            self.waiting.remove(request)
        if request.drafter is not None:
            request.drafter.end(request)
        self._changed[request] = None


def _ready(request: Request) -> bool:
    """Whether a request that waits could have a place: nobody computes what it begins with, nor reads it."""
    return not request.rests and not (request.waits_for and request.waits_for.computing)


def _groups(feeds: Sequence[Feed], n_batch: int) -> Iterator[list[Feed]]:
    """As many together as the context takes at once."""
    group: list[Feed] = []
    n_tokens = 0
    for feed in feeds:
        if group and n_tokens + len(feed.tokens) > n_batch:
            yield group
            group, n_tokens = [], 0
        group.append(feed)
        n_tokens += len(feed.tokens)
    if group:
        yield group
