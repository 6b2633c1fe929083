"""tools/compare_llamacpp.py: its random GGUF files, the order of the runs, what is made of their figures."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quants

from vptq_runtime import _native
from vptq_runtime.bench.shapes import SHAPES, Shape

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import compare_llamacpp
from random_gguf import SCALES, write_random

TINY = Shape(3, 256, 512, 4, 2, 320, 256, 1e4, head_dim=64)


@pytest.mark.parametrize("type_name", SCALES)
def test_random_file(type_name: str, tmp_path: Path) -> None:
    """Every weight of it is a small number, and they are not all the same."""
    write_random(tmp_path / "model.gguf", TINY, type_name, 2)
    reader = GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["llama.block_count"].contents() == 2
    assert reader.fields["tokenizer.ggml.model"].contents() == "no_vocab"
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["token_embd.weight"] == types["output.weight"] == "Q8_0"
    assert types["blk.1.ffn_down.weight"] == type_name
    assert len(types) == 3 + 2 * 9
    for tensor in reader.tensors:
        weights = quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(weights).all() and abs(weights).max() < 100
        assert tensor.tensor_type == GGMLQuantizationType.F32 or 0.001 < weights.std() < 10


class Children:
    """Stands for the child processes; keeps their order."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def output_of(self, command: list[str]) -> str:
        if "llama_cpp" in command[-1]:
            return ""
        if command[1].endswith("llamacpp_speed.py"):
            self.ran.append("llama.cpp")
            slower = float(len(self.ran))  # 1, 3, 5: one side's rounds differ
            seconds = {"pp": [8.0 * slower], "tg": [5.0 * slower], "layers": [3.0 * slower]}
            return json.dumps({"version": "1.0", "system": "none", "seconds": seconds})
        self.ran.append(command[command.index("--quant") + 1])
        results = [{"test": "pp16", "tok_s": 10.0}, {"test": "tg4", "tok_s": 2.0}]
        return json.dumps({"system": {"cpu": "c", "device": "d"}, "results": results})


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Children:
    children = Children()
    monkeypatch.setattr(compare_llamacpp, "output_of", children.output_of)
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    return children


def run(*options: str) -> int:
    sizes = ["-p", "16", "-n", "4"]
    return compare_llamacpp.main(["--shape", "tiny", "--quants", "v8-k256-0,v6-k256-0", *sizes, *options])


def test_comparison(children: Children, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--layers", "2", "--json") == 0
    assert children.ran == ["llama.cpp", "v8-k256-0"] * 3 + ["llama.cpp", "v6-k256-0"] * 3
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 6
    report: dict[str, Any] = json.loads(captured.out)
    assert (report["n_layer"], report["layers_measured"]) == (3, 2)
    results = report["results"]
    assert [(r["quant"], r["test"]) for r in results] == [
        (quant, test) for quant in ("v8-k256-0", "v6-k256-0") for test in ("pp16", "tg4")
    ]
    # Of a layer's 589824 weights 393216 are in the feed-forward matrices, which llama.cpp leaves out once: of
    # 2 1/3 layers 1 1/3 ran. So in the first round 8 s are 14, and the 3 in layers of 5 s are 5.25.
    assert results[0]["llamacpp_tok_s"] == pytest.approx([16 / 14, 16 / 42, 16 / 70])
    assert results[1]["llamacpp_tok_s"] == pytest.approx([4 / 7.25, 4 / 21.75, 4 / 36.25])
    assert results[0]["ratio"] == pytest.approx(10 / (16 / 42))
    assert results[1]["ratio"] == pytest.approx(2 / (4 / 21.75))


def test_table(children: Children, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--md", "--rounds", "1") == 0
    out = capsys.readouterr().out
    assert "| v8-k256-0 | pp16 | 2.00 (2.00 to 2.00) | 10.00 (10.00 to 10.00) | 5.00 |" in out
    assert "xtrapolated" not in out
    assert run("--layers", "2") == 0
    assert "Extrapolated on both sides: of 3 layers 2 ran" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quants", "v8-k3-0"], "--quant: found 'v8-k3-0'"),
        (["--layers", "1"], "--layers: found 1"),
        (["--layers", "4"], "--layers: found 4"),
        (["--rounds", "0"], "--rounds: found 0"),
        (["-n", "0"], "--n-gen: found 0"),
    ],
)
def test_errors(
    options: list[str],
    message: str,
    children: Children,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(*options) == 1
    assert message in capsys.readouterr().err
    assert children.ran == []


def test_no_room(
    children: Children, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_native, "available_memory", lambda: 1 << 20)
    assert run() == 1
    assert "tiny, 3 layers: needs 0.15 GiB of memory" in capsys.readouterr().err
    monkeypatch.setattr(compare_llamacpp.shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    assert run() == 1
    assert "expected 0.00 GiB for llama.cpp's file" in capsys.readouterr().err
    assert children.ran == []


def test_a_python_without_llamacpp(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before anything is written."""
    monkeypatch.setattr(compare_llamacpp, "write_random", None)
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    assert run("--llama-python", "/no/python") == 1
    assert capsys.readouterr().err == (
        "compare_llamacpp: error: /no/python: cannot be run: No such file or directory\n"
    )
    assert run("--llama-python", "/bin/false") == 1
    assert capsys.readouterr().err == (
        "compare_llamacpp: error: /bin/false -c 'import llama_cpp': ended with status 1\n"
    )
