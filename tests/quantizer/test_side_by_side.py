"""Matrices side by side: the order of the results, one thread each, errors."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import read_tensors
from dense_models import SMALL
from vptq_quantizer import quantize
from vptq_quantizer.run.side_by_side import side_by_side

from vptq_runtime import OptionError


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets PyTorch's number of threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_results_come_in_the_tasks_order(threads: Callable[[int], None]) -> None:
    threads(2)

    def first() -> tuple[int, int]:
        time.sleep(0.05)
        return 1, torch.get_num_threads()

    found = list(side_by_side([first, lambda: (2, torch.get_num_threads())]))
    assert found == [(1, 1), (2, 1)]
    assert torch.get_num_threads() == 2


def test_after_an_error_nothing_more_begins(threads: Callable[[int], None]) -> None:
    threads(1)
    begun = []

    def fail() -> None:
        raise OptionError("the first")

    def more() -> None:
        begun.append(1)
        time.sleep(0.05)

    with pytest.raises(OptionError, match="the first"):
        list(side_by_side([fail, *[more] * 20]))
    assert len(begun) < 20
    assert torch.get_num_threads() == 1


def test_the_number_of_threads_changes_no_bit_of_small_matrices(
    model: Path, text: Path, tmp_path: Path, threads: Callable[[int], None]
) -> None:
    """Hessians are made once: products of other sizes are not meant here."""
    options = replace(SMALL, finetune=True)
    quantize(model, tmp_path / "1", options, calibration=[text], hessians=tmp_path / "h")
    threads(3)
    quantize(model, tmp_path / "3", options, calibration=[text], hessians=tmp_path / "h")
    first, second = read_tensors(tmp_path / "1"), read_tensors(tmp_path / "3")
    assert all(torch.equal(first[name], second[name]) for name in first)
