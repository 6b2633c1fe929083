"""The native loader against files that are damaged, lie, or contradict themselves: always an error."""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feeding import all_logits
from gguf import GGUFValueType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layer_tensors import Raw, raw, vptq_layer
from tiny_gguf import KEYS, N_VOCAB, tensors, write

from vptq_runtime import _native
from vptq_runtime.errors import FileError, UnsupportedError, VPTQError


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = write(tmp_path_factory.mktemp("gguf") / "good.gguf", KEYS, tensors())
    context = _native.Context(_native.Model(str(path)), device="cpu", n_ctx=32, n_threads=1, kv_type="f32")
    assert all_logits(context, context.new_sequence(), [1, 2]).shape == (2, N_VOCAB)
    return path.read_bytes()


def error_of(path: Path) -> str:
    with pytest.raises(VPTQError) as error:
        _native.Model(str(path))
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_not_there(tmp_path: Path) -> None:
    assert "No such file" in error_of(tmp_path / "none.gguf")


def test_a_directory(tmp_path: Path) -> None:
    assert "a directory, expected a GGUF file: vptq-convert makes one" in error_of(tmp_path)


def test_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in error_of(tmp_path / "pipe")


def patched(at: int, data: bytes) -> Callable[[bytes], bytes]:
    return lambda good: good[:at] + data + good[at + len(data) :]


HEADERS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda good: b"", "the file is empty"),
    "three bytes": (lambda good: good[:3], "wrong magic"),
    "wrong magic": (patched(0, b"GGML"), "wrong magic; vptq-convert makes one"),
    "old version": (patched(4, struct.pack("<I", 2)), "GGUF version 2, expected 3"),
    "big-endian": (patched(4, struct.pack(">I", 3)), "GGUF version 50331648, expected 3"),
    "half a header": (lambda good: good[:20], "truncated: the number of keys"),
    "more tensors than bytes": (patched(8, struct.pack("<Q", 2**63)), ""),
    "more keys than bytes": (patched(16, struct.pack("<Q", 2**63)), ""),
    "a key longer than the file": (patched(24, struct.pack("<Q", 2**64 - 1)), "truncated: a key"),
    "cut in the data": (lambda good: good[:-64], "lie outside the file"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_bad_header(good: bytes, tmp_path: Path, name: str) -> None:
    change, message = HEADERS[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(change(good))
    assert message in error_of(path)


def header(keys: bytes, n_keys: int, infos: bytes, n_tensors: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_keys) + keys + infos


def key(name: str, value_type: GGUFValueType | int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", value_type) + value


def info(name: str, shape: list[int], dtype: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}q", len(shape), *shape)
    return struct.pack("<Q", len(name)) + name.encode() + dims + struct.pack("<IQ", dtype, offset)


TENSORS: dict[str, tuple[bytes, int, str]] = {
    "past the end": (info("a", [16], offset=1 << 40), 1, "tensor 'a' needs 64 bytes at offset 1099511627776"),
    "offset overflows": (info("a", [16], offset=2**64 - 64), 1, "lie outside the file"),
    "not aligned": (info("a", [1], offset=4), 1, "expected a multiple of 32"),
    "overlap": (info("a", [16]) + info("b", [8], offset=32), 2, "tensor 'b' overlaps tensor 'a'"),
    "twice": (info("a", [8]) + info("a", [8], offset=32), 2, "tensor 'a' stands twice"),
    "size overflows": (info("a", [1 << 33, 1 << 33]), 1, "shape (8589934592, 8589934592)"),
    "negative": (info("a", [-4]), 1, "shape (-4,)"),
    "zero": (info("a", [4, 0]), 1, "shape (0, 4)"),
    "no dimensions": (info("a", []), 1, "0 dimensions, expected 1 to 4"),
    "nine dimensions": (info("a", [1] * 9), 1, "9 dimensions, expected 1 to 4"),
    "unknown type": (info("a", [32], dtype=12), 1, "type number 12"),
    "a plain GGUF": (info("a", [32], dtype=12), 1, "run a plain GGUF with llama.cpp"),
    "half a q8_0 block": (info("a", [33], dtype=8), 1, "type Q8_0 and shape (33,)"),
    "half a q4_0 block": (info("a", [16], dtype=2), 1, "type Q4_0 and shape (16,)"),
    "too large in q5_1": (info("a", [2**40, 2**40], dtype=7), 1, "type Q5_1 and shape"),
    "q4_1 past the end": (info("a", [2**20, 2**10], dtype=3), 1, "outside the file"),
    "control characters": (info("a\n\x1b[31m", [32], dtype=12), 1, "tensor 'a??[31m'"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_bad_tensor(tmp_path: Path, name: str) -> None:
    infos, n, message = TENSORS[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(header(b"", 0, infos, n) + bytes(256))
    assert message in error_of(path)


def array(element: int, n: int, data: bytes) -> bytes:
    return struct.pack("<IQ", element, n) + data


VALUES: dict[str, tuple[bytes, str]] = {
    "unknown type": (key("x", 99, b""), "value type 99"),
    "array of arrays": (key("x", GGUFValueType.ARRAY, array(9, 1, array(4, 0, b""))), "array of arrays"),
    "array of nothing": (key("x", GGUFValueType.ARRAY, array(77, 1, b"")), "element type 77"),
    "array past the end": (
        key("x", GGUFValueType.ARRAY, array(4, 1 << 20, b"")),
        "has 1048576 elements, the file has",
    ),
    "array overflows": (key("x", GGUFValueType.ARRAY, array(4, 2**64 - 1, b"")), "expected at most"),
    "string past the end": (key("x", GGUFValueType.STRING, struct.pack("<Q", 1 << 50)), "truncated: key 'x'"),
    "twice": (key("x", GGUFValueType.BOOL, b"\1") * 2, "key 'x' stands twice"),
    "alignment": (
        key("general.alignment", GGUFValueType.UINT32, struct.pack("<I", 48)),
        "not a power of two",
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_bad_value(tmp_path: Path, name: str) -> None:
    keys, message = VALUES[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(header(keys, 2 if name == "twice" else 1, b"", 0) + bytes(256))
    assert message in error_of(path)


BAD_KEYS: dict[str, tuple[str, Any, str]] = {
    "version": ("vptq.version", 2, "'vptq.version': 2, expected 1"),
    "no version": ("vptq.version", None, "run a plain GGUF with llama.cpp"),
    "row order": ("vptq.qk_row_order", "interleaved", "expected huggingface"),
    "no layers": ("llama.block_count", 0, "'llama.block_count': 0, expected 1 to 4096"),
    "more layers than tensors": ("llama.block_count", 2, "'blk.1.attn_norm.weight': missing"),
    "too many layers": ("llama.block_count", 2**31, "expected 1 to 4096"),
    "wrong type": ("llama.block_count", "one", "expected an unsigned integer"),
    "head_count": ("llama.attention.head_count", 5, "expected a multiple of head_count_kv, 2"),
    "odd head_dim": ("llama.attention.key_length", 7, "expected an even number"),
    "value_length": ("llama.attention.value_length", 16, "differs from key_length, 8"),
    "embedding_length": ("llama.embedding_length", 64, "expected (40, 64)"),
    "vocab_size": ("llama.vocab_size", 41, "expected (41, 32)"),
    "feed_forward_length": (
        "llama.feed_forward_length",
        96,
        "'blk.0.ffn_gate.weight': shape (48, 32), expected (96, 32)",
    ),
    "eps": ("llama.attention.layer_norm_rms_epsilon", float("nan"), "expected a positive number"),
    "rope_theta": ("llama.rope.freq_base", -1.0, "expected a positive number"),
    "rope type": ("llama.rope.scaling.type", "yarn", "rope scaling 'yarn', expected linear or none"),
    "window": ("llama.attention.sliding_window", 0, "expected 1 to"),
}


@pytest.mark.parametrize("name", BAD_KEYS)
def test_bad_key(tmp_path: Path, name: str) -> None:
    which, value, message = BAD_KEYS[name]
    keys = {k: v for k, v in (KEYS | {which: value}).items() if v is not None}
    assert message in error_of(write(tmp_path / "bad.gguf", keys, tensors()))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ([True, False], "2 entries, expected one a layer: 1"),
        ([1], "expected an array of booleans"),
        (7, "an array"),
    ],
)
def test_bad_window_pattern(tmp_path: Path, pattern: object, message: str) -> None:
    window = "llama.attention.sliding_window"
    keys = KEYS | {window: 8, f"{window}_pattern": pattern}
    error = error_of(write(tmp_path / "bad.gguf", keys, tensors()))
    assert f"'{window}_pattern'" in error and message in error


def test_unknown_architecture(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.gguf", KEYS, tensors(), arch="mamba")
    with pytest.raises(UnsupportedError, match="'mamba', expected llama or qwen2"):
        _native.Model(str(path))


BAD_WEIGHTS: dict[str, tuple[str, np.ndarray | None, str]] = {
    "no norm": ("blk.0.ffn_norm.weight", None, "'blk.0.ffn_norm.weight': missing"),
    "no layer": ("blk.0.attn_k.weight", None, "'blk.0.attn_k': has neither .weight nor .vptq_indices"),
    "no embedding": ("token_embd.weight", None, "'token_embd': has neither .weight nor .vptq_indices"),
    "embedding twice": (
        "token_embd.vptq_indices",
        np.ones((1, 8, 6), np.int32),
        "'token_embd': has both .weight and .vptq_indices, expected one of them",
    ),
    "embedding's bias": (
        "token_embd.bias",
        np.ones(40, np.float16),
        "'token_embd.bias': found one, expected an embedding without",
    ),
    "norm": ("output_norm.weight", np.ones(31, np.float32), "shape (31,), expected (32,)"),
    "integers": (
        "blk.0.attn_q.weight",
        np.ones((32, 32), np.int16),
        "type I16, expected F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1 or Q4_0",
    ),
    "bias": (
        "blk.0.attn_q.bias",
        np.ones(31, np.float16),
        "'blk.0.attn_q.bias': shape (31,), expected (32,)",
    ),
    "NaN bias": ("blk.0.attn_q.bias", np.full(32, np.nan, np.float16), "holds NaN or infinity"),
    "rope_freqs": ("rope_freqs.weight", np.zeros(4, np.float32), "entry 0 is 0.0"),
    "indices": ("blk.0.ffn_down.vptq_indices", np.ones((1, 8, 5), np.int32), "expected (1, 8, 6)"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights(tmp_path: Path, name: str) -> None:
    which, value, message = BAD_WEIGHTS[name]
    arrays = {k: v for k, v in (tensors() | {which: value}).items() if v is not None}
    assert message in error_of(write(tmp_path / "bad.gguf", KEYS, arrays))


EMBEDDING = dict(v=3, k=11, r=5, g=2, group_size=14, n0=4, v0=7, k0=9)  # of 40 tokens: 14 and 6 vectors
BAD_EMBEDDINGS: dict[str, tuple[dict[str, Raw | None], str]] = {
    "index": ({"vptq_indices": raw(np.full((2, 14, 4), -1), "i32")}, "index 15 in row 0, column 0, expected"),
    "outlier": ({"vptq_outlier_indices": raw(np.full((6, 4), 9), "i16")}, "index 9 in row 0, column 0"),
    "rows": ({"vptq_indices": raw(np.zeros((2, 13, 4)), "i32")}, "(2, 13, 4), expected (2, 14, 4)"),
    "columns": ({"vptq_perm": raw(np.arange(31), "i16")}, "shape (31,), expected (32,)"),
    "twice": ({"vptq_perm": raw(np.zeros(32), "i16")}, "not a permutation: 0 stands twice"),
    "out_scale": (
        {"vptq_scale": None, "vptq_shift": None, "vptq_out_scale": raw(np.ones(32), "f16")},
        "'token_embd.vptq_out_scale': shape (32,), expected (40,)",
    ),
    "NaN": ({"vptq_res_centroids": raw(np.full((2, 5, 3), np.nan), "f16")}, "holds NaN or infinity"),
    "no centroids": ({"vptq_centroids": None}, "'token_embd.vptq_centroids': missing"),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", [None, *BAD_EMBEDDINGS])
def test_bad_vptq_embedding(tmp_path: Path, name: str | None, tied: bool) -> None:
    changes, message = BAD_EMBEDDINGS[name] if name else ({}, "")
    layer, _ = vptq_layer(np.random.default_rng(0), out=40, **EMBEDDING)
    arrays: dict[str, np.ndarray | Raw] = {**tensors()}
    embedding = arrays.pop("token_embd.weight")
    if not tied:
        arrays["output.weight"] = embedding
    arrays |= {f"token_embd.{key}": t for key, t in (layer | changes).items() if t is not None}
    path = write(tmp_path / "model.gguf", KEYS, arrays)
    if name:
        assert message in error_of(path)
    else:  # all the others differ from this one
        assert _native.Model(str(path)).dequantize("token_embd").shape == (40, 32)


def test_weights_that_are_not_finite_are_noticed_at_the_logits(tmp_path: Path) -> None:
    arrays = tensors()
    arrays["blk.0.ffn_up.weight"][3, 4] = np.nan
    model = _native.Model(str(write(tmp_path / "nan.gguf", KEYS, arrays)))
    context = _native.Context(model, device="cpu", n_ctx=32, n_threads=1, kv_type="f32")
    sequence = context.new_sequence()
    with pytest.raises(FileError, match=r"nan\.gguf: the logits are not finite"):
        all_logits(context, sequence, [1, 2])
    assert context.length(sequence) == 0


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_an_error_or_harmless(good: bytes, tmp_path: Path, data: st.DataObject) -> None:
    """Bytes changed anywhere in the header, or the file cut anywhere: a VPTQError or a model that runs."""
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 3000))
        damaged[at] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, damaged[at] ^ 1]))
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(damaged) - 1)) :]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    try:
        model = _native.Model(str(path))
        context = _native.Context(model, device="cpu", n_ctx=8, n_threads=1, kv_type="f16")
        all_logits(context, context.new_sequence(), [0])
        assert all(model.metadata_value(key) is not None for key in model.metadata_keys())
    except VPTQError as error:
        assert "\n" not in str(error)
