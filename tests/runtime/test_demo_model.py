"""The demo model that is part of the package: small, whole, and it knows some Python."""

import re
from pathlib import Path

import numpy as np
import pytest
from reference import mean_kl
from vptq_converter.facts import read_facts

import vptq_runtime
from vptq_runtime import FileError, Runtime, demo_path

TEXT = '''
class Counter(object):
    """Count the number of lines of a file."""

    def __init__(self, filename, encoding=None):
        self.filename = filename
        self.encoding = encoding

    def count(self):
        """Return the number of lines."""
        with open(self.filename, encoding=self.encoding) as f:
            return len(f.readlines())
'''


def mean_loss(runtime: Runtime, tokens: list[int]) -> float:
    """Mean cross-entropy in nats per token, in float64."""
    logits = np.asarray(runtime.logits(tokens[:-1]), np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_total = np.log(np.exp(logits).sum(axis=1))
    return float((log_total - logits[np.arange(len(logits)), tokens[1:]]).mean())


def test_size_and_facts() -> None:
    facts = read_facts(demo_path())
    assert facts.file_bytes <= 8_000_000
    assert {linear.type for linear in facts.linears} == {"VPTQ"}
    assert facts.metadata["general.name"] == "vptq-runtime demo (Python standard library)"


def test_it_knows_python() -> None:
    with Runtime(demo_path(), device="cpu") as runtime:
        tokens = runtime.tokenize(TEXT)
        loss = mean_loss(runtime, tokens)
        shuffled = np.random.default_rng(0).permutation(tokens).tolist()
        assert loss < 2  # np.log(4096) = 8.3 is knowing nothing
        assert mean_loss(runtime, shuffled) > loss + 2


@pytest.mark.parametrize(
    ("options", "most"),
    [({"kv_type": "f16"}, 1e-5), ({"kv_type": "q8_0"}, 1e-3), ({"precision": "auto"}, 1e-5)],
)
def test_what_smaller_numbers_change(options: dict[str, str], most: float) -> None:
    exact = {"kv_type": "f32", "precision": "f32"}
    logits = []
    for each in (exact, exact | options):
        with Runtime(demo_path(), device="cpu", **each) as runtime:
            logits.append(runtime.logits(runtime.tokenize(TEXT)))
    assert mean_kl(*logits) < most


def test_it_writes_a_function() -> None:
    with Runtime(demo_path(), device="cpu") as runtime:
        generation = runtime.generate("def ", max_tokens=40, temperature=0)
    assert re.match(r"[A-Za-z_]\w*\([\w, =*]*\):\n +\S", generation.text)


def test_an_installation_without_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vptq_runtime, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileError, match="found no demo model in this installation"):
        demo_path()
