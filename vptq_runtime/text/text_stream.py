"""Tokens to text, piece by piece: never half a UTF-8 character, never a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

MAX_CHARACTER_TOKENS = 4  # the longest UTF-8 character has four bytes, and a token at least one
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """What a TextStream needs of a Tokenizer."""

    def encode(self, text: str, add_special: bool) -> list[int]: ...
    def decode(self, tokens: Sequence[int]) -> str: ...


class TextStream:
    """The text of one sequence's new tokens.

    The pieces that `push` and `flush` return add up to the text. A token that ends inside a UTF-8
    character is held back until the character is whole; so is text that may be the start of a stop string.
    After a stop string `stopped` is true, and the text ends just before it.
    """

    def __init__(self, tokenizer: Decoder, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        # Decoders of the SentencePiece kind drop a space at the start of a text, and what comes here is no
        # start: tokens are decoded behind an anchor, whose own text is then cut off.
        self._anchor = tokenizer.encode("a", add_special=False)
        self._anchor_text = tokenizer.decode(self._anchor)
        self._held_tokens: list[int] = []
        self._held_text = ""

    def push(self, token: int, stops: bool = True) -> str:
        """Adds a token; returns the text that is now certain, often empty.

        stops: whether a stop string may end the text by now; once true, it stays so.
        """
        self._held_tokens.append(token)
        text = ""
        while self._held_tokens:
            decoded = self._decode(self._held_tokens)
            if not decoded.endswith(REPLACEMENT):
                text += decoded
                self._held_tokens.clear()
            elif len(self._held_tokens) >= MAX_CHARACTER_TOKENS:
                # Not all of them can be the start of one character: some hold bytes that are no UTF-8.
                n = self._whole(decoded)
                text += self._decode(self._held_tokens[:n])
                del self._held_tokens[:n]
            else:
                break
        return self._until_stop(text) if stops else text

    def flush(self) -> str:
        """Ends the text: returns all that was held back, an unfinished character as U+FFFD."""
        text = self._decode(self._held_tokens) if self._held_tokens else ""
        self._held_tokens.clear()
        released = self._until_stop(text) + self._held_text
        self._held_text = ""
        return released

    def _whole(self, decoded: str) -> int:
        """How many held tokens, at least one, stand on their own: what follows does not change their text."""
        for n in range(1, len(self._held_tokens)):
            if self._decode(self._held_tokens[:n]) + self._decode(self._held_tokens[n:]) == decoded:
                return n
        return len(self._held_tokens)

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(self._anchor + tokens)
        # Bytes that are no UTF-8 can spoil the anchor's text as well; then there is no space to save.
        if text.startswith(self._anchor_text):
            return text[len(self._anchor_text) :]
        return self._tokenizer.decode(tokens)

    def _until_stop(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held_text + text
        found = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held_text = ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held_text = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a start of `stop`, without being all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
