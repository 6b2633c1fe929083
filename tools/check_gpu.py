"""All checks and measurements of the CUDA backend, on a machine with an NVIDIA GPU, in one go of ten minutes.

    pip install ".[test]"                            # or at least pytest beside the package
    python tools/check_gpu.py --out gpu-report [--only machine,tests,bench,kernels,vptq,sanitizer]

machine    the GPU, its driver, its memory's copy bandwidth, its library's rate of matrix products
tests      pytest -m gpu
bench      vptq-bench --device cuda on synthetic models: decoding and prompts beside what is aimed at
kernels    one linear layer by itself, of many that no cache holds together; also by the plain kernel
vptq       the published package's CUDA kernels beside those (tools/compare_vptq_cuda.py)
sanitizer  compute-sanitizer's memcheck and racecheck over a few tests and the demo model
large      only if it is named: all of the 405B model; 83 GiB of the host's memory and of the GPU's

It prints as it goes, and one table at the end; the folder OUT gets that table, report.json with everything,
and the logs. A part that fails, or runs out of its time, does not stop the others. Exit status: 0 if nothing
failed, 1 otherwise; a figure that is short of what it should be at least is no failure.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_measurements
import gpu_tests
from gpu_plans import FULL, TINY, Plan
from gpu_report import Row, print_rows

from vptq_runtime.checks import check_int
from vptq_runtime.commands import command
from vptq_runtime.errors import OptionError

Part = Callable[[Plan, Path, float, dict[str, Any]], tuple[dict[str, Any], list[Row]]]
# In the order in which they run; with each the share of the time that it may take at most.
PARTS: dict[str, tuple[Part, float]] = {
    "machine": (gpu_measurements.machine, 0.15),
    "tests": (gpu_tests.tests, 0.35),
    "bench": (gpu_measurements.bench, 0.6),
    "kernels": (gpu_measurements.kernels, 0.2),
    "vptq": (gpu_tests.published, 0.2),
    "sanitizer": (gpu_tests.sanitizer, 0.3),
    "large": (gpu_measurements.large, 1.0),
}
ONLY_IF_NAMED = ("large",)


def main(argv: Sequence[str] | None = None) -> int:
    default = [name for name in PARTS if name not in ONLY_IF_NAMED]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", metavar="OUT", type=Path, required=True, help="the folder for what is found")
    parser.add_argument("--only", metavar="PART,...", default=",".join(default), help="default: %(default)s")
    parser.add_argument(
        "--time-limit", metavar="S", type=int, default=570, help="seconds for all (default: %(default)s)"
    )
    parser.add_argument(
        "--host-memory",
        metavar="GIB",
        type=int,
        help="what the host has, where it says less: a virtual machine's memory may grow as it is used",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="tiny models and few tests, to see whether this script works"
    )
    arguments = parser.parse_args(argv)
    failed: list[str] = []
    return command.run("check_gpu", lambda: failed.extend(check(arguments))) or int(bool(failed))


def check(arguments: argparse.Namespace) -> list[str]:
    """Runs the parts; returns the names of those that failed."""
    names = arguments.only.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise OptionError(f"--only: found {unknown[0]!r:.80}, expected some of {','.join(PARTS)}")
    check_int("--time-limit", arguments.time_limit, 1, 86400)
    plan = TINY if arguments.tiny else FULL
    if arguments.host_memory is not None:
        check_int("--host-memory", arguments.host_memory, 1, 1 << 20)
        plan = replace(plan, host_memory=arguments.host_memory << 30)
    out: Path = arguments.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"--out: {out} cannot be made: {error.strerror}") from error
    report: dict[str, Any] = {"tiny": arguments.tiny}
    rows: list[Row] = []
    end = time.monotonic() + arguments.time_limit
    for name, (part, share) in PARTS.items():
        if name not in names:
            continue
        begin = time.monotonic()
        allowed = min(share * arguments.time_limit, end - begin)
        print(f"== {name} (at most {max(allowed, 0):.0f} s)", flush=True)
        found, made = _run(part, plan, out, allowed, report)
        found["took_s"] = time.monotonic() - begin
        report[name] = found
        rows += [Row(name, "took", f"{found['took_s']:.0f} s"), *made]
        if "failure" in found:
            if not any(row.failed for row in made):
                rows.append(Row(name, "", found["failure"], failed=True))
            print(f"failed: {found['failure']}", flush=True)
        (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print()
    (out / "table.txt").write_text(print_rows(rows), encoding="utf-8")
    return [row.part for row in rows if row.failed]


def _run(
    part: Part, plan: Plan, out: Path, allowed: float, report: dict[str, Any]
) -> tuple[dict[str, Any], list[Row]]:
    if allowed <= 0:
        return {"failure": "no time was left for it"}, []
    try:
        return part(plan, out, allowed, report)
    except Exception as error:  # whatever it is: the other parts are still to come
        return {"failure": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}, []


if __name__ == "__main__":
    sys.exit(main())
