"""Plans: the best choice within a budget, sizes that are met, and runs that keep their plan."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dense_models import SEQ_LEN
from vptq_quantizer import QuantizeOptions, quantize
from vptq_quantizer.planning.allocation import Choice, allocate, least_size

from vptq_runtime import OptionError

TARGET = QuantizeOptions(target_bits=3.0, samples=8, seq_len=SEQ_LEN)


@pytest.mark.parametrize("seed", range(20))
def test_the_allocation_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    choices = [
        [Choice(int(rng.integers(1, 60)), float(rng.random())) for _ in range(rng.integers(1, 6))]
        for _ in range(5)
    ]
    smallest = least_size(choices)
    for budget in (smallest, smallest + 17, smallest + 60, 1000):
        found = allocate(choices, budget)
        assert sum(choice.size for choice in found) <= budget
        assert all(choice in each for choice, each in zip(found, choices, strict=True))
        fitting = [all for all in itertools.product(*choices) if sum(c.size for c in all) <= budget]
        best = min(sum(choice.loss for choice in all) for all in fitting)
        assert sum(choice.loss for choice in found) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("bits", [3.0, 4.5])
def test_a_target_is_met(bits: float, model: Path, text: Path, tmp_path: Path) -> None:
    report = quantize(model, tmp_path / "out", replace(TARGET, target_bits=bits), calibration=[text])
    assert 0.99 * bits <= report["bits_per_weight"] <= bits
    layers = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"][
        "config_for_layers"
    ]
    assert len(layers) == 14
    assert len({json.dumps([e["vector_lens"], e["num_centroids"]]) for e in layers.values()}) > 1


def test_a_target_that_cannot_be_met(model: Path, text: Path, tmp_path: Path) -> None:
    options = QuantizeOptions(target_bits=0.1, samples=8, seq_len=SEQ_LEN)
    with pytest.raises(OptionError, match=r"--target-bits: found 0\.1, expected at least [01]\.\d+ for this"):
        quantize(model, tmp_path / "out", options, calibration=[text])
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_with_its_plan(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    quantize(model, out, TARGET, calibration=[text], layers=(0, 0))
    planned = json.loads((out / ".parts/run.json").read_text())["plan"]

    def again(*_: object) -> None:
        raise AssertionError("planned again")

    monkeypatch.setattr("vptq_quantizer.run.model_quantizer.measure_costs", again)
    assert quantize(model, out, TARGET, calibration=[text])["finished"]
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["config_for_layers"] == planned["config_for_layers"]


def test_a_target_of_a_sequential_run(model: Path, text: Path, tmp_path: Path) -> None:
    """Its plan is that of another run: it is made of the dense model alone."""
    options = replace(TARGET, sequential=True)
    report = quantize(model, tmp_path / "out", options, calibration=[text])
    assert 2.97 <= report["bits_per_weight"] <= 3
    other = quantize(model, tmp_path / "other", TARGET, calibration=[text], dry_run=True)
    assert report["plan"]["config_for_layers"] == other["plan"]["config_for_layers"]
    assert report["plan"]["expected_kl_divergence"] == other["plan"]["expected_kl_divergence"]


def test_a_dry_run_writes_nothing(model: Path, text: Path, tmp_path: Path) -> None:
    report = quantize(model, tmp_path / "out", TARGET, calibration=[text], dry_run=True)
    assert not (tmp_path / "out").exists()
    assert not report["finished"] and report["plan"]["expected_kl_divergence"] > 0
    assert 2.97 <= report["plan"]["bits_per_weight"] <= 3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target_bits": 2.0, "vector_len": 4, "centroids": 16}, "--target-bits: found --vector-len and"),
        ({"target_bits": 2.0, "res_centroids": 4}, "--res-centroids: found 4, expected --vector-len and"),
        ({"target_bits": 2.0, "groups": 2}, "--groups: found 2, expected --vector-len and"),
        ({"target_bits": 0.0}, "--target-bits: found 0.0, expected bits per weight"),
        ({"target_bits": float("nan")}, "--target-bits: found nan, expected bits per weight"),
        ({"vector_len": 4}, "--centroids: found none, expected one beside --vector-len"),
        ({"centroids": 4}, "--vector-len: found none, expected one beside --centroids"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, float], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        QuantizeOptions(**options)  # type: ignore[arg-type]


def test_options_that_do_not_fit_are_answered_with_some_that_do(
    model: Path, text: Path, tmp_path: Path
) -> None:
    options = QuantizeOptions(vector_len=8, centroids=65536, seq_len=SEQ_LEN)
    with pytest.raises(OptionError, match=r"expected at most 128.*; for this model: .*--target-bits 2"):
        quantize(model, tmp_path / "out", options, calibration=[text])
