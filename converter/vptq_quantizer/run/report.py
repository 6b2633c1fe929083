"""What became of each layer: a table, a picture, and the numbers behind them (report.json)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from vptq_converter.architectures import Model
from vptq_converter.checkpoint import Tensor as StoredTensor
from vptq_converter.layer import LayerConfig

from vptq_quantizer.options import MATRICES
from vptq_runtime.errors import FileError, OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

# A layer's report: {"layer": n, "seconds": s, "linears": {path in the layer: {
#     "out_features", "in_features", "bits": of all its tensors but a bias,
#     "proxy_error": {step: relative error}, "seconds": {step: s}}}}
LayerReport = dict[str, Any]
# Below these KL divergences, in nats a token; docs/quantize.md says what was seen at such numbers.
JUDGEMENTS = (
    (0.05, "close to the dense model"),
    (0.5, "poorer than the dense model, and usable"),
    (1.0, "much poorer than the dense model"),
)
RUINED = "ruined: it wants more bits, or --end-to-end's training"


def source_of(model: Model) -> dict[str, Any]:
    """How the dense model stores its decoder layers' linear weights: "bits_per_weight", and "types", how many
    matrices have each."""
    matrices = [
        weight.weight
        for weight in model.weights
        if weight.name.startswith("blk.")
        and isinstance(weight.weight, StoredTensor)
        and len(weight.weight.shape) == 2
    ]
    n_weights = sum(prod(matrix.shape) for matrix in matrices)
    types = Counter(matrix.stored_type for matrix in matrices)
    return {
        "bits_per_weight": 8 * sum(matrix.nbytes for matrix in matrices) / n_weights,
        "types": dict(types.most_common()),
    }


def layer_bits(tensors: Mapping[str, Tensor], config: LayerConfig) -> dict[str, Any]:
    """What a layer takes, in all and for its indices, without its bias."""
    indices = [tensor for name, tensor in tensors.items() if name.endswith("indices")]
    return {
        "out_features": config.out_features,
        "in_features": config.in_features,
        "bits": 8 * sum(tensor.nbytes for tensor in tensors.values()),
        "index_bits": 8 * sum(tensor.nbytes for tensor in indices),
    }


def run_report(
    model: str, source: dict[str, Any], options: dict[str, Any], n_layers: int, layers: list[LayerReport]
) -> dict[str, Any]:
    """What report.json says of a run of n_layers decoder layers, of which `layers` are finished."""
    return {
        "model": model,
        "source": source,
        "options": options,
        "finished": len(layers) == n_layers,
        "n_layers": n_layers,
        **summary(layers),
        "layers": layers,
    }


def dry_report(model: str, options: dict[str, Any], planned: dict[str, Any], n_layers: int) -> dict[str, Any]:
    """What a run would do."""
    return {
        "model": model,
        "options": options,
        "finished": False,
        "n_layers": n_layers,
        "layers": [],
        "plan": planned,
    }


def summary(layers: Sequence[LayerReport]) -> dict[str, Any]:
    """Over all linear layers: bits per weight, seconds, and the mean relative proxy error after each step."""
    linears = [linear for layer in layers for linear in layer["linears"].values()]
    weights = sum(linear["out_features"] * linear["in_features"] for linear in linears)
    return {
        "bits_per_weight": sum(linear["bits"] for linear in linears) / weights,
        "index_bits_per_weight": sum(linear["index_bits"] for linear in linears) / weights,
        "quantized_weights": weights,
        "seconds": sum(layer["seconds"] for layer in layers),
        "proxy_error": {step: _mean_error(linears, step) for step in steps(layers)},
    }


def steps(layers: Sequence[LayerReport]) -> list[str]:
    """The steps that layers went through, in order."""
    first = next(iter(layers[0]["linears"].values()))
    return list(first["proxy_error"])


def _mean_error(linears: Sequence[dict[str, Any]], step: str) -> float:
    errors: list[float] = [linear["proxy_error"][step] for linear in linears]
    return sum(errors) / len(errors)


def table(layers: Sequence[LayerReport]) -> Table:
    """A row for each decoder layer. Proxy errors are tr(D H D^T) / tr(W H W^T), the mean over its linears."""
    result = Table(title="Relative proxy error (mean over the linear layers) and bits per weight")
    result.add_column("layer", justify="right")
    names = steps(layers)
    for name in [*names, "bits", "seconds"]:
        result.add_column(name, justify="right")

    def row(name: str, layers: Sequence[LayerReport]) -> None:
        total = summary(layers)
        errors = (f"{total['proxy_error'][step]:.4f}" for step in names)
        result.add_row(name, *errors, f"{total['bits_per_weight']:.3f}", f"{total['seconds']:.1f}")

    for layer in layers:
        row(str(layer["layer"]), [layer])
    result.add_section()
    row("all", layers)
    return result


def matrix_line(module: str, report: Mapping[str, Any]) -> str:
    """What became of the embedding or the output matrix as a VPTQ layer; report: as of a linear layer."""
    bits = report["bits"] / (report["out_features"] * report["in_features"])
    steps = ", ".join(f"{step} {error:.4f}" for step, error in report["proxy_error"].items())
    return f"{module}: {bits:.3f} bits per weight, relative proxy error after {steps}"


def planned_types(planned: Mapping[str, Any]) -> dict[str, str]:
    """How embedding and output matrix are to be stored, where not in 16 bits, by their options' names."""
    entries = planned["config_for_layers"]
    layers = {name: _configuration(entries[module]) for name, module in MATRICES.items() if module in entries}
    return {name: planned[name] for name in MATRICES if name in planned} | layers


def plan_table(entries: Mapping[str, Mapping[str, Any]], n_layers: int) -> Table:
    """A row for each decoder layer, a column for each kind of matrix: vV-kK-R, and -n without a norm."""
    result = Table(title="Configurations")
    kinds = dict.fromkeys(module.split(".", 3)[3] for module in entries if module not in MATRICES.values())
    for name in ["layer", *(kind.rpartition(".")[2] for kind in kinds)]:
        result.add_column(name, justify="right", overflow="fold")
    for n in range(n_layers):
        cells = [_configuration(entries[f"model.layers.{n}.{kind}"]) for kind in kinds]
        result.add_row(str(n), *cells)
    return result


def _configuration(entry: Mapping[str, Any]) -> str:
    """Of a layer in config_for_layers: vV-kK-R, and -n without a norm."""
    v, k, r = entry["vector_lens"][1], entry["num_centroids"][1], max(0, entry["num_res_centroids"][1])
    return f"v{v}-k{k}-{r}{'' if entry['enable_norm'] else '-n'}"


def verdict_line(verdict: Mapping[str, float | int]) -> str:
    """What verdict.py has measured, in words."""
    divergence = verdict["kl_divergence"]  # which may be no number, of a model that computes none
    judgement = next((words for most, words in JUDGEMENTS if divergence < most), RUINED)
    return (
        f"KL divergence from the dense model {verdict['kl_divergence']:.4f} nats a token, perplexity "
        f"{verdict['perplexity']:.4g} ({verdict['perplexity_ratio']:.3f} times the dense model's "
        f"{verdict['dense_perplexity']:.4g}), on {verdict['n_tokens']} tokens held back: {judgement}"
    )


def check_plot(target: Path, out_dir: Path) -> None:
    """Whether plot can write there, asked before hours of work; raises OptionError or FileError.

    out_dir: will be there by then, if it is not yet.
    """
    formats = _figure_class()().canvas.get_supported_filetypes()
    if target.suffix[1:].lower() not in formats:
        raise OptionError(f"--plot: {target}: expected a name that ends in .{', .'.join(sorted(formats))}")
    try:
        wanted = target if target.exists() else target.parent
        to_come = not out_dir.exists() and target.parent.absolute() == out_dir.absolute()
        writable = to_come or (os.access(wanted, os.W_OK) and not target.is_dir())
    except (OSError, ValueError) as error:  # ValueError: a null byte in its name
        raise FileError(f"--plot: {target}: cannot be written: {error}") from error
    if not writable:
        raise FileError(f"--plot: {target}: expected a file in a directory that can be written to")


def plot(layers: Sequence[LayerReport], target: Path) -> None:
    """The proxy error of every linear layer after each step, a panel for each kind."""
    kinds = list(layers[0]["linears"])
    n_columns = len(kinds) // 2 + 1  # in two rows, with room for the legend
    figure = _figure_class()(figsize=(3 * n_columns, 6), layout="constrained")
    panels = figure.subplots(2, n_columns, sharey=True).flatten()
    for rest in panels[len(kinds) :]:
        rest.remove()
    numbers = [layer["layer"] for layer in layers]
    some_error = False
    for panel, kind in zip(panels, kinds, strict=False):
        for step in steps(layers):
            errors = [layer["linears"][kind]["proxy_error"][step] for layer in layers]
            some_error |= any(error > 0 for error in errors)
            panel.plot(numbers, errors, marker=".", label=step)
        panel.set(title=kind, xlabel="decoder layer")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="relative proxy error", yscale="log" if some_error else "linear")  # of all panels
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower right", title="after")
    try:
        figure.savefig(target, dpi=150)
    except (OSError, ValueError) as error:
        raise FileError(f"--plot: {target}: cannot be written: {error}") from error


def _figure_class() -> type[Figure]:
    try:
        from matplotlib.figure import Figure  # slow to load, and may be missing
    except ImportError as error:
        raise OptionError('--plot needs matplotlib: pip install "vptq-runtime[quantize]"') from error
    return Figure
