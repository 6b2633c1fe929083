"""Attention over every type of cache against its slow, obvious twin in float64, over odd sizes."""

import numpy as np
import pytest
from numpy.typing import NDArray

from vptq_runtime import _native


def in_cache(x: NDArray[np.float32], kv_type: str) -> NDArray[np.float64]:
    """Keys or values (..., head_dim) as the cache gives them back."""
    if kv_type != "q8_0":
        return x.astype(kv_type.replace("f", "float")).astype(np.float64)
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    scale = (np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)).astype(np.float16)
    scale = scale.astype(np.float32)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    q = np.clip(np.rint(blocks * inverse), -127, 127)
    return (q.astype(np.float64) * scale).reshape(x.shape)


def attention_in_float64(
    q: NDArray[np.float64], k: NDArray[np.float64], v: NDArray[np.float64], window: int
) -> NDArray[np.float64]:
    """q (n, n_head, head_dim), the last n of the tokens of k, v (n_tokens, n_head_kv, head_dim)."""
    n, n_head, head_dim = q.shape
    n_tokens, n_head_kv, _ = k.shape
    k, v = (np.repeat(t, n_head // n_head_kv, axis=1) for t in (k, v))
    scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(head_dim)
    token, seen = np.arange(n_tokens - n, n_tokens)[:, None], np.arange(n_tokens)[None]
    visible = (seen <= token) & (seen > token - (window or n_tokens))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True)) * visible
    return np.einsum("hts,shd->thd", weights / weights.sum(axis=-1, keepdims=True), v)


def attention_error(
    found: NDArray[np.float32],
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    window: int,
    kv_type: str,
) -> float:
    """Relative to what was added up, whose signs may cancel."""
    wide, k, v = q.astype(np.float64), in_cache(k, kv_type), in_cache(v, kv_type)
    error = found - attention_in_float64(wide, k, v, window)
    return float(np.linalg.norm(error) / np.linalg.norm(attention_in_float64(wide, k, np.abs(v), window)))


# (n_head, n_head_kv, head_dim): groups that fill no register and no look at the cache, and head_dim that is
# no multiple of 16, 32 or 64.
HEADS = [
    (1, 1, 1),
    (6, 2, 20),
    (4, 4, 64),
    (3, 1, 80),
    (8, 4, 96),
    (7, 1, 100),
    (16, 2, 128),
    (3, 3, 129),
    (45, 1, 33),
    (4, 2, 256),
]


def attention_of(
    operations: _native.Operations,
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    window: int,
    kv_type: str,
    prompt: bool = False,
) -> NDArray[np.float32]:
    """The arrays have the heads as an axis of their own."""
    found = operations.attention(
        q.reshape(len(q), -1),
        k.reshape(len(k), -1),
        v.reshape(len(v), -1),
        q.shape[1],
        k.shape[1],
        window,
        kv_type,
        prompt,
    )
    return found.reshape(q.shape)


@pytest.mark.parametrize(
    ("n", "n_tokens", "window"),
    [(1, 1, 0), (1, 32, 0), (3, 33, 0), (3, 33, 1), (100, 100, 0), (100, 100, 20), (2, 131, 0), (2, 131, 33)],
)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
def test_attention(
    operations: _native.Operations,
    kv_type: str,
    heads: tuple[int, int, int],
    n: int,
    n_tokens: int,
    window: int,
) -> None:
    n_head, n_head_kv, head_dim = heads
    if kv_type == "q8_0":
        head_dim = 32 * -(-head_dim // 32)
    rng = np.random.default_rng(n_tokens)
    q = (3 * rng.normal(size=(n, n_head, head_dim))).astype(np.float32)
    k, v = rng.normal(size=(2, n_tokens, n_head_kv, head_dim)).astype(np.float32)
    found = attention_of(operations, q, k, v, window, kv_type)
    assert attention_error(found, q, k, v, window, kv_type) < 1e-6


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
def test_attention_of_prompts(
    operations: _native.Operations, kv_type: str, heads: tuple[int, int, int], window: int
) -> None:
    """They may be rounded to 16 bits; cut anywhere, they give the same numbers."""
    n_head, n_head_kv, head_dim = heads
    if kv_type == "q8_0":
        head_dim = 32 * -(-head_dim // 32)
    rng = np.random.default_rng(head_dim)
    q = (3 * rng.normal(size=(100, n_head, head_dim))).astype(np.float32)
    k, v = rng.normal(size=(2, 131, n_head_kv, head_dim)).astype(np.float32)
    found = attention_of(operations, q, k, v, window, kv_type, prompt=True)
    assert attention_error(found, q, k, v, window, kv_type) < 1e-3
    end = 131 - 100 + 37
    piece = attention_of(operations, q[5:37], k[:end], v[:end], window, kv_type, prompt=True)
    assert np.array_equal(piece, found[5:37])


@pytest.mark.parametrize("window", [0, 700])
@pytest.mark.parametrize(("n_head", "n_head_kv"), [(4, 1), (6, 3)])
@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
def test_attention_over_a_long_context(
    operations: _native.Operations, kv_type: str, n_head: int, n_head_kv: int, window: int
) -> None:
    """Several spans: the same numbers alone and in company, and whoever computes which span."""
    rng = np.random.default_rng(n_head)
    q = (3 * rng.normal(size=(9, n_head, 32))).astype(np.float32)
    k, v = rng.normal(size=(2, 2053, n_head_kv, 32)).astype(np.float32)
    found = attention_of(operations, q, k, v, window, kv_type)
    assert attention_error(found, q, k, v, window, kv_type) < 1e-6
    for t in (0, 3, 4, 8):  # the spans' bound of 2048 lies between 3 and 4
        end = 2053 - 8 + t
        alone = attention_of(operations, q[t : t + 1], k[:end], v[:end], window, kv_type)
        assert np.array_equal(alone, found[t : t + 1])


@pytest.mark.parametrize("isa", _native.cpu_isas())
@pytest.mark.parametrize("n", [1, 2, 30])
def test_attention_on_any_number_of_threads(isa: str, n: int) -> None:
    rng = np.random.default_rng(n)
    q = rng.normal(size=(n, 6, 20)).astype(np.float32)
    k, v = rng.normal(size=(2, 1700, 2, 20)).astype(np.float32)
    first, *others = (attention_of(_native.Operations(isa, t), q, k, v, 0, "f16") for t in (1, 2, 3, 7))
    for other in others:
        assert np.array_equal(first, other)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("where", ["k", "v"])
def test_what_a_cache_cannot_hold_shows(
    operations: _native.Operations, where: str, kv_type: str, bad: float
) -> None:
    """Also where a score of minus infinity would only take a weight away; who does not see it has no harm."""
    rng = np.random.default_rng(0)
    q = np.abs(rng.normal(size=(30, 2, 64))).astype(np.float32)
    k, v = rng.normal(size=(2, 40, 1, 64)).astype(np.float32)
    (k if where == "k" else v)[17, 0, 5] = bad
    found = attention_of(operations, q, k, v, 0, kv_type)
    if kv_type == "f32" and bad == 1e30:
        assert np.isfinite(found).all()
    else:  # q are those of the tokens from 10 on
        assert np.isnan(found[7:]).any(axis=-1).all()
        assert np.isfinite(found[:7]).all()


@pytest.mark.parametrize("size", [1e-9, 1e-6, 3e-6, 1e-5, 1e-3, 1.0, 1e6])
def test_q8_0_of_any_size(operations: _native.Operations, size: float) -> None:
    """Scales of 0, subnormal in f16, rounded up and down."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 50, 1, 64)).astype(np.float32)
    k, v = (np.float32(size) * t for t in (k, v))
    alone = np.concatenate(
        [attention_of(operations, q[:1], k[:1], v[t : t + 1], 0, "q8_0") for t in range(50)]
    )
    assert np.array_equal(alone, in_cache(v, "q8_0").astype(np.float32))
    q /= np.float32(size)
    found = attention_of(operations, q, k, v + 1, 0, "q8_0")
    assert attention_error(found, q, k, v + 1, 0, "q8_0") < 1e-6
