"""Which blocks a text gets from the cache: only those whose tokens it begins with, fed in the same way."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vptq_runtime.engine.prefix_cache import Block, CacheMode, PrefixCache

N = 4  # tokens of a block


class Pool:
    """Counts the users of numbered blocks, as a context does."""

    block_tokens = N

    def __init__(self) -> None:
        self.users: dict[int, int] = {}

    def hold(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            assert self.users[block] > 0
            self.users[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.users[block] -= 1
            assert self.users[block] >= 0
            if not self.users[block]:
                del self.users[block]

    def new(self) -> int:
        number = next(i for i in range(10_000) if i not in self.users)
        self.users[number] = 1
        return number


class Text:
    """A request as the scheduler has it: finds a path, computes what is behind it, leaves."""

    def __init__(
        self, cache: PrefixCache, pool: Pool, ids: list[int], generated: bytes = b"", salt: str = ""
    ) -> None:
        self.cache, self.pool, self.ids, self.salt = cache, pool, ids, salt
        self.generated = bytearray(generated or len(ids))
        self.path, self.waits_for = cache.find(ids, self.generated, salt, (len(ids) - 1) // N)
        self.n_found = len(self.path)
        cache.enter(self.path)
        self.blocks = [block.number for block in self.path if block.number is not None]
        pool.hold(self.blocks)
        for i, block in enumerate(self.path):
            self.generated[i * N : (i + 1) * N] = block.generated
        cache.announce(self.path, ids, self.generated, salt, len(ids) // N)

    def compute(self, n_blocks: int | None = None) -> None:
        n = len(self.ids) // N if n_blocks is None else n_blocks
        while len(self.blocks) < n:
            self.blocks.append(self.pool.new())
        self.cache.publish(self.path, self.blocks, n)

    def leave(self) -> None:
        self.pool.release(self.blocks)
        self.cache.leave(self.path)


@pytest.fixture
def pool() -> Pool:
    return Pool()


def ids_of(*blocks: int) -> list[int]:
    """Four tokens a block."""
    return [10 * block + i for block in blocks for i in range(N)]


def test_the_beginning_is_found(pool: Pool) -> None:
    cache = PrefixCache(pool)
    first = Text(cache, pool, [*ids_of(1, 2, 3), 7])
    assert first.n_found == 0
    first.compute()
    first.leave()
    assert cache.n_unused == 3 and len(pool.users) == 3
    for ids, n_found in (
        ([*ids_of(1, 2, 3), 8], 3),
        (ids_of(1, 2, 3), 2),  # the last token is always fed, for its logits
        ([*ids_of(1, 2), 20, 31, 32, 33, 9], 2),
        ([*ids_of(2, 2, 3), 9], 0),
        (ids_of(1)[:3], 0),
    ):
        text = Text(cache, pool, ids)
        assert text.n_found == n_found
        text.leave()


def test_what_somebody_computes_is_waited_for(pool: Pool) -> None:
    cache = PrefixCache(pool)
    first = Text(cache, pool, [*ids_of(1, 2), 7])
    second = Text(cache, pool, [*ids_of(1, 2), 8])
    assert second.n_found == 0 and second.waits_for is first.path[0] and second.waits_for.computing
    second.leave()
    first.compute(1)
    path, waits_for = cache.find([*ids_of(1, 2), 8], bytes(9), "", 2)
    assert path == first.path[:1] and waits_for is first.path[1]
    first.leave()  # without its second block
    assert not waits_for.computing
    assert cache.find([*ids_of(1, 2), 8], bytes(9), "", 2) == (path, None)


def test_who_leaves_early_is_forgotten(pool: Pool) -> None:
    cache = PrefixCache(pool)
    first = Text(cache, pool, [*ids_of(1, 2), 7])
    first.leave()
    assert cache.n_unused == 0 and not pool.users
    assert Text(cache, pool, [*ids_of(1, 2), 7]).waits_for is None


def test_salts_share_nothing(pool: Pool) -> None:
    cache = PrefixCache(pool)
    text = Text(cache, pool, [*ids_of(1), 7], salt="a")
    text.compute()
    text.leave()
    assert Text(cache, pool, [*ids_of(1), 7], salt="b").n_found == 0
    assert Text(cache, pool, [*ids_of(1), 7], salt="a").n_found == 1


@pytest.mark.parametrize(("mode", "n_found"), [("shared", 2), ("exact", 1), ("off", 0)])
def test_generated_tokens(pool: Pool, mode: CacheMode, n_found: int) -> None:
    """Fed as generated, they serve as a prompt only in "shared"; whoever generated them finds them again."""
    cache = PrefixCache(pool, mode)
    generated = bytes([0] * 4 + [1] * 5)
    text = Text(cache, pool, [*ids_of(1, 2), 7], generated)
    text.compute()
    text.leave()
    as_prompt = Text(cache, pool, [*ids_of(1, 2), 7])
    assert as_prompt.n_found == n_found
    if mode == "shared":  # it goes on as that text was fed
        assert as_prompt.generated == bytes([0] * 4 + [1] * 4 + [0])
    as_prompt.leave()
    again = Text(cache, pool, [*ids_of(1, 2), 7], generated)
    assert again.n_found == (0 if mode == "off" else 2)


def test_as_a_prompt_does_not_serve_who_generates(pool: Pool) -> None:
    cache = PrefixCache(pool)
    text = Text(cache, pool, [*ids_of(1, 2), 7])
    text.compute()
    text.leave()
    assert Text(cache, pool, [*ids_of(1, 2), 7], bytes([0] * 4 + [1] * 5)).n_found == 1


def test_least_recently_used_goes_first(pool: Pool) -> None:
    cache = PrefixCache(pool)
    for ids in (ids_of(1, 2, 3), ids_of(4, 5)):
        text = Text(cache, pool, [*ids, 7])
        text.compute()
        text.leave()
    again = Text(cache, pool, [*ids_of(1, 2), 7])
    cache.evict(2)  # what is on a path stays: the end of the first text goes, and the end of the second
    assert [Text(cache, pool, [*ids, 7]).n_found for ids in (ids_of(1, 2, 3), ids_of(4, 5))] == [2, 1]
    again.leave()


def test_evicting_all(pool: Pool) -> None:
    cache = PrefixCache(pool)
    text = Text(cache, pool, [*ids_of(1, 2, 3), 7])
    text.compute()
    cache.evict(10)
    assert len(pool.users) == 3
    text.leave()
    cache.evict(cache.n_unused)
    assert cache.n_unused == 0 and not pool.users and not cache._root.children


class Cache(RuleBasedStateMachine):
    """Random texts over few tokens, beside a dictionary of what was computed for each block number."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool()
        self.cache = PrefixCache(self.pool)
        self.texts: list[Text] = []
        # Of a block's number: the salt, and all tokens up to its end with how they were fed.
        self.computed: dict[int, tuple[str, list[int], bytes]] = {}

    @rule(
        ids=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        n=st.integers(0, 14),
        salt=st.sampled_from("ab"),
    )
    def begin(self, ids: list[int], n: int, salt: str) -> None:
        generated = bytes([0] * (len(ids) - min(n, len(ids) - 1)) + [1] * min(n, len(ids) - 1))
        text = Text(self.cache, self.pool, ids, generated, salt)
        for i, number in enumerate(text.blocks):
            end = (i + 1) * N
            its_salt, its_ids, fed = self.computed[number]
            assert (its_salt, its_ids) == (salt, ids[:end])
            assert fed == text.generated[:end]
            # In place of a generated token nothing stands but the same, fed as generated.
            assert all(f or not g for f, g in zip(fed, generated, strict=False))
        if text.waits_for is not None:
            text.leave()
        else:
            self.texts.append(text)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        text = data.draw(st.sampled_from(self.texts))
        before = len(text.blocks)
        n = data.draw(st.integers(before, max(before, len(text.ids) // N)))
        text.compute(n)
        for i in range(before, len(text.blocks)):
            end = (i + 1) * N
            self.computed[text.blocks[i]] = (text.salt, text.ids[:end], bytes(text.generated[:end]))

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.texts.remove(text := data.draw(st.sampled_from(self.texts)))
        text.leave()

    @rule(n=st.integers(0, 3))
    def evict(self, n: int) -> None:
        before = self.cache.n_unused
        self.cache.evict(n)
        assert self.cache.n_unused == max(0, before - n)

    @invariant()
    def every_block_has_its_users(self) -> None:
        mine = [number for text in self.texts for number in text.blocks]
        held = [block.number for block in blocks_of(self.cache) if block.number is not None]
        assert self.pool.users == {n: [*mine, *held].count(n) for n in {*mine, *held}}
        unused = [b for b in blocks_of(self.cache) if not b.n_users]
        assert len(unused) == self.cache.n_unused and all(b.number is not None for b in unused)

    def teardown(self) -> None:
        for text in self.texts:
            text.leave()
        self.cache.evict(self.cache.n_unused)
        assert not self.pool.users and not self.cache._root.children


def blocks_of(cache: PrefixCache) -> list[Block]:
    found, left = [], [cache._root]
    while left:
        below = [block for variants in left.pop().children.values() for block in variants]
        found += below
        left += below
    return found


TestCache = Cache.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_a_text_finds_itself(ids: list[int]) -> None:
    pool = Pool()
    cache = PrefixCache(pool)
    text = Text(cache, pool, ids)
    text.compute()
    text.leave()
    assert Text(cache, pool, ids).n_found == (len(ids) - 1) // N
