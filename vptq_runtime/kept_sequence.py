"""The last prompt's sequence, kept for the next one: a chat feeds only what is new in each turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vptq_runtime._native import Context


class KeptSequence:
    """At most one sequence of a context that nobody decodes, and the tokens that it holds.

    Methods are called with the context to themselves. Still, the garbage collector may close a stream, and so
    call `keep`, in the middle of one: each takes the sequence out before it works on it.
    """

    def __init__(self) -> None:
        self._kept: tuple[int, list[int]] | None = None  # its number in the context, its tokens

    def take(self, context: Context, prompt: list[int], n_tokens: int) -> tuple[int, int]:
        """A sequence for n_tokens tokens, and how many of the prompt's it has already.

        That is never all of them: the last one has to be fed, for its logits.
        """
        kept, self._kept = self._kept, None
        if kept is None:
            return self.new(context, n_tokens), 0
        sequence, tokens = kept
        n = _common_prefix(tokens, prompt[:-1])
        context.truncate(sequence, n)
        return sequence, n

    def new(self, context: Context, n_tokens: int) -> int:
        """A new sequence for n_tokens tokens; where blocks are lacking, in place of the kept one."""
        if context.n_free_blocks * context.block_tokens < n_tokens:
            kept, self._kept = self._kept, None
            if kept is not None:
                context.free_sequence(kept[0])
        return context.new_sequence()

    def keep(self, context: Context, sequence: int, tokens: list[int]) -> None:
        """Keeps a sequence, which holds the first of `tokens`, instead of the one before."""
        before, self._kept = self._kept, (sequence, tokens[: context.length(sequence)])
        if before is not None:
            context.free_sequence(before[0])


def _common_prefix(a: list[int], b: list[int]) -> int:
    """How many first tokens are the same."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((n for n, (left, right) in pairs if left != right), min(len(a), len(b)))
