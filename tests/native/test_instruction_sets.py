"""Every instruction set beside the generic kernels: conversions to the bit, a whole model within rounding."""

import gguf
import numpy as np
import pytest
from feeding import all_logits
from layer_tensors import DTYPES, QUANTISED
from numpy.typing import NDArray

from vptq_runtime import _native, demo_path

ALL_16_BITS = np.arange(1 << 16).astype(np.uint16)


def embed(isa: str, dtype: str, data: NDArray[np.generic], n: int) -> NDArray[np.float32]:
    rows = data.size // (n // 32 * data.shape[1] if dtype in QUANTISED else n)
    table = (DTYPES[dtype], [rows, n], data.tobytes())
    return _native.Operations(isa, 1).embed({"weight": table}, n, rows, range(rows))


@pytest.mark.parametrize("n", [64, 16, 8, 1])
@pytest.mark.parametrize("isa", _native.cpu_isas())
def test_every_half_float(isa: str, n: int) -> None:
    with np.errstate(invalid="ignore"):  # NaN
        expected = ALL_16_BITS.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(embed(isa, "f16", ALL_16_BITS, n).ravel(), expected)
    expected = (ALL_16_BITS.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(embed(isa, "bf16", ALL_16_BITS, n).ravel(), expected)


@pytest.mark.parametrize("isa", _native.cpu_isas())
def test_every_quantised_weight(isa: str) -> None:
    blocks = np.zeros((8, 34), np.uint8)
    blocks[:, :2] = np.array([1.5, -0.25, 2**-24, 65504, 0, 1, 3, 7], "<f2")[:, None].view(np.uint8)
    blocks[:, 2:] = np.arange(256).reshape(8, 32)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    expected = scale * blocks[:, 2:].view(np.int8).astype(np.float32)
    np.testing.assert_array_equal(embed(isa, "q8_0", blocks, 64).ravel(), expected.ravel())


@pytest.mark.parametrize("dtype", [name for name in QUANTISED if name != "q8_0"])
@pytest.mark.parametrize("isa", _native.cpu_isas())
def test_every_packed_weight(isa: str, dtype: str) -> None:
    """Random bits, so that every weight comes at every place; scales, and smallest weights, of all sizes."""
    type = gguf.GGMLQuantizationType(DTYPES[dtype])
    rng = np.random.default_rng(0)
    blocks = rng.integers(256, size=(512, gguf.GGML_QUANT_SIZES[type][1])).astype(np.uint8)
    halves = np.array([1.5, -0.25, 2**-24, 65504, 0, 1, 3, -7], "<f2")
    n_halves = 2 if dtype.endswith("_1") else 1
    blocks[:, : 2 * n_halves] = rng.choice(halves, size=(512, n_halves)).view(np.uint8)
    expected = gguf.quants.dequantize(blocks, type)
    np.testing.assert_array_equal(embed(isa, dtype, blocks, 64).ravel(), expected.ravel())


@pytest.mark.parametrize("isa", _native.cpu_isas())
def test_rounding_to_half_floats(isa: str) -> None:
    """What an f16 cache makes of a lone token's value, which attention returns.

    The middle between every f16 and the next, and the float32 on either side of it.
    """
    halves = np.arange(0x7BFF, dtype=np.uint16)
    middles = (
        halves.view(np.float16).astype(np.float32) + (halves + 1).view(np.float16).astype(np.float32)
    ) / 2
    values = np.concatenate(
        [middles, np.nextafter(middles, 0), np.nextafter(middles, np.inf), [65519.0, 1e-30]]
    )
    values = np.concatenate([values, -values]).astype(np.float32)[None]
    ones = np.ones_like(values)
    found = _native.Operations(isa, 1).attention(ones, 0 * ones, values, 1, 1, 0, "f16")
    np.testing.assert_array_equal(found, values.astype(np.float16).astype(np.float32))


def logits(isa: str, kv_type: str, monkeypatch: pytest.MonkeyPatch) -> NDArray[np.float64]:
    """Of the demo model for 24 tokens, 14 of them at once."""
    monkeypatch.setenv("VPTQ_CPU_ISA", isa)
    model = _native.Model(str(demo_path()))
    context = _native.Context(model, device="cpu", n_ctx=128, n_threads=2, kv_type=kv_type, precision="f32")
    assert isa in context.device
    sequence = context.new_sequence()
    tokens = np.random.default_rng(0).integers(model.n_vocab, size=24).tolist()
    parts = [tokens[:14], *([token] for token in tokens[14:])]
    return np.concatenate([all_logits(context, sequence, part) for part in parts]).astype(np.float64)


@pytest.mark.parametrize(("kv_type", "bound"), [("f32", 1e-5), ("f16", 1e-3)])
@pytest.mark.parametrize("isa", _native.cpu_isas()[:-1])
def test_a_whole_model(isa: str, kv_type: str, bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generic kernels round product and sum, the others only the sum; an f16 cache makes more of it."""
    expected = logits("generic", kv_type, monkeypatch)
    found = logits(isa, kv_type, monkeypatch)
    error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < bound
