"""tools/compare_vptq_torch.py: both sides get the same layer."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("vptq") is None:
    pytest.skip("pip install --no-deps vptq==0.0.5.post1", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import compare_vptq_torch


@pytest.mark.parametrize("quant", ["v8-k65536-256", "v6-k4096-0", "v12-k256-16"])
def test_same_layer(quant: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--in-features", "100", "--out-features", "77", "--tokens", "3", "--rounds", "1"]
    assert compare_vptq_torch.main(["--quant", quant, "--dtype", "f32", *options]) == 0
    out = capsys.readouterr().out
    assert f"{quant}, 77 x 100, tokens: 3" in out
    difference = re.search(r"largest difference (\S+) of the largest output", out)
    assert difference is not None and 0 < float(difference[1]) < 1e-5
    assert re.search(r"torch path in f32 \d+\.\d ms, here \d+\.\d{3} ms: \d+ times as fast", out)


def test_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_vptq_torch.main(["--quant", "q4_k"]) == 1
    assert "--quant: found 'q4_k'" in capsys.readouterr().err
    assert compare_vptq_torch.main(["--tokens", "0"]) == 1
    assert "--tokens: found 0" in capsys.readouterr().err
