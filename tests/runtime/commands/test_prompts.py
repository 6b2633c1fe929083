"""vptq-run --prompts: results in order, whatever ends first, and what of a file is refused."""

import json
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
from configurations import BOS

from vptq_runtime import Runtime
from vptq_runtime.commands import run as cli

GREEDY = ["--temp", "0", "-n", "6"]


def run(
    capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> tuple[int, list[dict[str, Any]], list[str]]:
    """The exit status, the results, and the lines of standard error."""
    status = cli.main([*map(str, arguments)])
    captured = capsys.readouterr()
    return status, [json.loads(line) for line in captured.out.splitlines()], captured.err.splitlines()


def test_lines_of_text(
    runtime: Runtime, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [f"the fox {n}" for n in range(40)]
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([prompts[0], "", *prompts[1:], "  "]) + "\n", encoding="utf-8")
    status, results, err = run(capsys, "-m", model, "--prompts", path, "--parallel", "3", *GREEDY)
    assert status == 0
    assert [result["index"] for result in results] == list(range(40))
    expected = runtime.generate(prompts, max_tokens=6, temperature=0)
    assert [result["text"] for result in results] == [generation.text for generation in expected]
    assert err[-1].startswith("40 prompts with ") and "generated 240 tokens" in err[-1]


def test_objects_with_options_of_their_own(
    runtime: Runtime, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [{"role": "user", "content": "the fox"}]
    lines: list[dict[str, Any]] = [
        {"prompt": "the", "max_tokens": 3},
        {"prompt": [BOS, 20, 21], "id": "b", "logprobs": 1},
        {"messages": messages, "id": 7, "temperature": 1.0, "seed": 5},
        {"prompt": "the", "temperature": 1.0},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    status, results, _ = run(capsys, "-m", model, "--prompts", path, *GREEDY, "--seed", "9")
    assert status == 0
    assert [result.get("id") for result in results] == [None, "b", 7, None]
    assert results[0]["tokens"] == runtime.generate("the", max_tokens=3, temperature=0).tokens
    assert [entry["token"] for entry in results[1]["logprobs"]] == results[1]["tokens"]
    top = results[1]["logprobs"][0]["top"]
    assert top == [{key: results[1]["logprobs"][0][key] for key in ("token", "text", "logprob")}]
    assert results[2]["tokens"] == runtime.chat(messages, max_tokens=6, temperature=1.0, seed=5).tokens
    assert [result["seed"] for result in results] == [9, 10, 5, 12]
    # Line n of the file has the seed of the command plus n, as prompts of a list have.
    assert results[3]["tokens"] == runtime.generate("the", max_tokens=6, temperature=1.0, seed=12).tokens


def test_lines_end_with_line_feeds_only(
    runtime: Runtime, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other characters at which Python splits lines are part of a prompt, and of a string in JSON."""
    prompts = [f"the{separator}fox" for separator in "\u2028\u2029\x85\x0b\x0c\x1c"]
    expected = [generation.text for generation in runtime.generate(prompts, max_tokens=6, temperature=0)]
    path = tmp_path / "prompts.txt"
    path.write_bytes("\r\n".join([*prompts, ""]).encode())
    status, results, _ = run(capsys, "-m", model, "--prompts", path, *GREEDY)
    assert (status, [result["text"] for result in results]) == (0, expected)
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    path.write_text("\n".join(lines), encoding="utf-8")
    status, results, _ = run(capsys, "-m", model, "--prompts", path, *GREEDY)
    assert (status, [result["text"] for result in results]) == (0, expected)


def test_more_at_once_than_may_wait(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vptq_runtime.commands.prompts.AHEAD", 100)
    monkeypatch.setattr(Runtime, "__init__", partialmethod(Runtime.__init__, queue=2))
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"the fox {n}" for n in range(30)))
    status, results, _ = run(capsys, "-m", model, "--prompts", path, "--parallel", "2", *GREEDY)
    assert status == 0
    assert [len(result["tokens"]) for result in results] == [6] * 30


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ('{"prompt": ', "line 2: found no JSON"),
        ("[1]", "line 2: found '[1]', expected a JSON object"),
        ("{}", "line 2: found neither, expected prompt or messages"),
        ('{"prompt": "a", "messages": []}', "line 2: found prompt and messages, expected prompt or messages"),
        (
            '{"prompt": "a", "id": 7, "colour": 1}',
            "line 2: found the key 'colour', expected one of max_tokens,",
        ),
        ('{"prompt": "a", "id": 7, "top_p": 2}', "line 2: top_p: found 2, expected a finite number"),
        ('{"prompt": [99999]}', "line 2: prompt[0]: found 99999, expected a whole number"),
        ('{"prompt": {"a": 1}}', "line 2: prompt: found {'a': 1}, expected a string or a list of token ids"),
        ('{"messages": [{"role": 5}]}', "line 2: "),
        ("[" * 100_000, "line 2: found no JSON"),
    ],
)
def test_one_bad_line_spoils_no_other(
    line: str, error: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n{line}\n{{"prompt": "b"}}\n', encoding="utf-8")
    status, results, err = run(capsys, "-m", model, "--prompts", path, *GREEDY)
    assert status == 1
    assert [len(result.get("tokens", ())) for result in results] == [6, 0, 6]
    assert results[1]["error"].startswith(error)
    assert results[1].get("id") == (7 if '"id"' in line else None)
    assert err[-1] == f"vptq-run: error: {path}: 1 of 3 prompts failed, as their lines say"


def test_usage(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["--prompts", "a", "-p", "b"],
        ["--prompts", "a", "--chat"],
        ["-p", "a", "--parallel", "2"],
    ):
        with pytest.raises(SystemExit) as left:
            cli.main(arguments)
        assert left.value.code == 2
    capsys.readouterr()
    path = tmp_path / "prompts.txt"
    path.write_text("a\n")
    assert cli.main(["-m", str(model), "--prompts", str(path), "--parallel", "0"]) == 2
    assert "--parallel: found 0, expected a whole number, at least 1" in capsys.readouterr().err
    assert cli.main(["-m", str(model), "--prompts", str(tmp_path / "none")]) == 1
    assert "none: cannot be read: No such file" in capsys.readouterr().err


def test_no_prompts(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n \n")
    status, results, err = run(capsys, "-m", model, "--prompts", path)
    assert (status, results) == (0, []) and err[-1].startswith("0 prompts with 0 tokens")
