"""The verdict on the whole model: as a plain computation of both models' probabilities has it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from dense_models import SMALL, write_wide
from plain_verdict import expected_verdict
from vptq_quantizer import quantize
from vptq_quantizer.planning import target
from vptq_quantizer.run.report import RUINED, verdict_line


@pytest.mark.parametrize("name", ["llama", "qwen2", "llama-biases"])
def test_the_verdict(name: str, dense_model: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    model = dense_model(name)
    verdict = quantize(model, tmp_path / "out", SMALL, calibration=[text])["verdict"]
    assert verdict == pytest.approx(expected_verdict(model, tmp_path / "out", text), rel=1e-3)
    assert verdict["kl_divergence"] > 0.01 and verdict["n_tokens"] >= 96


def test_the_type_of_the_embedding_is_part_of_it(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that has the embedding in q4_0."""
    monkeypatch.setattr(target.FileSizes, "types", lambda _: ["q4_0"])
    model, out = write_wide(tmp_path / "model", tied=True), tmp_path / "out"
    options = replace(SMALL, vector_len=None, centroids=None, res_centroids=0, fit=10**6)
    report = quantize(model, out, options, calibration=[text])
    assert report["plan"]["embedding_type"] == "q4_0"
    expected = expected_verdict(model, out, text, "q4_0")
    assert report["verdict"] == pytest.approx(expected, rel=1e-3)
    other = expected_verdict(model, out, text)
    assert abs(other["kl_divergence"] / expected["kl_divergence"] - 1) > 0.05  # it would be noticed


def test_a_trained_model_is_judged_as_it_is_stored(model: Path, text: Path, tmp_path: Path) -> None:
    options = replace(SMALL, end_to_end=12)
    report = quantize(model, tmp_path / "out", options, calibration=[text])
    before, after = report["end_to_end"]["kl_divergence"]
    assert after < 0.9 * before
    assert report["verdict"]["kl_divergence"] == pytest.approx(after, rel=1e-3)
    assert report["verdict"] == pytest.approx(expected_verdict(model, tmp_path / "out", text), rel=1e-3)


def test_without_text_there_is_none(model: Path, text: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "one", SMALL, calibration=[text], hessians=tmp_path / "hessians")
    report = quantize(model, tmp_path / "other", SMALL, hessians=tmp_path / "hessians")
    assert report["finished"] and "verdict" not in report


@pytest.mark.parametrize(
    ("divergence", "words"),
    [
        (0.01, "close to"),
        (0.3, "usable"),
        (0.7, "much poorer"),
        (1.0, RUINED),
        (float("nan"), RUINED),
        (float("inf"), RUINED),
    ],
)
def test_the_verdict_in_words(divergence: float, words: str) -> None:
    ratio = 1 + divergence
    verdict = {"perplexity": 20 * ratio, "dense_perplexity": 20.0, "perplexity_ratio": ratio}
    line = verdict_line({"kl_divergence": divergence, "n_tokens": 8192, **verdict})
    assert words in line and "times the dense model's 20), on 8192 tokens held back" in line
