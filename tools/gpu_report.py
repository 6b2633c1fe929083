"""The one table of tools/check_gpu.py."""

from __future__ import annotations

from dataclasses import dataclass

from vptq_runtime.bench.report import print_table

HEADINGS = {
    "part": "left",
    "what": "left",
    "found": "left",
    "share": "right",
    "at least": "right",
    "aim": "right",
    "": "left",
}


@dataclass(frozen=True)
class Row:
    """share: of the bound; at_least and aim: what is wanted of it, or of `number` where that is given."""

    part: str
    what: str
    found: str
    share: float | None = None
    at_least: float | None = None
    aim: float | None = None
    number: float | None = None
    failed: bool = False

    def cells(self) -> list[str]:
        def text(value: float | None) -> str:
            if value is None:
                return ""
            return f"{value:.0f}" if self.number is not None else f"{value:.0%}"

        share = "" if self.share is None else f"{self.share:.1%}"
        return [self.part, self.what, self.found, share, text(self.at_least), text(self.aim), self.verdict()]

    def verdict(self) -> str:
        value = self.share if self.number is None else self.number
        if self.failed:
            return "FAILED"
        if self.at_least is None or value is None:
            return ""
        if value < self.at_least:
            return "short"
        return "reached" if self.aim is not None and value >= self.aim else "enough"


def print_rows(rows: list[Row]) -> str:
    """Prints the table, and returns it in Markdown."""
    cells = [row.cells() for row in rows]
    print_table(HEADINGS, cells, markdown=False)
    lines = [list(HEADINGS), ["---"] * len(HEADINGS), *cells]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
