"""--fit: the size of the GGUF file, known before it is there, and met with the best that fits."""

import argparse
import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from configurations import ARCHITECTURES
from converted import raw_tensors
from dense_models import SEQ_LEN, SMALL, write_wide
from vptq_converter import convert
from vptq_quantizer import QuantizeOptions, quantize
from vptq_quantizer.cli import _size
from vptq_quantizer.planning.file_size import in_words
from vptq_quantizer.run import safe_files

from vptq_runtime import FileError, OptionError

OPTIONS = QuantizeOptions(samples=8, seq_len=SEQ_LEN)


@pytest.mark.parametrize("name", ["llama", "llama3", "llama-biases", "mistral", "qwen2"])
@pytest.mark.parametrize("options", [SMALL, replace(SMALL, res_centroids=0, groups=2, normalize=False)])
def test_the_size_of_the_file_is_known_before(
    name: str, options: QuantizeOptions, dense_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    model = dense_model(name)
    report = quantize(model, tmp_path / "out", options, calibration=[text])
    assert report["plan"]["file_bytes"] == convert(tmp_path / "out", tmp_path / "out.gguf").n_bytes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_a_size_is_met(tied: bool, share: float, text: Path, tmp_path: Path) -> None:
    model = write_wide(tmp_path / "model", tied)
    with pytest.raises(OptionError, match=r"--fit: found 0\.01 kB, expected at least ([\d.]+) kB") as error:
        quantize(model, tmp_path / "out", replace(OPTIONS, fit=1), calibration=[text])
    smallest = int(float(str(error.value).split("at least ")[1].split()[0]) * 1000)
    weights = sum(
        out * width
        for out, width in replace(ARCHITECTURES["llama"], hidden_size=128).linear_shapes().values()
    )
    size = smallest + int(share * weights / 2)
    report = quantize(model, tmp_path / "out", replace(OPTIONS, fit=size), calibration=[text])
    done = convert(tmp_path / "out", tmp_path / "out.gguf")
    assert done.n_bytes == report["plan"]["file_bytes"]
    assert 0.99 * size < done.n_bytes <= size
    assert report["plan"]["expected_kl_divergence"] > 0
    stored = {name: type.lower() for name, (type, _, _) in raw_tensors(tmp_path / "out.gguf").items()}
    planned = report["plan"]
    assert stored["token_embd.weight"] == planned.get("embedding_type", "f16")
    if tied:
        assert "output.weight" not in stored and "output_type" not in planned
    else:
        assert stored["output.weight"] == planned.get("output_type", "f16")


def test_the_smallest_size_can_be_had(text: Path, tmp_path: Path) -> None:
    model = write_wide(tmp_path / "model", tied=True)
    with pytest.raises(OptionError) as error:
        quantize(model, tmp_path / "out", replace(OPTIONS, fit=1), calibration=[text])
    size = _size(str(error.value).split("at least ")[1].split(" for this")[0])
    quantize(model, tmp_path / "out", replace(OPTIONS, fit=size), calibration=[text], dry_run=True)


def test_a_run_for_a_size_goes_on_with_its_plan(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = write_wide(tmp_path / "model", tied=True), tmp_path / "out"
    options = replace(OPTIONS, fit=150_000)
    first = quantize(model, out, options, calibration=[text], layers=(0, 0))["plan"]
    monkeypatch.delattr("vptq_quantizer.run.model_quantizer.measure_costs")
    report = quantize(model, out, options, calibration=[text])
    assert report["finished"] and report["plan"] == first and first["expected_kl_divergence"] > 0
    assert json.loads((out / "report.json").read_text())["plan"] == first


def test_a_full_disk(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a planned run writes its second layer: the plan and the first layer stay, and it goes on."""
    model, out = write_wide(tmp_path / "model", tied=True), tmp_path / "out"
    options = replace(OPTIONS, fit=150_000, sequential=True)
    real, calls = safe_files.save_file, 0

    def save_file(tensors: Any, path: Path, metadata: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            path.write_bytes(b"the beginning")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(tensors, path, metadata)

    monkeypatch.setattr(safe_files, "save_file", save_file)
    with pytest.raises(FileError, match=r"cannot be written: No space left on device"):
        quantize(model, out, options, calibration=[text])
    assert [path.name for path in (out / ".parts").glob("layer-*")] == ["layer-00000.safetensors"]
    assert not list(out.rglob("*.tmp"))
    monkeypatch.delattr("vptq_quantizer.run.model_quantizer.measure_costs")
    assert quantize(model, out, options, calibration=[text])["finished"]


def test_no_room_for_a_temporary_file(text: Path, model: Path, tmp_path: Path) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vptq_converter.gguf_writer.GGUFWriter.write_kv_data_to_file", full)
        with pytest.raises(FileError, match="a temporary file cannot be written: No space left on device"):
            quantize(model, tmp_path / "out", OPTIONS, calibration=[text])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"fit": 10, "target_bits": 2.0}, "--fit: found --target-bits beside it, expected either"),
        ({"fit": 10, "vector_len": 4, "centroids": 16}, "--fit: found --vector-len and --centroids beside"),
        ({"fit": 0}, "--fit: found 0, expected bytes of a file, above 0"),
        ({"fit": 1.5}, "--fit: found 1.5, expected bytes of a file, above 0"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, float], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        QuantizeOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("64MB", 64_000_000),
        ("1.5 GiB", 3 << 29),
        ("4gb", 4 * 10**9),
        ("700kB", 700_000),
        ("10B", 10),
        ("0.07 kB", 70),
    ],
)
def test_sizes_are_read(text: str, n_bytes: int) -> None:
    assert _size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "64", "MB", "-1MB", "64MBit", "1iB", "1e3MB", "inf GB", "1" * 30 + "B"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a size, as 64MB"):
        _size(text)


@pytest.mark.parametrize(
    ("n_bytes", "words"),
    [(1, "0.01 kB"), (64_000_000, "64 MB"), (64_000_001, "64.01 MB"), (4_123_000_001, "4.13 GB")],
)
def test_sizes_in_words_are_never_too_small(n_bytes: int, words: str) -> None:
    assert in_words(n_bytes) == words
