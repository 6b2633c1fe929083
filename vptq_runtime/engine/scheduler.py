"""Which tokens the context computes next, and for whom.

A round is a decode step of all requests that generate, then prompts for their share of the time. Prompts go
through the context a few layers at a time, so that a long one delays a decode step by a part of such a step
and still is computed in large batches. Pure Python over the interface `batch.Context`: nothing here knows of
threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vptq_runtime.engine.batch import Batch, Context, Drawn, Feed, Want
from vptq_runtime.engine.prefix_cache import Block, CacheMode, PrefixCache
from vptq_runtime.engine.request import Request
from vptq_runtime.engine.speculation import Speculator
from vptq_runtime.engine.step_costs import StepCosts
from vptq_runtime.errors import DeviceError, OutOfMemoryError
from vptq_runtime.generation import TokenLogprob

PREFILL_SHARE = 1 / 3  # of the time, for prompts, while others generate
MOST_BURST = 4 / 3  # of that share in one round, when some was left over before
MOST_PASSED_OVER = 8  # passes that shorter prompts get before a longer one
LEAST_SLICE = 16  # tokens of prompts in a pass: fewer are hardly faster
IDLE_SECONDS = 0.05  # of a prompt's layers at once while nobody generates: how long a cancellation may take
MOST_TRIED = 64  # waiting requests that a round looks up in the cache


@dataclass
class Counters:
    """What a scheduler has done so far."""

    prompt_tokens: int = 0  # of the prompts admitted
    prompt_tokens_cached: int = 0  # of these, that need not be computed
    prompt_tokens_computed: int = 0
    generated_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    preemptions: int = 0
    decode_steps: int = 0


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
        prefill_share: float = PREFILL_SHARE,
    ) -> None:
        self.context = context
        self._clock = clock
        self._parallel = parallel
        self._prefill_share = prefill_share
        self.cache = PrefixCache(context, cache)
        self.costs = StepCosts(context.n_layer)
        self.counters = Counters()
        self._speculator = Speculator(self.costs, context.n_batch)
        self.waiting: list[Request] = []
        self.active: list[Request] = []  # those that have a place
        self._pass: Batch | None = None  # of prompts, under way
        self._layers_left = 0  # of it
        self._credit = 0.0  # seconds that prompts may still take
        self._changed: dict[Request, None] = {}  # in order

    def add(self, request: Request) -> None:
        """Puts a request into the queue."""
        request.arrived = self._clock()
        self.waiting.append(request)
        path, _ = self._find(request)
        request.n_found = len(path) * self.context.block_tokens

    def cancel(self, request: Request) -> None:
        """Ends a request as it is; its place is free."""
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
        return self._compute_prompts(seconds) or seconds is not None

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
            if self._room(sum(self._lacking(request, 1) for request in running)):
                break
            self._preempt_youngest(OutOfMemoryError(self._no_room()))
        drafts = self._speculator.drafts(running, self.context.n_ctx)
        lacking = sum(self._lacking(r, 1 + len(d)) for r, d in zip(running, drafts, strict=True))
        if any(drafts) and not self._room(lacking):
            drafts = [[] for _ in running]
        return [
            Feed(request, [request.ids[-1], *draft], False, "all", len(draft))
            for request, draft in zip(running, drafts, strict=True)
        ]

    # Prompts

    def _compute_prompts(self, decode_seconds: float | None) -> bool:
        """Runs prompts for their share of a round's time, or for a moment if nobody generates.

        False: there is nothing to run.
        """
        if decode_seconds is None:
            budget, left, self._credit = None, IDLE_SECONDS, 0.0
        else:
            budget = decode_seconds * self._prefill_share / (1 - self._prefill_share)
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
        try:
            done = self.context.advance(n_layers)
        except DeviceError:
            raise
        except Exception as error:
            self._pass = None
            self._isolate(batch.feeds, error)
            return self._clock() - begin
        self._layers_left -= n_layers
        if done:
            self._pass = None
            self._settle(batch.feeds, batch.draw(self.context))
        seconds = self._clock() - begin
        if not done:  # the last layer computes fewer tokens, and the output more
            self.costs.saw_layers(batch.n_tokens, n_layers, seconds)
        return seconds

    def _begin_pass(self, budget: float | None) -> bool:
        """Chooses the prompts, or their pieces, of the next pass; False: there are none."""
        feeds = self._next_feeds(self._pass_size(budget))
        while feeds and not self._room(sum(self._lacking(f.request, len(f.tokens)) for f in feeds)):
            self._preempt_youngest(OutOfMemoryError(self._no_room()))
            feeds = [feed for feed in feeds if feed.request.sequence >= 0]
        if not feeds:
            return False
        batch = Batch(feeds)
        try:
            batch.begin(self.context)
        except DeviceError:
            raise
        except Exception as error:
            self._isolate(feeds, error)
            return True
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
        passed_over: list[Request] = []
        for request in self._in_order():
            if left == 0 or (feeds and feeds[0].request.alone):
                passed_over.append(request)
                continue
            if (request.alone and feeds) or not self._has_place(request):
                passed_over.append(request)
                if request.n_passed_over >= MOST_PASSED_OVER and request.waits_for is None:
                    break  # nobody else takes what it needs
                continue
            if request.decodes:
                continue  # the cache had all the rest of it
            feed = self._piece(request, self.context.n_batch if request.alone else left)
            feeds.append(feed)
            left = max(0, left - len(feed.tokens))
        last = max((feed.request.number for feed in feeds), default=-1)
        for request in passed_over:
            request.n_passed_over += request.number < last
        return feeds

    def _in_order(self) -> list[Request]:
        def key(request: Request) -> tuple[int, int]:
            if request.n_passed_over >= MOST_PASSED_OVER:
                return -1, request.number
            return request.n_rest - request.n_found, request.number

        candidates = [request for request in self.active if not request.decodes and not request.rests]
        if self._has_free_place():
            ready = (r for r in self.waiting if not r.rests and not (r.waits_for and r.waits_for.computing))
            candidates += sorted(ready, key=key)[:MOST_TRIED]
        return sorted(candidates, key=key)

    def _piece(self, request: Request, most: int) -> Feed:
        """Of what is to be fed, the next tokens that are fed in one way."""
        start, prompt = request.n_fed, not request.generated[request.n_fed]
        run = request.generated.find(prompt, start)
        end = min(start + most, len(request.ids) if run < 0 else run)
        scored = request.scored
        if scored and start < scored.start:
            end = min(end, scored.start)
        elif scored:
            end = min(end, scored.stop)
        if not prompt and end == len(request.ids):
            end -= 1  # the last one is a decode step's
        last = end == len(request.ids) and request.max_tokens > 0
        want: Want = "all" if start in scored else "last" if last else "none"
        return Feed(request, request.ids[start:end], prompt, want)

    # Places

    def _has_place(self, request: Request) -> bool:
        """Whether a request has a place in the context; a waiting one gets it if there is one."""
        if request.sequence >= 0:
            return True
        if not self._has_free_place():
            return False
        path, request.waits_for = self._find(request)
        request.n_found = len(path) * self.context.block_tokens
        if request.waits_for is not None:
            return False
        while not self._has_blocks(request, path):
            if resting := [other for other in self.active if other.rests]:
                self._give_way(max(resting, key=lambda other: other.number))
                continue
            if not self.active:
                self._fail(request, OutOfMemoryError(self._no_room()))
            return False
        self.waiting.remove(request)
        self.active.append(request)
        self._admit(request, path)
        return True

    def _has_free_place(self) -> bool:
        return sum(not request.rests for request in self.active) < self._parallel

    def _has_blocks(self, request: Request, path: Sequence[Block]) -> bool:
        """Whether there are blocks for the whole of a request that begins with `path`, and for what the
        others have still to feed, and one more for each."""
        needed = self._blocks_for(len(request.ids) + 1) - len(path)
        others = sum(1 if other.decodes else self._lacking(other, other.n_rest + 1) for other in self.active)
        unused = self.cache.n_unused - sum(block.n_users == 0 for block in path)
        return needed + others <= self.context.n_free_blocks + unused

    def _find(self, request: Request) -> tuple[list[Block], Block | None]:
        most = request.most_cached // self.context.block_tokens
        return self.cache.find(request.ids, request.generated, request.salt, most)

    def _admit(self, request: Request, path: list[Block]) -> None:
        n = self.context.block_tokens
        self.cache.enter(path)
        request.path = path
        request.sequence = self.context.new_sequence([b.number for b in path if b.number is not None])
        request.n_fed = len(path) * n
        for i, block in enumerate(path):  # from now on it is a matter of the request how they were fed
            request.generated[i * n : (i + 1) * n] = block.generated
        request.n_published = len(path)
        if request.uses_cache:
            self.cache.announce(path, request.ids, request.generated, request.salt, len(request.ids) // n)
        if request.admitted is None:
            request.admitted = self._clock()
            request.n_cached = request.n_fed
            self.counters.prompt_tokens += len(request.prompt)
            self.counters.prompt_tokens_cached += request.n_cached

    def _preempt_youngest(self, error: OutOfMemoryError) -> None:
        """Takes the place of the request that came last; the only one there is ends with the error."""
        youngest = max(self.active, key=lambda request: request.number)
        if len(self.active) == 1:
            self._fail(youngest, error)
        else:
            self._give_way(youngest)

    def _give_way(self, request: Request) -> None:
        """Takes the place of a request, which waits for another one at the queue's head."""
        self.counters.preemptions += 1
        self._give_up_place(request)
        request.n_passed_over = MOST_PASSED_OVER
        self.waiting.insert(0, request)

    def _give_up_place(self, request: Request) -> None:
        if self._pass is not None and any(feed.request is request for feed in self._pass.feeds):
            self.context.abandon()  # what others have in it is computed again
            self._pass = None
        self.active.remove(request)
        self.context.free_sequence(request.sequence)
        self.cache.leave(request.path)
        request.sequence, request.n_fed = -1, 0

    def _room(self, n_blocks: int) -> bool:
        """Whether so many blocks are free, if need be after unused ones have left the cache."""
        lacking = n_blocks - self.context.n_free_blocks
        if lacking > 0:
            self.cache.evict(lacking)
        return self.context.n_free_blocks >= n_blocks

    def _lacking(self, request: Request, n_tokens: int) -> int:
        """Blocks that a request needs beside its own for so many more tokens."""
        return self._blocks_for(request.n_fed + n_tokens) - self._blocks_for(request.n_fed)

    def _blocks_for(self, n_tokens: int) -> int:
        return -(-n_tokens // self.context.block_tokens)

    def _no_room(self) -> str:
        n = self.context.n_blocks * self.context.block_tokens
        return f"kv_tokens: found room for {n} tokens in the KV cache, expected more: memory is short"

    # What came of it

    def _run(self, batch: Batch) -> bool:
        """A batch from beginning to end; False if it had to be done in another way."""
        try:
            batch.forward(self.context)
        except DeviceError:
            raise
        except Exception as error:
            self._isolate(batch.feeds, error)
            return False
        self._settle(batch.feeds, batch.draw(self.context))
        return True

    def _isolate(self, feeds: Sequence[Feed], error: Exception) -> None:
        """After a failure, which has changed nothing: finds whose it is, so that only that request ends."""
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
        for feed, (tokens, logprobs, error) in zip(feeds, drawn, strict=True):
            request = feed.request
            n_right = len(feed.tokens)
            if feed.n_drafts and error is None:
                n_right -= 1 + feed.n_drafts - len(tokens)
                self._count_drafts(request, feed.n_drafts, len(tokens) - 1)
                if n_right < len(feed.tokens):
                    self.context.truncate(request.sequence, request.n_fed + n_right)
            request.n_fed += n_right
            self.counters.prompt_tokens_computed += len(feed.tokens) * feed.prompt
            if error is not None:
                self._fail(request, error)
                continue
            if tokens:
                self._accept(request, tokens, logprobs, now)
            if request.ended:
                continue
            self._publish(request)
            if request.rests:
                self._changed[request] = None
            if request.finish_reason or (request.max_tokens == 0 and not request.scored):
                request.finish_reason = request.finish_reason or "length"
                self._end(request)

    def _accept(self, request: Request, tokens: list[int], logprobs: list[TokenLogprob], now: float) -> None:
        try:
            self.counters.generated_tokens += request.accept(tokens, logprobs, now)
        except Exception as error:  # of the tokenizer, or of a grammar that has become too complex
            self._fail(request, error)
        else:
            self._changed[request] = None

    def _count_drafts(self, request: Request, n_drafts: int, n_accepted: int) -> None:
        request.n_drafted += n_drafts
        request.n_accepted += n_accepted
        self.counters.drafted += n_drafts
        self.counters.accepted += n_accepted

    def _publish(self, request: Request) -> None:
        """Lets others have the blocks that are full by now."""
        n_blocks = request.n_fed // self.context.block_tokens
        if not request.uses_cache or n_blocks <= request.n_published:
            return
        request.n_published = n_blocks
        self.cache.announce(request.path, request.ids, request.generated, request.salt, n_blocks)
        self.cache.publish(request.path, self.context.blocks(request.sequence), n_blocks)

    def _fail(self, request: Request, error: Exception) -> None:
        request.error = error
        self._end(request)

    def _end(self, request: Request) -> None:
        request.ended = True
        if request.sequence >= 0:
            self._give_up_place(request)
        else:
            self.waiting.remove(request)
        if request.drafter is not None:
            request.drafter.end(request)
        self._changed[request] = None


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
