"""End-to-end training: what is reported is of what is stored, on text that was not trained on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import read_tensors
from dense_models import SMALL
from vptq_quantizer import quantize
from vptq_quantizer.calibration.text import Calibration
from vptq_quantizer.training import end_to_end
from vptq_quantizer.training.end_to_end import _Training


@pytest.mark.parametrize("length", [2, 3, 30, 47, 960, 1000, 5000])
def test_what_is_measured_on_is_never_trained_on(length: int) -> None:
    """Tokens are numbered: no window of a training reaches into the last 5 %, and all of those are there."""
    stream = np.arange(length)
    seq_len = min(48, length)
    text = Calibration(stream, stream[None, :seq_len])
    trained = np.concatenate([text.batch(step, 16, 0) for step in range(50)])
    held_out = text.held_out(10**6)
    assert trained.max() < held_out.min()
    assert trained.shape[1] == min(48, held_out.min())
    assert held_out.min() == length - max(1, length // 20)
    assert len(np.unique(held_out)) == held_out.size > length / 20 - 48
    assert len(text.held_out(2)) == min(2, len(held_out))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # stored in float16, bfloat16
def test_the_loss_is_measured_on_the_numbers_that_are_stored(
    architecture: str,
    dense_model: Callable[[str], Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured: list[bool] = []
    real = _Training.measure
    dtype = {"llama": torch.float16, "qwen2": torch.bfloat16}[architecture]

    def measure(training: _Training) -> float:
        values = training.student.parameters.values()
        measured.append(all(torch.equal(p, p.to(dtype).float()) for p in values))
        return real(training)

    monkeypatch.setattr(_Training, "measure", measure)
    options = replace(SMALL, end_to_end=3)
    quantize(dense_model(architecture), tmp_path / "out", options, calibration=[text])
    assert measured == [True, True]


def test_what_is_not_trained_is_in_memory_once(
    dense_model: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common: set[str] = set()
    real = _Training.advance

    def advance(training: _Training) -> float:
        of_teacher = {p.data_ptr() for p in training.teacher.parameters()}
        model = training.student.model
        common.update(name for name, p in model.named_parameters() if p.data_ptr() in of_teacher)
        return real(training)

    monkeypatch.setattr(_Training, "advance", advance)
    quantize(dense_model("llama"), tmp_path / "out", replace(SMALL, end_to_end=1), calibration=[text])
    assert common == {"model.embed_tokens.weight", "lm_head.weight"}


def test_a_training_that_was_stopped_goes_on(
    dense_model: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number and index is that of a training in one go; steps that were done are not done again."""
    monkeypatch.setattr(end_to_end, "SAVE_S", 0.0)
    monkeypatch.setattr(end_to_end, "OFFSET_RATE", 0.3)  # so that few steps change indices
    options, model = replace(SMALL, end_to_end=6), dense_model("llama")
    whole = quantize(model, tmp_path / "whole", options, calibration=[text])["end_to_end"]
    steps: list[int] = []
    real = _Training.advance

    def advance(training: _Training) -> float:
        if training.step == 3 and len(steps) == 3:
            raise KeyboardInterrupt
        steps.append(training.step)
        return real(training)

    monkeypatch.setattr(_Training, "advance", advance)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "out", options, calibration=[text])
    steps.append(-1)
    again = quantize(model, tmp_path / "out", options, calibration=[text])["end_to_end"]
    assert steps == [0, 1, 2, -1, 3, 4, 5]
    assert again == whole and whole["changed_indices"] > 0
    found, expected = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not (tmp_path / "out" / ".parts").exists()


@pytest.mark.parametrize("rate", [30.0, float("nan")])
def test_a_training_that_makes_it_worse_is_not_kept(
    rate: float,
    dense_model: Callable[[str], Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A learning rate that destroys the model leaves the checkpoint as it is without any training."""
    quantize(dense_model("llama"), tmp_path / "untrained", SMALL, calibration=[text])
    monkeypatch.setattr(end_to_end, "LEARNING_RATE", rate)
    options = replace(SMALL, end_to_end=3)
    report = quantize(dense_model("llama"), tmp_path / "out", options, calibration=[text])["end_to_end"]
    assert not report["kept"]
    assert report["kl_divergence"][0] == report["kl_divergence"][1]
    found, expected = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "untrained")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
