"""What quantised models of a dense one are worth: perplexity and KL divergence over bits, step by step.

    pip install ".[quantize]"
    python tools/compare_quality.py MODEL_DIR OUT_DIR --calibration TEXT --held-out TEXT [--llamacpp DIR]

Each --quants argument is one or more configurations of about one size, as v6-k512-0,v6-k256-4,v6-k256-0-o2.
The first is measured after each step of vptq-quantize's method, the others after layer-wise fine-tuning; the
one of them with the least proxy error (not: perplexity) is then trained end to end. DIR has
llama.cpp's llama-imatrix, llama-quantize and llama-perplexity: its types of the same dense model, with an
importance matrix from the same calibration text, go beside them.

Models can also be given as a file of --options: in each line a name, a colon, options of vptq-quantize, and
behind a | those of vptq-convert; lines that begin with # are left out. For example

    v4-k256-0: --vector-len 4 --centroids 256 --finetune | --embedding-type q8_0

--own-embedding lets llama-quantize choose the embedding's type: then sizes of files compare. --models DIR has
the models, so that another OUT_DIR measures the same ones on another text.

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
    OPTIONS,
    STEPS,
    Configuration,
    LlamaCpp,
    Measured,
    OptionLine,
    Setting,
    measured_here,
    measured_line,
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
    parser.add_argument("--quants", metavar="vV-kK-R,...", nargs="*", default=["v6-k512-0"])
    parser.add_argument("--options", metavar="FILE", help="models by their options, a line each")
    parser.add_argument("--models", metavar="DIR", type=Path, help="where models go (default: OUT_DIR)")
    parser.add_argument("--llamacpp", metavar="DIR", type=Path)
    parser.add_argument("--llamacpp-types", metavar="TYPE,...", default=",".join(LLAMACPP_TYPES))
    parser.add_argument(
        "--own-embedding", action="store_true", help="llama.cpp's embedding in the type that it chooses"
    )
    parser.add_argument(
        "--imatrix-windows", metavar="N", type=int, help="the first of the calibration text (default: all)"
    )
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
    if arguments.imatrix_windows is not None:
        check_int("--imatrix-windows", arguments.imatrix_windows, 1, 1 << 20)
    lines = read_lines(arguments.options) if arguments.options is not None else []
    quants = [[Configuration.parse(name) for name in group.split(",")] for group in arguments.quants]
    setting = Setting(
        dense=arguments.model,
        directory=arguments.out,
        models=arguments.models or arguments.out,
        calibration=arguments.calibration,
        held_out=arguments.held_out,
        n_ctx=arguments.n_ctx,
        n_windows=arguments.windows,
        n_threads=arguments.threads,
        samples=arguments.samples,
        end_to_end=arguments.end_to_end,
    )
    for directory in (setting.directory, setting.models):
        directory.mkdir(parents=True, exist_ok=True)
    results = Results(setting)
    dense = results.get(DENSE, DENSE, lambda: measured_here(setting, setting.dense_file(), DENSE, DENSE))
    tables = [[dense]]
    if arguments.llamacpp is not None:
        llamacpp = LlamaCpp(arguments.llamacpp, setting, arguments.own_embedding, arguments.imatrix_windows)
        names = (DENSE, *arguments.llamacpp_types.split(","))
        tables.append([results.get(name, LLAMACPP, partial(llamacpp.measured, name)) for name in names])

    def get(configuration: Configuration, step: str) -> Measured:
        return results.get(configuration.name, step, partial(measured_vptq, setting, configuration, step))

    tables.append(
        [results.get(line.name, OPTIONS, partial(measured_line, setting, line), line.line) for line in lines]
    )
    for group in quants:
        tables.append([get(group[0], step) for step in LAYER_WISE])
        tables[-1] += [get(configuration, FINE_TUNED) for configuration in group[1:]]
    if setting.end_to_end and quants:  # last, as it takes longest
        for group, table in zip(quants, tables[-len(quants) :], strict=True):
            errors = [get(configuration, FINE_TUNED).proxy_error or 0 for configuration in group]
            table.append(get(group[errors.index(min(errors))], END_TO_END))
    measured = [each for table in tables for each in table]
    print_results(measured, setting, markdown=arguments.md)
    plot(measured, setting.directory / "quality.png")


def read_lines(file: str) -> list[OptionLine]:
    """The models of a file of options; raises OptionError for a name that is there twice."""
    texts = [text for text in command.read_text(file).splitlines() if text.strip() and text[0] != "#"]
    lines = [OptionLine.parse(text) for text in texts]
    names = [line.name for line in lines]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise OptionError(f"--options: found {twice} twice, expected each name once")
    return lines


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

    def get(
        self, name: str, step: str, measure: Callable[[], Measured], options: str | None = None
    ) -> Measured:
        for each in self.measured:
            if (each.name, each.step) == (name, step):
                if each.options != options:
                    found = f"found it made with {each.options!r}, expected {options!r}: give another name"
                    raise OptionError(f"--options: {name}: {found}")
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
        "MB": "right",
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
            f"{each.file_bytes / 1e6:.1f}",
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
    """Perplexity over bits per weight, KL divergence over the file's size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    by_bits, by_size = figure.subplots(1, 2)
    _draw(by_bits, measured, lambda each: (each.bits, each.perplexity))
    _draw(by_size, measured, lambda each: (each.file_bytes / 1e6, each.kl_divergence))
    dense = next(each for each in measured if each.step == DENSE)
    by_bits.axhline(dense.perplexity, color="gray", lw=1, label="dense")
    by_bits.set(xlabel="bits per weight of the linear layers", ylabel="perplexity on held-out text")
    by_size.set(xlabel="MB of the file", ylabel="KL divergence from the dense model")
    for axes in (by_bits, by_size):
        axes.set_yscale("log")
        for axis_labels in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis_labels("{x:g}")
        axes.margins(x=0.1)
        axes.grid(alpha=0.3, which="both")
    by_bits.legend(fontsize="small")
    figure.savefig(target, dpi=110)


def _draw(axes: Any, measured: Sequence[Measured], point: Callable[[Measured], tuple[float, float]]) -> None:
    for step in (*STEPS, OPTIONS):
        # Of several configurations of a size, the frontier is drawn: none has fewer bits and less.
        points = sorted(point(each) for each in measured if each.step == step)
        best = [p for n, p in enumerate(points) if all(p[1] < other[1] for other in points[:n])]
        if best:
            label = "VPTQ" if step == OPTIONS else f"VPTQ, {step}"
            axes.plot(*zip(*best, strict=True), marker=".", label=label)
    theirs = [each for each in measured if each.step == LLAMACPP and each.name != DENSE]
    if theirs:
        points = sorted(map(point, theirs))
        axes.plot(*zip(*points, strict=True), "k--s", ms=4, label="llama.cpp")
    for each in theirs:
        axes.annotate(each.name, point(each), xytext=(4, 6), textcoords="offset points", fontsize=8)


if __name__ == "__main__":
    sys.exit(main())
