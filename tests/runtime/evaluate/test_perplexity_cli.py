"""vptq-perplexity: what comes out where, and with which exit status."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from configurations import ARCHITECTURES, VOCAB_SIZE
from converted import change_json, change_tensors

from vptq_runtime import Runtime, _native, demo_path
from vptq_runtime.commands import command
from vptq_runtime.evaluate import DenseModel, Estimate, Perplexity, compare, perplexity, scoring
from vptq_runtime.evaluate import cli as perplexity_cli

COMMAND = [str(Path(sys.executable).with_name("vptq-perplexity"))]  # as installed
SPEED = r"\d+ tokens in [\d.]+ s, [\d.]+ tok/s \| cpu \(.*\).*\n"

ChangedModel = Callable[[dict[str, dict[str, Any]]], Path]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 4000 tokens, with characters of several bytes and line ends of both kinds."""
    words = ["the quick brown fox", "a model is a file", "\N{SNOWMAN} über", "lazy dog\r\n", "\n\n"]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(" ".join(np.random.default_rng(0).choice(words, 400)).encode())
    return path


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dense") / "checkpoint"
    write_checkpoint(directory, ARCHITECTURES["llama"], {}, seed=1)
    change_json(directory / "config.json", lambda config: config.pop("quantization_config"))
    return directory


def run(*arguments: str | Path, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*COMMAND, *map(str, arguments)], input=given, capture_output=True, timeout=120)


def read(path: Path) -> str:
    return path.read_bytes().decode()


def as_json(estimate: Estimate) -> dict[str, float | None]:
    return {"value": estimate.value, "standard_error": estimate.standard_error}


def test_result_to_stdout_speed_to_stderr(runtime: Runtime, model: Path, text: Path) -> None:
    done = run("-m", model, text, "-c", "300")
    result = perplexity(runtime, runtime.tokenize(read(text)), n_ctx=300)
    value, n = result.perplexity, result.n_windows
    assert n > 5
    assert done.stdout.decode() == (
        f"{model}: perplexity {value.value:.4f} ± {value.standard_error:.4f}\n"
        f"papers: {n} windows of 300 tokens, all but the first token of each scored: {299 * n} tokens "
        "(±: standard error over windows)\n"
    )
    assert re.fullmatch(SPEED, done.stderr.decode())
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("options", "definition"),
    [
        (
            "--method llama.cpp",
            "llama.cpp: 3 windows of 60 tokens, the second half of each, behind BOS, scored",
        ),
        ("--stride 50", "papers: 3 windows of 60 tokens, one every 50, what is new in each scored"),
    ],
)
def test_the_definition_is_said(model: Path, text: Path, options: str, definition: str) -> None:
    done = run("-m", model, text, "-c", "60", "--chunks", "3", *options.split())  # llama.cpp's name
    assert done.stdout.decode().splitlines()[1].startswith(f"{definition}: ")


def test_comparison(runtime: Runtime, model: Path, text: Path, dense: Path) -> None:
    """With a dense checkpoint; its own file is another model's as any."""
    result = compare(runtime, DenseModel(dense), runtime.tokenize(read(text)), n_ctx=300, max_windows=4)
    done = run("-m", model, text, "-c", "300", "--windows", "4", "--compare", dense)
    lines = done.stdout.decode().splitlines()
    theirs = result.reference.perplexity
    assert lines[2:5] == [
        "",
        f"{dense}: perplexity {theirs.value:.4f} ± {theirs.standard_error:.4f}",
        f"{model} beside it, on the same tokens:",
    ]
    table = dict(re.fullmatch(r" +([\w\- ]+?)  +(.*)", line).groups() for line in lines[5:])
    ratio, kl, same = result.perplexity_ratio, result.mean_kl_divergence, result.top_token_agreement
    assert table == {
        "perplexity ratio": f"{ratio.value:.5f} ± {ratio.standard_error:.5f}",
        "KL divergence": f"{kl.value:#.4g} ± {kl.standard_error:#.4g} nats a token",
        "median": f"{result.kl_quantile(0.5):#.4g}",
        "p99": f"{result.kl_quantile(0.99):#.4g}",
        "max": f"{result.kl_quantile(1):#.4g}",
        "top-token agreement": f"{same.value:.3%} ± {same.standard_error:.3%}",
    }
    assert re.fullmatch(SPEED, done.stderr.decode())


def test_beside_itself(model: Path, text: Path) -> None:
    done = run("-m", model, text, "-c", "100", "--windows", "3", "--compare", model, "--json")
    comparison = json.loads(done.stdout)["comparison"]
    zeros = dict.fromkeys(("value", "standard_error", "median", "p99", "max"), 0.0)
    assert comparison["kl_divergence"] == zeros
    assert (
        comparison["top_token_agreement"]
        == comparison["perplexity_ratio"]
        == {
            "value": 1.0,
            "standard_error": 0.0,
        }
    )


def test_json(runtime: Runtime, model: Path, text: Path, dense: Path) -> None:
    done = run("-m", model, text, "-c", "300", "--compare", dense, "--method", "llama.cpp", "--json")
    report = json.loads(done.stdout)
    tokens = runtime.tokenize(read(text))
    expected = compare(runtime, DenseModel(dense), tokens, n_ctx=300, method="llama.cpp")
    assert report.pop("seconds") > 0
    assert report.pop("tokens_per_s") > 0
    kl = expected.mean_kl_divergence
    assert report == {
        "model": str(model),
        "compare": str(dense),
        "texts": [str(text)],
        "device": runtime.device,
        "kv_type": "f16",
        "precision": "auto",
        "method": "llama.cpp",
        "n_ctx": 300,
        "stride": 300,
        "bos": 0,
        "n_tokens": len(tokens),
        "n_windows": len(tokens) // 300,
        "n_scored": len(tokens) // 300 * 149,
        "standard_error_over": "tokens",
        "perplexity": as_json(expected.model.perplexity),
        "mean_nll": as_json(expected.model.mean_nll),
        "comparison": {
            "reference": {
                "perplexity": as_json(expected.reference.perplexity),
                "mean_nll": as_json(expected.reference.mean_nll),
            },
            "perplexity_ratio": as_json(expected.perplexity_ratio),
            "kl_divergence": {
                **as_json(kl),
                "median": expected.kl_quantile(0.5),
                "p99": expected.kl_quantile(0.99),
                "max": expected.kl_quantile(1),
            },
            "top_token_agreement": as_json(expected.top_token_agreement),
        },
    }
    assert done.stderr == b""


def test_json_without_a_comparison(model: Path, text: Path) -> None:
    """Of one window: no standard error."""
    report = json.loads(run("-m", model, text, "--windows", "1", "--json").stdout)
    assert report["comparison"] is None
    assert report["standard_error_over"] == "windows"
    assert report["perplexity"]["standard_error"] is None


def test_texts_are_joined_as_they_are(model: Path, text: Path, tmp_path: Path) -> None:
    data = text.read_bytes()
    half = data.index("\N{SNOWMAN}".encode())
    (tmp_path / "a").write_bytes(data[:half])
    (tmp_path / "b").write_bytes(data[half:])
    whole = json.loads(run("-m", model, text, "--json").stdout)
    parts = json.loads(run("-m", model, tmp_path / "a", tmp_path / "b", "--json").stdout)
    piped = json.loads(run("-m", model, tmp_path / "a", "-", "--json", given=data[half:]).stdout)
    assert whole["n_tokens"] == parts["n_tokens"] == piped["n_tokens"]
    assert whole["perplexity"] == parts["perplexity"] == piped["perplexity"]
    assert piped["texts"] == [str(tmp_path / "a"), "-"]


def test_a_short_text_is_said(model: Path) -> None:
    done = run("-m", model, "-", given=b"the quick brown fox")
    assert done.returncode == 0
    line = b"papers: 1 window of 5 tokens, all but the first token of each scored: 4 tokens\n"
    assert done.stdout.endswith(line)  # no standard error, and so no word of it
    note = "the text has 5 tokens, fewer than the context of 1024: they are the one window\n"
    assert done.stderr.decode().startswith(note)


def test_the_demo_model_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert perplexity_cli.main([__file__, "--windows", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == str(demo_path())
    assert 1 < report["perplexity"]["value"] < 100  # 4096 is knowing nothing


def test_every_option_arrives(
    model: Path, dense: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[dict[str, Any]] = []
    for kind in (Runtime, DenseModel):

        def spying(self: Any, path: Any, init: Any = kind.__init__, **options: Any) -> None:
            seen.append({"path": str(path)} | options)
            init(self, path, **options)

        monkeypatch.setattr(kind, "__init__", spying)
    options = "-c 99 -t 1 --device cpu --kv-type f32 --precision f32 -ngl 0 --windows 1"
    arguments = ["-m", str(model), str(text), *options.split(), "--compare"]
    assert perplexity_cli.main([*arguments, str(dense), "--compare-dtype", "bfloat16"]) == 0
    assert perplexity_cli.main([*arguments, str(model)]) == 0
    runtime = {
        "path": str(model),
        "n_ctx": 99,
        "n_threads": 1,
        "device": "cpu",
        "gpu_layers": 0,
        "kv_type": "f32",
        "precision": "f32",
        "progress": None,  # standard error is no terminal
    }
    dense_options = {"path": str(dense), "device": "cpu", "dtype": "bfloat16", "n_threads": 1}
    assert seen == [runtime, dense_options, runtime, runtime]
    capsys.readouterr()


@pytest.mark.parametrize(
    "arguments",
    [[], ["a", "--compare-dtype", "float32"], ["a", "--windows", "many"], ["a", "--colour"]],
    ids=" ".join,
)
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        perplexity_cli.main(arguments)
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("usage: vptq-perplexity")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", ""], "-m: found ''"),
        (["-c", "1"], "-c: found 1"),
        (["-c", "-1"], "-c: found -1"),
        (["-c", "2", "--method", "llama.cpp"], "-c: found 2"),
        (["-t", "0"], "-t: found 0"),
        (["--method", "gptq"], "--method: found 'gptq'"),
        (["--windows", "0"], "--windows: found 0"),
        (["--stride", "0"], "--stride: found 0"),
        (["--stride", "2000"], "--stride: found 2000"),
        (["--stride", "5", "--method", "llama.cpp"], "--stride: found 5 with the method llama.cpp"),
        (["--kv-type", "q4"], "--kv-type: found 'q4'"),
        (["--precision", "f16"], "--precision: found 'f16'"),
        (["--device", "tpu"], "--device: found 'tpu'"),
        (["--compare", ""], "--compare: found ''"),
    ],
    ids=str,
)
def test_values_out_of_range(
    model: Path, text: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert perplexity_cli.main(["-m", str(model), str(text), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(f"vptq-perplexity: error: {re.escape(message)}, expected [^\n]*\n", captured.err)


def test_the_type_of_a_dense_checkpoint(
    model: Path, text: Path, dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for other, dtype, message in (
        (dense, "int8", "--compare-dtype: found 'int8', expected one of float32, bfloat16, float16"),
        (
            model,
            "float32",
            "--compare-dtype: found no dense model to compare with, expected one",
        ),
    ):
        options = ["--compare", str(other), "--compare-dtype", dtype]
        assert perplexity_cli.main(["-m", str(model), str(text), *options]) == 2
        assert capsys.readouterr() == ("", f"vptq-perplexity: error: {message}\n")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "TEXT: found 1 token, expected at least 2, to score one"),  # BOS
        (b"abc\xff", "{path}: found byte 0xff at offset 3, expected valid UTF-8"),
        (b"\x7fELF\x02\x01\x01\x00\xb8", "{path}: found byte 0xb8 at offset 8, expected valid UTF-8"),
        ("the".encode("utf-16"), "{path}: found byte 0xff at offset 0, expected valid UTF-8"),
        (None, "{path}: cannot be read: No such file or directory"),
    ],
)
def test_texts_that_are_refused(
    model: Path, tmp_path: Path, data: bytes | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text"
    if data is not None:
        path.write_bytes(data)
    assert perplexity_cli.main(["-m", str(model), str(path)]) == 1
    assert capsys.readouterr() == ("", f"vptq-perplexity: error: {message.format(path=path)}\n")


def failed(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that fails, in one line and without any result."""
    assert perplexity_cli.main([*map(str, arguments)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    line = re.fullmatch(r"vptq-perplexity: error: ([^\n]*)\n", captured.err)
    assert line
    return line[1]


def test_a_directory_is_no_text(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = failed("-m", model, tmp_path, capsys=capsys)
    assert message == f"{tmp_path}: cannot be read: Is a directory"


def test_standard_input_that_cannot_be_read(model: Path, tmp_path: Path) -> None:
    command = [*COMMAND, "-m", str(model), "-"]
    with (tmp_path / "written").open("wb") as written:
        done = subprocess.run(command, stdin=written, capture_output=True, timeout=60)
    message = "vptq-perplexity: error: standard input: cannot be read: Bad file descriptor\n"
    assert (done.returncode, done.stderr.decode()) == (1, message)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero here")
def test_a_text_without_an_end(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "MAX_TEXT_BYTES", 1 << 20)
    message = failed("-m", model, "/dev/zero", capsys=capsys)
    assert message == "/dev/zero: found more than 1 MiB, expected a text of at most that"


def test_a_text_that_takes_more_memory_than_there_is(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the tokenizer takes it, which would end the process."""
    monkeypatch.setattr(_native, "available_memory", lambda: 1 << 30)
    monkeypatch.setattr(Runtime, "tokenize", lambda *_: pytest.fail("was tokenised"))
    text = text.with_name("long")
    text.write_bytes(b"the " * (2 << 20))
    message = failed("-m", model, text, capsys=capsys)
    found = "found 8 MiB, which take some 1.2 GiB to tokenise, of which there are 1.0"
    assert message == f"TEXT: {found}, expected at most 6 MiB"


def test_models_that_are_refused(
    model: Path, text: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str | Path) -> str:
        return failed(text, *arguments, capsys=capsys)

    missing = tmp_path / "missing.gguf"
    assert said("-m", missing).startswith(f"{missing}: ")
    assert said("-m", model, "--compare", missing).startswith(f"{missing}: ")
    assert said("-m", model, "--compare", text).startswith(f"{text}: ")  # no GGUF file
    long = "a" * 300
    assert re.fullmatch(f"{long}: .*File name too long", said("-m", model, "--compare", long))
    message = said("-m", model, "--compare", tmp_path)
    assert message.startswith(f"{tmp_path / 'config.json'}: cannot be read: No such file")
    message = said("-m", model, "--compare", checkpoint)  # what the model was made of
    assert message.startswith(f"{checkpoint / 'config.json'}: quantization_config: found")
    assert "n_ctx" in said("-m", model, "-c", "2000000000")


def test_a_model_without_a_tokenizer(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare.gguf"
    data = model.read_bytes()
    assert data.count(b"tokenizer.huggingface.json") == 1
    bare.write_bytes(data.replace(b"tokenizer.huggingface.json", b"tokenizer.huggingface.JSON"))
    for arguments in (("-m", bare), ("-m", model, "--compare", bare)):
        message = failed(*arguments, text, capsys=capsys)
        assert message.startswith(f"{bare}: the model has no tokenizer (tokenizer.huggingface.json)")


def test_a_reference_that_reads_other_tokens(
    model: Path, text: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(dense, tmp_path / "other")
    change_json(other / "tokenizer.json", lambda tokenizer: tokenizer.update(post_processor=None))
    message = failed("-m", model, text, "--compare", other, capsys=capsys)
    first = DenseModel(other).tokenize(read(text))[0]
    found = f"found a tokenizer that makes token 0 of the text {first}, expected 0 as the model's"
    assert message.startswith(f"--compare: {found}")


def test_a_reference_with_another_vocabulary(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of the embedding that no token has make the logits another shape."""
    directory = tmp_path / "larger"
    write_checkpoint(directory, ARCHITECTURES["llama"], {})
    change_json(directory / "config.json", lambda config: config.pop("quantization_config"))
    change_json(directory / "config.json", lambda config: config.update(vocab_size=VOCAB_SIZE + 8))

    def widen(tensors: dict[str, Any]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], tensors[name][:8]])

    change_tensors(directory, widen)
    message = failed("-m", model, text, "--compare", directory, capsys=capsys)
    found = f"found a vocabulary of {VOCAB_SIZE + 8} tokens, expected the model's {VOCAB_SIZE}"
    assert message == f"--compare: {found}"


def test_ctrl_c_reports_the_windows_so_far(
    runtime: Runtime,
    model: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = perplexity(runtime, runtime.tokenize(read(text)), n_ctx=100, max_windows=2)
    running = scoring.running_perplexity

    def interrupted(*arguments: Any) -> Iterator[Perplexity]:
        for result in running(*arguments):
            if result.n_windows == 3:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(scoring, "running_perplexity", interrupted)
    assert perplexity_cli.main(["-m", str(model), str(text), "-c", "100", "--json"]) == 130
    report = json.loads(capsys.readouterr().out)
    assert report["n_windows"] == 2
    assert report["perplexity"] == as_json(expected.perplexity)


def test_usage_waits_for_no_library() -> None:
    code = "import sys, vptq_runtime.evaluate.cli as c; c.parser(); print(sorted(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, timeout=60
    ).stdout.decode()
    names = {"numpy", "tokenizers", "rich", "torch", "transformers", "vptq_runtime._native"}
    assert not names & set(re.findall(r"'([\w.]+)'", loaded))


def test_a_file_to_compare_with_needs_no_pytorch(model: Path, text: Path) -> None:
    code = (
        "import sys; from vptq_runtime.evaluate.cli import main; "
        "status = main(sys.argv[1:]); sys.exit(status or ('torch' in sys.modules))"
    )
    arguments = ["-m", str(model), str(text), "--windows", "1", "--compare", str(model)]
    command = [sys.executable, "-c", code, *arguments]
    assert subprocess.run(command, cwd=text.parent, timeout=60).returncode == 0


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for option, shown in (("--version", r"vptq-perplexity \S.*\n"), ("--help", r"usage: vptq-perplexity.*")):
        with pytest.raises(SystemExit) as left:
            perplexity_cli.main([option])
        assert left.value.code == 0
        assert re.fullmatch(shown, capsys.readouterr().out, re.DOTALL)
