"""vptq-bench on a GPU: what it says of one and what it refuses, without one but for the last test."""

import json
import re
from typing import Any

import pytest
from gpu import need_gpu
from tiny_bench import HEADINGS, SYNTHETIC, cells

from vptq_runtime import _native
from vptq_runtime.bench import cli as bench
from vptq_runtime.bench import machine, speed, synthetic
from vptq_runtime.bench.speed import Measured, SpeedTest

pytestmark = pytest.mark.usefixtures("tiny_world")


class FakeGpu:
    """Stands for _native.Gpu."""

    description = "cuda (fake)"
    total_memory = 140 << 30
    available_memory = 130 << 30

    def copy_bandwidth(self) -> float:
        return 4e12


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> type[FakeGpu]:
    monkeypatch.setattr(_native, "Gpu", FakeGpu)
    return FakeGpu


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_no_threads_on_a_gpu(
    device: str, fake_gpu: type[FakeGpu], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main([*SYNTHETIC, "--device", device, "-t", "2"]) == 2
    assert "--threads: found a number of the CPU's, expected none on a GPU" in capsys.readouterr().err


def test_too_large_for_a_gpu(
    fake_gpu: type[FakeGpu], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused by the GPU's memory, and of a synthetic model also by the host's, which has its file."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("made all the same")

    monkeypatch.setattr(synthetic, "_empty_file", never)
    monkeypatch.setattr(_native, "Context", never)
    monkeypatch.setattr(_native, "available_memory", lambda: 80 << 30)
    large = ["--synthetic", "llama-3.1-405b", "--quant", "v16-k65536-1024", "--device", "cuda"]
    assert bench.main(large) == 1
    error = capsys.readouterr().err
    assert re.search(r"needs \d+\.\d\d GiB of host memory \(model [^,]*\), 80.00 GiB are available", error)
    monkeypatch.setattr(fake_gpu, "available_memory", 70 << 30)
    assert bench.main(large) == 1
    assert re.search(
        r"405b, 126 layers: needs \d+\.\d\d GiB of GPU memory \(model .*, KV cache of 512 tokens .*\), "
        r"70.00 GiB are available: --layers N measures N of them\n",
        capsys.readouterr().err,
    )


def test_report_of_a_gpu(
    fake_gpu: type[FakeGpu], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(*_: object, **options: Any) -> Measured:
        assert options["device"] == "cuda"
        monkeypatch.setattr(fake_gpu, "available_memory", 128 << 30)
        test = SpeedTest("tg", 5, 0)
        return Measured("cuda (fake)", 512, 0.5, {test: [0.5]}, options["peak_memory"]())

    monkeypatch.setattr(speed, "measure", measure)
    assert bench.main([*SYNTHETIC, "--device", "cuda", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["peak_memory_bytes"] == 2 << 30
    assert report["system"]["memory_bytes"] == 140 << 30
    assert report["system"]["copy_bandwidth"] == 4e12 and "read_bandwidth" not in report["system"]
    [result] = report["results"]
    assert result["threads"] is None
    assert result["bandwidth_share"] == result["bytes_per_token"] * 10 / 4e12
    monkeypatch.setattr(fake_gpu, "available_memory", 130 << 30)
    assert bench.main([*SYNTHETIC, "--device", "cuda", "--md"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("cuda (fake), 140.00 GiB memory, 130.00 GiB available; host: ")
    assert lines[1] == f"memory bandwidth: 4000.0 GB/s ({machine.COPY_METHOD})"
    header, _, row = cells("\n".join(lines), "|")
    assert header == [heading for heading in HEADINGS if heading != "threads"]
    assert row[3:5] == ["tg5", "10.00 ± 0.00"]
    assert lines[-1] == "load 0.50 s, peak GPU memory 2.00 GiB"


def test_layers_on_a_gpu(
    fake_gpu: type[FakeGpu], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However much memory the whole model would need: the runtime says what fits."""
    seen: list[dict[str, Any]] = []

    def measure(*_: object, **options: Any) -> Measured:
        seen.append(options)
        threads = 2 if options["device"] == "cpu" else 0
        return Measured("cpu, cuda", 128, 0.5, {SpeedTest("tg", 5, threads): [0.5]}, 0)

    monkeypatch.setattr(speed, "measure", measure)
    monkeypatch.setattr(fake_gpu, "available_memory", 1 << 10)
    assert bench.main([*SYNTHETIC, "--device", "cuda", "-ngl", "3"]) == 0
    assert (seen[0]["device"], seen[0]["gpu_layers"]) == ("cuda", 3)
    assert bench.main([*SYNTHETIC, "-ngl", "0", "-t", "2"]) == 0
    assert (seen[1]["device"], seen[1]["gpu_layers"]) == ("cpu", 0)
    capsys.readouterr()


def test_layers_on_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*SYNTHETIC, "--device", "cpu", "-ngl", "3"]) == 2
    assert "--gpu-layers: found 3, expected 0, or none, with device cpu\n" in capsys.readouterr().err
    assert bench.main([*SYNTHETIC, "-ngl", "-1"]) == 2
    assert "--gpu-layers: found -1, expected a whole number, at least 0" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    need_gpu()
    gpu = _native.Gpu()
    options = [*SYNTHETIC, "--device", "cuda", "-p", "20", "-n", "5", "-b", "1,3", "-r", "1", "--json"]
    for layers in ([], ["--layers", "2"]):
        assert bench.main([*options, *layers]) == 0
        report = json.loads(capsys.readouterr().out)
        assert [result["test"] for result in report["results"]] == ["pp20", "tg5", "tg5x3"]
        assert all(result["tok_s"] > 0 for result in report["results"])
        system = report["system"]
        assert system["device"] == gpu.description
        assert 0 < system["available_bytes"] <= system["memory_bytes"] == gpu.total_memory
        assert system["copy_bandwidth"] > 0
        assert report["peak_memory_bytes"] > 0
