"""A batch that goes through the layers in pieces gives the numbers that it gives whole, in any company."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated import Emulated
from feeding import all_logits, prefill, step
from gpu import need_gpu
from numpy.typing import NDArray
from tiny_gguf import KEYS, N_VOCAB, tensors, write, write_tiny

from vptq_runtime import _native, demo_path
from vptq_runtime.errors import FileError, OptionError, OutOfMemoryError

GREEDY: dict[str, Any] = dict(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0, seed=0)
N_LAYER = 5
TOKENS = np.random.default_rng(0).integers(N_VOCAB, size=60).tolist()
# All layers on one backend, or the last two on a GPU.
PLACES = {"cpu": {"device": "cpu"}, "cuda": {"device": "cuda"}, "both": {"device": "auto", "gpu_layers": 2}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> _native.Model:
    path = tmp_path_factory.mktemp("passes") / "model.gguf"
    return _native.Model(str(write_tiny(path, n_layer=N_LAYER)))


@pytest.fixture(
    params=[name if name == "cpu" else pytest.param(name, marks=pytest.mark.gpu) for name in PLACES]
)
def place(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param != "cpu":
        need_gpu()
    return PLACES[request.param]


def make(model: _native.Model, **options: Any) -> _native.Context:
    return _native.Context(model, **{"n_ctx": 100, "n_threads": 2, "kv_type": "f16"} | options)


@pytest.fixture
def context(model: _native.Model, place: dict[str, Any]) -> _native.Context:
    return make(model, **place)


@pytest.fixture
def twin(model: _native.Model, place: dict[str, Any]) -> _native.Context:
    """Of the same kind, for what comes out whole."""
    return make(model, **place)


# Tokens, whether they are a prompt's, and whose logits are wanted.
Feeds = Sequence[tuple[list[int], bool, str]]
BATCHES: list[Feeds] = [
    [(TOKENS[:20], True, "all")],
    [(TOKENS[:20], True, "none")],
    [([3], False, "last")],  # as a decoding step, which a GPU records
    [([3], False, "last"), (TOKENS[5:15], True, "last"), ([4, 5, 6], False, "all"), ([7, 8], True, "none")],
]


def arguments(sequences: Sequence[int], feeds: Feeds) -> tuple[Any, ...]:
    tokens, prompts, wants = zip(*feeds, strict=True)
    return sequences, tokens, prompts, wants


def begun(context: _native.Context, n: int) -> list[int]:
    """Sequences that have some tokens, each others."""
    sequences = [context.new_sequence() for _ in range(n)]
    for i, sequence in enumerate(sequences):
        prefill(context, [sequence], [TOKENS[i : 2 * i + 3]])
    return sequences


def whole(twin: _native.Context, feeds: Feeds) -> list[NDArray[np.float32]]:
    """The feeds' logits, and those of the token that comes after them."""
    sequences = begun(twin, len(feeds))
    twin.forward(*arguments(sequences, feeds))
    logits = [twin.logits(feed) for feed in range(len(feeds))]
    return logits + [all_logits(twin, sequence, [9], False) for sequence in sequences]


def same(a: Sequence[NDArray[np.float32]], b: Sequence[NDArray[np.float32]]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("feeds", BATCHES, ids=["all", "none", "step", "mixed"])
@pytest.mark.parametrize("pieces", [[1] * 5, [3, 2], [2, 9]], ids=str)
def test_in_pieces_as_in_one(
    context: _native.Context, twin: _native.Context, feeds: Feeds, pieces: list[int]
) -> None:
    expected = whole(twin, feeds)
    sequences = begun(context, len(feeds))
    context.begin(*arguments(sequences, feeds))
    assert [context.advance(n) for n in pieces] == [False] * (len(pieces) - 1) + [True]
    logits = [context.logits(feed) for feed in range(len(feeds))]
    assert same(logits + [all_logits(context, sequence, [9], False) for sequence in sequences], expected)


def decoding(context: _native.Context, n_sequences: int) -> Iterator[list[int]]:
    """Steps of sequences that go on without end, as a GPU records and plays them."""
    samplers = [_native.Sampler(**GREEDY | {"repeat_penalty": 1.3}) for _ in range(n_sequences)]
    sequences = [context.new_sequence() for _ in samplers]
    fed = [[n + 1] for n in range(n_sequences)]
    while True:
        drawn = step(context, sequences, fed, samplers)
        fed = [[token] for token in drawn]
        yield drawn


@pytest.mark.parametrize("feeds", BATCHES, ids=["all", "none", "step", "mixed"])
def test_others_in_between(context: _native.Context, twin: _native.Context, feeds: Feeds) -> None:
    """Steps of one and of three sequences, from before the batch until after it, and prompts."""
    expected, n = whole(twin, feeds), 3 + 2 * N_LAYER
    alone = [[next(steps) for _ in range(n)] for steps in (decoding(twin, 1), decoding(twin, 3))]
    prompt = all_logits(twin, twin.new_sequence(), TOKENS[20:40])

    others, found = [decoding(context, 1), decoding(context, 3)], [[], []]
    sequences = begun(context, len(feeds))
    for _ in range(3):
        for steps, drawn in zip(others, found, strict=True):
            drawn.append(next(steps))
    context.begin(*arguments(sequences, feeds))
    for layer in range(N_LAYER):
        for _ in range(2):
            for steps, drawn in zip(others, found, strict=True):
                drawn.append(next(steps))
        assert np.array_equal(all_logits(context, context.new_sequence(), TOKENS[20:40]), prompt)
        assert context.advance(1) == (layer == N_LAYER - 1)
    logits = [context.logits(feed) for feed in range(len(feeds))]
    assert same(logits + [all_logits(context, sequence, [9], False) for sequence in sequences], expected)
    assert found == alone


@pytest.mark.parametrize("seed", range(2))
def test_any_order(context: _native.Context, twin: _native.Context, seed: int) -> None:
    """Prompts in pieces, steps and prompts whole, begun, abandoned and ended by chance: each sequence has the
    logits that it has alone."""
    rng = np.random.default_rng(seed)
    tokens: dict[int, list[int]] = {context.new_sequence(): [] for _ in range(4)}
    under_way: dict[int, list[int]] = {}

    def some(n_most: int) -> dict[int, list[int]]:
        idle = [s for s in tokens if s not in under_way and len(tokens[s]) < 70]
        chosen = rng.permutation(idle)[: rng.integers(1, 3)].tolist()
        return {s: rng.integers(N_VOCAB, size=rng.integers(1, n_most)).tolist() for s in chosen}

    def check(feeds: dict[int, list[int]]) -> None:
        for feed, sequence in enumerate(feeds):
            tokens[sequence] += feeds[sequence]
            if rng.integers(3) == 0:
                fresh = twin.new_sequence()
                expected = all_logits(twin, fresh, tokens[sequence])[-1:]
                assert np.array_equal(context.logits(feed), expected)
                twin.free_sequence(fresh)

    for _ in range(60):
        what = rng.integers(6)
        feeds = some(12)
        if not under_way and what < 2 and feeds:
            under_way = feeds
            context.begin(list(feeds), list(feeds.values()), [True] * len(feeds))
        elif under_way and what < 4:
            if context.advance(int(rng.integers(1, 4))):
                ended, under_way = under_way, {}
                check(ended)
        elif what == 4 and rng.integers(3) == 0:
            context.abandon()
            under_way = {}
        elif feeds:
            context.forward(list(feeds), list(feeds.values()), [True] * len(feeds))
            check(feeds)
        assert {s: context.length(s) for s in tokens} == {s: len(t) for s, t in tokens.items()}


def test_samplers(context: _native.Context, twin: _native.Context) -> None:
    """The batch before can be asked until this one comes to its end."""
    expected = step(twin, begun(twin, 2), [[1, 2, 3], [4]], [_native.Sampler(**GREEDY) for _ in range(2)])
    before = context.new_sequence()
    samplers = [_native.Sampler(**GREEDY) for _ in range(2)]
    context.begin(begun(context, 2), [[1, 2, 3], [4]], samplers=samplers)
    context.forward([before], [[7]])
    logits = context.logits(0).copy()
    while not context.advance(2):
        assert np.array_equal(context.logits(0), logits)
    assert context.sample(samplers) == [[token] for token in expected]


def test_busy_sequences(context: _native.Context) -> None:
    a, b = begun(context, 2)
    length, n_free = context.length(a), context.n_free_blocks
    context.begin([a], [TOKENS[:40]])
    assert (context.length(a), len(context.blocks(a))) == (length, 2)
    assert context.n_free_blocks == n_free - 1
    message = rf"^sequence {a} is busy: its batch is under way \(advance, abandon\)$"
    for use in (
        lambda: context.free_sequence(a),
        lambda: context.truncate(a, 1),
        lambda: context.truncate(a, length),
        lambda: context.forward([a], [[1]]),
        lambda: context.forward([b, a], [[1], [1]]),
    ):
        with pytest.raises(OptionError, match=message):
            use()
    with pytest.raises(OptionError, match="with 3 tokens, expected full ones"):
        context.new_sequence(context.blocks(a)[:1])  # others are not there yet
    with pytest.raises(OptionError, match=r"^a batch is under way, expected none: advance\(\) it to its end"):
        context.begin([b], [[1]])
    while not context.advance(2):
        pass
    context.new_sequence(context.blocks(a)[:1])
    context.free_sequence(a)


def test_abandoned(context: _native.Context, twin: _native.Context) -> None:
    context.abandon()  # nothing
    expected = whole(twin, BATCHES[0])
    (sequence,) = begun(context, 1)
    length, blocks, n_free = context.length(sequence), context.blocks(sequence), context.n_free_blocks
    for n in range(N_LAYER):
        context.begin([sequence], [TOKENS[20:60]], [True])
        if n:
            assert not context.advance(n)
        context.abandon()
        assert (context.length(sequence), context.blocks(sequence)) == (length, blocks)
        assert context.n_free_blocks == n_free
        with pytest.raises(OptionError, match=r"^no batch is under way, expected one: begin\(\) it$"):
            context.advance(1)
    context.begin(*arguments([sequence], BATCHES[0]))
    assert context.advance(N_LAYER)
    assert same([context.logits(0), all_logits(context, sequence, [9], False)], expected)


def test_errors_at_the_start(context: _native.Context) -> None:
    (sequence,) = begun(context, 1)
    length, blocks = context.length(sequence), context.blocks(sequence)
    for tokens in ([], [N_VOCAB], [1] * 99):
        with pytest.raises(OptionError):
            context.begin([sequence], [tokens])
    context.begin([sequence], [[1]])
    with pytest.raises(OptionError, match=r"^n_layers: found 0, expected at least 1$"):
        context.advance(0)
    assert (context.length(sequence), context.blocks(sequence)) == (length, blocks)
    context.truncate(sequence, 0)  # it is not busy any more


def test_no_blocks_left(model: _native.Model, place: dict[str, Any]) -> None:
    context = make(model, **place, kv_tokens=128)
    a, b = begun(context, 2)
    context.begin([a], [TOKENS[:50]])
    with pytest.raises(OutOfMemoryError, match="the KV cache is full"):
        context.forward([b], [[1] * 61])
    while not context.advance(3):
        pass
    with pytest.raises(OutOfMemoryError, match="the KV cache is full"):
        context.begin([b, a], [[1] * 61, [1]])
    assert (context.length(a), context.length(b), context.n_free_blocks) == (53, 4, 1)
    context.free_sequence(a)
    context.begin([b], [[1] * 61])


@pytest.mark.parametrize("layer", [0, N_LAYER - 1])
def test_logits_that_are_not_finite(tmp_path: Path, place: dict[str, Any], layer: int) -> None:
    arrays = tensors(N_LAYER)
    arrays[f"blk.{layer}.ffn_up.weight"][3, 4] = np.nan
    path = write(tmp_path / "model.gguf", KEYS | {"llama.block_count": N_LAYER}, arrays)
    context = make(_native.Model(str(path)), **place)
    sequence = context.new_sequence()
    context.begin([sequence], [TOKENS[:9]])
    assert not context.advance(N_LAYER - 1)
    with pytest.raises(FileError, match="the logits are not finite"):
        context.advance(1)
    assert (context.length(sequence), context.blocks(sequence)) == (0, [])
    for ask in (lambda: context.advance(1), lambda: context.logits(0)):
        with pytest.raises(OptionError, match=r"^no batch "):
            ask()
    context.free_sequence(sequence)


@pytest.mark.gpu
def test_over_several_gpus(emulated: Emulated) -> None:
    model = _native.Model(demo_path())
    options: dict[str, Any] = {"device": "cuda", "n_ctx": 128, "kv_type": "f32"}
    twin = make(model, **options)
    prompt = list(range(5, 25))
    expected = [all_logits(twin, twin.new_sequence(), tokens) for tokens in (prompt, prompt[::-1])]
    del twin
    emulated.have(16, 15, 17)
    context = make(model, **options)
    assert context.device.count(" with ") == 3
    context.begin([context.new_sequence()], [prompt], [True], ["all"])
    for _ in range(2):
        assert not context.advance(2)
        assert np.array_equal(all_logits(context, context.new_sequence(), prompt[::-1]), expected[1])
    assert context.advance(2)
    assert np.array_equal(context.logits(0), expected[0])
