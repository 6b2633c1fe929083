"""One prompt on its way to a Generation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vptq_runtime.generation import FinishReason, Generation, Timings
from vptq_runtime.text.text_stream import TextStream

if TYPE_CHECKING:
    from vptq_runtime._native import Sampler


@dataclass
class DecodingSequence:
    """One prompt on its way: what it has so far, and what tells it to end."""

    prompt: list[int]
    max_tokens: int
    sampler: Sampler
    end_tokens: frozenset[int]
    text: TextStream | None  # None for a model without a tokenizer
    id: int = -1  # in the context, once it has one
    n_cached: int = 0  # tokens of the prompt that an earlier call has computed
    tokens: list[int] = field(default_factory=list)
    n_sampled: int = 0
    pieces: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def accept(self, token: int) -> str:
        """Adds the token that was sampled; returns the text that is now certain."""
        piece = ""
        self.n_sampled += 1
        if token in self.end_tokens:
            self.finish_reason = "stop"
        else:
            self.tokens.append(token)
            piece = self.text.push(token) if self.text else ""
            if len(self.tokens) == self.max_tokens:
                self.finish_reason = "length"
        if self.text:
            if self.finish_reason:
                piece += self.text.flush()
            if (
                self.text.stopped
            ):  # by the last token or by what was held back: a stop string goes before length
                self.finish_reason = "stop"
        self.pieces.append(piece)
        return piece

    @property
    def n_decoded(self) -> int:
        """Tokens sampled after the first one, the end token included."""
        return max(self.n_sampled - 1, 0)

    def generation(self, timings: Timings) -> Generation:
        return Generation("".join(self.pieces), self.tokens, self.finish_reason, timings)
