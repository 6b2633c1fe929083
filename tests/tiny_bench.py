"""A model that vptq-bench makes in no time, and its tables."""

from vptq_runtime.bench.shapes import Shape

TINY = Shape(3, 64, 96, 4, 2, 160, 256, 1e4, head_dim=16)
QUANT = "v6-k256-16"  # neither 64, 96 nor 32 output features are whole vectors of 6; indices of 12 bits
SYNTHETIC = ["--synthetic", "tiny", "--quant", QUANT]
HEADINGS = ["model", "size", "quant", "threads", "test", "tok/s", "read/token", "of bandwidth"]


def cells(table: str, border: str) -> list[list[str]]:
    """Of each line that has columns."""
    return [
        [cell.strip() for cell in line.strip(border).split(border)]
        for line in table.replace("┃", "│").splitlines()
        if line.startswith(border)
    ]
