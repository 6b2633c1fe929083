"""A context without a model: what it generates depends on every token in its blocks, and on nothing else."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vptq_runtime.errors import FileError, OptionError, OutOfMemoryError


class Misused(BaseException):
    """Something that the scheduler must not ask for; no Exception, which it would take for a request's."""


def expect(condition: object, what: str = "") -> None:
    if not condition:
        raise Misused(what)


Token = tuple[int, bool]  # an id, and whether it was fed as generated


class FakeClock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeSampler:
    """Draws by a hash of its seed, the draw's number and all tokens before."""

    seed: int = 0
    n_generated: int = 0

    def accept(self, tokens: Sequence[int], generated: bool = False) -> None:
        self.n_generated += generated * len(tokens)


@dataclass
class FakeSequence:
    blocks: list[int] = field(default_factory=list)
    length: int = 0
    busy: bool = False


@dataclass
class Feed:
    sequence: int
    tokens: list[int]
    prompt: bool
    want: str
    start: int = 0


class FakeContext:
    """As _native.Context, with blocks of four tokens.

    n_vocab: the smaller, the more repetition. exact: what a token was fed as makes no difference.
    poison: a token that, fed, makes the whole batch fail. name: with another one it generates something else,
    here and there. An advance takes its layers' share of a pass's seconds.
    """

    block_tokens = 4

    def __init__(
        self,
        *,
        n_ctx: int = 64,
        n_blocks: int = 64,
        n_batch: int = 16,
        n_layer: int = 4,
        n_vocab: int = 50,
        exact: bool = False,
        clock: FakeClock | None = None,
        poison: int | None = None,
        name: str = "",
    ) -> None:
        self.name = name
        self.n_ctx, self.n_blocks, self.n_batch, self.n_layer = n_ctx, n_blocks, n_batch, n_layer
        self.n_vocab, self.exact = n_vocab, exact
        self.clock = clock or FakeClock()
        self.poison = poison
        self.memory_ends_at: int | None = None  # blocks
        self.contents: dict[int, list[Token]] = {}  # by block
        self.users: dict[int, int] = {}
        self.sequences: dict[int, FakeSequence] = {}
        self.passes: list[list[tuple[int, bool]]] = []  # of each its feeds' sizes, and whether prompts
        self.seconds = pass_seconds  # of a pass, by its number of tokens
        self._under_way: list[Feed] | None = None
        self._layers_done = 0
        self._done: list[Feed] = []

    # Memory

    @property
    def n_free_blocks(self) -> int:
        return self.n_blocks - len(self.users)

    def new_sequence(self, prefix: Sequence[int] = ()) -> int:
        for block in prefix:
            expect(len(self.contents[block]) == self.block_tokens)
            expect(self.users[block] > 0)
            self.users[block] += 1
        number = next(i for i in range(len(self.sequences) + 1) if i not in self.sequences)
        self.sequences[number] = FakeSequence(list(prefix), len(prefix) * self.block_tokens)
        return number

    def free_sequence(self, sequence: int) -> None:
        expect(not self.sequences[sequence].busy)
        self.release(self.sequences.pop(sequence).blocks)

    def truncate(self, sequence: int, n_tokens: int) -> None:
        s = self.sequences[sequence]
        expect(not s.busy and 0 <= n_tokens <= s.length)
        keep = -(-n_tokens // self.block_tokens)
        self.release(s.blocks[keep:])
        del s.blocks[keep:]
        if n_tokens % self.block_tokens and n_tokens < s.length:
            expect(self.users[s.blocks[-1]] == 1, "truncated into a shared block")
        if s.blocks:
            del self.contents[s.blocks[-1]][n_tokens - (keep - 1) * self.block_tokens :]
        s.length = n_tokens

    def length(self, sequence: int) -> int:
        return self.sequences[sequence].length

    def blocks(self, sequence: int) -> list[int]:
        return list(self.sequences[sequence].blocks)

    def hold(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            expect(self.users[block] > 0)
            self.users[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            expect(self.users[block] > 0, "freed twice")
            self.users[block] -= 1
            if not self.users[block]:
                del self.users[block], self.contents[block]

    # Computing

    def forward(
        self, sequences: Any, tokens: Any, prompts: Any = (), wants: Any = (), samplers: Any = ()
    ) -> None:
        feeds = self._feeds(sequences, tokens, prompts, wants)
        self._extend(feeds)
        self.clock.now += self.seconds(sum(len(feed.tokens) for feed in feeds))
        self._end(feeds)

    def begin(
        self, sequences: Any, tokens: Any, prompts: Any = (), wants: Any = (), samplers: Any = ()
    ) -> None:
        expect(self._under_way is None)
        feeds = self._feeds(sequences, tokens, prompts, wants)
        self._extend(feeds)
        for feed in feeds:
            self.sequences[feed.sequence].busy = True
        self._under_way, self._layers_done = feeds, 0

    def advance(self, n_layers: int) -> bool:
        feeds = self._under_way
        expect(feeds is not None and 1 <= n_layers <= self.n_layer - self._layers_done)
        n_tokens = sum(len(feed.tokens) for feed in feeds)
        self.clock.now += self.seconds(n_tokens) * n_layers / self.n_layer
        self._layers_done += n_layers
        if self._layers_done < self.n_layer:
            return False
        self._under_way = None
        for feed in feeds:
            self.sequences[feed.sequence].busy = False
        self._end(feeds)
        return True

    def abandon(self) -> None:
        feeds, self._under_way = self._under_way, None
        for feed in feeds or ():
            self.sequences[feed.sequence].busy = False
            self.truncate(feed.sequence, feed.start)

    def sample(self, samplers: Any, masks: Any = ()) -> list[list[int]]:
        drawn: list[list[int]] = []
        for feed, sampler in zip(self._done, samplers, strict=True):
            drawn.append([])
            if sampler is None:
                continue
            for row in self._rows(feed):
                token = self.next_token(feed.sequence, row, sampler.seed, sampler.n_generated)
                sampler.n_generated += 1
                drawn[-1].append(token)
                following = row + 1 - feed.start
                if following == len(feed.tokens) or feed.tokens[following] != token:
                    break
        return drawn

    def log_probs(
        self, feed: int, tokens: Sequence[int], n_top: int
    ) -> tuple[list[float], list[list[tuple[int, float]]]]:
        rows = list(self._rows(self._done[feed]))[: len(tokens)]
        found = [
            -self._fraction(self._done[feed].sequence, row, token)
            for row, token in zip(rows, tokens, strict=True)
        ]
        return found, [[] for _ in rows]

    def logits(self, feed: int) -> NDArray[np.float32]:
        f = self._done[feed]
        return np.array(
            [
                [self._fraction(f.sequence, row, token) for token in range(self.n_vocab)]
                for row in self._rows(f)
            ],
            np.float32,
        )

    def next_token(self, sequence: int, row: int, seed: int, n: int) -> int:
        """What is drawn behind the first row + 1 tokens of a sequence."""
        return int(self._fraction(sequence, row, seed, n) * self.n_vocab)

    def _fraction(self, sequence: int, row: int, *besides: int) -> float:
        s = self.sequences[sequence]
        content = [token for block in s.blocks for token in self.contents[block]][: row + 1]
        expect(len(content) == row + 1)
        # The last two alone decide in seven of eight cases: so texts repeat themselves.
        if self.exact:
            content = [(token, False) for token, _ in content]
        whole = hashlib.blake2b(f"{self.name}{content}".encode(), digest_size=8).digest()
        near = hashlib.blake2b(repr((content[-2:], besides[:1])).encode(), digest_size=8).digest()
        number = int.from_bytes(whole if whole[0] < 32 else near, "little")
        return number / 2**64

    def _rows(self, feed: Feed) -> range:
        end = feed.start + len(feed.tokens)
        return {"none": range(0), "last": range(end - 1, end), "all": range(feed.start, end)}[feed.want]

    def _feeds(self, sequences: Any, tokens: Any, prompts: Any, wants: Any) -> list[Feed]:
        feeds = []
        expect(len(set(sequences)) == len(sequences) > 0)
        expect(sum(map(len, tokens)) <= self.n_batch)
        for i, sequence in enumerate(sequences):
            s = self.sequences[sequence]
            expect(not s.busy and tokens[i])
            feed = Feed(sequence, list(tokens[i]), bool(prompts[i]), wants[i] if wants else "last", s.length)
            if s.length + len(feed.tokens) > self.n_ctx:
                raise OptionError("too long")
            feeds.append(feed)
        return feeds

    def _extend(self, feeds: list[Feed]) -> None:
        needed = sum(
            -(-(feed.start + len(feed.tokens)) // self.block_tokens)
            - len(self.sequences[feed.sequence].blocks)
            for feed in feeds
        )
        if self.memory_ends_at is not None and len(self.users) + needed > self.memory_ends_at:
            self.n_blocks = min(self.n_blocks, self.memory_ends_at)
            raise OutOfMemoryError("the KV cache: no memory")
        expect(needed <= self.n_free_blocks, "the scheduler is to know that there are none")
        if any(self.poison in feed.tokens for feed in feeds):
            raise FileError("the logits are not finite")
        for feed in feeds:
            s = self.sequences[feed.sequence]
            for token in feed.tokens:
                if s.length % self.block_tokens == 0:
                    number = next(i for i in range(self.n_blocks) if i not in self.users)
                    self.users[number], self.contents[number] = 1, []
                    s.blocks.append(number)
                expect(self.users[s.blocks[-1]] == 1, "wrote into a shared block")
                self.contents[s.blocks[-1]].append((token, not feed.prompt))
                s.length += 1

    def _end(self, feeds: list[Feed]) -> None:
        self._done = feeds
        self.passes.append([(len(feed.tokens), feed.prompt) for feed in feeds])


def pass_seconds(n_tokens: int) -> float:
    return 0.01 * (1 + n_tokens / 8)


def fresh(context: FakeContext) -> FakeContext:
    """One of the same kind, for one sequence."""
    return FakeContext(
        n_ctx=context.n_ctx,
        n_vocab=context.n_vocab,
        n_blocks=math.ceil(context.n_ctx / 4),
        n_batch=context.n_ctx,
        exact=context.exact,
    )


def logits_alone(context: FakeContext, prompt: Sequence[int]) -> NDArray[np.float32]:
    """Of all tokens of a prompt."""
    context = fresh(context)
    context.forward([context.new_sequence()], [list(prompt)], [True], ["all"])
    return context.logits(0)


def alone(context: FakeContext, prompt: Sequence[int], max_tokens: int, seed: int = 0) -> list[int]:
    """What such a context generates when there is nobody else: token by token, from an empty cache."""
    context = fresh(context)
    sequence, sampler = context.new_sequence(), FakeSampler(seed)
    context.forward([sequence], [list(prompt)], [True], ["last"])
    tokens = context.sample([sampler])[0]
    while len(tokens) < max_tokens:
        context.forward([sequence], [tokens[-1:]], [False], ["last"])
        tokens += context.sample([sampler])[0]
    return tokens
