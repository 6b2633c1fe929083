"""What a generation gives: its text, its tokens, where the time went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Timings:
    """Where the time of one request went, in seconds of wall time.

    It waits for queue_s until it has a place; then its prompt takes prompt_s, and its other tokens decode_s.
    What is computed together counts for each request. `prompt_tokens` are those that were fed, without what
    the KV cache had. The first new token comes out of the last pass over the prompt, so `decode_tokens`
    counts from the second one.
    """

    load_s: float
    queue_s: float
    prompt_tokens: int
    prompt_s: float
    decode_tokens: int
    decode_s: float

    @property
    def prompt_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prompt_s if self.prompt_s > 0 else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decode_tokens / self.decode_s if self.decode_s > 0 else 0.0


class TokenLogprob(NamedTuple):
    """How likely a token was at its place: the model's own probabilities, without penalties, filters or
    temperature, in nats (float64).

    top: the likeliest tokens there with theirs, likeliest first.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Generation:
    """The continuation of one prompt.

    `tokens` are all new tokens but the end-of-text token; `text` ends before a stop string, whose tokens are
    among `tokens`. `finish_reason` is `stop` (end of text, stop string) or `length` (max_tokens, context),
    and None of a stream that was closed early.

    n_cached: tokens of the prompt that the KV cache had from other requests.
    logprobs: of each of `tokens`, where asked for; else None.
    prompt_logprobs: of each token of the prompt, None standing for the first; None where not asked for.
    n_drafted, n_accepted: tokens that speculation has guessed, and how many of them were right.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason | None
    timings: Timings
    n_cached: int = 0
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    n_drafted: int = 0
    n_accepted: int = 0
