"""The parts of tools/check_gpu.py that run other programs: the tests, a sanitizer, the published package."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from gpu_child import run_logged
from gpu_plans import KERNEL_AT_LEAST, Plan
from gpu_report import Row

PROMPT = "def add(a, b): return a + b"  # a prompt's tokens go through kernels of their own
ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
# These need no GPU, but packages that may not be there.
IGNORED = tuple(TESTS / name for name in ("converter", "quantizer", "tools"))
Found = tuple[dict[str, Any], list[Row]]


def pytest_command(*options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)),
        *("-p", "no:cacheprovider", "-v", "--color=no", "--continue-on-collection-errors", "-m", "gpu"),
        *options,
    ]


def tests(plan: Plan, out: Path, allowed: float, report: dict[str, Any]) -> Found:
    command = pytest_command(*plan.test_options, *(f"--ignore={path}" for path in IGNORED), str(TESTS))
    status, log = run_logged(command, out / "tests.log", allowed)
    # A line a test, while it runs: there even if the time ran out.
    outcomes = re.findall(r"^(\S*::.*) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", log, re.MULTILINE)
    failed = [name for name, outcome in outcomes if outcome in ("FAILED", "ERROR")]
    failed += re.findall(r"^ERROR ([^\s:]+)(?: - .*)?$", log, re.MULTILINE)  # not even collected
    counts = Counter(outcome.lower() for _, outcome in outcomes)
    summary = ", ".join(f"{n} {outcome}" for outcome, n in counts.items()) or "no test ran"
    found: dict[str, Any] = {"status": status, "counts": counts, "failed": failed}
    if status is None:
        found["failure"] = f"not done after {allowed:.0f} s: {summary}"
    elif status != 0 or not counts["passed"]:
        found["failure"] = f"pytest's status {status}: {summary}; see tests.log"
    for line in (summary, *failed[:20]):
        print(line, flush=True)
    shown = [Row("tests", "failed", name, failed=True) for name in failed[:20]]
    return found, [Row("tests", "pytest -m gpu", summary, failed="failure" in found), *shown]


def sanitizer(plan: Plan, out: Path, allowed: float, report: dict[str, Any]) -> Found:
    program = shutil.which("compute-sanitizer")
    if program is None:
        print("left out: compute-sanitizer is not on the PATH", flush=True)
        return {}, [Row("sanitizer", "", "left out: compute-sanitizer is not on the PATH")]
    demo = [sys.executable, "-m", "vptq_runtime", "--device", "cuda", "--temp", "0", "-n", "4", "-p", PROMPT]
    checked = {  # and what shows that something ran
        "the demo model": (demo, "generated 4 tokens"),
        "tests": (pytest_command("-k", plan.sanitized, str(TESTS / "native")), " passed"),
    }
    runs = [(tool, name) for name in checked for tool in ("memcheck", "racecheck")]
    end = time.monotonic() + allowed
    found: dict[str, Any] = {"runs": []}
    rows = []
    for i, (tool, name) in enumerate(runs):
        share = (end - time.monotonic()) / (len(runs) - i)
        command = [program, "--tool", tool, "--target-processes", "all", *checked[name][0]]
        log = out / f"{tool}-{name.split()[-1]}.log"
        status, text = run_logged(command, log, share)
        counts = [int(n) for n in re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)]
        ran = checked[name][1] in text
        said = f"{sum(counts)} errors" if counts and ran else "nothing ran"
        if status is None:
            said = f"not done after {share:.0f} s"
        failed = status != 0 or not ran or not counts or any(counts)
        if failed:
            found["failure"] = f"{tool} of {name}: {said}, status {status}; see {log.name}"
        found["runs"].append({"tool": tool, "of": name, "status": status, "errors": counts})
        rows.append(Row("sanitizer", f"{tool} of {name}", said, failed=failed))
        print(f"{tool} of {name}: {said}", flush=True)
    return found, rows


def published(plan: Plan, out: Path, allowed: float, report: dict[str, Any]) -> Found:
    sizes = ",".join(f"{rows}x{columns}" for rows, columns in plan.sizes)
    options = ["--quants", ",".join(plan.quants), "--sizes", sizes, "--json"]
    options += ["--mib", str(max(1, plan.rotating_bytes >> 20))]
    script = str(Path(__file__).with_name("compare_vptq_cuda.py"))
    status, text = run_logged([sys.executable, script, *options], out / "vptq.log", allowed)
    if missing := re.search(
        r"^compare_vptq_cuda: error: (vptq's CUDA kernels cannot .*)$", text, re.MULTILINE
    ):
        print(f"left out: {missing[1]}", flush=True)
        return {}, [Row("vptq", "", f"left out: {missing[1]:.150}")]
    if status != 0:
        return {"failure": f"compare_vptq_cuda.py: status {status}; see vptq.log"}, []
    found = json.loads(text[text.index("{") :])
    rows = []
    for result in found["results"]:
        what = f"{result['quant']} {result['out_features']} x {result['in_features']}"
        if "error" in result:
            rows.append(Row("vptq", what, f"not there: {result['error']:.100}"))
            continue
        there, here = (f"{result[f'{side}_s'] * 1e6:.1f} us" for side in ("kernel", "here"))
        figure = f"{result['ratio']:.1f} times as fast: {there} there, {here} here"
        rows.append(Row("vptq", what, figure, at_least=KERNEL_AT_LEAST, number=result["ratio"]))
        print(f"{what}: {figure}", flush=True)
    return found, rows
