"""tools/check_gpu.py: all of it on a GPU, or what stands for one; what it makes of failures and figures."""

import json
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gpu import need_gpu

from vptq_runtime import _native
from vptq_runtime.bench.shapes import SHAPES

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import check_gpu
import gpu_measurements
import gpu_tests
from gpu_child import ChildError, in_child, run_logged
from gpu_plans import FULL, TINY, Model
from gpu_report import Row

SHAPE = TINY.shape("tiny")


@pytest.mark.gpu
def test_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need_gpu()
    gpu = _native.Gpu()
    out = tmp_path / "report"
    assert check_gpu.main(["--tiny", "--out", str(out), "--only", "machine,tests,bench,kernels"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["machine"]["device"] == gpu.description
    assert report["machine"]["copy_bandwidth"] > 0
    assert report["tests"]["counts"]["passed"] > 0 and report["tests"]["failed"] == []
    tests = [[result["test"] for result in each["results"]] for each in report["bench"]["models"]]
    assert tests == [["pp8", "pp20", "tg3", "tg3x3"], ["pp8", "pp20", "tg3"]]
    layers = report["kernels"]["layers"]
    assert [layer["kernel"] for layer in layers] == ["", "plain"]
    for layer in layers:
        assert layer["seconds"].keys() == {"1", "8", "12"} and min(layer["seconds"].values()) > 0
        assert layer["share"] > 0
    printed = capsys.readouterr().out
    table = (out / "table.txt").read_text()
    for found in ("copy bandwidth", "pytest -m gpu", "tiny v6-k256-16 tg3x3", "v6-k256-16 (plain) 96 x 64"):
        assert found in printed and found in table
    assert table.count(" | took | ") == 4


def fake_parts(monkeypatch: pytest.MonkeyPatch, **parts: Any) -> None:
    monkeypatch.setattr(check_gpu, "PARTS", {name: (part, 0.5) for name, part in parts.items()})


def test_a_failure_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no\nluck")

    def half(*_: Any) -> Any:
        return {"failure": "the second half", "first": 1}, [
            Row("half", "first", "well"),
            Row("half", "b", "no"),
        ]

    def seen(plan: Any, out: Path, allowed: float, report: dict[str, Any]) -> Any:
        assert plan is FULL and 0 < allowed <= 50 and report["half"]["first"] == 1
        return {"n": 2}, [Row("seen", "n", "2")]

    fake_parts(monkeypatch, broken=broken, half=half, seen=seen)
    options = ["--out", str(tmp_path), "--time-limit", "100"]
    assert check_gpu.main(options) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["broken"]["failure"] == "RuntimeError: no luck"
    assert report["half"]["first"] == 1 and report["seen"]["n"] == 2
    assert all(report[name]["took_s"] >= 0 for name in ("broken", "half", "seen"))
    table = (tmp_path / "table.txt").read_text()
    assert table.count("FAILED") == 2 and "the second half" in table
    assert "RuntimeError: no luck" in capsys.readouterr().out
    assert check_gpu.main([*options, "--only", "nothing"]) == 1
    assert "--only: found 'nothing', expected some of broken,half,seen" in capsys.readouterr().err


def test_no_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_parts(monkeypatch, slow=lambda *_: (time.sleep(1.1), ({}, []))[1], late=lambda *_: ({}, []))
    assert check_gpu.main(["--out", str(tmp_path), "--time-limit", "1"]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["late"]["failure"] == "no time was left for it"


@pytest.mark.parametrize(
    ("row", "verdict", "cells"),
    [
        (Row("p", "w", "f"), "", ["", "", ""]),
        (Row("p", "w", "f", 0.1, 0.15, 0.3), "short", ["10.0%", "15%", "30%"]),
        (Row("p", "w", "f", 0.2, 0.15, 0.3), "enough", ["20.0%", "15%", "30%"]),
        (Row("p", "w", "f", 0.3, 0.15, 0.3), "reached", ["30.0%", "15%", "30%"]),
        (Row("p", "w", "f", 0.01, 30, 60, number=45), "enough", ["1.0%", "30", "60"]),
        (Row("p", "w", "f", 0.9, 0.15, failed=True), "FAILED", ["90.0%", "15%", ""]),
    ],
)
def test_verdicts(row: Row, verdict: str, cells: list[str]) -> None:
    assert row.verdict() == verdict
    assert row.cells() == ["p", "w", "f", *cells, verdict]


def test_figures_of_a_prompt() -> None:
    """Of three layers a prompt runs two and the q, k and v of the last one."""
    layer = 3 * 64 * 64 + 3 * 64 * 96  # weights
    n_layer = 2 + 2 * 64 * 64 / layer
    result = {"test": "pp20", "n_tokens": 20, "tok_s": 10.0, "seconds": [2.0, 1.0, 4.0]}
    matrices = {"20": {"seconds": {"f16": [0.1] * 7, "bf16": [0.05] * 7}}}
    row = gpu_measurements._prompt_row("what", "speed", result, SHAPE, matrices)
    assert row.found == f"speed, {2 * n_layer * layer * 10 / 1e12:.1f} TFLOP/s"
    assert row.share == pytest.approx(n_layer * 7 * 0.05 / 2.0)
    assert row.at_least == 0.5
    assert gpu_measurements._prompt_row("what", "speed", result, SHAPE, {}).share is None


def test_rows_of_a_model() -> None:
    def result(test: str, sequences: int, tok_s: float) -> dict[str, Any]:
        return {
            "test": test,
            "sequences": sequences,
            "tok_s": tok_s,
            "bandwidth_share": 0.2,
            "extrapolated": test == "tg4",
        }

    measured = {
        "results": [result("tg4", 1, 45), result("tg4x8", 8, 90)],
        "model": {"model_bytes": 2 << 30},
        "peak_memory_bytes": 3 << 30,
        "load_s": 1.5,
    }
    model = Model("m", "q", at_least=30, aim=60, in_tok_s=True)
    alone, together, memory = gpu_measurements._bench_rows(model, SHAPE, measured, {})
    assert (alone.found, alone.verdict()) == ("45.0 tok/s (extrapolated)", "enough")
    assert (together.what, together.verdict()) == ("m q tg4x8", "")
    assert memory.found == "2.00 GiB in the file, 3.00 GiB taken, loaded in 1.5 s"
    by_share = gpu_measurements._bench_rows(Model("m", "q", at_least=0.25), SHAPE, measured, {})[0]
    assert by_share.verdict() == "short"


def test_memory_that_grows_as_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's file is not refused by what the host says it has, where the caller knows better."""
    seen = []

    def main(_: list[str]) -> int:
        seen.append(_native.available_memory())
        print("{}")
        return 0

    monkeypatch.setenv("VPTQ_CUDA_KERNEL", "")
    monkeypatch.setitem(SHAPES, "tiny", SHAPE)
    monkeypatch.setattr(_native, "available_memory", lambda: 1 << 30)
    monkeypatch.setattr(gpu_measurements.bench_command, "main", main)
    for host_memory in (None, 128 << 30):
        gpu_measurements._bench(TINY.models[0], replace(TINY, host_memory=host_memory))
    assert seen == [1 << 30, 128 << 30]


def test_targets_are_those_of_the_shapes() -> None:
    for model in (*FULL.models, *TINY.models):
        shape = (FULL if model in FULL.models else TINY).shape(model.name)
        assert model.layers is None or 2 <= model.layers <= shape.n_layer


LOG = """\
a/test_a.py::test_one[x y] PASSED   [ 10%]
a/test_a.py::test_two[cuda] FAILED   [ 20%]
a/test_b.py::test_three SKIPPED (no such thing)   [ 30%]
a/test_b.py::test_four ERROR   [ 40%]
ERROR a/test_c.py - ModuleNotFoundError: No module named 'torch'
"""


def test_outcomes_of_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tests, "run_logged", lambda *_: (1, LOG))
    found, rows = gpu_tests.tests(TINY, tmp_path, 10, {})
    assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 1, "error": 1}
    assert found["failed"] == ["a/test_a.py::test_two[cuda]", "a/test_b.py::test_four", "a/test_c.py"]
    assert [row.found for row in rows[1:]] == found["failed"]
    assert "pytest's status 1" in found["failure"]
    monkeypatch.setattr(gpu_tests, "run_logged", lambda *_: (None, LOG[:40]))
    found, _ = gpu_tests.tests(TINY, tmp_path, 10, {})
    assert found["failure"].startswith("not done after 10 s")
    monkeypatch.setattr(gpu_tests, "run_logged", lambda *_: (0, "x::y SKIPPED"))
    assert "failure" in gpu_tests.tests(TINY, tmp_path, 10, {})[0]  # without one that ran, nothing is shown


def test_all_tests_that_need_a_gpu_are_run() -> None:
    """But for those of this script; and none whose modules need more packages than the runtime and torch."""
    modules = {path: path.read_text() for path in gpu_tests.TESTS.rglob("test_*.py")}
    run = {path for path in modules if not any(folder in path.parents for folder in gpu_tests.IGNORED)}
    assert {path for path, text in modules.items() if re.search(r"need_gpu|mark\.gpu", text)} - run == {
        Path(__file__)
    }
    assert not [
        path for path in run if re.search(r"^(import|from) (vptq|vptq_quantizer)\b", modules[path], re.M)
    ]


@pytest.mark.parametrize(("errors", "failed"), [(0, False), (3, True)])
def test_sanitizer(errors: int, failed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "compute-sanitizer"
    printed = f"generated 4 tokens\\n3 passed\\n========= ERROR SUMMARY: {errors} errors"
    fake.write_text(f'#!/bin/sh\necho "$@"\nprintf "{printed}\\n"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found, rows = gpu_tests.sanitizer(TINY, tmp_path, 20, {})
    assert ("failure" in found) == failed
    assert [(run["tool"], run["errors"]) for run in found["runs"]] == [
        ("memcheck", [errors]),
        ("racecheck", [errors]),
    ] * 2
    assert all(row.failed == failed for row in rows)
    assert "--tool racecheck" in (tmp_path / "racecheck-tests.log").read_text()
    fake.write_text('#!/bin/sh\necho "========= ERROR SUMMARY: 0 errors"\n')  # but nothing ran
    found, rows = gpu_tests.sanitizer(TINY, tmp_path, 20, {})
    assert [row.found for row in rows] == ["nothing ran"] * 4 and "failure" in found
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    found, rows = gpu_tests.sanitizer(TINY, tmp_path, 20, {})
    assert found == {} and "left out" in rows[0].found


def test_published_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [
        {"quant": "q", "out_features": 2, "in_features": 3, "kernel_s": 6e-6, "here_s": 1e-6, "ratio": 6.0},
        {"quant": "r", "out_features": 2, "in_features": 3, "error": "no kernel"},
    ]
    text = "a warning\n" + json.dumps({"results": results})
    monkeypatch.setattr(gpu_tests, "run_logged", lambda *_: (0, text))
    _, (fast, missing) = gpu_tests.published(TINY, tmp_path, 10, {})
    assert (fast.verdict(), missing.found) == ("enough", "not there: no kernel")
    assert fast.found == "6.0 times as fast: 6.0 us there, 1.0 us here"
    refused = "compare_vptq_cuda: error: vptq's CUDA kernels cannot be imported: no\n"
    monkeypatch.setattr(gpu_tests, "run_logged", lambda *_: (1, refused))
    found, [row] = gpu_tests.published(TINY, tmp_path, 10, {})
    assert found == {} and row.found.startswith("left out: vptq's CUDA kernels")
    monkeypatch.setattr(gpu_tests, "run_logged", lambda *_: (1, "Traceback"))
    assert "failure" in gpu_tests.published(TINY, tmp_path, 10, {})[0]


def test_children() -> None:
    assert in_child(60, divmod, 7, 2) == (3, 1)
    with pytest.raises(ChildError, match="ZeroDivisionError"):
        in_child(60, divmod, 7, 0)
    with pytest.raises(ChildError, match="ended with status 3"):
        in_child(60, os._exit, 3)
    with pytest.raises(ChildError, match="not done after 0 s"):
        in_child(0.2, time.sleep, 60)


def test_logged_command(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    assert run_logged(command, tmp_path / "log", 2) == (None, "begun\n")
    assert run_logged([sys.executable, "-c", "print(5); exit(4)"], tmp_path / "log", 20) == (4, "5\n")
