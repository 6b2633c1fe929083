"""tools/compare_quality.py: which models it makes and measures, of what, and what it makes of the figures."""

import json
import re
import shutil
import stat
import sys
from pathlib import Path

import pytest
from dense_models import SEQ_LEN, write_dense, write_text
from vptq_converter.facts import read_facts

from vptq_runtime.errors import OptionError

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import compare_quality
from quality_models import STEPS, Configuration, bits_of_blocks

# Stand for llama.cpp's programs; each call is a line of calls.txt. What llama-perplexity prints is cut off
# the first time, as it happens there.
PROGRAM = """#!{python}
import pathlib, shutil, sys
here = pathlib.Path(__file__).parent
name, arguments = pathlib.Path(__file__).name, sys.argv[1:]
with open(here / "calls.txt", "a") as calls:
    calls.write(" ".join([name, *arguments]) + "\\n")
if name == "llama-imatrix":
    pathlib.Path(arguments[arguments.index("-o") + 1]).write_bytes(b"imatrix")
elif name == "llama-quantize":
    shutil.copy(arguments[-4], arguments[-3])
elif "--kl-divergence" not in arguments:
    pathlib.Path(arguments[arguments.index("--kl-divergence-base") + 1]).write_bytes(b"predictions")
else:
    print("Mean PPL(Q)                   :  12.500000 ±   0.250000")
    if (here / "printed").exists():
        print("Mean    KLD:   0.125000 ±   0.002000\\nSame top p: 75.000 ± 0.200 %")
    (here / "printed").touch()
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    write_dense(directory / "dense", "llama")
    write_text(directory / "text.txt")
    (directory / "llamacpp").mkdir()
    for name in ("llama-imatrix", "llama-quantize", "llama-perplexity"):
        program = directory / "llamacpp" / name
        program.write_text(PROGRAM.format(python=sys.executable), encoding="utf-8")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return directory


def run(files: Path, out: Path, *options: str) -> int:
    text = str(files / "text.txt")
    sizes = ["-c", str(SEQ_LEN), "--windows", "2", "--samples", "16", "--end-to-end", "1", "-t", "1"]
    return compare_quality.main(
        [str(files / "dense"), str(out), "--calibration", text, "--held-out", text, *sizes, *options]
    )


@pytest.fixture(scope="module")
def compared(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared")
    theirs = ["--llamacpp", str(files / "llamacpp"), "--llamacpp-types", "IQ2_XXS"]
    assert run(files, out, "--quants", "v4-k16-0-n,v4-k16-8-n", *theirs) == 0
    return out


def test_every_step_is_measured(compared: Path) -> None:
    """Of the first configuration all but the last step, of the others one, and the last one of the best."""
    measured = json.loads((compared / "report.json").read_text(encoding="utf-8"))["measured"]
    layer_wise = [("v4-k16-0-n", step) for step in list(STEPS)[:-1]]
    assert [(each["name"], each["step"]) for each in measured] == [
        ("dense", "dense"),
        ("dense", "llama.cpp"),
        ("IQ2_XXS", "llama.cpp"),
        *layer_wise,
        ("v4-k16-8-n", "fine-tuning"),
        ("v4-k16-8-n", "end to end"),  # a residual codebook more: a smaller proxy error
    ]
    dense, *_ = measured
    assert dense["kl_divergence"] == 0 and dense["top_token_agreement"] == 1
    assert all(each["kl_divergence"] > 0 for each in measured if each["step"] in STEPS)
    errors = [each["proxy_error"] for each in measured if each["step"] in STEPS]
    assert errors[0] > errors[2] > errors[3] > errors[4]
    assert (compared / "quality.png").stat().st_size > 1000


def test_llamacpp_reads_the_same_texts(compared: Path, files: Path) -> None:
    calls = (files / "llamacpp" / "calls.txt").read_text(encoding="utf-8").splitlines()
    names = [call.split()[0] for call in calls]
    # The dense model's predictions, then the dense model, twice as the lines were cut off; then IQ2_XXS.
    perplexity = "llama-perplexity"
    assert names == [*[perplexity] * 3, "llama-imatrix", "llama-quantize", perplexity]
    for name, call in zip(names, calls, strict=True):
        if name != "llama-quantize":
            assert f"-f {files / 'text.txt'}" in call and f"-c {SEQ_LEN}" in call
    assert "--token-embedding-type f16 --output-tensor-type f16" in calls[-2]
    measured = json.loads((compared / "report.json").read_text(encoding="utf-8"))["measured"]
    theirs = measured[2]
    assert (theirs["perplexity"], theirs["perplexity_error"]) == (12.5, 0.25)
    assert (theirs["kl_divergence"], theirs["kl_divergence_error"]) == (0.125, 0.002)
    assert theirs["top_token_agreement"] == 0.75
    assert theirs["bits"] == bits_of_blocks(compared / "dense-f16.gguf") == 16


def test_a_second_run_measures_nothing_again(
    compared: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(files, compared, "--quants", "v4-k16-0-n", "--end-to-end", "0", "--md") == 1
    assert "found the report of another setting" in capsys.readouterr().err
    before = (compared / "report.json").read_bytes()
    assert run(files, compared, "--quants", "v4-k16-0-n,v4-k16-8-n", "--md") == 0
    captured = capsys.readouterr()
    assert captured.err == "" and (compared / "report.json").read_bytes() == before
    rows = captured.out.splitlines()
    assert rows[2].startswith("| dense | dense | ")
    assert len(rows) == 2 + 1 + 6 + 2  # headings, dense, ours, what was scored
    assert rows[-1] == f"2 windows of {SEQ_LEN}: {2 * (SEQ_LEN // 2 - 1)} scored tokens"


def test_what_was_quantised_but_not_measured_is_measured(
    compared: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where a run was stopped between the two."""
    out = Path(shutil.copytree(compared, tmp_path / "out"))
    before = json.loads((out / "report.json").read_text())
    lost = before | {"measured": before["measured"][:-1]}
    (out / "report.json").write_text(json.dumps(lost))
    assert run(files, out, "--quants", "v4-k16-0-n,v4-k16-8-n", "--md") == 0
    capsys.readouterr()
    assert json.loads((out / "report.json").read_text()) == before


def test_a_program_that_is_stopped_leaves_nothing_that_is_taken_for_whole(
    files: Path, compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = Path(shutil.copytree(files / "llamacpp", tmp_path / "llamacpp"))
    out = Path(shutil.copytree(compared, tmp_path / "out"))
    options = ["--quants", "v4-k16-0-n,v4-k16-8-n", "--llamacpp", str(programs), "--llamacpp-types", "Q2_K"]
    program = programs / "llama-quantize"
    whole = program.read_text(encoding="utf-8")
    program.write_text('#!/bin/sh\necho half > "$8"; exit 3\n', encoding="utf-8")  # the file it writes
    assert run(files, out, *options) == 1
    assert "llama-quantize" in capsys.readouterr().err and not (out / "Q2_K.gguf").exists()
    program.write_text(whole, encoding="utf-8")
    assert run(files, out, *options) == 0
    assert (out / "Q2_K.gguf").read_bytes() == (out / "dense-f16.gguf").read_bytes()
    capsys.readouterr()


def test_refused(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A text with fewer windows than are asked for, texts that cannot be read, another program's report."""

    def said(out: Path, *options: str) -> str:
        assert run(files, out, *options) == 1
        return capsys.readouterr().err.removeprefix("compare_quality: error: ")

    expected = f"expected enough for 1000 windows of {SEQ_LEN}\n"
    assert re.fullmatch(rf"--held-out: found \d+ tokens, {expected}", said(tmp_path, "--windows", "1000"))
    for option in ("--calibration", "--held-out"):
        assert said(tmp_path, option, "nowhere") == "nowhere: cannot be read: No such file or directory\n"
    for report in ("{", "[]", '{"proxy_error": 1}'):
        (tmp_path / "report.json").write_text(report, encoding="utf-8")
        found = "found another program's report, expected none"
        assert said(tmp_path) == f"{tmp_path / 'report.json'}: {found}\n"


def test_models_by_their_options(
    files: Path, compared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Quantised and converted by the commands, kept, refused under the same name with other options; and
    another directory measures the same models on another text."""
    lines, models = tmp_path / "lines.txt", tmp_path / "models"
    lines.write_text(
        "# what is tried\n\nsmall: --vector-len 4 --centroids 16 --no-normalize | --embedding-type f16\n"
    )
    options = ["--quants", "--options", str(lines), "--models", str(models), "--md"]
    assert run(files, tmp_path / "one", *options) == 0
    rows = [row for row in capfd.readouterr().out.splitlines() if row.startswith("| small | options | ")]
    small = json.loads((tmp_path / "one" / "report.json").read_text())["measured"][-1]
    file = models / "small.gguf"
    assert small["options"] == "--vector-len 4 --centroids 16 --no-normalize | --embedding-type f16"
    assert small["file_bytes"] == file.stat().st_size and f"| {file.stat().st_size / 1e6:.1f} |" in rows[0]
    assert small["bits"] == bits_of_blocks(file) and read_facts(file).embedding_type == "F16"
    assert small["kl_divergence"] > 0
    made = (models / "small" / "report.json").stat()
    text = files / "other.txt"
    text.write_text((files / "text.txt").read_text(encoding="utf-8")[1000:], encoding="utf-8")
    assert run(files, tmp_path / "two", *options, "--held-out", str(text)) == 0
    other = json.loads((tmp_path / "two" / "report.json").read_text())["measured"][-1]
    assert other["perplexity"] != small["perplexity"] and other["bits"] == small["bits"]
    assert (models / "small" / "report.json").stat() == made
    capfd.readouterr()
    lines.write_text("small: --vector-len 4 --centroids 32\n")
    assert run(files, tmp_path / "one", *options) == 1
    assert "--options: small: found it made with" in capfd.readouterr().err
    for wrong in ("small", "small: a | b | c", "sm/all: -v 4", "dense: -v 4", "a: x\na: y"):
        lines.write_text(f"{wrong}\n")
        assert run(files, tmp_path / "one", *options) == 1
        assert "--options: found " in capfd.readouterr().err
    lines.write_text("bad: --vector-len 0\n")
    assert run(files, tmp_path / "one", *options) == 1
    assert "vptq_quantizer.cli" in capfd.readouterr().err


def test_llamacpp_s_own_embedding(
    files: Path, compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = Path(shutil.copytree(files / "llamacpp", tmp_path / "llamacpp"))
    (programs / "calls.txt").unlink(missing_ok=True)
    theirs = ["--llamacpp", str(programs), "--llamacpp-types", "Q2_K", "--imatrix-windows", "3"]
    assert run(files, tmp_path / "out", "--quants", "--own-embedding", *theirs) == 0
    calls = (programs / "calls.txt").read_text(encoding="utf-8")
    assert "--token-embedding-type" not in calls and "--chunks 3" in calls
    assert (tmp_path / "out" / "Q2_K-own-embedding.gguf").exists()
    capsys.readouterr()


def test_configurations() -> None:
    options = Configuration.parse("v6-k512-4-o1.5-n").options
    assert (options.vector_len, options.centroids, options.res_centroids) == (6, 512, 4)
    assert (options.outliers, options.normalize) == (1.5, False)
    assert Configuration.parse("v6-k512-0").options.normalize
    for name in ("", "v6-k512", "v6-k512-0-x", "v6-k500-0"):
        with pytest.raises(OptionError, match=r"^--"):
            Configuration.parse(name)


def test_a_program_that_is_not_there(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(files, tmp_path / "out", "--llamacpp", "/no/directory") == 1
    assert (
        "--llamacpp: /no/directory/llama-perplexity: cannot be run: No such file" in capsys.readouterr().err
    )
