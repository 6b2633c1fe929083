"""tools/compare_vptq_cuda.py: what it says without a GPU, and, with the CPU in its place, that both sides get
the same layers."""

import json
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from vptq_runtime import _native
from vptq_runtime.bench.synthetic import Quant

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import compare_vptq_cuda
from random_layer import layer_bytes, raw_tensors, rotating_layers


def test_without_the_package_or_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if find_spec("torch") is not None:
        import torch

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compare_vptq_cuda.main([]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("compare_vptq_cuda: error: vptq's CUDA kernels cannot be imported: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quants", "q4_k"], "--quant: found 'q4_k'"),
        (["--sizes", "4096"], "--sizes: found '4096', expected sizes such as 4096x4096"),
        (["--sizes", "0x8"], "--sizes: found '0x8'"),
        (["--tokens", "3"], "--tokens: found 3"),
        (["--rounds", "0"], "--rounds: found 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_vptq_cuda.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_layers_that_take_turns() -> None:
    """More bytes than asked for, no two alike, and each what its raw tensors say."""
    layers = rotating_layers(Quant.parse("v8-k256-16"), 40, 64, 50_000)
    assert 50_000 < sum(map(layer_bytes, layers)) <= 50_000 + layer_bytes(layers[0])
    indices = [layer["indices"][1] for layer in layers]
    assert not any(np.array_equal(indices[0], other) for other in indices[1:])
    weights = [_native.Operations.dequantize(raw_tensors(layer), 64, 40) for layer in layers[:2]]
    assert weights[0].shape == (40, 64) and not np.array_equal(*weights)


class FakeEvent:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def elapsed_time(self, end: "FakeEvent") -> float:
        return 8.0  # milliseconds


@pytest.mark.skipif(find_spec("vptq") is None, reason="pip install --no-deps vptq==0.0.5.post1")
@pytest.mark.parametrize("quant", ["v8-k256-16", "v6-k64-0"])
def test_both_sides_get_the_same(
    quant: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import published_vptq
    import torch
    import vptq
    from vptq.ops.quant_gemm import dequant

    parsed, (rows, columns) = Quant.parse(quant), (77, 100)
    calls = []

    def quant_gemv(x: Any, indices: Any, centroids: Any, *rest: Any) -> Any:
        """With the arguments of the published kernel, its result by the published torch code."""
        no_res, res_centroids, no_outliers, no_outlier_centroids, perm, scale, shift, bias, n_in, n_out = rest
        assert (no_res, no_outliers, no_outlier_centroids, bias) == (None, None, None, None)
        assert x.shape == (1, 2, columns) and (n_in, n_out) == (columns, rows)
        assert centroids.shape == (1, parsed.k, parsed.v)
        calls.append(indices.data_ptr())
        weight = dequant(
            *(indices, centroids, None, None, None, res_centroids, perm, scale, shift),
            *(True, False, res_centroids is not None, True, True),
            *(parsed.k, 0, parsed.r, -rows % parsed.v, 0, 1, columns, 0, parsed.v, 0),
        )
        return torch.nn.functional.linear(x, weight)

    library = ModuleType("vptq.libvptq")
    library.quant_gemv = quant_gemv  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vptq.libvptq", library)
    monkeypatch.setattr(vptq, "libvptq", library, raising=False)
    for name, fake in {
        "is_available": lambda: True,
        "synchronize": lambda: None,
        "Event": FakeEvent,
        "CUDAGraph": lambda: ModuleType("graph"),
        "graph": lambda graph: nullcontext(setattr(graph, "replay", lambda: None)),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor, *_: tensor)
    operations = _native.Operations
    monkeypatch.setattr(_native, "Operations", lambda _, n_threads: operations("", n_threads))
    layer = published_vptq.published_layer

    def checked_layer(*arguments: Any) -> Any:
        made = layer(*arguments)
        x = torch.randn(1, 2, columns).half()
        assert torch.equal(compare_vptq_cuda.gemv(made, x), made(x))
        return made

    monkeypatch.setattr(published_vptq, "published_layer", checked_layer)
    options = ["--quants", quant, "--sizes", f"{rows}x{columns}", "--tokens", "2", "--rounds", "1"]
    monkeypatch.setattr(
        compare_vptq_cuda, "rotating_layers", lambda *sizes: rotating_layers(*sizes[:-1], 8_000)
    )
    assert compare_vptq_cuda.main([*options, "--json"]) == 0
    [result] = json.loads(capsys.readouterr().out)["results"]
    n = result["layers"]
    assert n > 1 and len(set(calls)) == n
    assert result["layer_s"] == result["kernel_s"] == pytest.approx(8e-3 / n)
    assert result["ratio"] == pytest.approx(8e-3 / n / result["here_s"])
    assert 0 < result["difference"] < 5e-3
    assert compare_vptq_cuda.main([*options, "--md"]) == 0
    assert f"| {quant} | {rows} x {columns} | " in capsys.readouterr().out
