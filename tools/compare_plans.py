"""What plans are worth: uniform configurations, and beside each a plan for as many bits.

    python tools/compare_plans.py DENSE OUT --calibration TEXT --quants v4-k64-0-n,v4-k256-0-n

Both are made in OUT, from the same Hessians and without end-to-end training, and judged by vptq-quantize's
verdict: the KL divergence from the dense model on the last 5 % of TEXT. A run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quality_models import Configuration
from vptq_quantizer import QuantizeOptions, quantize

from vptq_runtime.bench.report import print_table
from vptq_runtime.commands import command

HEADINGS = {
    "uniform": "left",
    "bits": "right",
    "KL divergence": "right",
    "plan: bits": "right",
    "plan: KL divergence": "right",
    "of the uniform one": "right",
    "predicted": "right",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dense", metavar="DENSE")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--calibration", metavar="TEXT", type=Path, required=True)
    parser.add_argument("--quants", metavar="NAMES", required=True, help="vV-kK-R, and -n for no norm")
    parser.add_argument("--samples", metavar="N", type=int, default=QuantizeOptions.samples)
    parser.add_argument("--seq-len", metavar="N", type=int, default=512)
    parser.add_argument("--finetune", action="store_true")
    parser.add_argument("--md", action="store_true", help="print the table as Markdown")
    return command.run("compare_plans", lambda: compare(parser.parse_args(argv)))


def compare(arguments: argparse.Namespace) -> None:
    """Makes what is not there yet, and prints a row for each uniform configuration."""
    rows = []
    for name in arguments.quants.split(","):
        options = replace(
            Configuration.parse(name).options,
            samples=arguments.samples,
            seq_len=arguments.seq_len,
            finetune=arguments.finetune,
        )
        uniform = made(arguments, name, options)
        bits = uniform["bits_per_weight"]
        as_large = replace(
            options, vector_len=None, centroids=None, res_centroids=0, outliers=0.0, normalize=True,
            target_bits=bits,
        )  # fmt: skip
        plan = made(arguments, f"{name}-plan", as_large)
        losses = [report["verdict"]["kl_divergence"] for report in (uniform, plan)]
        rows.append(
            [
                name,
                f"{bits:.3f}",
                f"{losses[0]:.4f}",
                f"{plan['bits_per_weight']:.3f}",
                f"{losses[1]:.4f}",
                f"{losses[1] / losses[0]:.2f}",
                f"{plan['plan']['expected_kl_divergence']:.4f}",
            ]
        )
    print_table(HEADINGS, rows, markdown=arguments.md)


def made(arguments: argparse.Namespace, name: str, options: QuantizeOptions) -> dict[str, Any]:
    """The report of a model in OUT/name, which is made unless it is there."""
    out = arguments.out / name
    if (out / "config.json").exists():  # what a run writes last
        report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
        return report
    return quantize(
        arguments.dense,
        out,
        options,
        calibration=[arguments.calibration],
        hessians=arguments.out / "hessians",
    )


if __name__ == "__main__":
    sys.exit(main())
