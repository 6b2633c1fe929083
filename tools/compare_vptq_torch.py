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
from statistics import median

import numpy as np
import torch
from published_vptq import DTYPES, published_layer
from random_layer import random_layer, raw_tensors

from vptq_runtime import _native
from vptq_runtime.bench.synthetic import Quant, Random
from vptq_runtime.checks import check_int
from vptq_runtime.commands import command

REPETITIONS = 13  # of ours a round, each of four: it takes a few hundred times less


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
    arrays = random_layer(quant, Random(), out_features, arguments.in_features)
    raw, ours = raw_tensors(arrays), _native.Operations("", arguments.threads)
    theirs = published_layer(quant, arrays, arguments.in_features, out_features, DTYPES[arguments.dtype])
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
            seconds["ours"].append(median(ours.time_linear([raw], out_features, x, REPETITIONS)))
    error = np.abs(ours.linear(raw, out_features, x) - expected).max() / np.abs(expected).max()
    there, here = (median(seconds[side]) for side in ("theirs", "ours"))
    times = f"vptq's torch path in {arguments.dtype} {there * 1e3:.1f} ms, here {here * 1e3:.3f} ms"
    print(
        f"{quant.name}, {out_features} x {arguments.in_features}, tokens: {arguments.tokens}, "
        f"threads: {arguments.threads}, torch {torch.__version__}\n"
        f"{times}: {there / here:.0f} times as fast; largest difference {error:.1e} of the largest output"
    )


if __name__ == "__main__":
    sys.exit(main())
