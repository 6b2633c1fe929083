"""What quantised models of a dense one are worth: perplexity and KL divergence over bits, step by step.

    pip install ".[quantize]"
    python tools/compare_quality.py MODEL_DIR OUT_DIR --calibration TEXT --held-out TEXT [--llamacpp DIR]

Each --quants argument is one or more configurations of about one size, as v6-k512-0,v6-k256-4,v6-k256-0-o2.
The first is measured after each step of vptq-quantize's method, the others after layer-wise fine-tuning; the
one of them with the least proxy error (not: perplexity) is then trained end to end. DIR has
llama.cpp's llama-imatrix, llama-quantize and llama-perplexity: its types of the same dense model, with an
importance matrix from the same calibration text, go beside them.

Perplexity is llama-perplexity's on both sides (vptq-perplexity --method llama.cpp): the second half of each
window is scored. Bits are of the blocks' linear layers, with all that is stored for them; the embedding, and
the output matrix if there is one, are float16 everywhere. Prints one table; OUT_DIR/report.json has the
figures, OUT_DIR/quality.png the picture. A run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from quality_models import (
    DENSE,
    LLAMACPP,
    LLAMACPP_TYPES,
    STEPS,
    Configuration,
    LlamaCpp,
    Measured,
    Setting,
    measured_here,
    measured_vptq,
)
from vptq_quantizer.run.safe_files import write_json

from vptq_runtime.bench.report import print_table
from vptq_runtime.checks import check_int
from vptq_runtime.commands import command
from vptq_runtime.errors import FileError, OptionError

LAYER_WISE = list(STEPS)[:-1]
FINE_TUNED, END_TO_END = list(STEPS)[-2:]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL_DIR", type=Path)
    parser.add_argument("out", metavar="OUT_DIR", type=Path)
    parser.add_argument("--calibration", metavar="TEXT", type=Path, required=True)
    parser.add_argument("--held-out", metavar="TEXT", type=Path, required=True)
    parser.add_argument("--quants", metavar="vV-kK-R,...", nargs="+", default=["v6-k512-0"])
    parser.add_argument("--llamacpp", metavar="DIR", type=Path)
    parser.add_argument("--llamacpp-types", metavar="TYPE,...", default=",".join(LLAMACPP_TYPES))
    parser.add_argument("-c", "--n-ctx", metavar="N", type=int, default=512)
    parser.add_argument("--windows", metavar="N", type=int, default=100, help="of held-out text")
    parser.add_argument("--samples", metavar="N", type=int, default=128, help="windows for the Hessians")
    parser.add_argument("--end-to-end", metavar="STEPS", type=int, default=100, help="0: none")
    parser.add_argument("-t", "--threads", metavar="N", type=int, default=2)
    parser.add_argument("--md", action="store_true", help="print Markdown")
    arguments = parser.parse_args(argv)
    return command.run("compare_quality", lambda: compare(arguments))


def compare(arguments: argparse.Namespace) -> None:
    for option in ("n_ctx", "windows", "samples", "threads"):
        check_int(f"--{option.replace('_', '-')}", getattr(arguments, option), 1, 1 << 20)
    check_int("--end-to-end", arguments.end_to_end, 0, 1 << 20)
    quants = [[Configuration.parse(name) for name in group.split(",")] for group in arguments.quants]
    setting = Setting(
        dense=arguments.model,
        directory=arguments.out,
        calibration=arguments.calibration,
        held_out=arguments.held_out,
        n_ctx=arguments.n_ctx,
        n_windows=arguments.windows,
        n_threads=arguments.threads,
        samples=arguments.samples,
        end_to_end=arguments.end_to_end,
    )
    setting.directory.mkdir(parents=True, exist_ok=True)
    results = Results(setting)
    dense = results.get(DENSE, DENSE, lambda: measured_here(setting, setting.dense_file(), DENSE, DENSE))
    tables = [[dense]]
    if arguments.llamacpp is not None:
        llamacpp = LlamaCpp(arguments.llamacpp, setting)
        names = (DENSE, *arguments.llamacpp_types.split(","))
        tables.append([results.get(name, LLAMACPP, partial(llamacpp.measured, name)) for name in names])

    def get(configuration: Configuration, step: str) -> Measured:
        return results.get(configuration.name, step, partial(measured_vptq, setting, configuration, step))

    for group in quants:
        tables.append([get(group[0], step) for step in LAYER_WISE])
        tables[-1] += [get(configuration, FINE_TUNED) for configuration in group[1:]]
    if setting.end_to_end:  # last, as it takes longest
        for group, table in zip(quants, tables[-len(quants) :], strict=True):
            errors = [get(configuration, FINE_TUNED).proxy_error or 0 for configuration in group]
            table.append(get(group[errors.index(min(errors))], END_TO_END))
    measured = [each for table in tables for each in table]
    print_results(measured, setting, markdown=arguments.md)
    plot(measured, setting.directory / "quality.png")


class Results:
    """What was measured, kept in report.json, and taken from there."""

    def __init__(self, setting: Setting) -> None:
        self.path = setting.directory / "report.json"
        self.setting = _as_json(setting)
        self.measured: list[Measured] = []
        if self.path.exists():
            try:
                report = json.loads(command.read_text(str(self.path)))
                found, self.measured = report["setting"], [Measured(**each) for each in report["measured"]]
            except (ValueError, KeyError, TypeError) as error:
                raise FileError(f"{self.path}: found another program's report, expected none") from error
            if found != self.setting:
                raise OptionError(f"{setting.directory}: found the report of another setting, expected none")

    def get(self, name: str, step: str, measure: Callable[[], Measured]) -> Measured:
        for each in self.measured:
            if (each.name, each.step) == (name, step):
                return each
        each = measure()
        self.measured.append(each)
        report = {"setting": self.setting, "measured": [asdict(each) for each in self.measured]}
        write_json(self.path, report)
        found = f"perplexity {each.perplexity:.3f}, KL divergence {each.kl_divergence:.4f}"
        print(f"{name}, {step}: {each.bits:.3f} bits, {found}", file=sys.stderr, flush=True)
        return each


def _as_json(setting: Setting) -> dict[str, Any]:
    """What figures depend on."""
    files = {"calibration": setting.calibration, "held_out": setting.held_out}
    texts = {name: command.read_text(str(path)) for name, path in files.items()}
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    names = ("n_ctx", "n_windows", "samples", "end_to_end")
    return {"model": str(setting.dense), **digests, **{name: getattr(setting, name) for name in names}}


def print_results(measured: Sequence[Measured], setting: Setting, *, markdown: bool) -> None:
    headings = {
        "model": "left",
        "after": "left",
        "bits": "right",
        "of them indices": "right",
        "perplexity": "right",
        "KL divergence": "right",
        "same top token": "right",
    }
    rows = [
        [
            each.name,
            each.step,
            f"{each.bits:.3f}",
            "" if each.index_bits is None else f"{each.index_bits:.3f}",
            f"{each.perplexity:.3f} ± {each.perplexity_error:.3f}",
            f"{each.kl_divergence:.4f} ± {each.kl_divergence_error:.4f}",
            f"{each.top_token_agreement:.1%}",
        ]
        for each in measured
    ]
    print_table(headings, rows, markdown=markdown)
    scored = setting.n_windows * (setting.n_ctx - setting.n_ctx // 2 - 1)
    print(f"\n{setting.n_windows} windows of {setting.n_ctx}: {scored} scored tokens")


def plot(measured: Sequence[Measured], target: Path) -> None:
    """Perplexity over bits per weight."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    for step in STEPS:
        # Of several configurations of a size, the frontier is drawn: none has fewer bits and less.
        points = sorted((each.bits, each.perplexity) for each in measured if each.step == step)
        best = [p for n, p in enumerate(points) if all(p[1] < other[1] for other in points[:n])]
        if best:
            axes.plot(*zip(*best, strict=True), marker=".", label=f"VPTQ, {step}")
    theirs = [each for each in measured if each.step == LLAMACPP and each.name != DENSE]
    if theirs:
        bits, perplexities = [each.bits for each in theirs], [each.perplexity for each in theirs]
        axes.plot(bits, perplexities, "k--s", ms=4, label="llama.cpp")
    for each in theirs:
        axes.annotate(
            each.name, (each.bits, each.perplexity), xytext=(4, 6), textcoords="offset points", fontsize=8
        )
    dense = next(each for each in measured if each.step == DENSE)
    axes.axhline(dense.perplexity, color="gray", lw=1, label="dense")
    axes.set(xlabel="bits per weight, all counted", ylabel="perplexity on held-out text", yscale="log")
    for axis_labels in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_labels("{x:g}")
    axes.margins(x=0.1)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
