"""Multiple choice: log-likelihoods by hand, what counts as right, files of items, the command."""

import json
import re
from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from vptq_runtime import FileError, OptionError, Runtime
from vptq_runtime.evaluate import Choices, Item, choices, read_items
from vptq_runtime.evaluate import cli as perplexity_cli

N_VOCAB = 8


class Letters:
    """A token is a letter, a space begins the one behind it: 2 n + 1 is the n-th letter, 2 n with a space.

    What it predicts depends on the last token only.
    """

    n_vocab = N_VOCAB
    log_p = np.log(np.random.default_rng(0).dirichlet(np.ones(N_VOCAB), size=N_VOCAB))

    def tokenize(self, text: str) -> list[int]:
        found = re.findall(" ?[a-d]| ", text)
        return [2 * "abcd".index(each[-1]) + (len(each) == 1) for each in found if each != " "]

    def logits_in_pieces(self, tokens: Sequence[int], *, first: int = 0) -> Generator[NDArray[np.float32]]:
        yield (self.log_p[tokens[first:]] + 3).astype(np.float32)  # a logit's offset is nobody's business


def test_log_likelihoods_by_hand() -> None:
    """Of a choice's tokens, each behind those before it; a space at the context's end is the choice's."""
    log_p = Letters.log_p
    for context, choice in (("ab", " cd"), ("ab ", "cd")):
        found = choices(Letters(), [Item(context, (choice, f"{choice}a"), 0)]).log_likelihoods[0]
        cd = log_p[3, 4] + log_p[4, 7]
        np.testing.assert_allclose(found, [cd, cd + log_p[7, 1]], rtol=1e-6)


def test_what_counts_as_right() -> None:
    """acc takes the likeliest choice, acc_norm the likeliest by character, its first space not counted."""
    items = [Item("a", (" bb", " bbbb"), 0), Item("a", (" bb", " bbbb"), 1)]
    scores = [np.array([-2.0, -3.0]), np.array([-1.0, -3.0])]  # by character: -1, -0.75; -0.5, -0.75
    found = Choices(items, scores)
    assert found.chosen(normalised=False).tolist() == [0, 0]
    assert found.chosen(normalised=True).tolist() == [1, 0]
    assert found.right(normalised=False).tolist() == [True, False]
    accuracy = found.accuracy(normalised=False)
    assert accuracy.value == 0.5 and accuracy.standard_error == pytest.approx(np.sqrt(0.25 / (2 - 1)))
    other = Choices(items, [np.array([-3.0, -2.0]), np.array([-2.0, -1.0])])
    assert other.chosen(normalised=False).tolist() == [1, 1]
    assert found.agreement(other, normalised=True).value == 0.5
    difference = found.accuracy_difference(other, normalised=False)
    assert difference.value == 0 and difference.standard_error == 1.0  # of 1 and -1: the errors of two
    alone = Choices(items[:1], scores[:1])
    assert alone.accuracy(normalised=True).standard_error is None


def test_refused_items() -> None:
    with pytest.raises(OptionError, match="items: found none, expected at least one"):
        choices(Letters(), [])
    with pytest.raises(OptionError, match=r"^item 1: choices: found ' ', expected a text of at least one"):
        choices(Letters(), [Item("ab", (" ", " c"), 0)])


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    item = {"context": "a", "choices": [" b", " c"], "answer": 1, "doc_id": 7}
    path.write_text(f"{json.dumps(item)}\n\n{json.dumps(item | {'answer': 0})}", encoding="utf-8")
    assert read_items(path) == [Item("a", (" b", " c"), 1), Item("a", (" b", " c"), 0)]
    wrong: list[tuple[object, str]] = [
        ({"context": ""}, "context: found '', expected a text"),
        ({"context": 3}, "context: found 3, expected a text"),
        ({"choices": [" b"]}, "choices: found [' b'], expected 2 to 256 texts"),
        ({"choices": [" b", " "]}, "choices: found ' ', expected a text"),
        ({"answer": 2}, "answer: found 2, expected 0 to 1"),
        ({"answer": True}, "answer: found True, expected 0 to 1"),
        ({"answer": None}, "answer: found None, expected 0 to 1"),
    ]
    for change, said in wrong:
        path.write_text(f"{json.dumps(item)}\n{json.dumps(item | change)}", encoding="utf-8")
        with pytest.raises(FileError) as error:
            read_items(path)
        assert str(error.value) == f"{path}: line 2: {said}"
    for text, said in (
        ("{", "line 1: not valid JSON"),
        ("[" * 100_000, "line 1: not valid JSON"),
        ("[]", "line 1: found [], expected an object"),
        ("\n", "found no items, expected at least one"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(FileError) as error:
            read_items(path)
        assert str(error.value) == f"{path}: {said}"


@pytest.fixture
def items_file(tmp_path: Path) -> Path:
    path = tmp_path / "items.jsonl"
    made = [
        {"context": "the quick brown", "choices": [" fox jumps", " dog"], "answer": 0},
        {"context": "a model is", "choices": [" a file", " lazy", " the quick brown fox"], "answer": 2},
    ]
    path.write_text("\n".join(map(json.dumps, made)), encoding="utf-8")
    return path


def test_the_command(
    runtime: Runtime, model: Path, items_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a model beside itself; the log-likelihoods are those that a Runtime's logits give."""
    found = choices(runtime, read_items(items_file))
    for item, scores in zip(found.items, found.log_likelihoods, strict=True):
        for choice, score in zip(item.choices, scores, strict=True):
            n, tokens = len(runtime.tokenize(item.context)), runtime.tokenize(item.context + choice)
            logits = runtime.logits(tokens).astype(np.float64)
            log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            by_hand = sum(log_p[at - 1, tokens[at]] for at in range(n, len(tokens)))
            assert score == pytest.approx(by_hand, rel=1e-3)
    options = ["-m", str(model), "--multiple-choice", str(items_file), "--compare", str(model)]
    assert perplexity_cli.main([*options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["n_items"] == 2
    assert report["acc"]["value"] == found.accuracy(normalised=False).value
    assert report["acc_norm"]["value"] == found.accuracy(normalised=True).value
    assert report["comparison"]["same_choice"] == {"value": 1.0, "standard_error": 0.0}
    assert report["comparison"]["acc_difference"] == {"value": 0.0, "standard_error": 0.0}
    assert perplexity_cli.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{items_file}: 2 items"
    accuracy = found.accuracy(normalised=False)
    assert lines[1].startswith(f"{model}: acc {accuracy.value:.2%} ± {accuracy.standard_error:.2%}, acc_norm")
    assert lines[-1] == "  same choice          100.00% ± 0.00%"


def test_usage(model: Path, items_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = ["--multiple-choice", str(items_file)]
    for options, said in (
        ([], "expected a TEXT, or --multiple-choice"),
        ([*both, "text.txt"], "--multiple-choice: expected no TEXT, --windows or --stride beside it"),
        ([*both, "--windows", "3"], "--multiple-choice: expected no TEXT"),
    ):
        with pytest.raises(SystemExit) as ended:
            perplexity_cli.main(["-m", str(model), *options])
        assert ended.value.code == 2 and said in capsys.readouterr().err
    assert perplexity_cli.main(["-m", str(model), *both, "-c", "4"]) == 1
    assert "item 1: tokens: found" in capsys.readouterr().err
    assert perplexity_cli.main(["-m", str(model), "--multiple-choice", str(tmp_path / "none")]) == 1
    assert "cannot be read" in capsys.readouterr().err
