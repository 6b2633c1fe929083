"""The speed of this runtime beside llama.cpp's, on one machine in one run.

    python tools/compare_llamacpp.py --llama-python PYTHON [--shape llama-3.1-8b] [--quants v8-k65536-0,...]

PYTHON has llama-cpp-python (`pip install llama-cpp-python` builds it, some ten minutes); without the option
it is the one that runs this. Both sides run models of random weights in the same shape, embedding and output
matrix in Q8_0: llama.cpp a plain GGUF of one of its types, written to the directory for temporary files, this
runtime what `vptq-bench --synthetic` runs. They take turns, each time as a new process, so that a drift of
the machine falls on both; other work on it need not, so let there be none. Printed are the medians of the
rounds (smallest to largest) and the ratio of the medians.

`--layers N` runs N layers on both sides, and extrapolates as vptq-bench does.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from random_gguf import SCALES, random_tensors, write_random

from vptq_runtime import _native
from vptq_runtime.bench.cli import MIN_LAYERS
from vptq_runtime.bench.report import print_table
from vptq_runtime.bench.shapes import SHAPES, Shape
from vptq_runtime.bench.speed import Measured, SpeedTest, extrapolated
from vptq_runtime.bench.synthetic import Quant, SyntheticModel
from vptq_runtime.checks import check_int
from vptq_runtime.commands import command
from vptq_runtime.errors import OutOfMemoryError, VPTQError

QUANTS = "v8-k65536-0,v6-k4096-0,v8-k4096-0,v8-k65536-256,v16-k65536-65536"
# Tokens a second of each test, by its name (pp512, tg32).
Speeds = dict[str, float]


@dataclass
class Comparison:
    """The rounds of one configuration."""

    quant: str
    theirs: list[Speeds] = field(default_factory=list)
    ours: list[Speeds] = field(default_factory=list)

    def results(self) -> list[dict[str, Any]]:
        results = []
        for test in self.ours[0]:
            theirs, ours = [speeds[test] for speeds in self.theirs], [speeds[test] for speeds in self.ours]
            results.append(
                {
                    "quant": self.quant,
                    "test": test,
                    "llamacpp_tok_s": theirs,  # one a round
                    "tok_s": ours,
                    "ratio": median(ours) / median(theirs),
                }
            )
        return results


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama-python", metavar="PYTHON", default=sys.executable)
    parser.add_argument("--llama-type", metavar="TYPE", default="IQ2_XXS", choices=SCALES)
    parser.add_argument("--shape", metavar="SHAPE", default="llama-3.1-8b", choices=SHAPES)
    parser.add_argument("--quants", metavar="V-K-R,...", default=QUANTS, help="default: %(default)s")
    parser.add_argument("-p", "--n-prompt", metavar="N", type=int, default=512)
    parser.add_argument("-n", "--n-gen", metavar="N", type=int, default=32)
    parser.add_argument("-t", "--threads", metavar="N", type=int, default=2)
    parser.add_argument("--rounds", metavar="N", type=int, default=3)
    parser.add_argument(
        "--layers", metavar="N", type=int, help="run N layers, at least 2, and extrapolate (default: run all)"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--md", action="store_true", help="print Markdown")
    output.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    return command.run("compare_llamacpp", lambda: compare(arguments))


def compare(arguments: argparse.Namespace) -> None:
    shape = SHAPES[arguments.shape]
    n_layer = shape.n_layer if arguments.layers is None else arguments.layers
    check_int("--layers", n_layer, MIN_LAYERS, shape.n_layer)
    for option in ("n_prompt", "n_gen", "threads", "rounds"):
        check_int(f"--{option.replace('_', '-')}", getattr(arguments, option), 1, 1 << 20)
    quants = [Quant.parse(quant) for quant in arguments.quants.split(",")]
    output_of([arguments.llama_python, "-c", "import llama_cpp"])
    report: dict[str, Any] = {}
    comparisons = []
    with tempfile.TemporaryDirectory() as directory:
        check_room(arguments, shape, n_layer, quants, directory)
        path = Path(directory, "llama.gguf")
        write_random(path, shape, arguments.llama_type, n_layer)
        for quant in quants:
            comparison = Comparison(quant.name)
            for n in range(arguments.rounds):
                theirs, report["llamacpp"] = run_llamacpp(arguments, path, shape, n_layer)
                ours, report["vptq_runtime"] = run_vptq_runtime(arguments, quant, n_layer)
                comparison.theirs.append(theirs)
                comparison.ours.append(ours)
                said = "; ".join(f"{test} {theirs[test]:.2f} there, {ours[test]:.2f} here" for test in ours)
                print(f"{quant.name}, round {n + 1} of {arguments.rounds}: {said}", file=sys.stderr)
            comparisons.append(comparison)
    report |= {
        "shape": arguments.shape,
        "llama_type": arguments.llama_type,
        "threads": arguments.threads,
        "n_layer": shape.n_layer,
        "layers_measured": n_layer if n_layer < shape.n_layer else None,
        "results": [result for comparison in comparisons for result in comparison.results()],
    }
    print_comparison(report, arguments)


def check_room(
    arguments: argparse.Namespace, shape: Shape, n_layer: int, quants: list[Quant], directory: str
) -> None:
    """Raises OutOfMemoryError where a model does not fit into the memory, or llama.cpp's onto the disk."""
    n_ctx = max(arguments.n_prompt, arguments.n_gen)
    n_bytes = sum(tensor.nbytes for tensor in random_tensors(shape, arguments.llama_type, n_layer))
    free = shutil.disk_usage(directory).free
    if n_bytes > free:
        raise OutOfMemoryError(
            f"{directory}: found {free / 2**30:.2f} GiB of room, expected {n_bytes / 2**30:.2f} GiB for "
            f"llama.cpp's file (TMPDIR names another directory)"
        )
    models = [SyntheticModel(arguments.shape, shape, quant, "q8_0", "q8_0") for quant in quants]
    facts = [model.facts(n_layer, "f16") for model in models]
    llamacpp = replace(facts[0], name=f"{arguments.shape} in {arguments.llama_type}", model_bytes=n_bytes)
    for each in (*facts, llamacpp):
        each.check_memory(n_ctx, _native.available_memory())


def run_llamacpp(
    arguments: argparse.Namespace, path: Path, shape: Shape, n_layer: int
) -> tuple[Speeds, dict[str, str]]:
    sizes = ["-p", str(arguments.n_prompt), "-n", str(arguments.n_gen), "-t", str(arguments.threads)]
    script = Path(__file__).with_name("llamacpp_speed.py")
    found = json.loads(output_of([arguments.llama_python, str(script), str(path), *sizes]))
    n_tokens = {"pp": arguments.n_prompt, "tg": arguments.n_gen, "layers": arguments.n_gen}
    seconds = {
        SpeedTest(kind, n_tokens[kind], arguments.threads): each
        for kind, each in found.pop("seconds").items()
    }
    # llama.cpp leaves out the last layer's feed-forward matrices for tokens that need no logits.
    left_out = dict.fromkeys(("pp", "layers"), shape.share(("ffn_gate", "ffn_up", "ffn_down")))
    measured = extrapolated(Measured("llama.cpp", 512, 0.0, seconds), n_layer, shape.n_layer, left_out)
    return {test.name: test.n_tokens / each[0] for test, each in measured.seconds.items()}, found


def run_vptq_runtime(
    arguments: argparse.Namespace, quant: Quant, n_layer: int
) -> tuple[Speeds, dict[str, Any]]:
    options = ["--synthetic", arguments.shape, "--quant", quant.name, "--layers", str(n_layer)]
    options += ["--embedding-type", "q8_0", "--output-type", "q8_0", "-p", str(arguments.n_prompt)]
    options += ["-n", str(arguments.n_gen), "-t", str(arguments.threads), "-r", "1", "--json"]
    options += ["--device", "cpu"]
    found = json.loads(output_of([sys.executable, "-m", "vptq_runtime.bench.cli", *options]))
    return {result["test"]: result["tok_s"] for result in found["results"]}, found["system"]


def output_of(command: list[str]) -> str:
    """Of a child, run where nothing lies that it could import by accident. Raises VPTQError if it fails."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=tempfile.gettempdir())
    except OSError as error:
        raise VPTQError(f"{command[0]}: cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        raise VPTQError(f"{shlex.join(command)}: ended with status {done.returncode}")
    return done.stdout


def print_comparison(report: dict[str, Any], arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    llamacpp, system = report["llamacpp"], report["vptq_runtime"]
    print(
        f"{system['cpu']}; here {system['device']}, "
        f"there llama-cpp-python {llamacpp['version']} ({llamacpp['system']})\n"
    )
    there, here = f"llama.cpp {report['llama_type']}, tok/s", "vptq-runtime, tok/s"
    headings = {"quant": "left", "test": "left", there: "right", here: "right", "ratio": "right"}
    rows = []
    for result in report["results"]:
        speeds = spread(result["llamacpp_tok_s"]), spread(result["tok_s"])
        rows.append([result["quant"], result["test"], *speeds, f"{result['ratio']:.2f}"])
    print_table(headings, rows, markdown=arguments.md)
    print(f"\n{report['shape']}, threads: {report['threads']}, rounds: {arguments.rounds}; median (range)")
    whole, measured = report["n_layer"], report["layers_measured"]
    if measured is not None:
        print(f"Extrapolated on both sides: of {whole} layers {measured} ran.")


def spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    sys.exit(main())
