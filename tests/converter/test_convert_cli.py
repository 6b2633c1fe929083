"""vptq-convert: exit status, one-line errors, a summary; a bar only on a terminal."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from configurations import ARCHITECTURES, CONFIGURATIONS
from converted import keys, raw_tensors
from vptq_converter import cli

COMMAND = [str(Path(sys.executable).with_name("vptq-convert"))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli") / "checkpoint"
    return write_checkpoint(directory, ARCHITECTURES["llama"], CONFIGURATIONS["v8-k256-256"])


def test_success(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.gguf"
    assert cli.main([str(checkpoint), str(out), "--embedding-type", "f16"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{out}: llama, 14 VPTQ and 1 dense linear layers, ")
    assert captured.out.count("\n") == 1 and captured.err == ""
    assert keys(out)["vptq.version"] == 1


def test_dequantize(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.gguf"
    assert cli.main([str(checkpoint), str(out), "--dequantize", "bf16"]) == 0
    assert "0 VPTQ and 15 dense" in capsys.readouterr().out
    assert keys(out)["general.file_type"] == 32


def test_a_window_that_llamacpp_ignores_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "in", ARCHITECTURES["mistral-window"], CONFIGURATIONS["v8-k256-256"])
    assert cli.main([str(source), str(tmp_path / "vptq.gguf")]) == 0
    assert capsys.readouterr().err == ""
    assert cli.main([str(source), str(tmp_path / "plain.gguf"), "--dequantize", "f16"]) == 0
    assert "ignores the model's sliding window: beyond 24 tokens" in capsys.readouterr().err


def test_matrices_that_q8_0_cannot_hold_are_said(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([str(checkpoint), str(tmp_path / "plain.gguf"), "--dequantize", "q8_0"]) == 0
    types = [
        type_name for type_name, shape, _ in raw_tensors(tmp_path / "plain.gguf").values() if len(shape) == 2
    ]
    assert set(types) == {"F16"}  # rows of 100 and of 198: not one is a multiple of 32
    expected = f"{len(types)} matrices are f16, not q8_0, which needs rows of a multiple of 32 weights"
    assert capsys.readouterr().err == f"vptq-convert: note: {expected} (token_embd: 100)\n"


def test_an_error_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "line\nbreak" / "out.gguf"
    result = subprocess.run([*COMMAND, checkpoint, out], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("vptq-convert: error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["in"],
        ["in", "out", "more"],
        ["in", "out", "--dequantize", "q4_0"],
        ["in", "out", "--nothing"],
        ["in", "out", "--embedding-type", "q6_k"],
    ],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    assert raised.value.code == 2
    assert "usage: vptq-convert" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(["--version"])
    assert raised.value.code == 0
    assert capsys.readouterr().out.startswith("vptq-convert ")


def test_ctrl_c(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    assert cli.main([str(checkpoint), str(tmp_path / "out.gguf")]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_progress_bar_on_a_terminal_only(checkpoint: Path, tmp_path: Path) -> None:
    command = [*COMMAND, str(checkpoint), str(tmp_path / "out.gguf")]
    piped = subprocess.run(command, capture_output=True, text=True, check=True)
    assert piped.stderr == ""

    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(command, stderr=theirs, stdout=subprocess.DEVNULL, env=environment) as process:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 4096):
                shown += piece
        except OSError:  # Linux: the other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0
    text = shown.decode()
    assert "writing" in text and "MB" in text and "━" in text
