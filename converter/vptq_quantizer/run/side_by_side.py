"""Small matrices are quantised side by side, a core for each: one alone cannot keep several busy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import faiss
import torch

Result = TypeVar("Result")
# A larger Hessian (4096 x 4096) has enough to do for all cores, and several at a time would take much memory.
MOST_IN_FEATURES = 4096


def side_by_side(tasks: Sequence[Callable[[], Result]]) -> Iterator[Result]:
    """What the tasks return, in their order, as soon as it is there; they begin in the same order.

    Each runs in one thread of its own, however many run at a time, so that results do not depend on that.
    PyTorch's number of threads is 1 meanwhile. What a task raises is raised here, and those not begun are
    left out.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(
        min(n_threads, len(tasks)), initializer=faiss.omp_set_num_threads, initargs=(1,)
    )
    try:
        for future in [pool.submit(task) for task in tasks]:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(n_threads)
