"""The other operations of the CPU backend, each against its slow, obvious twin in float64, over odd sizes."""

from typing import Any

import numpy as np
import pytest
from layer_tensors import MATRIX_TYPES, raw, vptq_layer
from relative_error import relative_l2

from vptq_runtime import _native
from vptq_runtime.errors import OptionError


@pytest.mark.parametrize("dtype", MATRIX_TYPES)
def test_embed(operations: _native.Operations, dtype: str) -> None:
    table = np.random.default_rng(1).normal(size=(9, 96)).astype(np.float32)
    tensors = {"weight": raw(table, dtype)}
    rows = _native.Operations.dequantize(tensors, 96, 9)
    assert np.array_equal(operations.embed(tensors, 96, 9, [3, 0, 8, 3]), rows[[3, 0, 8, 3]])


@pytest.mark.parametrize(
    "layer",
    [
        dict(out=7, v=2, k=16, group_size=33),
        dict(out=10, v=3, k=5, group_size=77, dtype="f32"),
        dict(out=23, v=5, k=7, r=3, group_size=91, dtype="bf16", norm_dim=1),
        dict(out=9, v=8, k=2, group_size=31, perm=False, norm_dim=None),
        dict(out=65, v=8, k=65536, r=256, group_size=70),
        dict(out=31, v=16, k=65536, r=65536, group_size=64, norm_dim=1),
        dict(out=50, v=12, k=4096, r=4096, g=4, group_size=19, n0=5, k0=8192),
        dict(out=24, v=4, k=16, r=8, g=16, group_size=7, n0=2, v0=3),
        dict(out=1, v=64, k=9, group_size=1, g=3),
        dict(out=300, v=1, k=4, group_size=600),
    ],
)
def test_embed_of_a_vptq_layer(operations: _native.Operations, layer: dict[str, Any]) -> None:
    tensors, n_in = vptq_layer(np.random.default_rng(1), **layer)
    tokens = [layer["out"] - 1, 0, *range(layer["out"])]
    rows = _native.Operations.dequantize(tensors, n_in, layer["out"])
    assert np.array_equal(operations.embed(tensors, n_in, layer["out"], tokens), rows[tokens])


@pytest.mark.parametrize("d", [1, 15, 16, 100, 4096])
def test_rms_norm(operations: _native.Operations, d: int) -> None:
    rng = np.random.default_rng(d)
    x, weight = rng.normal(size=(3, d)).astype(np.float32), rng.normal(size=d).astype(np.float32)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    assert relative_l2(operations.rms_norm(x, weight, 1e-5), expected) < 1e-6


@pytest.mark.parametrize("d", [1, 17, 333])
def test_swiglu(operations: _native.Operations, d: int) -> None:
    rng = np.random.default_rng(d)
    gate, up = (10 * rng.normal(size=(2, d))).astype(np.float32), rng.normal(size=(2, d)).astype(np.float32)
    gate.flat[0] = -200.0  # where e^-x would overflow
    expected = gate / (1 + np.exp(-gate.astype(np.float64))) * up
    assert relative_l2(operations.swiglu(gate, up), expected) < 1e-6


@pytest.mark.parametrize(("n_head", "head_dim"), [(1, 2), (3, 20), (2, 128)])
def test_rope(operations: _native.Operations, n_head: int, head_dim: int) -> None:
    rng = np.random.default_rng(head_dim)
    positions = [0, 1, 77, 1000]
    inv_freq = (10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    x = rng.normal(size=(4, n_head * head_dim)).astype(np.float32)
    angle = (np.array(positions, np.float32)[:, None] * inv_freq).astype(np.float64)[:, None]
    a, b = np.split(x.reshape(4, n_head, head_dim).astype(np.float64), 2, axis=-1)
    expected = np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1
    )
    found = operations.rope(x, n_head, positions, inv_freq.tolist())
    assert relative_l2(found, expected.reshape(4, -1)) < 1e-6


def test_an_instruction_set_that_is_not_there() -> None:
    with pytest.raises(
        OptionError, match=r"instruction set 'mmx' .* expected one that this processor has: .*generic"
    ):
        _native.Operations("mmx", 1)


def test_vptq_cpu_isa_forces_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VPTQ_CPU_ISA", "mmx")
    with pytest.raises(OptionError, match="VPTQ_CPU_ISA"):
        _native.Operations("", 1)
