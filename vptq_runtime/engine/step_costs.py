"""What a step takes on this machine, learnt from the steps before."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise

WEIGHT = 0.2  # of the newest measurement
# Before anything is measured: a decode step of so many tokens takes so many times one of a single token. An
# 8B model on two cores; what a GPU takes is flatter, and soon learnt.
PRIOR = ((1, 1.0), (2, 1.3), (4, 1.5), (8, 2.6), (16, 4.1), (32, 7.0))
LEAST_SECONDS = 1e-9
PRIOR_PROMPT = 14.0  # tokens of a prompt that take as long as what a pass of one token takes


class StepCosts:
    """Running means of seconds, by the number of tokens that are fed together.

    Sizes that were never seen are estimated from the nearest one that was.
    """

    def __init__(self, n_layer: int) -> None:
        self._n_layer = n_layer
        self._steps: dict[int, float] = {}  # of decode steps
        self._layers: dict[int, float] = {}  # of one layer of a prompt's pass
        self._sizes: list[int] = []  # of _steps, in order

    def saw_step(self, n_tokens: int, seconds: float) -> None:
        """A decode step has taken so long."""
        if n_tokens not in self._steps:
            self._sizes.insert(bisect_left(self._sizes, n_tokens), n_tokens)
        _update(self._steps, n_tokens, seconds)
        # A smaller step takes no longer. One that was seen in a bad moment would never be tried again.
        for n in self._sizes[: bisect_left(self._sizes, n_tokens)]:
            self._steps[n] = min(self._steps[n], self._steps[n_tokens])

    def saw_layers(self, n_tokens: int, n_layers: int, seconds: float) -> None:
        """So many layers of a pass over n_tokens tokens of prompts have taken so long."""
        _update(self._layers, n_tokens, seconds / n_layers)

    def step(self, n_tokens: int) -> float:
        """Seconds of a decode step; in units of one of a single token before any was measured."""
        known = self._steps.get(n_tokens)
        if known is not None:
            return known
        if not self._sizes:
            return prior(n_tokens)
        at = bisect_left(self._sizes, n_tokens)
        near = self._sizes[max(at - 1, 0) : at + 1]
        nearest = min(near, key=lambda n: abs(prior(n) - prior(n_tokens)))
        return self._steps[nearest] * prior(n_tokens) / prior(nearest)

    def knows_step(self) -> bool:
        """Whether any was measured, and `step` tells seconds."""
        return bool(self._steps)

    def knows_layer(self, n_tokens: int) -> bool:
        """Whether `layer` has seen this size."""
        return n_tokens in self._layers

    def layer(self, n_tokens: int) -> float:
        """Seconds of one layer of a prompt's pass; 0 before anything was measured."""
        if n_tokens in self._layers:
            return max(self._layers[n_tokens], LEAST_SECONDS)
        scale = PRIOR_PROMPT + n_tokens
        if self._layers:
            nearest = min(self._layers, key=lambda n: abs(n - n_tokens))
            return self._layers[nearest] * scale / (PRIOR_PROMPT + nearest)
        if self._steps:
            return self.step(1) / self._n_layer * scale / PRIOR_PROMPT
        return 0.0


def prior(n_tokens: int) -> float:
    """PRIOR, on straight lines between its points and beyond."""
    for (n0, c0), (n1, c1) in pairwise(PRIOR):
        if n_tokens <= n1 or n1 == PRIOR[-1][0]:
            return c0 + (c1 - c0) * (n_tokens - n0) / (n1 - n0)
    raise AssertionError


def _update(means: dict[int, float], key: int, value: float) -> None:
    before = means.get(key, value)
    means[key] = before + WEIGHT * (value - before)
