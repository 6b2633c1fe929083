"""The GPU's rate of dense matrix products, by the library of whoever has one: torch or cupy."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

REPETITIONS = 5
PRODUCTS = 10  # a repetition


def matrix_seconds(sizes: Sequence[tuple[int, int]], n_tokens: int) -> dict[str, Any]:
    """Seconds that x (n_tokens, in) times W (out, in) takes for each (out, in), by type.

    Raises ImportError where there is neither library, or it finds no GPU.
    """
    try:
        return _with_torch(sizes, n_tokens)
    except ImportError as no_torch:
        try:
            return _with_cupy(sizes, n_tokens)
        except ImportError as no_cupy:
            raise ImportError(f"{no_torch}; {no_cupy}") from None


def _with_torch(sizes: Sequence[tuple[int, int]], n_tokens: int) -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        raise ImportError(f"torch {torch.__version__} finds no GPU")

    def seconds(dtype: torch.dtype, rows: int, columns: int) -> float:
        x, w = (torch.randn(n, columns, dtype=dtype, device="cuda") for n in (n_tokens, rows))
        return _median(lambda: torch.mm(x, w.T), torch.cuda.synchronize)

    types = {"f16": torch.float16, "bf16": torch.bfloat16}
    return {
        "library": f"torch {torch.__version__}",
        "seconds": {name: [seconds(dtype, *size) for size in sizes] for name, dtype in types.items()},
    }


def _with_cupy(sizes: Sequence[tuple[int, int]], n_tokens: int) -> dict[str, Any]:
    import cupy

    try:
        cupy.cuda.Device().synchronize()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise ImportError(f"cupy {cupy.__version__} finds no GPU: {error}") from error

    def seconds(rows: int, columns: int) -> float:
        x, w = (cupy.random.standard_normal((n, columns), "f4").astype("f2") for n in (n_tokens, rows))
        return _median(lambda: x @ w.T, cupy.cuda.Device().synchronize)

    return {
        "library": f"cupy {cupy.__version__}",
        "seconds": {"f16": [seconds(*size) for size in sizes]},
    }


def _median(product: Callable[[], object], synchronize: Callable[[], object]) -> float:
    seconds = []
    for i in range(REPETITIONS + 1):  # one to warm up
        synchronize()
        begin = time.perf_counter()
        for _ in range(PRODUCTS):
            product()
        synchronize()
        if i:
            seconds.append((time.perf_counter() - begin) / PRODUCTS)
    return median(seconds)
