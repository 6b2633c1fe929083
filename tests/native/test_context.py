"""A context: its options and threads; sequences of any length, alone and together."""

import os
from pathlib import Path

import numpy as np
import pytest
from feeding import all_logits, prefill
from tiny_gguf import KEYS, N_EMBD, N_VOCAB, tensors, write, write_tiny

from vptq_runtime import _native
from vptq_runtime.errors import OptionError, UnsupportedError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> _native.Model:
    return _native.Model(str(write_tiny(tmp_path_factory.mktemp("context") / "model.gguf")))


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


TOKENS = np.random.default_rng(0).integers(N_VOCAB, size=100).tolist()


def test_in_pieces_as_in_one(any_cache: _native.Context) -> None:
    context = any_cache
    whole = all_logits(context, context.new_sequence(), TOKENS)
    sequence = context.new_sequence()
    pieces = [all_logits(context, sequence, TOKENS[a:b]) for a, b in [(0, 1), (1, 33), (33, 64), (64, 100)]]
    assert np.array_equal(whole, np.concatenate(pieces))


def test_sequences_do_not_see_each_other(any_cache: _native.Context) -> None:
    context = any_cache
    alone = all_logits(context, context.new_sequence(), TOKENS[:50])
    a, b = context.new_sequence(), context.new_sequence()
    for i in range(49):
        prefill(context, [a, b], [[TOKENS[i]], [TOKENS[-i]]])
    assert np.array_equal(all_logits(context, a, [TOKENS[49]])[0], alone[49])


def test_long_contexts_alone_and_together(any_cache: _native.Context) -> None:
    """Longer than what attention takes at a time; one step for all, or pieces of any length."""
    context = any_cache
    tokens = np.random.default_rng(1).integers(N_VOCAB, size=1300).tolist()
    lengths = (1300, 1030, 500)
    alone = []
    for length in lengths:
        sequence = context.new_sequence()
        for i in range(0, length - 1, 128):
            prefill(context, [sequence], [tokens[i : min(i + 128, length - 1)]])
        alone.append(all_logits(context, sequence, [tokens[length - 1]])[0])
    together = [context.new_sequence() for length in lengths]
    for sequence, length in zip(together, lengths, strict=True):
        for i in range(0, length - 3, 37):
            prefill(context, [sequence], [tokens[i : min(i + 37, length - 3)]])
    prefill(context, together, [tokens[length - 3 : length - 1] for length in lengths])
    for sequence, length, expected in zip(together, lengths, alone, strict=True):
        assert np.array_equal(all_logits(context, sequence, [tokens[length - 1]])[0], expected)


def test_bad_options(model: _native.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="n_ctx: found 0, expected at least 1"):
        make(model, n_ctx=0)
    with pytest.raises(OptionError, match="kv_type: found 'f8', expected f16, f32 or q8_0"):
        make(model, kv_type="f8")
    with pytest.raises(
        OptionError, match=r"kv_type: found q8_0, expected f16 or f32: .* this model's head_dim of 8"
    ):
        make(model, kv_type="q8_0")
    for kv_tokens in (-1, 1, 199):
        with pytest.raises(OptionError, match=f"kv_tokens: found {kv_tokens}, expected at least n_ctx = 200"):
            make(model, kv_tokens=kv_tokens)
    with pytest.raises(OptionError, match="n_threads: found -1, expected 1 to"):
        make(model, n_threads=-1)
    with pytest.raises(OptionError, match="device: found 'tpu', expected auto, cpu or cuda"):
        make(model, device="tpu")
    monkeypatch.setenv("VPTQ_CUDA_LIBRARY", "/nowhere/libvptq_cuda.so")
    with pytest.raises(UnsupportedError, match=r"device cuda: this build has no CUDA backend: /nowhere/"):
        make(model, device="cuda")


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
    found = [all_logits(context, context.new_sequence(), TOKENS) for context in (one, three)]
    assert np.array_equal(*found)
