"""Blocks of the KV cache: who uses them, how many there are, and that what is shared does not change."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated import MIB, Emulated
from feeding import all_logits, prefill
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tiny_gguf import HEAD_DIM, KEYS, N_VOCAB, write_tiny

from vptq_runtime import _native
from vptq_runtime.errors import OptionError, OutOfMemoryError

TOKENS = np.random.default_rng(0).integers(N_VOCAB, size=100).tolist()
BLOCK = 32  # tokens
BLOCK_BYTES = 2 * KEYS["llama.attention.head_count_kv"] * BLOCK * HEAD_DIM * 4  # one layer, f32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> _native.Model:
    return _native.Model(str(write_tiny(tmp_path_factory.mktemp("kv_cache") / "model.gguf")))


Make = Callable[..., _native.Context]


@pytest.fixture
def make(model: _native.Model, device: str) -> Make:
    def make(**options: Any) -> _native.Context:
        return _native.Context(
            model, **{"device": device, "n_ctx": 200, "n_threads": 2, "kv_type": "f32"} | options
        )

    return make


@pytest.fixture
def context(make: Make) -> _native.Context:
    return make()


def test_truncate_and_go_on(context: _native.Context) -> None:
    whole = all_logits(context, context.new_sequence(), TOKENS)
    sequence = context.new_sequence()
    prefill(context, [sequence], [TOKENS[:40] + TOKENS[:30]])
    context.truncate(sequence, 40)
    assert np.array_equal(all_logits(context, sequence, TOKENS[40:]), whole[40:])
    for n_tokens in (-1, 101):
        with pytest.raises(OptionError, match=f"^truncate to {n_tokens} tokens, expected 0 to 100$"):
            context.truncate(sequence, n_tokens)


def test_freed_blocks_are_used_again(context: _native.Context) -> None:
    whole = all_logits(context, context.new_sequence(), TOKENS)
    for _ in range(5):
        sequence = context.new_sequence()
        prefill(context, [sequence], [TOKENS[::-1]])
        assert context.blocks(sequence) == [4, 5, 6, 7]
        context.free_sequence(sequence)
        with pytest.raises(OptionError, match=f"sequence {sequence} does not exist"):
            context.length(sequence)
    assert np.array_equal(all_logits(context, context.new_sequence(), TOKENS), whole)


def test_the_last_freed_is_the_next(context: _native.Context) -> None:
    a, b = context.new_sequence(), context.new_sequence()
    prefill(context, [a, b], [[1] * 64, [1] * 32])
    assert (context.blocks(a), context.blocks(b)) == ([0, 1], [2])
    context.free_sequence(b)
    context.truncate(a, 5)
    prefill(context, [a], [[1] * 123])
    assert context.blocks(a) == [0, 1, 2, 3]


def test_past_the_context(make: Make) -> None:
    context = make(n_ctx=42)
    sequence = context.new_sequence()
    prefill(context, [sequence], [TOKENS[:40]])
    with pytest.raises(OptionError, match="a sequence of 43 tokens, expected at most the context of 42"):
        prefill(context, [sequence], [TOKENS[:3]])
    assert context.length(sequence) == 40
    with pytest.raises(OptionError, match=r"^prefix: found 2 blocks of 32 tokens, expected at most the "):
        context.new_sequence(context.blocks(sequence))
    prefill(context, [sequence], [TOKENS[:2]])


def test_a_prefix_is_shared(context: _native.Context) -> None:
    whole = all_logits(context, context.new_sequence(), TOKENS)
    first = context.new_sequence()
    prefill(context, [first], [TOKENS[:70]])
    n_free = context.n_free_blocks
    others = [context.new_sequence(context.blocks(first)[:2]) for _ in range(3)]
    assert context.n_free_blocks == n_free
    assert {context.length(sequence) for sequence in others} == {64}
    context.free_sequence(first)
    assert context.n_free_blocks == n_free + 1
    for sequence in others:
        assert np.array_equal(all_logits(context, sequence, TOKENS[64:]), whole[64:])
    assert len({context.blocks(sequence)[2] for sequence in others}) == 3
    for sequence in others:
        context.free_sequence(sequence)
    assert context.n_free_blocks == context.n_blocks - 4  # of the whole


def test_blocks_that_are_held(context: _native.Context) -> None:
    whole = all_logits(context, context.new_sequence(), TOKENS)
    n_free, sequence = context.n_free_blocks, context.new_sequence()
    prefill(context, [sequence], [TOKENS[:70]])
    blocks = context.blocks(sequence)
    context.hold(blocks)
    context.free_sequence(sequence)
    assert context.n_free_blocks == n_free - 3
    sequence = context.new_sequence(blocks[:2])
    context.release(blocks)
    assert context.n_free_blocks == n_free - 2
    assert np.array_equal(all_logits(context, sequence, TOKENS[64:]), whole[64:])


def test_truncating_what_is_shared(context: _native.Context) -> None:
    whole = all_logits(context, context.new_sequence(), TOKENS)
    first = context.new_sequence()
    prefill(context, [first], [TOKENS[:80]])
    blocks = context.blocks(first)
    second = context.new_sequence(blocks[:2])
    context.hold(blocks[2:])  # the last one, not full
    for n_tokens, block in ((79, blocks[2]), (63, blocks[1]), (33, blocks[1]), (1, blocks[0])):
        message = f"^truncate to {n_tokens} tokens, expected a multiple of 32: others use block {block}, too$"
        with pytest.raises(OptionError, match=message):
            context.truncate(first, n_tokens)
    context.truncate(first, 80)
    assert (context.length(first), context.blocks(first)) == (80, blocks)
    context.truncate(first, 32)
    prefill(context, [first], [TOKENS[::-1]])  # other ones, in a block of its own
    assert np.array_equal(all_logits(context, second, TOKENS[64:]), whole[64:])


def test_blocks_that_cannot_be_shared(context: _native.Context) -> None:
    sequence = context.new_sequence()
    prefill(context, [sequence], [TOKENS[:40]])
    first, last = context.blocks(sequence)
    with pytest.raises(OptionError, match=f"^prefix: found block {last} with 8 tokens, expected full ones"):
        context.new_sequence([first, last])
    for block in (-1, 2, 2**31 - 1):
        for use in (context.new_sequence, context.hold):
            with pytest.raises(OptionError, match=f"^found block {block}, expected one that is in use$"):
                use([first, block])
    prefill(context, [sequence], [TOKENS[:24]])
    context.truncate(sequence, 50)
    with pytest.raises(OptionError, match=f"^prefix: found block {last} with 18 tokens, expected full ones"):
        context.new_sequence([first, last])
    prefill(context, [sequence], [TOKENS[:14]])
    context.new_sequence([first, last])
    context.hold([first])
    for blocks, wrong in (([first, first], first), ([first, last], last), ([-1], -1), ([9], 9)):
        with pytest.raises(OptionError, match=f"^found block {wrong}, expected one that is held$"):
            context.release(blocks)  # a sequence's use is not taken from it
    context.release([first])


def test_a_full_pool(make: Make) -> None:
    context = make(n_ctx=64, kv_tokens=100)
    assert (context.block_tokens, context.n_blocks, context.n_free_blocks) == (32, 4, 4)
    a, b, c = (context.new_sequence() for _ in range(3))
    prefill(context, [a, b], [TOKENS[:33], TOKENS[:30]])
    with pytest.raises(
        OutOfMemoryError,
        match=r"^the KV cache is full: found 1 free of 4 blocks of 32 tokens, expected 2 \(option kv_t.*\)$",
    ):
        context.forward([c], [TOKENS[:34]])
    with pytest.raises(OutOfMemoryError, match=r"the KV cache is full: found 0 free of 4 .*, expected 1 "):
        context.forward([a, b, c], [[1], TOKENS[:3], [1]])
    assert (context.length(a), context.length(b), context.n_free_blocks) == (33, 30, 1)
    assert (len(context.blocks(a)), len(context.blocks(b))) == (2, 1)
    context.forward([a, b], [[1], TOKENS[30:50]])
    assert context.n_free_blocks == 0
    context.free_sequence(a)
    assert context.n_free_blocks == 2


def test_room_for_64_sequences(make: Make) -> None:
    context = make(n_ctx=33)
    assert context.n_blocks == context.n_free_blocks == 64 * 2


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc to read the memory from")
def test_nothing_is_taken_for_blocks_that_nobody_uses(model: _native.Model) -> None:
    options: dict[str, Any] = {"device": "cpu", "n_threads": 1, "kv_type": "f16"}
    _native.Context(model, n_ctx=64, **options)
    before = resident_bytes()
    context = _native.Context(model, n_ctx=500_000, kv_tokens=64 * 500_000, **options)
    assert context.n_blocks == 1_000_000
    assert resident_bytes() < before + (2 << 20)


def test_a_context_that_memory_cannot_hold(model: _native.Model) -> None:
    expected = r"the KV cache for 2147483647 tokens .* needs 256\.00 GiB, .* are available"
    with pytest.raises(OutOfMemoryError, match=expected):
        _native.Context(model, device="cpu", n_ctx=2**31 - 1, n_threads=1, kv_type="f32")


def test_three_quarters_of_the_memory(model: _native.Model) -> None:
    """Of the CPU's, which others use, too: give or take."""
    n_ctx = _native.available_memory() // BLOCK_BYTES * BLOCK // 8  # 64 sequences of it do not fit
    context = _native.Context(model, device="cpu", n_ctx=n_ctx, n_threads=1, kv_type="f32")
    expected = 0.75 * (_native.available_memory() - model.file_bytes) / BLOCK_BYTES
    assert context.n_blocks == pytest.approx(expected, rel=0.2)


class TestEmulatedMemory:
    """A GPU's, which is as large as the test says."""

    pytestmark = pytest.mark.gpu

    def test_three_quarters(self, emulated: Emulated, model: _native.Model) -> None:
        emulated.have(16)
        options: dict[str, Any] = {"device": "cuda", "n_threads": 1, "kv_type": "f32"}
        context = _native.Context(model, n_ctx=10_000, **options)
        assert context.n_blocks == int(0.75 * context.available_memory / BLOCK_BYTES)
        assert 313 < context.n_blocks < 64 * 313

    def test_memory_that_ends_before(self, emulated: Emulated, model: _native.Model) -> None:
        options: dict[str, Any] = {"device": "cuda", "n_threads": 1, "kv_type": "f32"}
        emulated.have(1.5)
        with pytest.raises(OutOfMemoryError, match=r"cache for 1000000000 tokens \(option kv_tokens\) need"):
            _native.Context(model, n_ctx=320, kv_tokens=10**9, **options)
        emulated.have(200 * 1024)
        context = _native.Context(model, n_ctx=320, kv_tokens=10**9, **options)
        assert context.n_blocks == 10**9 // 32
        emulated.have(1.5)
        sequences = []
        with pytest.raises(OutOfMemoryError, match=r"^no memory for more of the KV cache than \d+ blocks"):
            while len(sequences) < 100:
                sequences.append(context.new_sequence())
                prefill(context, sequences[-1:], [[1] * 320])
        used = sum(len(context.blocks(sequence)) for sequence in sequences)
        assert used > 100 and used <= context.n_blocks < used + 10
        assert context.n_free_blocks == context.n_blocks - used
        for sequence in sequences[-2:]:
            context.free_sequence(sequence)
        sequence = context.new_sequence()
        whole = all_logits(context, sequence, TOKENS)
        context.truncate(sequence, 50)
        assert np.array_equal(all_logits(context, sequence, TOKENS[50:]), whole[50:])

    def test_memory_that_ends_before_and_comes_again(self, emulated: Emulated, model: _native.Model) -> None:
        emulated.have(8)
        context = _native.Context(model, device="cuda", n_ctx=320, n_threads=1, kv_type="f32", kv_tokens=6400)
        emulated.have(1.5)
        sequences = [context.new_sequence()]
        prefill(context, sequences, [[1] * 320])
        before = context.available_memory
        emulated.have(1.5 + (3 * BLOCK_BYTES - before) / MIB)
        assert context.available_memory < 4 * BLOCK_BYTES
        n_there = 10 + context.available_memory // BLOCK_BYTES
        sequences.append(context.new_sequence())
        for _ in range(2):
            with pytest.raises(OutOfMemoryError):
                prefill(context, sequences[1:], [[1] * 320])
            assert (context.n_blocks, context.n_free_blocks) == (n_there, n_there - 10)
        prefill(context, sequences[1:], [[1] * (n_there - 10) * BLOCK])  # as many as it says
        assert context.n_free_blocks == 0
        emulated.have(1.5)
        context.hold(context.blocks(sequences[0]))
        context.free_sequence(sequences[0])
        assert context.n_blocks == n_there  # a sequence is left
        context.free_sequence(sequences[1])
        assert n_there < context.n_blocks <= 200  # whoever holds some
        sequences = [context.new_sequence()]
        prefill(context, sequences, [[1] * 320])
        assert len(context.blocks(sequences[0])) == 10

    def test_no_memory_for_a_block(self, emulated: Emulated, model: _native.Model) -> None:
        emulated.have(1.5)
        context = _native.Context(model, device="cuda", n_ctx=320, n_threads=1, kv_type="f32", kv_tokens=640)
        emulated.have(1.5 - context.available_memory / MIB)
        sequence = context.new_sequence()
        with pytest.raises(OutOfMemoryError, match=r"^no memory for more of the KV cache than 0 blocks of"):
            prefill(context, [sequence], [TOKENS])
        assert context.n_blocks == context.n_free_blocks == 0
        context.free_sequence(sequence)
        assert context.n_blocks == 0
        emulated.have(1.5)
        assert context.n_blocks == context.n_free_blocks == 20  # although there was no sequence since
        sequence = context.new_sequence()
        assert len(all_logits(context, sequence, TOKENS)) == len(TOKENS)


class CacheMachine(RuleBasedStateMachine):
    """The cache beside a plain model of it: lists of blocks, counts of users, a stack of freed ones."""

    device = "cpu"
    model: _native.Model
    N_CTX, N_BLOCKS = 3 * BLOCK, 7

    @initialize()
    def start(self) -> None:
        options: dict[str, Any] = {
            "device": self.device,
            "n_threads": 1,
            "kv_type": "f32",
            "precision": "f32",
        }
        self.context = _native.Context(
            self.model, n_ctx=self.N_CTX, kv_tokens=self.N_BLOCKS * BLOCK, **options
        )
        self.twin = _native.Context(self.model, n_ctx=self.N_CTX + 1, **options)  # shares nothing
        self.tokens: dict[int, list[int]] = {}
        self.blocks: dict[int, list[int]] = {}
        self.held: list[tuple[list[int], list[int]]] = []  # blocks, and the tokens of the full ones
        self.n_users = [0] * self.N_BLOCKS
        self.free = list(range(self.N_BLOCKS))[::-1]  # the last one is the next
        self.new()
        self.append(0, TOKENS[:70])
        self.fork(self.blocks[0][:2], TOKENS[:64])

    def use(self, blocks: list[int]) -> None:
        for block in blocks:
            self.n_users[block] += 1

    def unuse(self, blocks: list[int]) -> None:
        for block in blocks:
            self.n_users[block] -= 1
            if self.n_users[block] == 0:
                self.free.append(block)

    @rule()
    def new(self) -> None:
        sequence = self.context.new_sequence()
        assert sequence not in self.tokens
        self.tokens[sequence], self.blocks[sequence] = [], []

    def fork(self, blocks: list[int], tokens: list[int]) -> None:
        sequence = self.context.new_sequence(blocks)
        assert sequence not in self.tokens
        self.tokens[sequence], self.blocks[sequence] = list(tokens), list(blocks)
        self.use(blocks)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def fork_a_sequence(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.tokens)))
        n = max(len(self.tokens[sequence]) // BLOCK - data.draw(st.integers(0, 1)), 0)
        self.fork(self.blocks[sequence][:n], self.tokens[sequence][: n * BLOCK])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def fork_what_is_held(self, data: st.DataObject) -> None:
        blocks, tokens = data.draw(st.sampled_from(self.held))
        n = max(len(tokens) // BLOCK - data.draw(st.integers(0, 1)), 0)
        self.fork(blocks[:n], tokens[: n * BLOCK])

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), n=st.sampled_from([64, 33, 32, 31, 7, 1]), seed=st.integers(0, 3))
    def extend(self, data: st.DataObject, n: int, seed: int) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.tokens)))
        self.append(sequence, np.random.default_rng(seed).integers(N_VOCAB, size=n).tolist())

    def append(self, sequence: int, new: list[int]) -> None:
        tokens, blocks = self.tokens[sequence], self.blocks[sequence]
        lacking = -(-(len(tokens) + len(new)) // BLOCK) - len(blocks)
        too_long = len(tokens) + len(new) > self.N_CTX
        if too_long or lacking > len(self.free):
            with pytest.raises(OptionError if too_long else OutOfMemoryError):
                prefill(self.context, [sequence], [new])
            return
        prefill(self.context, [sequence], [new])
        taken = [self.free.pop() for _ in range(lacking)]
        self.use(taken)
        blocks += taken
        tokens += new

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.tokens)))
        tokens, blocks = self.tokens[sequence], self.blocks[sequence]
        n = data.draw(st.integers(0, len(tokens)))
        if n < len(tokens) and n % BLOCK and self.n_users[blocks[n // BLOCK]] > 1:
            with pytest.raises(OptionError, match="others use block"):
                self.context.truncate(sequence, n)
            return
        self.context.truncate(sequence, n)
        keep = -(-n // BLOCK)
        self.unuse(blocks[keep:][::-1])
        del tokens[n:], blocks[keep:]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def free_a_sequence(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.tokens)))
        self.context.free_sequence(sequence)
        self.unuse(self.blocks.pop(sequence)[::-1])
        del self.tokens[sequence]

    @precondition(lambda self: any(self.blocks.values()))
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from([s for s, blocks in self.blocks.items() if blocks]))
        blocks = list(self.blocks[sequence])
        self.context.hold(blocks)
        self.use(blocks)
        full = len(self.tokens[sequence]) // BLOCK * BLOCK
        self.held.append((blocks, self.tokens[sequence][:full]))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.context.release(blocks)
        self.unuse(blocks)

    @rule(block=st.integers(-1, N_BLOCKS))
    def misuse(self, block: int) -> None:
        in_use = 0 <= block < self.N_BLOCKS and self.n_users[block] > 0
        is_held = any(block in blocks for blocks, _ in self.held)
        if not in_use:
            with pytest.raises(OptionError, match="expected one that is in use"):
                self.context.new_sequence([block])
            with pytest.raises(OptionError, match="expected one that is in use"):
                self.context.hold([block])
        if not is_held:
            with pytest.raises(OptionError, match="expected one that is held"):
                self.context.release([block])

    @precondition(lambda self: any(0 < len(tokens) < self.N_CTX for tokens in self.tokens.values()))
    @rule(data=st.data())
    def logits_are_those_of_a_fresh_sequence(self, data: st.DataObject) -> None:
        going = [s for s, tokens in self.tokens.items() if 0 < len(tokens) < self.N_CTX]
        sequence = data.draw(st.sampled_from(going))
        tokens = self.tokens[sequence]
        if len(tokens) % BLOCK == 0 and not self.free:
            return  # no room for one more token
        n, last = len(tokens), tokens[-1]
        found = all_logits(self.context, sequence, [last])
        fresh = self.twin.new_sequence()
        assert np.array_equal(found, all_logits(self.twin, fresh, [*tokens, last])[-1:])
        self.twin.free_sequence(fresh)
        if n % BLOCK == 0:  # a block of its own, that goes back
            self.context.truncate(sequence, n)
        elif self.n_users[self.blocks[sequence][-1]] > 1:
            tokens.append(last)  # somebody holds the block: the token stays
        else:
            self.context.truncate(sequence, n)

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "context"):
            return
        assert self.context.n_blocks == self.N_BLOCKS
        assert self.context.n_free_blocks == len(self.free) == self.n_users.count(0)
        for sequence, tokens in self.tokens.items():
            assert self.context.length(sequence) == len(tokens)
            assert self.context.blocks(sequence) == self.blocks[sequence]

    def teardown(self) -> None:
        """Nothing is lost when all is given back."""
        if not hasattr(self, "context"):
            return
        for sequence in list(self.tokens):
            self.context.free_sequence(sequence)
        for blocks, _ in self.held:
            self.context.release(blocks)
        assert self.context.n_free_blocks == self.N_BLOCKS


def test_against_a_model_of_it(model: _native.Model, device: str) -> None:
    class Machine(CacheMachine):
        pass

    Machine.model, Machine.device = model, device
    n = 100 if device == "cpu" else 8
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=n, stateful_step_count=40, deadline=None)
    )
    del Machine.model  # hypothesis keeps the class
