"""Linear layers, VPTQ and dense, against slow, obvious twins in float64, over odd sizes."""

import numpy as np
import pytest
from layer_tensors import MATRIX_TYPES, QUANTISED, Raw, floats, raw, vptq_layer
from numpy.typing import NDArray
from relative_error import relative_l2

from vptq_runtime import _native
from vptq_runtime.errors import FileError

# Vector lengths in use, and some that are not; index widths from 1 to 32 bits; rows and columns that fill no
# block, no word, no tile and no vector register.
VPTQ_LAYERS = {
    "v2-k16": dict(out=7, v=2, k=16, group_size=33),
    "v3-k5": dict(out=10, v=3, k=5, group_size=77, dtype="f32"),
    "v4-k256": dict(out=41, v=4, k=256, group_size=300),
    "v5-k7-3": dict(out=23, v=5, k=7, r=3, group_size=91, dtype="bf16"),
    "v6-k4096": dict(out=64, v=6, k=4096, group_size=129),
    "v8-k2": dict(out=9, v=8, k=2, group_size=31, perm=False, norm_dim=None),
    "v8-k65536": dict(out=72, v=8, k=65536, group_size=257),
    "v8-k65536-256": dict(out=65, v=8, k=65536, r=256, group_size=70, bias=True),
    "v8-k65536-65536": dict(out=31, v=8, k=65536, r=65536, group_size=64),
    "v8-k65536-4-bf16": dict(out=33, v=8, k=65536, r=4, group_size=61, dtype="bf16"),
    "v8-k512-512-f32": dict(out=40, v=8, k=512, r=512, group_size=513, dtype="f32"),
    "v12-k4096-4096-outliers": dict(out=50, v=12, k=4096, r=4096, g=4, group_size=19, n0=5, k0=8192),
    "v12-outliers-v0-8": dict(out=47, v=12, k=64, group_size=100, n0=3, v0=8, norm_dim=1, bias=True),
    "v16-k32768-32768": dict(out=33, v=16, k=32768, r=32768, group_size=45, norm_dim=1),
    "v16-k65536-64": dict(out=160, v=16, k=65536, r=64, group_size=259, norm_dim=None),
    "v64-k9": dict(out=100, v=64, k=9, group_size=17),
    "one output": dict(out=1, v=8, k=256, group_size=1, g=3),
    "16 codebooks": dict(out=24, v=4, k=16, r=8, g=16, group_size=7, n0=2, v0=4),
}


@pytest.mark.parametrize("n_tokens", [1, 3, 4, 5, 6, 7, 8, 12, 131])
@pytest.mark.parametrize("name", VPTQ_LAYERS)
def test_vptq_linear(operations: _native.Operations, name: str, n_tokens: int) -> None:
    rng = np.random.default_rng(len(name))
    tensors, n_in = vptq_layer(rng, **VPTQ_LAYERS[name])
    out = VPTQ_LAYERS[name]["out"]
    x = rng.normal(size=(n_tokens, n_in)).astype(np.float32)
    weight = _native.Operations.dequantize(tensors, n_in, out).astype(np.float64)
    expected = x.astype(np.float64) @ weight.T
    if "bias" in tensors:
        expected += floats(tensors["bias"])
    assert relative_l2(operations.linear(tensors, out, x), expected) < 1e-6


@pytest.mark.parametrize("bits", range(1, 33))
def test_every_index_width(operations: _native.Operations, bits: int) -> None:
    """Rows long enough for whole vectors of indices, tiles of columns, and a rest."""
    rng = np.random.default_rng(bits)
    res_bits = max(0, bits - 16)
    tensors, n_in = vptq_layer(
        rng, out=40, v=8, k=1 << bits - res_bits, r=1 << res_bits if res_bits else 0, group_size=555
    )
    weight = _native.Operations.dequantize(tensors, n_in, 40).astype(np.float64)
    for n_tokens in (1, 9):
        x = rng.normal(size=(n_tokens, n_in)).astype(np.float32)
        assert relative_l2(operations.linear(tensors, 40, x), x.astype(np.float64) @ weight.T) < 1e-6


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 4, 67])
@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (33, 64), (4, 257), (66, 300), (130, 96)])
@pytest.mark.parametrize("dtype", MATRIX_TYPES)
def test_dense_linear(
    operations: _native.Operations, dtype: str, shape: tuple[int, int], n_tokens: int
) -> None:
    out, n_in = shape
    if dtype in QUANTISED:
        n_in = 32 * -(-n_in // 32)
    rng = np.random.default_rng(out)
    tensors = {"weight": raw(rng.normal(size=(out, n_in)).astype(np.float32), dtype)}
    x = rng.normal(size=(n_tokens, n_in)).astype(np.float32)
    weight = _native.Operations.dequantize(tensors, n_in, out).astype(np.float64)
    assert np.array_equal(weight, floats(tensors["weight"]))
    assert relative_l2(operations.linear(tensors, out, x), x.astype(np.float64) @ weight.T) < 1e-6


@pytest.mark.parametrize("n_tokens", [1, 3, 64])
def test_layers_that_share_a_loop(operations: _native.Operations, n_tokens: int) -> None:
    """With rows that come in blocks of 6, of 24 (8 and 12) and of 4, enough of them for several chunks."""
    rng = np.random.default_rng(n_tokens)
    outs = (1000, 77, 502)
    layers = [
        vptq_layer(rng, out=outs[0], v=6, k=64, group_size=300, norm_dim=1, bias=True)[0],
        vptq_layer(rng, out=outs[1], v=8, k=64, group_size=280, n0=20, v0=12)[0],
        {"weight": raw(rng.normal(size=(outs[2], 300)), "f16"), "bias": raw(rng.normal(size=outs[2]), "f16")},
    ]
    x = rng.normal(size=(n_tokens, 300)).astype(np.float32)
    for order in ([0, 1, 2], [2, 0, 1], [1, 1, 0]):
        together = operations.linears([layers[i] for i in order], [outs[i] for i in order], x)
        for i, y in zip(order, together, strict=True):
            assert np.array_equal(y, operations.linear(layers[i], outs[i], x))


def test_each_repetition_is_timed(operations: _native.Operations) -> None:
    tensors, n_in = vptq_layer(np.random.default_rng(0), **VPTQ_LAYERS["v5-k7-3"])
    x = np.ones((1, n_in), np.float32)
    seconds = operations.time_linear([tensors, tensors], VPTQ_LAYERS["v5-k7-3"]["out"], x, 3)
    assert len(seconds) == 3 and min(seconds) > 0


@pytest.mark.parametrize("name", ["v8-k65536-256", "v12-k4096-4096-outliers", "v5-k7-3"])
def test_a_token_gives_the_same_alone_and_in_a_batch(operations: _native.Operations, name: str) -> None:
    rng = np.random.default_rng(0)
    tensors, n_in = vptq_layer(rng, **VPTQ_LAYERS[name])
    x = rng.normal(size=(12, n_in)).astype(np.float32)
    alone = [operations.linear(tensors, VPTQ_LAYERS[name]["out"], row[None]) for row in x]
    for n in (2, 3, 4, 5, 8, 9, 12):
        together = operations.linear(tensors, VPTQ_LAYERS[name]["out"], x[:n])
        assert np.array_equal(together, np.concatenate(alone[:n]))


def in_16_bits(tensors: dict[str, Raw], x: NDArray[np.float32]) -> NDArray[np.float64]:
    """What native/src/cpu/kernels/i16.h says for one codebook without scales or a permutation."""
    tile_columns, most_w, most_x, most = 128, 16383, (2**31 - 1) // 16383 - 65, 32767
    centroids = [
        floats(tensors[name])[0] for name in ("vptq_centroids", "vptq_res_centroids") if name in tensors
    ]
    w_step = np.float32(sum(np.float32(np.abs(c).max()) for c in centroids)) / np.float32(most_w)
    w = _native.Operations.dequantize(tensors, x.shape[1], len(floats(tensors["bias"])))
    whole_w = np.rint(w / w_step).astype(np.int64)
    y = np.zeros((len(x), len(w)))
    for begin in range(0, x.shape[1], tile_columns):
        tile = x[:, begin : begin + tile_columns]
        step = np.maximum(np.abs(tile).sum(axis=1) / most_x, np.abs(tile).max(axis=1) / most)[:, None]
        sums = np.rint(tile / step).astype(np.int64) @ whole_w[:, begin : begin + tile_columns].T
        assert np.abs(sums).max() < 2**31
        y += sums * (step * w_step).astype(np.float64)
    return y + floats(tensors["bias"])


@pytest.mark.parametrize("spike", [1, 1000])
@pytest.mark.parametrize("n_tokens", [1, 5, 131])
@pytest.mark.parametrize(("v", "k", "r"), [(2, 16, 0), (4, 256, 256), (6, 4096, 0), (8, 65536, 0)])
def test_linear_in_16_bits(
    cpu_operations: _native.Operations, v: int, k: int, r: int, n_tokens: int, spike: float
) -> None:
    rng = np.random.default_rng(v)
    tensors, n_in = vptq_layer(
        rng, out=77, v=v, k=k, r=r, group_size=301, perm=False, norm_dim=None, bias=True
    )
    x = rng.normal(size=(n_tokens, n_in)).astype(np.float32)
    x[:, 7] *= spike
    found = cpu_operations.linear(tensors, 77, x, n_tokens)
    # A number half way between two may be rounded the other way: a step more or less in one of 301 products.
    # What all the rounding does is ten times as much.
    assert relative_l2(found, in_16_bits(tensors, x)) < 5e-5


@pytest.mark.parametrize("n_tokens", [1, 7, 8])
@pytest.mark.parametrize(
    ("v", "k", "r"), [(2, 16, 0), (4, 256, 256), (6, 4096, 0), (8, 4096, 16), (12, 64, 0)]
)
def test_16_bits_are_the_same_on_every_instruction_set(
    cpu_operations: _native.Operations, v: int, k: int, r: int, n_tokens: int
) -> None:
    """One tile, whose largest x decides the step: of whole sums only their product is rounded."""
    rng = np.random.default_rng(v)
    tensors, n_in = vptq_layer(rng, out=77, v=v, k=k, r=r, group_size=127, perm=False, norm_dim=None)
    x = rng.normal(size=(n_tokens, n_in)).astype(np.float32)
    x[:, 7] = 100
    expected = _native.Operations("generic", 1).linear(tensors, 77, x, n_tokens)
    assert np.array_equal(cpu_operations.linear(tensors, 77, x, n_tokens), expected)


# The vector lengths that have a kernel for it.
ROUNDED = [name for name, layer in VPTQ_LAYERS.items() if layer["v"] in (2, 4, 6, 8, 12, 16)]


@pytest.mark.parametrize("n_tokens", [1, 2, 131])
@pytest.mark.parametrize("name", ROUNDED)
def test_16_bits_are_close(operations: _native.Operations, name: str, n_tokens: int) -> None:
    rng = np.random.default_rng(len(name))
    tensors, n_in = vptq_layer(rng, **VPTQ_LAYERS[name])
    x = rng.normal(size=(n_tokens, n_in)).astype(np.float32)
    out = VPTQ_LAYERS[name]["out"]
    exact = operations.linear(tensors, out, x).astype(np.float64)
    found = operations.linear(tensors, out, x, n_tokens)
    assert 0 < relative_l2(found, exact) < 1e-3


@pytest.mark.parametrize("name", ["v8-k65536-256", "v12-k4096-4096-outliers", "v5-k7-3"])
def test_16_bits_for_some_of_a_batch(operations: _native.Operations, name: str) -> None:
    rng = np.random.default_rng(5)
    tensors, n_in = vptq_layer(rng, **VPTQ_LAYERS[name])
    x = rng.normal(size=(11, n_in)).astype(np.float32)
    out = VPTQ_LAYERS[name]["out"]
    y = operations.linear(tensors, out, x, 4)
    for t in range(11):
        alone = operations.linear(tensors, out, x[t : t + 1], int(t < 4))
        assert np.array_equal(alone[0], y[t])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_16_bits_keep_what_is_not_finite(operations: _native.Operations, bad: float) -> None:
    rng = np.random.default_rng(6)
    tensors, n_in = vptq_layer(rng, out=64, v=8, k=256, group_size=300)
    x = rng.normal(size=(3, n_in)).astype(np.float32)
    x[1, 200] = bad
    y = operations.linear(tensors, 64, x, 3)
    assert np.isfinite(y[[0, 2]]).all() and not np.isfinite(y[1]).any()


def test_16_bits_of_nothing(operations: _native.Operations) -> None:
    tensors, n_in = vptq_layer(np.random.default_rng(7), out=16, v=8, k=16, group_size=40, norm_dim=None)
    for tiny in (0.0, 1e-40):
        assert np.abs(operations.linear(tensors, 16, np.full((2, n_in), tiny, np.float32), 2)).max() < 1e-37


def with_one_huge_weight(dtype: str, *, dense: bool) -> dict[str, Raw]:
    """A layer (64, 200) that keeps too little of its other weights in 16 bits: it stays in float32."""
    rng = np.random.default_rng(8)
    if dense:
        weight = rng.normal(size=(64, 200)).astype(np.float32)
        weight[3, 5] = 1000
        return {"weight": raw(weight, dtype)}
    tensors, _ = vptq_layer(rng, out=64, v=8, k=4096, r=16, group_size=200, dtype=dtype)
    centroids = floats(tensors["vptq_centroids"])
    centroids[0, 0] = 1000
    return tensors | {"vptq_centroids": raw(centroids, dtype)}


@pytest.mark.parametrize(
    ("dtype", "dense"), [("f16", False), ("f32", False), ("bf16", False), ("f32", True), ("bf16", True)]
)
def test_weights_that_need_more_than_16_bits(operations: _native.Operations, dtype: str, dense: bool) -> None:
    tensors = with_one_huge_weight(dtype, dense=dense)
    x = np.random.default_rng(9).normal(size=(3, 200)).astype(np.float32)
    exact = operations.linear(tensors, 64, x)
    assert np.isfinite(exact).all()
    assert np.array_equal(operations.linear(tensors, 64, x, 3), exact)


@pytest.mark.parametrize("n_prompt", [0, 5, 11])
@pytest.mark.parametrize("order", [[0, 1, 2], [1, 2, 0], [2, 0, 1], [2, 2, 0], [0, 0, 2]])
def test_each_layer_is_rounded_or_not_by_itself(
    operations: _native.Operations, order: list[int], n_prompt: int
) -> None:
    """Whatever layers share the loop with it, and whichever of them comes first."""
    rng = np.random.default_rng(1)
    layers = [
        vptq_layer(rng, out=64, v=8, k=256, group_size=200)[0],
        {"weight": raw(rng.normal(size=(64, 200)), "f16")},
        with_one_huge_weight("bf16", dense=False),
    ]
    x = rng.normal(size=(11, 200)).astype(np.float32)
    together = operations.linears([layers[i] for i in order], [64] * 3, x, n_prompt)
    for i, y in zip(order, together, strict=True):
        assert np.array_equal(y, operations.linear(layers[i], 64, x, n_prompt))


def test_dequantised_by_hand() -> None:
    """Two blocks of v = 2 over three columns, one of them an outlier column with v0 = 4."""
    tensors = {
        "vptq_centroids": raw(np.array([[[1, 2], [3, 4]]]), "f16"),
        "vptq_res_centroids": raw(np.array([[[0.5, 0.25], [0, 8]]]), "f16"),
        # one bit of index, one of residual: (index, residual) = (1, 0), (0, 1) and (1, 1), (0, 0)
        "vptq_indices": raw(np.array([[[0b1001], [0b0011]]]), "i32"),
        "vptq_outlier_indices": raw(np.array([[1]]), "i16"),
        "vptq_outlier_centroids": raw(np.array([[9, 9, 9, 9], [10, 20, 30, 40]]), "f16"),
        "vptq_perm": raw(np.array([2, 0, 1]), "i16"),
        "vptq_scale": raw(np.array([1, 2, 3]), "f16"),
        "vptq_shift": raw(np.array([0, 0, -1]), "f16"),
    }
    expected = [[3.5, 2, 29], [4.25, 20, 59], [3, 3, 89]]
    assert _native.Operations.dequantize(tensors, 3, 3).tolist() == expected


BAD_LAYERS = {
    "index beyond the codebook": (
        dict(v=4, k=5, group_size=8, out=8),
        {"vptq_indices": raw(np.full((1, 2, 1), -1), "i32")},
        "index 7 in row 0, column 0, expected less than 5",
    ),
    "residual index beyond the codebook": (
        dict(v=4, k=4, r=5, group_size=4, out=8),
        {"vptq_indices": raw(np.full((1, 2, 1), 0b11100), "i32")},
        "residual index 7 in row 0, column 0, expected less than 5",
    ),
    "outlier index beyond the codebook": (
        dict(v=4, k=4, group_size=8, n0=1, out=8),
        {"vptq_outlier_indices": raw(np.array([[3], [16]]), "i16")},
        "vptq_outlier_indices': index 16 in row 1, column 0, expected less than 16",
    ),
    "perm twice": (
        dict(v=4, k=4, group_size=3, out=8),
        {"vptq_perm": raw(np.array([0, 2, 2]), "i16")},
        "vptq_perm': not a permutation: 2 stands twice",
    ),
    "perm too large": (
        dict(v=4, k=4, group_size=3, out=8),
        {"vptq_perm": raw(np.array([0, 1, 3]), "i16")},
        "vptq_perm': entry 3, expected less than 3",
    ),
    "NaN centroid": (
        dict(v=2, k=4, group_size=3, out=8),
        {"vptq_centroids": raw(np.array([[[0, 1], [np.nan, 0], [0, 0], [0, 0]]]), "f16")},
        "vptq_centroids': holds NaN or infinity",
    ),
    "infinite scale": (
        dict(v=2, k=4, group_size=3, out=8, dtype="bf16"),
        {"vptq_scale": raw(np.array([1, np.inf, 1]), "bf16")},
        "vptq_scale': holds NaN or infinity",
    ),
    "scale without shift": (
        dict(v=2, k=4, group_size=3, out=8),
        {"vptq_shift": None},
        "expected .vptq_scale with",
    ),
    "both norms": (
        dict(v=2, k=4, group_size=3, out=8),
        {"vptq_out_scale": raw(np.ones(8), "f16"), "vptq_out_shift": raw(np.ones(8), "f16")},
        "expected .vptq_scale with",
    ),
    "too few words": (
        dict(v=2, k=256, group_size=8, out=8),
        {"vptq_indices": raw(np.zeros((1, 4, 1)), "i32")},
        "vptq_indices': shape (1, 4, 1), expected (1, 4, 2)",
    ),
    "float indices": (
        dict(v=2, k=4, group_size=8, out=8),
        {"vptq_indices": raw(np.zeros((1, 4, 1)), "f32")},
        "vptq_indices': type F32, expected I32",
    ),
    "codebooks that do not divide the columns": (
        dict(v=2, k=4, group_size=8, out=8),
        {"vptq_centroids": raw(np.zeros((3, 4, 2)), "f16")},
        "3 codebooks, expected a divisor of the 8 columns",
    ),
    "residual of another vector length": (
        dict(v=2, k=4, r=4, group_size=8, out=8),
        {"vptq_res_centroids": raw(np.zeros((1, 4, 3)), "f16")},
        "vptq_res_centroids': shape (1, 4, 3), expected (1, 4, 2)",
    ),
    "no centroids": (
        dict(v=2, k=4, group_size=8, out=8),
        {"vptq_centroids": None},
        "vptq_centroids': missing",
    ),
    "outliers everywhere": (
        dict(v=4, k=4, group_size=8, n0=1, out=4),
        {"vptq_outlier_indices": raw(np.zeros((1, 9)), "i16")},
        "vptq_outlier_indices': shape (1, 9), expected (1, fewer than 9)",
    ),
    "dense and quantised": (
        dict(v=2, k=4, group_size=8, out=8),
        {"weight": raw(np.zeros((8, 8)), "f16")},
        "has both .weight and .vptq_indices",
    ),
    "huge vectors": (
        dict(v=2, k=4, group_size=8, out=8),
        {"vptq_centroids": raw(np.zeros((1, 4, 65)), "f16")},
        "at most 64 weights",
    ),
    "one centroid": (
        dict(v=2, k=4, group_size=8, out=8),
        {"vptq_centroids": raw(np.zeros((1, 1, 2)), "f16")},
        "expected at least two centroids",
    ),
}


@pytest.mark.parametrize("name", BAD_LAYERS)
def test_bad_layer(name: str) -> None:
    arguments, changes, message = BAD_LAYERS[name]
    tensors, n_in = vptq_layer(np.random.default_rng(0), **arguments)
    tensors |= changes
    tensors = {suffix: tensor for suffix, tensor in tensors.items() if tensor is not None}
    with pytest.raises(FileError) as error:
        _native.Operations.dequantize(tensors, n_in, arguments["out"])
    assert message in str(error.value)
