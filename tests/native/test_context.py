"""Sequences in the shared cache: what is fed, forgotten and refused."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_gguf import KEYS, N_EMBD, N_VOCAB, tensors, write

from vptq_runtime import _native
from vptq_runtime.errors import OptionError, OutOfMemoryError, UnsupportedError

GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0, "seed": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> _native.Model:
    return _native.Model(str(write(tmp_path_factory.mktemp("context") / "model.gguf", KEYS, tensors())))


TOPOLOGY = Path("/sys/devices/system/cpu/cpu0/topology")


def make(model: _native.Model, **options: object) -> _native.Context:
    return _native.Context(
        model, **({"device": "cpu", "n_ctx": 200, "n_threads": 2, "kv_type": "f32"} | options)
    )


# Heads as wide as q8_0 needs, two to a kv head.
WIDE_HEADS = {
    "attn_q": (64, N_EMBD),
    "attn_k": (32, N_EMBD),
    "attn_v": (32, N_EMBD),
    "attn_output": (N_EMBD, 64),
}


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> _native.Model:
    keys = KEYS | {"llama.attention.head_count": 2, "llama.attention.head_count_kv": 1}
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        keys[f"llama.{name}"] = 32
    rng = np.random.default_rng(1)
    arrays = tensors() | {
        f"blk.0.{name}.weight": rng.normal(size=shape).astype(np.float16)
        for name, shape in WIDE_HEADS.items()
    }
    return _native.Model(str(write(tmp_path_factory.mktemp("context") / "wide.gguf", keys, arrays)))


@pytest.fixture(params=["f32", "f16", "q8_0"])
def any_cache(request: pytest.FixtureRequest, wide_model: _native.Model) -> _native.Context:
    return make(wide_model, kv_type=request.param, n_ctx=1500)


@pytest.fixture
def context(model: _native.Model) -> Iterator[_native.Context]:
    yield make(model)


TOKENS = np.random.default_rng(0).integers(N_VOCAB, size=100).tolist()


def test_in_pieces_as_in_one(any_cache: _native.Context) -> None:
    context = any_cache
    whole = context.logits(context.new_sequence(), TOKENS)
    sequence = context.new_sequence()
    pieces = [context.logits(sequence, TOKENS[a:b]) for a, b in [(0, 1), (1, 33), (33, 64), (64, 100)]]
    assert np.array_equal(whole, np.concatenate(pieces))


def test_sequences_do_not_see_each_other(any_cache: _native.Context) -> None:
    context = any_cache
    alone = context.logits(context.new_sequence(), TOKENS[:50])
    a, b = context.new_sequence(), context.new_sequence()
    for i in range(49):
        context.prefill([a, b], [[TOKENS[i]], [TOKENS[-i]]])
    assert np.array_equal(context.logits(a, [TOKENS[49]])[0], alone[49])


def test_step_samples_each_sequence(context: _native.Context) -> None:
    expected = [
        int(context.logits(context.new_sequence(), part)[-1].argmax()) for part in (TOKENS[:9], TOKENS[9:12])
    ]
    a, b = context.new_sequence(), context.new_sequence()
    samplers = [_native.Sampler(**GREEDY), _native.Sampler(**GREEDY)]
    assert context.step([a, b], [TOKENS[:9], TOKENS[9:12]], samplers) == expected
    assert (context.length(a), context.length(b)) == (9, 3)


def test_long_contexts_alone_and_together(any_cache: _native.Context) -> None:
    """Longer than what attention takes at a time; one step for all, or pieces of any length."""
    context = any_cache
    tokens = np.random.default_rng(1).integers(N_VOCAB, size=1300).tolist()
    lengths = (1300, 1030, 500)
    alone = []
    for length in lengths:
        sequence = context.new_sequence()
        for i in range(0, length - 1, 128):
            context.prefill([sequence], [tokens[i : min(i + 128, length - 1)]])
        alone.append(context.logits(sequence, [tokens[length - 1]])[0])
    together = [context.new_sequence() for length in lengths]
    for sequence, length in zip(together, lengths, strict=True):
        for i in range(0, length - 3, 37):
            context.prefill([sequence], [tokens[i : min(i + 37, length - 3)]])
    context.prefill(together, [tokens[length - 3 : length - 1] for length in lengths])
    for sequence, length, expected in zip(together, lengths, alone, strict=True):
        assert np.array_equal(context.logits(sequence, [tokens[length - 1]])[0], expected)


def test_truncate_and_go_on(context: _native.Context) -> None:
    whole = context.logits(context.new_sequence(), TOKENS)
    sequence = context.new_sequence()
    context.logits(sequence, TOKENS[:40] + TOKENS[:30])
    context.truncate(sequence, 40)
    assert np.array_equal(context.logits(sequence, TOKENS[40:]), whole[40:])


def test_freed_blocks_are_used_again(context: _native.Context) -> None:
    whole = context.logits(context.new_sequence(), TOKENS)
    for _ in range(5):
        sequence = context.new_sequence()
        context.prefill([sequence], [TOKENS[::-1]])
        context.free_sequence(sequence)
        with pytest.raises(OptionError, match=f"sequence {sequence} does not exist"):
            context.length(sequence)
    assert np.array_equal(context.logits(context.new_sequence(), TOKENS), whole)


def test_past_the_context(model: _native.Model) -> None:
    context = make(model, n_ctx=10)
    sequence = context.new_sequence()
    context.prefill([sequence], [TOKENS[:8]])
    with pytest.raises(OptionError, match="a sequence of 11 tokens, expected at most the context of 10"):
        context.prefill([sequence], [TOKENS[:3]])
    assert context.length(sequence) == 8
    context.prefill([sequence], [TOKENS[:2]])


def test_bad_batches(context: _native.Context) -> None:
    sequence = context.new_sequence()
    cases: list[tuple[list[int], list[list[int]], str]] = [
        ([sequence], [[N_VOCAB]], f"token {N_VOCAB}, expected 0 to {N_VOCAB - 1}"),
        ([sequence], [[-1]], "token -1, expected 0 to"),
        ([sequence], [[]], "no tokens for sequence"),
        ([sequence, sequence], [[1], [1]], "stands twice in one batch"),
        ([99], [[1]], "sequence 99 does not exist"),
        ([sequence], [[1], [2]], "2 token lists, expected one a sequence: 1"),
        ([sequence], [[1] * (context.n_batch + 1)], "a batch of 129 tokens or more, expected at most 128"),
    ]
    for sequences, tokens, message in cases:
        with pytest.raises(OptionError, match=message):
            context.prefill(sequences, tokens)
    assert context.length(sequence) == 0
    with pytest.raises(OptionError, match="0 samplers, expected one a sequence: 1"):
        context.step([sequence], [[1]], [])
    with pytest.raises(OptionError, match="sequence 0: no sampler, expected one a sequence"):
        context.step([sequence], [[1]], [None])  # type: ignore[list-item]
    assert context.length(sequence) == 0
    with pytest.raises(OptionError, match="truncate to 1 tokens, expected 0 to 0"):
        context.truncate(sequence, 1)


def test_bad_options(model: _native.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="n_ctx: found 0, expected at least 1"):
        make(model, n_ctx=0)
    with pytest.raises(OptionError, match="kv_type: found 'f8', expected f16, f32 or q8_0"):
        make(model, kv_type="f8")
    with pytest.raises(
        OptionError, match=r"kv_type: found q8_0, expected f16 or f32: .* this model's head_dim of 8"
    ):
        make(model, kv_type="q8_0")
    with pytest.raises(OptionError, match="n_threads: found -1, expected 1 to"):
        make(model, n_threads=-1)
    with pytest.raises(OptionError, match="device: found 'tpu', expected auto, cpu or cuda"):
        make(model, device="tpu")
    monkeypatch.setenv("VPTQ_CUDA_LIBRARY", "/nowhere/libvptq_cuda.so")
    with pytest.raises(UnsupportedError, match=r"device cuda: this build has no CUDA backend: /nowhere/"):
        make(model, device="cuda")


def test_a_context_that_memory_cannot_hold(tmp_path: Path) -> None:
    model = _native.Model(str(write(tmp_path / "model.gguf", KEYS, tensors())))
    with pytest.raises(
        OutOfMemoryError, match=r"the KV cache for 2147483647 tokens .* needs 256\.00 GiB, .* are available"
    ):
        make(model, n_ctx=2**31 - 1)


@pytest.mark.skipif(not TOPOLOGY.exists(), reason="needs Linux's description of the processors")
def test_a_thread_for_each_physical_core(model: _native.Model) -> None:
    """Hyperthreads of one core are one; cores that this process may not run on are none."""
    cores = {
        tuple(
            (TOPOLOGY.parent.parent / f"cpu{cpu}/topology" / part).read_text()
            for part in ("physical_package_id", "cluster_id", "core_id")
            if (TOPOLOGY / part).exists()
        )
        for cpu in os.sched_getaffinity(0)
    }
    assert f", {len(cores)} thread" in make(model, n_threads=0).device
    if len(cores) > 1:
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(allowed)})
        try:
            assert ", 1 thread)" in make(model, n_threads=0).device
        finally:
            os.sched_setaffinity(0, allowed)


def test_how_many_threads_does_not_matter(model: _native.Model) -> None:
    one, three = make(model, n_threads=1), make(model, n_threads=3)
    assert "1 thread)" in one.device
    assert "3 threads)" in three.device
    found = [context.logits(context.new_sequence(), TOKENS) for context in (one, three)]
    assert np.array_equal(*found)
