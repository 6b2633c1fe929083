"""vptq-convert: a VPTQ checkpoint to a GGUF file."""

from __future__ import annotations

import argparse
import os
import sys

from vptq_converter.convert import convert
from vptq_converter.dense import DENSE_TYPES, check_dense_type
from vptq_converter.dequantize import FILE_TYPES
from vptq_runtime.commands import command
from vptq_runtime.errors import OptionError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vptq-convert", description="Converts a VPTQ checkpoint to one GGUF file."
    )
    parser.add_argument(
        "source",
        metavar="IN",
        help="a .safetensors file (config.json and tokenizer files beside it), an index.json, "
        "a directory, or a Hugging Face repo id",
    )
    parser.add_argument(
        "target", metavar="OUT.gguf", help="the file to write; replaced only once the new one is whole"
    )
    parser.add_argument(
        "--dequantize",
        choices=tuple(FILE_TYPES),
        help="write a plain GGUF for llama.cpp instead, in this type; with q8_0, matrices whose rows are "
        "not a multiple of 32 weights become f16",
    )
    for name, note in (
        ("embedding", ""),
        ("output", "; a type other than the embedding's adds a matrix to a model that uses one for both"),
    ):
        parser.add_argument(
            f"--{name}-type",
            metavar=f"{{{','.join(DENSE_TYPES)}}}",
            type=_dense_type,
            default="auto",
            help=f"type of the {name} matrix; auto: as the checkpoint has or names it, or as "
            f"--dequantize says; vq: the VPTQ layer that the checkpoint has of it{note}",
        )
    parser.add_argument("--version", action="version", version=f"%(prog)s {command.version()}")
    return parser


def _dense_type(value: str) -> str:
    try:
        check_dense_type(value)
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return value


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 1 for an error (one line on standard error), 2 for wrong usage, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    return command.run("vptq-convert", lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    try:
        done = convert(
            options.source,
            options.target,
            dequantize=options.dequantize,
            embedding_type=options.embedding_type,
            output_type=options.output_type,
        )
    except KeyboardInterrupt:
        print(f"vptq-convert: interrupted, {options.target} is as it was", file=sys.stderr)
        raise
    size = f"{done.n_bytes / 1e9:.2f} GB" if done.n_bytes >= 1e9 else f"{done.n_bytes / 1e6:.1f} MB"
    speed = done.n_bytes / 1e6 / max(done.seconds, 1e-3)
    target = os.fsencode(done.target).decode(errors="replace")
    print(
        f"{target}: {done.arch}, {done.n_vptq} VPTQ and {done.n_dense} dense linear layers, {size} "
        f"in {done.seconds:.1f} s ({speed:.0f} MB/s)"
    )
    for note in done.notes:
        print(f"vptq-convert: note: {note}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
