"""tools/compare_vptq_cuda.py: what it says without a GPU, and the layers that it takes in turns."""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from vptq_runtime import _native
from vptq_runtime.synthetic import Quant

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
