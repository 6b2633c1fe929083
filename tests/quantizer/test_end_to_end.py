"""End-to-end training: what is reported is of what is stored, on text that was not trained on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import read_tensors
from dense_models import SMALL
from torch import Tensor, nn
from vptq_quantizer import quantize
from vptq_quantizer.calibration.text import Calibration
from vptq_quantizer.training import end_to_end


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
    real = end_to_end._divergence
    dtype = {"llama": torch.float16, "qwen2": torch.bfloat16}[architecture]

    def divergence(teacher: nn.Module, student: nn.Module, tokens: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            values = [p for p in student.parameters() if p.requires_grad]
            measured.append(all(torch.equal(p, p.to(dtype).float()) for p in values))
        return real(teacher, student, tokens)

    monkeypatch.setattr(end_to_end, "_divergence", divergence)
    options = replace(SMALL, end_to_end=3)
    quantize(dense_model(architecture), tmp_path / "out", options, calibration=[text])
    assert measured == [True, True]


def test_what_is_not_trained_is_in_memory_once(
    dense_model: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common: set[str] = set()
    real = end_to_end._divergence

    def divergence(teacher: nn.Module, student: nn.Module, tokens: Tensor) -> Tensor:
        of_teacher = {p.data_ptr() for p in teacher.parameters()}
        common.update(name for name, p in student.named_parameters() if p.data_ptr() in of_teacher)
        return real(teacher, student, tokens)

    monkeypatch.setattr(end_to_end, "_divergence", divergence)
    quantize(dense_model("llama"), tmp_path / "out", replace(SMALL, end_to_end=1), calibration=[text])
    assert common == {"model.embed_tokens.weight", "lm_head.weight"}


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
