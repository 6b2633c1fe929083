"""What vptq-bench prints for people."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 200  # a table is not folded to the width of a terminal that is not there
HEADINGS = {  # and how they are justified
    "model": "left",
    "size": "right",
    "quant": "left",
    "threads": "right",
    "test": "left",
    "tok/s": "right",
    "read/token": "right",
    "of bandwidth": "right",
}


def print_report(report: dict[str, Any], *, markdown: bool) -> None:
    """Prints the system, the table of results, then load time and memory."""
    headings = dict(HEADINGS)
    if "copy_bandwidth" in report["system"]:
        del headings["threads"]  # a GPU has none to choose
    if report["model"]["layers_measured"] is not None:
        headings = {name.replace("tok/s", "tok/s (extrapolated)"): side for name, side in headings.items()}
    rows = _rows(report)
    print(*_system(report["system"], report["model"]["precision"]), sep="\n")
    if not markdown:  # what all rows begin with, on a line: a table of the rest fits a terminal
        name, size, quant = rows[0][:3]
        print(f"{name}: {size}, {quant}")
        headings = {heading: headings[heading] for heading in list(headings)[3:]}
        rows = [row[3:] for row in rows]
    print()
    print_table(headings, rows, markdown=markdown)
    print("", *_notes(report), sep="\n")


def print_table(headings: Mapping[str, str], rows: Sequence[Sequence[str]], *, markdown: bool) -> None:
    """Prints rows of cells under headings, which say how their columns are justified."""
    if markdown:
        rules = ["--:" if justify == "right" else "---" for justify in headings.values()]
        for cells in (headings, rules, *rows):
            print("|", " | ".join(cell.replace("|", "\\|") for cell in cells), "|")
        return
    table = Table()
    for heading, justify in headings.items():
        # On a narrow terminal cells take more lines, rather than lose figures.
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for cells in rows:
        table.add_row(*map(Text, cells))
    Console(width=None if sys.stdout.isatty() else PIPED_WIDTH).print(table)


def _system(system: dict[str, Any], precision: str) -> list[str]:
    memory = f"{_size(system['memory_bytes'])} memory, {_size(system['available_bytes'])} available"
    processor = f"{system['cpu']}, cores: {system['cores']}"
    if "copy_bandwidth" in system:
        rate = f"{system['copy_bandwidth'] / 1e9:.1f} GB/s"
        return [
            f"{system['device']}, {memory}; host: {processor}; precision {precision}",
            f"memory bandwidth: {rate} ({system['copy_bandwidth_method']})",
        ]
    rates = ", ".join(
        f"{rate / 1e9:.1f} GB/s with {n} thread{'s' * (n != '1')}"
        for n, rate in system["read_bandwidth"].items()
    )
    return [
        f"{processor}, {memory}; runs on {system['device']}, precision {precision}",
        f"memory bandwidth: {rates} ({system['read_bandwidth_method']})",
    ]


def _rows(report: dict[str, Any]) -> list[list[str]]:
    model = report["model"]
    name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in model["name"])
    return [
        [
            name,
            _size(model["model_bytes"]),
            model["quant"],
            *([str(result["threads"])] if result["threads"] else []),
            result["test"],
            _speed(result["tok_s"], result["tok_s_std"]),
            "" if result["bytes_per_token"] is None else _size(result["bytes_per_token"]),
            "" if result["bandwidth_share"] is None else f"{result['bandwidth_share']:.1%}",
        ]
        for result in report["results"]
    ]


def _notes(report: dict[str, Any]) -> list[str]:
    model = report["model"]
    memory = "GPU memory" if "copy_bandwidth" in report["system"] else "memory"
    load = f"load {report['load_s']:.2f} s, peak {memory} {_size(report['peak_memory_bytes'])}"
    if model["layers_measured"] is None:
        return [load]
    n_layer, n_measured = model["n_layer"], model["layers_measured"]
    available = report["system"]["available_bytes"]
    fits = "fits" if model["memory_bytes"] <= available else "does not fit"
    return [
        f"Extrapolated: of {n_layer} layers {n_measured} ran, and the others are taken to be as fast.",
        f"The whole model with this context needs {_size(model['memory_bytes'])} and {fits} into the "
        f"{_size(available)} available. What ran: {load}.",
    ]


def _speed(tok_s: float, std: float) -> str:
    digits = 2 if tok_s >= 1 else 4
    return f"{tok_s:.{digits}f} ± {std:.{digits}f}"


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 1e9 else f"{n_bytes / 2**20:.2f} MiB"
