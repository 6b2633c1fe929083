"""Which configuration each matrix gets, so that the sum of their losses is least within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

STEPS_A_MATRIX = 300  # the budget is counted in so many steps times the number of matrices


@dataclass(frozen=True)
class Choice:
    """One way to store a matrix: its size (any unit, the budget's), and what the model loses by it."""

    size: int
    loss: float


C = TypeVar("C", bound=Choice)


def allocate(choices: Sequence[Sequence[C]], budget: int) -> list[C]:
    """One choice for each matrix: the least sum of losses of those whose sizes fit the budget together.

    The multiple-choice knapsack problem, by dynamic programming over the budget: best[b] is the least loss of
    the matrices so far within b steps. Sizes are rounded up to whole steps, so what comes out fits; with a
    step of 1 (small problems) it is the optimum, else it wastes less than 1 / STEPS_A_MATRIX of the budget.
    What that leaves is spent on whichever single change then still helps most. The budget is at least
    least_size.
    """
    useful = [_undominated(each) for each in choices]
    smallest = least_size(choices)
    assert budget >= smallest
    room = min(budget, sum(each[-1].size for each in useful)) - smallest
    step = max(1, room // (STEPS_A_MATRIX * len(useful)))
    n_steps = room // step
    best = np.zeros(n_steps + 1)
    taken: list[NDArray[np.uint16]] = []
    for each in useful:
        # Of its smallest choice the size is spent already.
        new = best + each[0].loss
        which = np.zeros(n_steps + 1, np.uint16)
        for i, choice in enumerate(each[1:], 1):
            steps = -(-(choice.size - each[0].size) // step)
            if steps > n_steps:
                break
            losses = best[: n_steps + 1 - steps] + choice.loss
            better = losses < new[steps:]
            new[steps:][better] = losses[better]
            which[steps:][better] = i
        best = new
        taken.append(which)
    left, result = n_steps, []
    for each, which in zip(reversed(useful), reversed(taken), strict=True):
        choice = each[which[left]]
        left -= -(-(choice.size - each[0].size) // step)
        result.append(choice)
    return _spend_rest(useful, result[::-1], budget)


def least_size(choices: Sequence[Sequence[Choice]]) -> int:
    """What all matrices take at least."""
    return sum(min(choice.size for choice in each) for each in choices)


def _undominated(choices: Sequence[C]) -> list[C]:
    """By rising size, and falling loss."""
    result: list[C] = []
    for choice in sorted(choices, key=lambda choice: (choice.size, choice.loss)):
        if not result or choice.loss < result[-1].loss:
            result.append(choice)
    return result


def _spend_rest(useful: Sequence[Sequence[C]], chosen: list[C], budget: int) -> list[C]:
    """Changes one matrix after another, the one that gains most, while there is room."""
    while True:
        left = budget - sum(choice.size for choice in chosen)
        gains = [
            (chosen[i].loss - choice.loss, i, choice)
            for i, each in enumerate(useful)
            for choice in each
            if choice.size - chosen[i].size <= left and choice.loss < chosen[i].loss
        ]
        if not gains:
            return chosen
        _, i, choice = max(gains, key=lambda gain: gain[:2])
        chosen[i] = choice
