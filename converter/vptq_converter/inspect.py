"""`vptq-inspect FILE.gguf`: what is in a file; for programs (--json), as a picture (--plot)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vptq_converter.facts import Facts, Linear, read_facts
from vptq_runtime import demo_path
from vptq_runtime.commands import command

WAYS = {
    "whole_file": "whole file",
    "without_embeddings": "without embedding and output",
    "quantised_layers": "VPTQ layers",
    "quantised_layers_without_codebooks": "VPTQ layers without codebooks",
}
# The tokenizer itself: megabytes that say nothing about the weights.
LONG_KEYS = {
    "tokenizer.huggingface.json",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.merges",
}
HYPERPARAMETERS = {
    "block_count": "layers",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_ff",
    "attention.head_count": "n_head",
    "attention.head_count_kv": "n_head_kv",
    "attention.key_length": "head_dim",
    "vocab_size": "n_vocab",
    "context_length": "context",
    "attention.sliding_window": "window",
}
# What the table says of a layer beside its type and its size. A column only where rows differ in it.
EXPLAINED = {
    "g": "groups of columns, each with codebooks of its own",
    "outliers": "how many columns have a codebook of their own, and its vV-kK",
    "perm": "whether the columns are permuted",
    "norm": "scale and shift for each feature, of the input or of the output",
    "bias": "whether there is one",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="vptq-inspect", description="Print what is in a GGUF file: size, bits per weight, layers."
    )
    parser.add_argument(
        "file",
        type=Path,
        nargs="?",
        metavar="FILE.gguf",
        help="default: the demo model of the package",
    )
    parser.add_argument("--json", action="store_true", help="print everything for programs to read")
    parser.add_argument("--layers", action="store_true", help="a row for each layer, not for each kind")
    parser.add_argument(
        "--plot", type=Path, metavar="OUT.png", help="draw bits per layer and how evenly centroids are used"
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {command.version()}")
    args = parser.parse_args(argv)
    return command.run("vptq-inspect", lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    facts = read_facts(demo_path() if args.file is None else args.file)
    if args.plot:
        from vptq_converter.plot import plot

        plot(facts, args.plot)
        print(f"vptq-inspect: {args.plot} written", file=sys.stderr)
    console = Console(highlight=False)
    if args.json:
        console.out(json.dumps(as_json(facts), indent=2, default=str), highlight=False)
    else:
        print_facts(console, facts, each_layer=args.layers)


def as_json(facts: Facts) -> dict[str, Any]:
    """Everything but the tokenizer and the data, in types that JSON has."""
    linears = []
    for linear in facts.linears:
        linears.append(
            {
                "name": linear.name,
                "type": linear.type,
                "out_features": linear.out_features,
                "in_features": linear.in_features,
                "has_bias": linear.has_bias,
                "nbytes": linear.nbytes,
                "codebook_bytes": linear.codebook_bytes,
                "bits_per_weight": linear.bits_per_weight,
                "vptq": asdict(linear.vptq) | {"index_bits": linear.vptq.index_bits} if linear.vptq else None,
            }
        )
    return {
        "file": str(facts.path),
        "file_bytes": facts.file_bytes,
        "architecture": facts.architecture,
        "n_parameters": facts.n_parameters,
        "n_embedding_parameters": facts.n_embedding_parameters,
        "embedding_type": facts.embedding_type,
        "tensor_bytes": facts.tensor_bytes,
        "bits_per_weight": facts.bits_per_weight,
        "layers": linears,
        "metadata": {key: value for key, value in facts.metadata.items() if key not in LONG_KEYS},
    }


def print_facts(console: Console, facts: Facts, *, each_layer: bool) -> None:
    """Prints the summary and the table of layers."""
    summary = Table.grid(padding=(0, 2))
    name = facts.metadata.get("general.name")
    rows = {
        "model": _printable(name) if name else _printable(facts.path.name),
        "architecture": f"{_printable(facts.architecture)}  {_hyperparameters(facts)}",
        "parameters": f"{facts.n_parameters:,} (embedding and output: {facts.n_embedding_parameters:,})",
        "file": f"{facts.file_bytes:,} bytes, of which tensors {facts.tensor_bytes:,}",
        "embedding": facts.embedding_type or "none",
    }
    for label, value in rows.items():
        summary.add_row(label, Text(value))
    for way, bits in facts.bits_per_weight.items():
        summary.add_row("bits per weight" if way == "whole_file" else "", Text(f"{bits:6.3f}  {WAYS[way]}"))
    console.print(summary)
    if not facts.linears:
        return
    table, shared = _table(facts.linears, each_layer=each_layer)
    # The lines of a table wider than the terminal are for the terminal to fold: no number is cut.
    unlimited = console.options.update(max_width=1 << 20)
    console.width = max(console.width, console.measure(table, options=unlimited).minimum)
    console.print()
    console.print(table)
    if any(linear.vptq for linear in facts.linears):
        console.print()
        console.print(Text(_legend(shared)))


def _hyperparameters(facts: Facts) -> str:
    found = []
    for key, label in HYPERPARAMETERS.items():
        value = facts.metadata.get(f"{facts.architecture}.{key}")
        if value is not None:
            found.append(f"{label} {_printable(value)}")
    return ", ".join(found)


def _table(linears: Sequence[Linear], *, each_layer: bool) -> tuple[Table, dict[str, str]]:
    """One row for all layers that are alike; and what is the same in every row, which needs no column."""
    groups: dict[tuple[object, ...], list[Linear]] = {}
    for linear in linears:
        alike = (
            linear.kind,
            linear.out_features,
            linear.in_features,
            linear.type,
            linear.vptq,
            linear.has_bias,
        )
        groups.setdefault((*alike, linear.nbytes, linear.name if each_layer else ""), []).append(linear)
    rows = [(group, _details(group[0])) for group in groups.values()]
    found = {key: {details[key] for _, details in rows if key in details} for key in EXPLAINED}
    shared = {key: next(iter(values)) for key, values in found.items() if len(values) == 1}
    varying = [key for key, values in found.items() if len(values) > 1]

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("linear", no_wrap=True)
    table.add_column("layers")  # where the terminal is narrow this one is folded, between two ranges
    for heading in ("out x in", "type"):
        table.add_column(heading, no_wrap=True)
    for heading in (*varying, "bits"):
        table.add_column(heading, justify="right", no_wrap=True)
    for group, details in rows:
        first = group[0]
        cells = [first.kind, _ranges(group), f"{first.out_features} x {first.in_features}", _type(first)]
        cells += [*(details.get(key, "-") for key in varying), f"{first.bits_per_weight:.3f}"]
        table.add_row(*(Text(_printable(cell)) for cell in cells))
    for column in table.columns:
        if column.no_wrap:  # which is not enough where space is short: what is too wide would be cut
            column.min_width = max(Text(str(cell)).cell_len for cell in column.cells)
    return table, shared


def _type(linear: Linear) -> str:
    """Of a dense layer its type, of a VPTQ layer v, k and r as in the names of the community's models."""
    config = linear.vptq
    return f"v{config.v}-k{config.k}-{config.r}" if config else linear.type


def _details(linear: Linear) -> dict[str, str]:
    """What a row says beside type and size, as EXPLAINED has it; `-`: none."""
    details = {"bias": "yes" if linear.has_bias else "-"}
    if config := linear.vptq:
        details |= {
            "g": str(config.g),
            "outliers": f"{config.n0} v{config.v0}-k{config.k0}" if config.n0 else "-",
            "perm": "yes" if config.has_perm else "-",
            "norm": config.norm.replace("none", "-"),
        }
    return details


def _legend(shared: Mapping[str, str]) -> str:
    """What stands below a table with VPTQ layers, in lines of less than 80 characters."""
    everywhere = {key: value for key, value in shared.items() if value != "-"}
    lines = ["vV-kK-R: vectors of V weights, K centroids, R residual centroids (0: none)"]
    lines += [f"{key}: {text}" for key, text in EXPLAINED.items() if key in everywhere or key not in shared]
    if everywhere:
        lines.append(
            "in every VPTQ layer: " + ", ".join(f"{key} {value}" for key, value in everywhere.items())
        )
    return "\n".join(lines)


def _ranges(group: Sequence[Linear]) -> str:
    """Layer numbers as `0-5, 7`."""
    numbers = sorted({linear.block for linear in group if linear.block is not None})
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def _printable(value: object, most: int = 100) -> str:
    """Text of a file, without what would steer a terminal."""
    text = str(value)
    text = text if len(text) <= most else text[: most - 3] + "..."
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )


if __name__ == "__main__":
    sys.exit(main())
