"""Linear layers on a GPU: the published package's CUDA kernels beside this runtime's, in one run.

    pip install torch && pip install --no-deps vptq==0.0.5.post1     # CPython 3.11, CUDA 12
    python tools/compare_vptq_cuda.py [--quants v8-k65536-0,...] [--sizes 4096x4096,...] [--tokens 1]

Both sides get the same random layers, so many of them that the GPU's L2 does not hold them, and go through
them again and again; the medians of the rounds are compared. Of the package two times are printed: its layer
as a model calls it, and its kernel by itself, recorded as a CUDA graph, as this runtime's are for timing.
The ratio is that of the kernels. How far apart the results are is printed, too: the package computes in f16.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from random_layer import layer_bytes, raw_tensors, rotating_layers

from vptq_runtime import _native
from vptq_runtime.bench.report import print_table
from vptq_runtime.bench.synthetic import Quant
from vptq_runtime.checks import check_int
from vptq_runtime.commands import command
from vptq_runtime.errors import OptionError, UnsupportedError

if TYPE_CHECKING:
    import torch
    from vptq.layers.vqlinear import VQuantLinear

QUANTS = "v8-k65536-0,v8-k65536-256,v8-k4096-0,v6-k4096-0,v16-k65536-65536"
SIZES = "4096x4096,14336x4096,4096x14336"
HEADINGS = {
    "quant": "left",
    "out x in": "left",
    "vptq's layer, us": "right",
    "vptq's kernel, us": "right",
    "here, us": "right",
    "kernel / here": "right",
    "difference": "right",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quants", metavar="V-K-R,...", default=QUANTS, help="default: %(default)s")
    parser.add_argument("--sizes", metavar="OUTxIN,...", default=SIZES, help="default: %(default)s")
    parser.add_argument("--tokens", metavar="N", type=int, default=1, help="1 or 2: its kernel takes no more")
    parser.add_argument("--rounds", metavar="N", type=int, default=11)
    parser.add_argument("--mib", metavar="N", type=int, default=192, help="of layers (default: %(default)s)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--md", action="store_true", help="print Markdown")
    output.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    return command.run("compare_vptq_cuda", lambda: compare(arguments))


def compare(arguments: argparse.Namespace) -> None:
    check_int("--tokens", arguments.tokens, 1, 2)
    check_int("--rounds", arguments.rounds, 1, 1000)
    check_int("--mib", arguments.mib, 1, 1 << 16)
    quants = [Quant.parse(quant) for quant in arguments.quants.split(",")]
    sizes = [_size(size) for size in arguments.sizes.split(",")]
    check_published()
    results = [compare_layers(quant, *size, arguments) for quant in quants for size in sizes]
    if arguments.json:
        print(json.dumps({"tokens": arguments.tokens, "results": results}, indent=2))
        return
    print_table(HEADINGS, [_row(result) for result in results], markdown=arguments.md)
    print(f"\ntokens: {arguments.tokens}, rounds: {arguments.rounds}; medians")


def check_published() -> None:
    """Raises UnsupportedError where the package's kernels do not run."""
    try:
        import torch

        if not torch.cuda.is_available():
            raise ImportError("torch finds no GPU")
        import published_vptq  # noqa: F401 (prepares the import of the package)
        import vptq.libvptq  # noqa: F401
    except (ImportError, OSError) as error:
        raise UnsupportedError(f"vptq's CUDA kernels cannot be imported: {error}") from error


def compare_layers(
    quant: Quant, out_features: int, in_features: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    import torch
    from published_vptq import published_layer

    arrays = rotating_layers(quant, out_features, in_features, arguments.mib << 20)
    raw = [raw_tensors(layer) for layer in arrays]
    x = np.random.default_rng(0).standard_normal((arguments.tokens, in_features), np.float32)
    result: dict[str, Any] = {
        "quant": quant.name,
        "out_features": out_features,
        "in_features": in_features,
        "layers": len(arrays),
        "layer_bytes": layer_bytes(arrays[0]),
    }
    # A GPU's Operations has time for one list of layers: the result is another's.
    y = _native.Operations("cuda", 1).linear(raw[0], out_features, x)
    here = _native.Operations("cuda", 1).time_linear(raw, out_features, x, arguments.rounds)
    with torch.inference_mode():
        x_there = torch.from_numpy(x).half().cuda()[None]  # (1, tokens, in_features)
        theirs = [
            published_layer(quant, layer, in_features, out_features, torch.float16).cuda() for layer in arrays
        ]
        seconds: dict[str, list[float]] = {"layer": [], "kernel": [], "here": here}
        try:
            expected = theirs[0](x_there)[0].float().cpu().numpy()
            whole = _timer(lambda layer: layer(x_there), theirs, recorded=False)
            kernel = _timer(lambda layer: gemv(layer, x_there), theirs, recorded=True)
        except RuntimeError as error:  # configurations that it has no kernel for
            return result | {"error": " ".join(str(error).split())[:200]}
        for _ in range(arguments.rounds):
            seconds["layer"].append(whole())
            seconds["kernel"].append(kernel())
    medians = {f"{side}_s": median(times) for side, times in seconds.items()}
    return result | {
        **medians,
        "ratio": medians["kernel_s"] / medians["here_s"],
        "difference": float(np.abs(y - expected).max() / np.abs(expected).max()),
    }


def gemv(layer: VQuantLinear, x: torch.Tensor) -> torch.Tensor:
    """The kernel that the package's layer launches for one or two tokens."""
    import vptq.libvptq

    def codebook(embedding: torch.nn.Embedding | None) -> torch.Tensor | None:
        if embedding is None:
            return None
        return embedding.weight.view(layer.num_codebooks, -1, layer.vector_len)

    return vptq.libvptq.quant_gemv(
        *(x, layer.indices, codebook(layer.centroids), None, codebook(layer.res_centroids), None, None),
        *(layer.perm, layer.weight_scale, layer.weight_bias, layer.bias),
        *(layer.in_features, layer.out_features),
    )


def _timer(
    call: Callable[[VQuantLinear], object], layers: list[VQuantLinear], *, recorded: bool
) -> Callable[[], float]:
    """Returns what measures the seconds that a call takes, in a run through all layers."""
    import torch

    def run() -> None:
        for layer in layers:
            call(layer)

    run()  # loads the kernels
    if recorded:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay

    def measure() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(layers)

    return measure


def _size(text: str) -> tuple[int, int]:
    try:
        out_features, in_features = map(int, text.split("x"))
        check_int("--sizes", out_features, 1, 1 << 20)
        check_int("--sizes", in_features, 1, 1 << 16)
        return out_features, in_features
    except ValueError:
        raise OptionError(f"--sizes: found {text!r:.80}, expected sizes such as {SIZES}") from None


def _row(result: dict[str, Any]) -> list[str]:
    name = [result["quant"], f"{result['out_features']} x {result['in_features']}"]
    if "error" in result:
        return [*name, result["error"], "", "", "", ""]
    times = [f"{result[f'{side}_s'] * 1e6:.1f}" for side in ("layer", "kernel", "here")]
    return [*name, *times, f"{result['ratio']:.1f}", f"{result['difference']:.1e}"]


if __name__ == "__main__":
    sys.exit(main())
