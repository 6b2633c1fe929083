"""Which requests have a place in the context, and the blocks of the KV cache that go with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vptq_runtime.engine.batch import Context
from vptq_runtime.engine.counters import Counters
from vptq_runtime.engine.prefix_cache import Block, PrefixCache
from vptq_runtime.engine.request import Request
from vptq_runtime.errors import OutOfMemoryError

MOST_PASSED_OVER = 8  # passes that shorter prompts get before a longer one


class Places:
    """Who waits, who has a place, and who gets or loses one.

    parallel: most requests that have a place, without those that rest.
    clock: seconds, for when a request was admitted.
    """

    def __init__(
        self,
        context: Context,
        cache: PrefixCache,
        counters: Counters,
        clock: Callable[[], float],
        parallel: int,
    ) -> None:
        self.waiting: list[Request] = []
        self.active: list[Request] = []  # those that have a place
        self._context = context
        self._cache = cache
        self._counters = counters
        self._clock = clock
        self._parallel = parallel

    @property
    def any_free(self) -> bool:
        """Whether one more request can have a place, if there are blocks for it."""
        return sum(not (request.rests or request.ended) for request in self.active) < self._parallel

    def look_up(self, request: Request) -> list[Block]:
        """The blocks that the cache has for a request; notes there how many, and what it waits for."""
        most = request.most_cached // self._context.block_tokens
        path, request.waits_for = self._cache.find(request.ids, request.generated, request.salt, most)
        request.n_found = len(path) * self._context.block_tokens
        return path

    def take(self, request: Request) -> bool:
        """Gives a request that waits a place, if there is one.

        Raises OutOfMemoryError where there are too few blocks although it would be the only one.
        """
        if not self.any_free:
            return False
        path = self.look_up(request)
        if request.waits_for is not None:
            return False
        while not self._has_blocks(request, path):
            if resting := [other for other in self.active if other.rests]:
                self.give_way(max(resting, key=lambda other: other.number))
                continue
            if not self.active:
                raise self.no_room()
            return False
        self.waiting.remove(request)
        self.active.append(request)
        self._admit(request, path)
        return True

    def leave(self, request: Request) -> None:
        """Takes the place of a request."""
        self.active.remove(request)
        self._context.free_sequence(request.sequence)
        self._cache.leave(request.path)
        request.sequence, request.n_fed = -1, 0

    def give_way(self, request: Request) -> None:
        """Takes the place of a request, which gets the next one before those that came later."""
        self._counters.preemptions += 1
        self.leave(request)
        request.n_passed_over = MOST_PASSED_OVER
        self.waiting.append(request)

    def make_room(self, n_blocks: int) -> bool:
        """Whether so many blocks are free, if need be after unused ones have left the cache."""
        lacking = n_blocks - self._context.n_free_blocks
        if lacking > 0:
            self._cache.evict(lacking)
        return self._context.n_free_blocks >= n_blocks

    def lacking(self, request: Request, n_tokens: int) -> int:
        """Blocks that a request needs beside its own for so many more tokens."""
        return self._blocks_for(request.n_fed + n_tokens) - self._blocks_for(request.n_fed)

    def publish(self, request: Request) -> None:
        """Lets others have the blocks of a request that are full by now."""
        # Right drafts behind the text's end are fed, too, but are no part of the text.
        n_blocks = min(request.n_fed, len(request.ids)) // self._context.block_tokens
        if not request.uses_cache or n_blocks <= request.n_published:
            return
        request.n_published = n_blocks
        self._cache.announce(request.path, request.ids, request.generated, request.salt, n_blocks)
        self._cache.publish(request.path, self._context.blocks(request.sequence), n_blocks)

    def no_room(self) -> OutOfMemoryError:
        """What a request fails with that needs more than there is."""
        n = self._context.n_blocks * self._context.block_tokens
        return OutOfMemoryError(
            f"kv_tokens: found room for {n} tokens in the KV cache, expected more: memory is short"
        )

    def _has_blocks(self, request: Request, path: Sequence[Block]) -> bool:
        """Whether there are blocks for the whole of a request that begins with `path` and a token more, and
        for what the others have still to feed and a token more for each."""
        needed = self._blocks_for(min(len(request.ids) + 1, self._context.n_ctx)) - len(path)
        others = sum(
            1 if other.decodes else self.lacking(other, other.n_rest + 1)
            for other in self.active
            if not other.ended
        )
        unused = self._cache.n_unused - sum(block.n_users == 0 for block in path)
        return needed + others <= self._context.n_free_blocks + unused

    def _admit(self, request: Request, path: list[Block]) -> None:
        n = self._context.block_tokens
        self._cache.enter(path)
        request.path = path
        request.sequence = self._context.new_sequence([b.number for b in path if b.number is not None])
        request.n_fed, request.n_found = len(path) * n, 0
        for i, block in enumerate(path):  # from now on it is a matter of the request how they were fed
            request.generated[i * n : (i + 1) * n] = block.generated
        request.n_published = len(path)
        if request.uses_cache:
            self._cache.announce(path, request.ids, request.generated, request.salt, len(request.ids) // n)
        if request.admitted is None:
            request.admitted = self._clock()
            request.n_cached = request.n_fed
            self._counters.prompt_tokens += len(request.prompt)
            self._counters.prompt_tokens_cached += request.n_cached

    def _blocks_for(self, n_tokens: int) -> int:
        return -(-n_tokens // self._context.block_tokens)
