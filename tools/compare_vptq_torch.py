"""One linear layer and one token: the published package's torch path beside this runtime.

    pip install ".[test]" && pip install --no-deps vptq==0.0.5.post1
    python tools/compare_vptq_torch.py [--quant v8-k65536-0] [--in-features 4096] [--out-features 4096]

Both sides get the same random layer and the same token (or --tokens of them) and as many threads of the CPU.
They take turns; the medians of the rounds are compared. How far apart the results are is printed, too.
Between two repetitions nothing else is read: the layer stays in what caches it fits.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from statistics import median
from types import ModuleType

import numpy as np
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from vptq_converter.gguf_writer import OutputTensor

from vptq_runtime import _native, command
from vptq_runtime.generation import check_int
from vptq_runtime.synthetic import Quant, Random, vptq_linear

# The package imports sentence_transformers for one isinstance check and needs nothing of it here.
for name in ("sentence_transformers", "sentence_transformers.SentenceTransformer"):
    stub = ModuleType(name)
    stub.__spec__ = ModuleSpec(name, None)  # others may ask whether the package is there
    stub.SentenceTransformer = type("SentenceTransformer", (), {})  # type: ignore[attr-defined]
    sys.modules.setdefault(name, stub)
from vptq.layers.vqlinear import VQuantLinear  # noqa: E402

REPETITIONS = 50  # of ours a round: it takes a few hundred times less
DTYPES = {"f16": torch.float16, "f32": torch.float32}
NUMPY_TYPES = {
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.I16: np.int16,
    GGMLQuantizationType.I32: np.int32,
}
# Where the package has what a file has as vptq_...
PUBLISHED = {
    "indices": "indices",
    "centroids": "centroids.weight",
    "res_centroids": "res_centroids.weight",
    "perm": "perm",
    "scale": "weight_scale",
    "shift": "weight_bias",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quant", metavar="V-K-R", default="v8-k65536-0")
    parser.add_argument("--in-features", metavar="N", type=int, default=4096)
    parser.add_argument("--out-features", metavar="N", type=int, default=4096)
    parser.add_argument("--tokens", metavar="N", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="f16", help="of the torch side (default: f16)")
    parser.add_argument("-t", "--threads", metavar="N", type=int, default=2)
    parser.add_argument("--rounds", metavar="N", type=int, default=5)
    arguments = parser.parse_args(argv)
    return command.run("compare_vptq_torch", lambda: compare(arguments))


def compare(arguments: argparse.Namespace) -> None:
    for option in ("in_features", "out_features", "tokens", "threads", "rounds"):
        check_int(f"--{option.replace('_', '-')}", getattr(arguments, option), 1, 1 << 16)
    quant, out_features = Quant.parse(arguments.quant), arguments.out_features
    arrays = {
        tensor.name.partition(".vptq_")[2]: array_of(tensor)
        for tensor in vptq_linear(quant, Random(), "layer", out_features, arguments.in_features)
    }
    ours, theirs = _native.Operations("", arguments.threads), published_layer(quant, arrays, arguments)
    raw = {
        f"vptq_{name}": (int(type), list(array.shape), array.tobytes())
        for name, (type, array) in arrays.items()
    }
    x = np.random.default_rng(0).standard_normal((arguments.tokens, arguments.in_features), np.float32)
    torch.set_num_threads(arguments.threads)
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    with torch.inference_mode():
        published_x = torch.from_numpy(x).to(DTYPES[arguments.dtype])
        expected = theirs(published_x).float().numpy()  # also warms up
        for _ in range(arguments.rounds):
            begin = time.perf_counter()
            theirs(published_x)
            seconds["theirs"].append(time.perf_counter() - begin)
            # The first ones wait for the cores, on which torch's threads still spin, and for the caches.
            seconds["ours"].append(median(ours.time_linear(raw, out_features, x, REPETITIONS)))
    error = np.abs(ours.linear(raw, out_features, x) - expected).max() / np.abs(expected).max()
    there, here = (median(seconds[side]) for side in ("theirs", "ours"))
    times = f"vptq's torch path in {arguments.dtype} {there * 1e3:.1f} ms, here {here * 1e3:.3f} ms"
    print(
        f"{quant.name}, {out_features} x {arguments.in_features}, tokens: {arguments.tokens}, "
        f"threads: {arguments.threads}, torch {torch.__version__}\n"
        f"{times}: {there / here:.0f} times as fast; largest difference {error:.1e} of the largest output"
    )


def array_of(tensor: OutputTensor) -> tuple[GGMLQuantizationType, NDArray[np.generic]]:
    data = b"".join(np.asarray(chunk).tobytes() for chunk in tensor.chunks())
    return tensor.type, np.frombuffer(data, NUMPY_TYPES[tensor.type]).reshape(tensor.shape)


def published_layer(
    quant: Quant,
    arrays: dict[str, tuple[GGMLQuantizationType, NDArray[np.generic]]],
    arguments: argparse.Namespace,
) -> VQuantLinear:
    layer = VQuantLinear(
        in_features=arguments.in_features,
        out_features=arguments.out_features,
        vector_lens=(-1, quant.v),
        num_centroids=(-1, quant.k),
        num_res_centroids=(-1, quant.r or -1),
        group_num=1,
        group_size=arguments.in_features,
        outlier_size=0,
        indices_as_float=False,
        enable_norm=True,
        enable_perm=True,
        is_indice_packed=True,
        enable_proxy_error=False,
        dtype=DTYPES[arguments.dtype],
    )
    state = {PUBLISHED[name]: torch.from_numpy(array.copy()) for name, (_, array) in arrays.items()}
    for name in ("centroids.weight", "res_centroids.weight"):
        if name in state:
            state[name] = state[name].flatten(1)
    layer.load_state_dict(state, strict=True)
    return layer


if __name__ == "__main__":
    sys.exit(main())
