"""vptq-quantize: a dense model to a VPTQ checkpoint."""

from __future__ import annotations

import argparse
import re
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.console import Console
from vptq_converter.checkpoint import is_hub_id
from vptq_converter.dense_gguf.checkpoint import open_checkpoint

from vptq_quantizer.options import DEFAULT_BITS, DEFAULT_SEQ_LEN, OPTION_NAMES, SCALAR_TYPES, QuantizeOptions
from vptq_quantizer.planning.file_size import in_words
from vptq_quantizer.run.report import (
    check_plot,
    matrix_line,
    plan_table,
    planned_types,
    plot,
    table,
    verdict_line,
)
from vptq_runtime.commands import command
from vptq_runtime.commands.progress import print_line
from vptq_runtime.errors import FileError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vptq-quantize",
        description="Quantises a dense Llama, Mistral or Qwen2 model to a VPTQ checkpoint: vptq-convert "
        "takes from there. A run that was interrupted goes on where it was.",
    )
    parser.add_argument(
        "model",
        metavar="SOURCE",
        help="a directory with config.json, *.safetensors and tokenizer.json, a repo id of the hub, or a "
        "dense GGUF file of llama.cpp",
    )
    parser.add_argument("out", metavar="OUT_DIR", help="a new directory, or that of a run to go on with")
    default = QuantizeOptions()

    def option(group: Any, name: str, text: str, instead: str | None = None) -> None:
        """instead: what there is where it is not given; a number then is an integer."""
        value = getattr(default, name)
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=int if instead else type(value),
            default=value,
            metavar="N",
            help=f"{text} (default: {instead or '%(default)s'})",
        )

    codebooks = parser.add_argument_group("codebooks")
    chosen = "chosen for each matrix"
    option(codebooks, "vector_len", "outputs that share an index", chosen)
    option(codebooks, "centroids", "entries of a codebook", chosen)
    option(codebooks, "res_centroids", "entries of the codebook for what the first leaves; 0: none")
    option(codebooks, "groups", "codebooks of a layer, each for as many input columns")
    option(
        codebooks,
        "outliers",
        "percent of the input columns, those that weigh most, with a codebook of their own",
    )
    option(codebooks, "outlier_vector_len", "outputs that share an index there")
    option(codebooks, "outlier_centroids", "entries of that codebook")

    sizes = parser.add_argument_group("a size, instead of codebooks by hand")
    sizes.add_argument(
        "--target-bits",
        type=float,
        metavar="BITS",
        help="per weight of all linear layers, all that is stored counted: each matrix gets what costs the "
        f"model least (default, without --vector-len and --centroids: {DEFAULT_BITS:g})",
    )
    sizes.add_argument(
        "--fit",
        type=_size,
        metavar="SIZE",
        help="of the GGUF file that vptq-convert makes, as 64MB, 4GB or 1.5GiB: embedding and output matrix "
        "are chosen, too",
    )
    sizes.add_argument(
        "--dry-run", action="store_true", help="print the plan and what it is expected to cost; write nothing"
    )

    matrices = parser.add_argument_group("embedding and output matrix, without --fit")
    for name, note in (("embedding", ""), ("output", "; only where it is not the embedding")):
        matrices.add_argument(
            f"--{name}-type",
            metavar="TYPE",
            help=f"of the {name} matrix: {', '.join(SCALAR_TYPES)}, which vptq-convert makes of it, or "
            f"vV-kK-R, as v2-k256-0: a VPTQ layer of that vector length and these codebooks{note}",
        )

    text = parser.add_argument_group("calibration")
    text.add_argument("--calibration", metavar="FILE", nargs="+", default=[], help="text files")
    option(text, "samples", "windows of text")
    option(text, "seq_len", "tokens of a window", f"{DEFAULT_SEQ_LEN}, or the model's context")
    text.add_argument(
        "--hessians", metavar="DIR", help="where the Hessians are kept; those that are there are used again"
    )
    option(text, "damping", "added to the Hessian's diagonal, in units of its mean")

    method = parser.add_argument_group("method")
    method.add_argument(
        "--sequential",
        action="store_true",
        help="fit each layer to what the quantised layers before give it; not with --hessians",
    )
    method.add_argument(
        "--finetune", action="store_true", help="fit codebooks, norms and indices of each layer once more"
    )
    option(method, "end_to_end", "steps of training the whole model: codebooks, norms and indices; 0: none")
    method.add_argument(
        "--no-hessian-weights",
        dest="hessian_weights",
        action="store_false",
        help="plain k-means: all columns weigh the same",
    )
    method.add_argument(
        "--no-second-order",
        dest="second_order",
        action="store_false",
        help="nearest centroids: no column answers for another one's error",
    )
    method.add_argument(
        "--no-normalize", dest="normalize", action="store_false", help="columns as they are, without a norm"
    )
    option(method, "seed", "of what is drawn at random")

    parser.add_argument("--layers", metavar="A-B", help="do decoder layers A to B only, the first is 0")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--plot", metavar="FILE", help="a picture of the errors; the ending says the format")
    parser.add_argument("--version", action="version", version=f"%(prog)s {command.version()}")
    return parser


def _size(text: str) -> int:
    """Bytes."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([kmgt]?)(i?)b", text.lower())
    if not match or (match[3] and not match[2]):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a size, as 64MB, 4GB or 1.5GiB")
    return int(Fraction(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " "))


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 1 for an error (one line on standard error), 2 for wrong usage, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    return command.run("vptq-quantize", lambda: _run(options))


def _run(arguments: argparse.Namespace) -> None:
    options = QuantizeOptions(**{name: getattr(arguments, name) for name in OPTION_NAMES})
    layers = None
    if arguments.layers is not None:
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", arguments.layers)
        if not match:
            raise command.UsageError(f"--layers: found {arguments.layers!r}, expected A-B, as 0-15")
        layers = (int(match[1]), int(match[2] or match[1]))
    if arguments.plot:
        check_plot(Path(arguments.plot), Path(arguments.out))
    _check_paths(arguments)
    from vptq_quantizer import quantize  # torch takes seconds to load, and may be missing

    def warn(message: str) -> None:
        print(f"vptq-quantize: warning: {message}", file=sys.stderr)

    try:
        report = quantize(
            arguments.model,
            arguments.out,
            options,
            calibration=arguments.calibration,
            hessians=arguments.hessians,
            layers=layers,
            device=arguments.device,
            dry_run=arguments.dry_run,
            warn=warn,
            tell=print_line,
        )
    except KeyboardInterrupt:
        print("vptq-quantize: interrupted; the same command goes on with what is finished", file=sys.stderr)
        raise
    _show(arguments, report)


def _check_paths(arguments: argparse.Namespace) -> None:
    """What is wrong with them is said before torch is loaded."""
    if not is_hub_id(arguments.model):
        open_checkpoint(arguments.model)
    for file in arguments.calibration:
        if not Path(file).exists():
            raise FileError(f"--calibration: {file}: no such file")


def _show(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    if arguments.dry_run:
        planned = report["plan"]
        Console().print(plan_table(planned["config_for_layers"], report["n_layers"]))
        types = ", ".join(
            f"{name.removesuffix('_type')} in {type}" for name, type in planned_types(planned).items()
        )
        print(
            f"{planned['bits_per_weight']:.3f} bits per weight of the linear layers{types and '; '}{types}; "
            f"a file of {in_words(planned['file_bytes'])}"
        )
        if planned["expected_kl_divergence"] is not None:
            print(f"KL divergence to expect, without training: about {planned['expected_kl_divergence']:.2f}")
        return
    Console().print(table(report["layers"]))
    for module, matrix in report.get("matrices", {}).items():
        print(matrix_line(module, matrix))
    if "end_to_end" in report:
        before, after = report["end_to_end"]["kl_divergence"]
        kept = "" if report["end_to_end"]["kept"] else ": no better, so the training is not kept"
        print(f"end to end: KL divergence from the dense model {before:.4f} before, {after:.4f} after{kept}")
    if report["finished"]:
        print(
            f"{arguments.out}: {report['bits_per_weight']:.3f} bits per quantised weight "
            f"({report['index_bits_per_weight']:.3f} of them indices), a GGUF file of "
            f"{in_words(report['plan']['file_bytes'])}"
        )
        if "verdict" in report:
            print(verdict_line(report["verdict"]))
    else:
        done = len(report["layers"])
        print(
            f"{arguments.out}: {done} of {report['n_layers']} decoder layers are finished, others still to do"
        )
    if arguments.plot:
        plot(report["layers"], Path(arguments.plot))


if __name__ == "__main__":
    sys.exit(main())
