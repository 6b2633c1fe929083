"""Feeding a native context in the three ways that tests mostly want."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vptq_runtime import _native


def prefill(context: _native.Context, sequences: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
    """Appends parts of prompts; no logits."""
    context.forward(sequences, tokens, [True] * len(sequences), ["none"] * len(sequences))


def all_logits(
    context: _native.Context, sequence: int, tokens: Sequence[int], prompt: bool = True
) -> NDArray[np.float32]:
    """Appends tokens; the logits of all of them."""
    context.forward([sequence], [tokens], [prompt], ["all"])
    return context.logits(0)


def step(
    context: _native.Context,
    sequences: Sequence[int],
    tokens: Sequence[Sequence[int]],
    samplers: Sequence[_native.Sampler],
    prompts: Sequence[bool] = (),
) -> list[int]:
    """Appends tokens and draws each sequence's next one."""
    context.forward(sequences, tokens, prompts, samplers=samplers)
    return [drawn for (drawn,) in context.sample(samplers)]
