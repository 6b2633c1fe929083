"""vptq-quantize: a table, a picture, exit status, one-line errors."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dense_models import SEQ_LEN
from vptq_quantizer import cli
from vptq_quantizer.run import model_quantizer
from vptq_quantizer.run.report import plot

from vptq_runtime.commands import progress

SMALL = ["--vector-len", "4", "--centroids", "16", "--samples", "8", "--seq-len", str(SEQ_LEN)]


def test_success(
    dense_model: Callable[[str], Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    picture = out / "errors.png"  # the directory is new
    command = [str(dense_model("llama")), str(out), *SMALL, "--finetune", "--plot", str(picture)]
    assert cli.main([*command, "--calibration", str(text)]) == 0
    captured = capsys.readouterr()
    report = json.loads((out / "report.json").read_text())
    assert f"{out}: {report['bits_per_weight']:.3f} bits per quantised weight" in captured.out
    for title in ("k-means", "second order", "fine-tuning", "bits", "seconds"):
        assert title in captured.out
    assert captured.err == ""
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_lines_without_a_terminal(
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """For matrices and steps of training, when the last one is old enough; what was done before counts."""
    monkeypatch.setattr(progress, "LINE_S", 0)
    command = [str(model), str(tmp_path / "out"), *SMALL, "--calibration", str(text), "--end-to-end", "2"]
    matrix = re.compile(r"layer ([01]): [a-z_.]+: proxy error 0\.\d{4}; (\d+)% done, about 0:0\d:\d\d left")
    training = re.compile(r"end to end: step \d, KL divergence \d\.\d{4}; (50|100)% done, about .+ left")
    assert cli.main([*command, "--layers", "0"]) == 0
    layer = [match.groups() for match in map(matrix.fullmatch, capsys.readouterr().err.splitlines()) if match]
    assert len(layer) == 7 and layer[-1] == ("0", "100")
    assert cli.main(command) == 0
    *lines, first, last = capsys.readouterr().err.splitlines()
    rest = [match.groups() for match in map(matrix.fullmatch, lines) if match]
    assert len(rest) == 7 == len(lines) and rest[-1] == ("1", "100")
    assert all(50 < int(share) <= 100 for _, share in rest)
    assert training.fullmatch(first) and training.fullmatch(last)


def test_switches(dense_model: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    command = [str(dense_model("llama")), str(tmp_path / "out"), *SMALL, "--calibration", str(text)]
    switches = ["--no-hessian-weights", "--no-second-order", "--no-normalize"]
    assert cli.main([*command, *switches]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["proxy_error"]) == ["k-means"]
    options = report["options"]
    assert not any(options[name] for name in ("hessian_weights", "second_order", "normalize", "finetune"))


def test_a_part(
    dense_model: Callable[[str], Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(dense_model("llama")), str(tmp_path / "out"), *SMALL, "--calibration", str(text)]
    assert cli.main([*command, "--layers", "1"]) == 0
    assert "1 of 2 decoder layers are finished, others still to do" in capsys.readouterr().out
    assert cli.main([*command, "--layers", "0-1"]) == 0
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("kept", [True, False])
def test_whether_a_training_is_kept_is_said(
    kept: bool, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    real = model_quantizer.tune

    def tune(*arguments: Any) -> Any:
        tensors, report = real(*arguments)
        return tensors, report | {"kept": kept}

    monkeypatch.setattr(model_quantizer, "tune", tune)
    command = [str(model), str(tmp_path / "out"), *SMALL, "--calibration", str(text), "--end-to-end", "1"]
    assert cli.main(command) == 0
    assert ("no better, so the training is not kept" in capsys.readouterr().out) is not kept


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--centroids", "3"], 1, "error: --centroids: found 3, expected a power of two from 2 to 65536"),
        (["--layers", "x"], 2, "error: --layers: found 'x', expected A-B, as 0-15"),
        (["--calibration", "nothing.txt"], 1, "error: --calibration: nothing.txt: no such file"),
    ],
)
def test_errors(
    arguments: list[str],
    status: int,
    message: str,
    dense_model: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([str(dense_model("llama")), str(tmp_path / "out"), *SMALL, *arguments]) == status
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(("source", "calibration"), [("none/../model", []), ("model", ["nothing.txt"])])
def test_wrong_paths_are_found_before_pytorch_is_loaded(
    source: str, calibration: list[str], model: Path, tmp_path: Path
) -> None:
    code = "import sys; from vptq_quantizer import cli; cli.main(sys.argv[1:]); print('torch' in sys.modules)"
    paths = [str(model.parent / source) if source != "model" else str(model), str(tmp_path / "out")]
    options = ["--calibration", *calibration] if calibration else []
    done = subprocess.run(
        [sys.executable, "-c", code, *paths, *options], capture_output=True, encoding="utf-8", timeout=60
    )
    assert done.stderr.startswith("vptq-quantize: error: ") and done.stderr.count("\n") == 1
    assert done.stdout == "False\n"


def test_warnings_are_printed(
    dense_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("the quick brown fox")
    command = [str(dense_model("llama")), str(tmp_path / "out"), *SMALL]
    assert cli.main([*command, "--calibration", str(tmp_path / "short.txt")]) == 0
    assert capsys.readouterr().err.startswith("vptq-quantize: warning: --calibration: found ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("errors.xyz", "expected a name that ends in ."),
        ("nowhere/errors.png", "expected a file in a directory that can be written to"),
    ],
)
def test_a_picture_that_cannot_be_drawn(
    name: str,
    message: str,
    dense_model: Callable[[str], Path],
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Is refused before the work: a run that is finished cannot be repeated."""
    command = [str(dense_model("llama")), str(tmp_path / "out"), *SMALL, "--calibration", str(text)]
    assert cli.main([*command, "--plot", str(tmp_path / name)]) == 1
    error = capsys.readouterr().err
    assert f"--plot: {tmp_path / name}: {message}" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_picture_without_matplotlib(
    dense_model: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    command = [str(dense_model("llama")), str(tmp_path / "out"), *SMALL, "--plot", "errors.png"]
    assert cli.main(command) == 1
    assert "--plot needs matplotlib: pip install" in capsys.readouterr().err


@pytest.mark.filterwarnings("error")
def test_a_picture_of_no_errors(tmp_path: Path) -> None:
    """A model of zeros: nothing that a logarithmic axis could show."""
    linears = {name: {"proxy_error": {"k-means": 0.0}} for name in ("mlp.up_proj", "mlp.down_proj")}
    plot([{"layer": n, "linears": linears} for n in (0, 1)], tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
