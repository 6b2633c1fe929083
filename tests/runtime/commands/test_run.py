"""vptq-run: what comes out where, and with which exit status."""

import itertools
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vptq_runtime import Runtime, demo_path
from vptq_runtime.commands import run as cli
from vptq_runtime.commands.chat import COMMANDS

COMMAND = [str(Path(sys.executable).with_name("vptq-run"))]  # as installed, whatever the working directory
GREEDY = ["--temp", "0"]
TIMINGS = (
    r"load [\d.]+ s \| prompt \d+ tokens?, [\d.]+ tok/s \| "
    r"generated (\d+) tokens, [\d.]+ tok/s \| cpu \(.*\)\n"
)
LONG_CONTEXT = "the context of 500000 tokens is more than the 1024 that the model was trained on\n"

ChangedModel = Callable[[dict[str, dict[str, Any]]], Path]


def run(*arguments: str | Path, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*COMMAND, *map(str, arguments)], input=given, capture_output=True, timeout=120)


def test_text_to_stdout_timings_to_stderr(runtime: Runtime, model: Path) -> None:
    text = runtime.generate("the quick", max_tokens=30, temperature=0).text
    done = run("-m", model, "-p", "the quick", "-n", "30", *GREEDY)
    assert done.stdout.decode() == text.removesuffix("\n") + "\n"
    timings = re.fullmatch(TIMINGS, done.stderr.decode())
    assert timings is not None
    assert timings[1] == "30"
    assert done.returncode == 0


def test_prompt_from_a_pipe(model: Path) -> None:
    options = ["-m", model, "-n", "20", *GREEDY]
    assert run(*options, "-p", "-", given="the é\n".encode()).stdout == run(*options, "-p", "the é").stdout


def test_prompt_from_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("the é\\n\n", encoding="utf-8")
    options = ["-m", model, "-n", "20", *GREEDY]
    assert run(*options, "-f", tmp_path / "prompt").stdout == run(*options, "-p", "the é\\n").stdout
    (tmp_path / "prompt").write_bytes(b"the \xff")
    for name, message in (
        ("prompt", "found byte 0xff at offset 4"),
        ("none", "cannot be read: No such file"),
    ):
        done = run(*options, "-f", tmp_path / name)
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.decode().startswith(f"vptq-run: error: {tmp_path / name}: {message}")


def test_a_seed_is_drawn(model: Path) -> None:
    options = ["-m", model, "-p", "a", "-n", "20", "--temp", "1.5", "--json"]
    first, second = [json.loads(run(*options, *seed).stdout) for seed in ([], ["--seed", "-1"])]
    assert first["seed"] != second["seed"]
    assert first["tokens"] != second["tokens"]
    again = json.loads(run(*options, "--seed", str(first["seed"])).stdout)
    assert again["tokens"] == first["tokens"]


def test_json(runtime: Runtime, model: Path) -> None:
    done = run("-m", model, "-p", "the", "-n", "5", "--seed", "3", "--stop", "xyz", "--json")
    result = json.loads(done.stdout)
    expected = runtime.generate("the", max_tokens=5, seed=3, stop="xyz")
    assert result.pop("timings").keys() == {
        *("load_s", "queue_s", "prompt_tokens", "prompt_s", "prompt_tokens_per_s"),
        *("decode_tokens", "decode_s", "decode_tokens_per_s"),
    }
    assert result == {
        "model": str(model),
        "device": runtime.device,
        "n_ctx": 1024,
        "seed": 3,
        "prompt": "the",
        "text": expected.text,
        "tokens": expected.tokens,
        "finish_reason": "length",
        "n_cached": 0,
        "n_drafted": 0,
        "n_accepted": 0,
    }
    assert done.stderr == b""


def test_every_option_arrives(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the Runtime gets them; what they do there is the other tests' matter."""
    seen: dict[str, Any] = {}
    init, generate = Runtime.__init__, Runtime.generate

    def spying_init(self: Runtime, path: Any, **options: Any) -> None:
        seen.update(options)
        init(self, path, **options)

    def spying_generate(self: Runtime, prompt: Any, **options: Any) -> Any:
        seen.update(options)
        return generate(self, prompt, **options)

    monkeypatch.setattr(Runtime, "__init__", spying_init)
    monkeypatch.setattr(Runtime, "generate", spying_generate)
    options = "-n 7 -c 99 -t 1 --device cpu --temp 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 --repeat-penalty 1.1"
    more = "--seed 4 --stop a --stop b --kv-type f32 --precision f32 -ngl 0 --presence-penalty 0.5"
    more += " --frequency-penalty -1 --logprobs 2 --speculate off --regex a+"
    assert cli.main(["-m", str(model), "-p", "a", *options.split(), *more.split()]) == 0
    assert seen == {
        "max_tokens": 7,
        "n_ctx": 99,
        "n_threads": 1,
        "device": "cpu",
        "gpu_layers": 0,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "repeat_penalty": 1.1,
        "seed": 4,
        "stop": ["a", "b"],
        "kv_type": "f32",
        "precision": "f32",
        "presence_penalty": 0.5,
        "frequency_penalty": -1.0,
        "logprobs": 2,
        "speculate": "off",
        "json_schema": None,
        "regex": "a+",
        "grammar": None,
        "parallel": None,
        "progress": None,  # standard error is no terminal
        "stream": True,
    }
    short = "-n 7 -c 99 -t 1 -ngl 3 --temp 0.5 --system b --seed 4"
    long = "--n-predict 7 --ctx-size 99 --threads 1 --n-gpu-layers 3 --temp 0.5 -sys b -s 4"
    assert cli.parser().parse_args(short.split()) == cli.parser().parse_args(long.split())
    capsys.readouterr()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-p"],
        ["-p", "a", "--system", "b"],
        ["-p", "a", "-f", "b"],
        ["-p", "a", "-n", "many"],
        ["-p", "a", "--temp", "hot"],
        ["-p", "a", "--colour"],
        ["a"],
    ],
    ids=" ".join,
)
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("usage: vptq-run")


def test_no_gpu(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("VPTQ_CUDA_LIBRARY", "/nowhere/libvptq_cuda.so")
    arguments = ["-m", str(model), "-p", "a", "-n", "1"]
    why = "device cuda: this build has no CUDA backend: /nowhere/"
    assert cli.main([*arguments, "--device", "cuda"]) == 1
    assert capsys.readouterr().err.startswith(f"vptq-run: error: {why}")
    assert cli.main(arguments) == 0
    assert f"; {why}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "missing.gguf"], "missing.gguf"),
        (["-c", "2000000000"], "n_ctx"),
        (["-c", "5", "-p", "the quick brown fox"], "-p: found 5 tokens, expected at most 4: n_ctx is 5"),
        (["-p", "a\udcff"], "-p: found invalid UTF-8"),
    ],
    ids=str,
)
def test_errors(model: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-m", str(model), "-p", "a", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"vptq-run: error: [^\n]*\n", captured.err)
    assert message in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", ""], "-m: found ''"),
        (["-n", "-5"], "-n: found -5"),
        (["--max-tokens", "0"], "-n: found 0"),
        (["--temp", "nan"], "--temp: found nan"),
        (["--top-k", "-1"], "--top-k: found -1"),
        (["--top-p", "2"], "--top-p: found 2.0"),
        (["--min-p", "-1"], "--min-p: found -1.0"),
        (["--repeat-penalty", "inf"], "--repeat-penalty: found inf"),
        (["--seed", "-2"], "--seed: found -2"),
        (["--stop", ""], "--stop: found ''"),
        (["-c", "-1"], "-c: found -1"),
        (["-t", "0"], "-t: found 0"),
        (["--kv-type", "q4"], "--kv-type: found 'q4'"),
        (["--precision", "f16"], "--precision: found 'f16'"),
        (["--device", "tpu"], "--device: found 'tpu'"),
        (["--chat", "--temp", "-1"], "--temp: found -1.0"),
    ],
    ids=str,
)
def test_values_out_of_range(
    model: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong usage, as the command line has the options."""
    assert cli.main(["-m", str(model), "-p", "a", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(f"vptq-run: error: {re.escape(message)}, expected [^\n]*\n", captured.err)


def test_guesses_are_named_as_they_were_typed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ["-m", str(model), "-p", "a", "-n", "2"]
    for wrong, status, message in (
        (["--speculate", "fast"], 2, "--speculate: found 'fast', expected one of auto, off, ngram"),
        (["--draft", str(demo_path())], 2, "--draft: found other tokens in "),
    ):
        assert cli.main([*prompt, *wrong]) == status
        assert f"vptq-run: error: {message}" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        cli.main([*prompt, "--speculate", "off", "--draft", str(model)])
    assert left.value.code == 2
    assert "--draft: not allowed with argument --speculate" in capsys.readouterr().err
    assert cli.main([*prompt, "--draft", str(model)]) == 0


def test_stdin_that_is_not_utf8(model: Path) -> None:
    for mode in (["-p", "-"], ["--chat"]):
        done = run("-m", model, *mode, given=b"abc\xff")
        assert (done.returncode, done.stdout) == (1, b"")
        assert (
            done.stderr
            == b"vptq-run: error: standard input: found byte 0xff at offset 3, expected valid UTF-8\n"
        )


def test_empty_prompt(runtime: Runtime, model: Path) -> None:
    done = run("-m", model, "-p", "", "-n", "5", *GREEDY, "--json")
    assert json.loads(done.stdout)["tokens"] == runtime.generate("", max_tokens=5, temperature=0).tokens


def test_the_demo_model_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-p", "def ", "-n", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == str(demo_path())


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vptq_runtime", "--version"], capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, run("--version").stdout)


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"vptq-run \S.*\n", capsys.readouterr().out)
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"])
    assert left.value.code == 0


def test_usage_waits_for_no_library() -> None:
    code = "import sys, vptq_runtime.commands.run as c; c.parser(); print(sorted(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, timeout=60
    ).stdout.decode()
    assert not {"numpy", "tokenizers", "jinja2", "rich", "vptq_runtime._native"} & set(
        re.findall(r"'([\w.]+)'", loaded)
    )


def test_broken_pipe(model: Path) -> None:
    arguments = [*COMMAND, "-m", str(model), "-p", "a", "-n", "-1", "-c", "500000"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(10)
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read().decode() == LONG_CONTEXT


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disk(model: Path) -> None:
    command = [*COMMAND, "-m", str(model), "-p", "a", "-n", "5"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
    assert done.stderr.startswith(b"vptq-run: error: standard output: No space left")


def test_closed_streams(model: Path) -> None:
    command = " ".join([*COMMAND, "-m", str(model), "-n", "5"])
    for rest, status in (
        ("-p a >&-", 0),
        ("-p a 2>&-", 0),
        ("-p - <&-", 0),
        ("--chat <&-", 0),
        ("-p '' -n 0 2>&-", 2),
    ):
        done = subprocess.run(["sh", "-c", f"{command} {rest}"], capture_output=True, timeout=60)
        assert done.returncode == status, rest
        assert b"Traceback" not in done.stderr


def test_ctrl_c(model: Path) -> None:
    arguments = [*COMMAND, "-m", str(model), "-p", "a", "-n", "-1", "-c", "500000"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output.endswith(b"\n")
    assert re.fullmatch(re.escape(LONG_CONTEXT) + TIMINGS, errors.decode())


def test_the_end_of_the_context_is_said(model: Path) -> None:
    full = "the context of 30 tokens is full: the text ends here\n"
    for n_tokens, said in (("-1", full), ("100", full), ("5", "")):
        done = run("-m", model, "-p", "the", "-c", "30", "-n", n_tokens, *GREEDY)
        assert done.stderr.decode().startswith(said + "load ")
    assert run("-m", model, "-p", "the", *GREEDY).stderr.startswith(b"load ")  # 128 tokens
    done = run("-m", model, "-p", "the", "-c", "2000", "-n", "5", *GREEDY)
    said = "the context of 2000 tokens is more than the 1024 that the model was trained on\n"
    assert done.stderr.decode().startswith(said + "load ")


def test_chat_over_a_pipe(runtime: Runtime, model: Path) -> None:
    """Each line is a turn, and has the ones before it in its prompt."""
    given = b"the fox\n\nand the dog\n/reset\nthe fox\n/exit\nnot asked any more\n"
    done = run("-m", model, "--chat", "--system", "Be kind.", "-n", "10", *GREEDY, "--json", given=given)
    first, second, again = [json.loads(line) for line in done.stdout.splitlines()]
    system = {"role": "system", "content": "Be kind."}
    messages = [system, {"role": "user", "content": "the fox"}]
    assert first["messages"] == again["messages"] == messages
    assert first["text"] == again["text"] == runtime.chat(messages, max_tokens=10, temperature=0).text
    messages += [{"role": "assistant", "content": first["text"]}, {"role": "user", "content": "and the dog"}]
    assert second["messages"] == messages
    assert second["text"] == runtime.chat(messages, max_tokens=10, temperature=0).text
    assert done.returncode == 0


def test_chat_reports_each_reply(model: Path) -> None:
    """It is loaded once."""
    done = run("-m", model, "--chat", "-n", "5", *GREEDY, given=b"the fox\nand the dog\n")
    first, second = done.stderr.decode().splitlines(keepends=True)
    assert re.fullmatch(TIMINGS, first)
    assert re.fullmatch(TIMINGS.partition(r"\| ")[2], second)


def test_chat_commands(model: Path) -> None:
    done = run("-m", model, "--chat", "-n", "5", given=b"/help\n /quit \nthe fox\n")
    assert (done.returncode, done.stdout) == (0, b"")
    assert done.stderr.decode() == COMMANDS + "\n"
    assert all(f"/{name}" in COMMANDS for name in ("exit", "quit", "reset", "help"))


def test_an_unknown_chat_command_is_not_sent_to_the_model(model: Path) -> None:
    done = run("-m", model, "--chat", "-n", "5", given=b"/rest\n")
    assert (done.returncode, done.stdout) == (0, b"")
    assert done.stderr.decode() == f"no such command: /rest; {COMMANDS}\n"
    assert run("-m", model, "--chat", "-n", "5", given=b"/etc/hosts\n").stdout


def test_chat_with_one_message(runtime: Runtime, model: Path) -> None:
    done = run("-m", model, "--chat", "-p", "/exit", "-n", "10", *GREEDY)
    reply = runtime.chat([{"role": "user", "content": "/exit"}], max_tokens=10, temperature=0).text
    assert done.stdout.decode() == reply.removesuffix("\n") + "\n"
    assert re.fullmatch(TIMINGS, done.stderr.decode())


def test_chat_history_stays_within_the_context(runtime: Runtime, model: Path) -> None:
    given = b"".join(b"question %d\n" % n for n in range(12))
    done = run(
        "-m", model, "--chat", "-n", "20", "-c", "160", "--system", "Be kind.", *GREEDY, "--json", given=given
    )
    turns = [json.loads(line) for line in done.stdout.splitlines()]
    assert (len(turns), done.returncode) == (12, 0)
    n_messages = [len(turn["messages"]) for turn in turns]
    dropped = [after for before, after in itertools.pairwise(n_messages) if after < before + 2]
    note = "the context of 160 tokens is full: the oldest turns are forgotten\n"
    assert done.stderr.decode() == note * len(dropped)
    assert dropped
    for n, turn in enumerate(turns):
        assert turn["messages"][0]["content"] == "Be kind."
        assert turn["messages"][1]["role"] == "user"
        assert turn["messages"][-1]["content"] == f"question {n}"
        assert len(runtime.chat_tokens(turn["messages"])) <= 160 - 20
        assert len(turn["tokens"]) == 20
    assert len(turns[1]["messages"]) == 4
    assert turns[-1]["messages"][1]["content"] != "question 0"


def test_chat_message_too_long(model: Path) -> None:
    done = run("-m", model, "--chat", "-c", "40", given=b"x" * 100)
    assert done.returncode == 1
    assert re.fullmatch(
        rb"vptq-run: error: prompt: found \d+ tokens, expected at most 39: [^\n]*\n", done.stderr
    )


def test_chat_without_a_template(changed_model: ChangedModel) -> None:
    path = changed_model({"tokenizer_config.json": {"chat_template": None}})
    done = run("-m", path, "--chat")
    assert done.returncode == 1
    assert b"the model has no chat template" in done.stderr
