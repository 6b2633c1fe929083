"""The picture of `vptq-inspect --plot`: bits per layer, and how evenly codebook entries are used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vptq_converter.facts import Facts, Linear
from vptq_converter.layer import unpack
from vptq_runtime.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_SAMPLED = 1 << 20  # indices of one codebook that are counted: an 80-layer model takes seconds
CURVE_POINTS = 257
MAX_KINDS = 64  # a file may have any number of names; a picture has not the room
MARKS = "os^vDP*Xp<>h"
PARTS = ("Centroids", "Residual centroids")  # as usage() returns them

Counts: TypeAlias = NDArray[np.int64]  # one codebook's
Layer: TypeAlias = "tuple[str, int | None]"  # kind and number, as Linear has them


def plot(facts: Facts, target: Path) -> None:
    """Draws the picture into target (the ending says the format). Raises OptionError.

    A row for each kind of linear layer and a column for each layer: bits per weight and, where there are VPTQ
    layers, how evenly their centroids are used. Lines would lie on one another, kinds are so alike.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError('--plot needs matplotlib: pip install "vptq-runtime[plot]"') from error

    kinds = list(dict.fromkeys(linear.kind for linear in facts.linears))
    if not 1 <= len(kinds) <= MAX_KINDS:
        raise OptionError(
            f"--plot: found {len(kinds)} kinds of linear layers in {facts.path}, expected 1 to {MAX_KINDS}"
        )
    quantised = [linear for linear in facts.linears if linear.vptq]
    has_residuals = any(linear.vptq.r for linear in facts.linears if linear.vptq)
    parts = PARTS if has_residuals else PARTS[: 1 if quantised else 0]
    # A figure of its own, without pyplot: no window system, no global state.
    figure = Figure(figsize=(13, 2 + 0.3 * len(kinds) * (2 if parts else 1) + (4 if parts else 0)))
    figure.set_layout_engine("constrained")
    columns = max(1, len(parts))
    rows: list[Any] = [["size"] * columns]
    if parts:
        rows += [parts, [f"{part}: sorted use" for part in parts]]
    axes = figure.subplot_mosaic(rows, height_ratios=[len(kinds) + 2, len(kinds) + 2, 13][: len(rows)])
    title = _plain(str(facts.metadata.get("general.name") or facts.path.name)[:100])
    without = "" if parts else ", no VPTQ layers"
    bits = facts.bits_per_weight.get("whole_file", 0)
    figure.suptitle(f"{title}: {bits:.2f} bits per weight in all{without}", fontsize=13)

    sizes = {(linear.kind, linear.block): linear.bits_per_weight for linear in facts.linears}
    size_title = "Bits per weight, of all the tensors of a layer (beside the names: means)"
    _draw_layers(figure, axes["size"], size_title, sizes, kinds)
    evenness: dict[str, dict[Layer, float]] = {part: {} for part in PARTS}
    curves: dict[str, dict[str, list[NDArray[np.float64]]]] = {part: {} for part in PARTS}
    for linear in quantised:
        for part, books in zip(PARTS, usage(linear), strict=True):
            if books:
                evenness[part][linear.kind, linear.block] = float(np.mean([entropy(book) for book in books]))
                curves[part].setdefault(linear.kind, []).extend(map(sorted_usage, books))
    for part in parts:
        _draw_layers(figure, axes[part], f"{part}: evenness of use (1: all alike)", evenness[part], kinds)
        _draw_curves(axes[f"{part}: sorted use"], part, curves[part], kinds)
    try:
        figure.savefig(target, dpi=120)
    except (OSError, ValueError) as error:
        raise OptionError(f"--plot {target}: cannot be written: {error}") from error


def _draw_layers(
    figure: Figure, axes: Axes, title: str, values: dict[Layer, float], kinds: list[str]
) -> None:
    """A cell for each layer; the rows' labels have the mean. The output layer's one value fills its row."""
    blocks = sorted({block for _, block in values if block is not None}) or [0]
    kinds = [kind for kind in kinds if any(layer[0] == kind for layer in values)]
    cells = np.full((len(kinds), len(blocks)), np.nan)
    row, column = ({key: index for index, key in enumerate(keys)} for keys in (kinds, blocks))
    for (kind, block), value in values.items():
        cells[row[kind], column[block] if block is not None else slice(None)] = value
    image = axes.pcolormesh(cells, edgecolors="white", linewidth=0.5, cmap="viridis")
    figure.colorbar(image, ax=axes, pad=0.01)
    means = np.nanmean(cells, axis=1)
    labels = [f"{_plain(kind)}  {mean:.3f}" for kind, mean in zip(kinds, means, strict=True)]
    axes.set_yticks(np.arange(len(kinds)) + 0.5, labels)
    step = -(-len(blocks) // 20)  # of the layers' numbers, as many as there is room for
    axes.set_xticks(np.arange(0, len(blocks), step) + 0.5, [str(block) for block in blocks[::step]])
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.set(title=title, xlabel="layer")


def _draw_curves(
    axes: Axes, part: str, curves: dict[str, list[NDArray[np.float64]]], kinds: list[str]
) -> None:
    """Sorted use of the entries, a line for each kind: the mean of its codebooks."""
    share = np.linspace(0, 1, CURVE_POINTS)
    axes.plot(share, share, color="grey", linewidth=1, label="all alike")
    for index, kind in enumerate(kinds):
        if kind in curves:
            # A mark of its own at places of its own: of lines on one another all are seen.
            line = axes.plot(share, np.mean(curves[kind], axis=0), color=f"C{index % 10}", linewidth=1)[0]
            line.set(label=_plain(kind), marker=MARKS[index % len(MARKS)])
            line.set_markevery((3 * index, 3 * len(kinds) + 8))
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)
    axes.set(
        title=f"{part}: sorted use, mean of the layers", xlabel="share of the entries, most used first",
        ylabel="share of the indices", ylim=(0, 1.03),
    )  # fmt: skip


def usage(linear: Linear) -> tuple[list[Counts], list[Counts]]:
    """How often each entry is used: counts (k,) of every codebook, and (r,) of every residual one.

    Counted over whole rows of indices, evenly spaced, at most about MAX_SAMPLED indices a codebook.
    """
    config, indices = linear.vptq, linear.indices
    assert config is not None and indices is not None
    group_size = (linear.in_features - config.n0) // config.g
    res_bits = config.index_bits - (config.k - 1).bit_length()
    k_bits = config.index_bits - res_bits
    n_rows = indices.shape[1]
    n_sampled = min(n_rows, max(1, MAX_SAMPLED // group_size))
    rows = np.linspace(0, n_rows - 1, n_sampled).astype(int)
    books, res_books = [], []
    for words in indices:
        values = unpack(np.ascontiguousarray(words[rows]), group_size, config.index_bits).ravel()
        # Indices beyond the codebook, which the runtime refuses, are left out.
        books.append(np.bincount(values & ((1 << k_bits) - 1), minlength=config.k)[: config.k])
        if config.r:
            res_books.append(np.bincount(values >> k_bits, minlength=config.r)[: config.r])
    return books, res_books


def entropy(counts: Counts) -> float:
    """Entropy over the most that so many entries and indices allow: 0 (one entry only) to 1 (all alike)."""
    total = int(counts.sum())
    most = np.log2(min(len(counts), total)) if total else 0.0
    if most == 0:
        return 1.0
    p = counts[counts > 0] / total
    return float(-(p * np.log2(p)).sum() / most)


def sorted_usage(counts: Counts) -> NDArray[np.float64]:
    """Share of the indices that the most used entries take, at CURVE_POINTS shares of the entries."""
    cumulative = np.concatenate([[0], np.cumsum(np.sort(counts)[::-1])]) / max(1, int(counts.sum()))
    return np.interp(np.linspace(0, 1, CURVE_POINTS), np.linspace(0, 1, len(cumulative)), cumulative)


def _plain(text: str) -> str:
    """Text of a file for matplotlib, to which a dollar sign is the start of a formula."""
    return "".join(character for character in text if character.isprintable()).replace("$", r"\$")
