"""Which tokens of a text count for its perplexity, and which ones the model sees before each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

from vptq_runtime.checks import check_choice, check_int, shown
from vptq_runtime.errors import OptionError

METHODS = ("papers", "llama.cpp")
LEAST_TOKENS = {"papers": 2, "llama.cpp": 3}  # of a window, for one of them to be scored


class WindowOptions(TypedDict, total=False):
    """The keyword arguments that `perplexity` and `compare` share; ScoredWindows says what they mean."""

    n_ctx: int | None
    method: str
    stride: int | None
    max_windows: int | None


def check_options(*, n_ctx: int | None, method: str, stride: int | None, max_windows: int | None) -> None:
    """Raises OptionError for one out of range, whatever the text is; n_ctx is None where it is not known."""
    check_choice("method", method, METHODS)
    if n_ctx is not None:
        check_int("n_ctx", n_ctx, LEAST_TOKENS[method])
    if stride is not None:
        if method != "papers":
            raise OptionError(f"stride: found {shown(stride)} with the method {method}, expected none")
        check_int("stride", stride, 1, n_ctx)
    if max_windows is not None:
        check_int("max_windows", max_windows, 1)


@dataclass(frozen=True)
class ScoredWindows:
    """Windows of n_ctx tokens of a text, each for an empty context; what is left behind the last whole one is
    not used. Of a text shorter than n_ctx, one window of all of it. Iterating gives each window's tokens, and
    the index in it of the first one that is scored, from there on all are.

    papers: windows one after another, every token scored but the first, which has none before it. Papers
        on quantisation, VPTQ's and GPTQ's among them, print this. With a stride below n_ctx windows overlap,
        and each scores what the one before did not.
    llama.cpp: windows one after another, each begun with BOS in place of its first token (where the model's
        tokenizer adds one), only its second half scored: n_ctx - n_ctx // 2 - 1 tokens. As llama-perplexity.
    """

    tokens: Sequence[int]
    method: str
    n_ctx: int  # tokens of a window
    stride: int  # from the begin of one to that of the next
    n_windows: int
    bos: int | None = None

    @classmethod
    def of(
        cls,
        tokens: Sequence[int],
        n_ctx: int,
        *,
        method: str = METHODS[0],
        stride: int | None = None,
        max_windows: int | None = None,
        bos: int | None = None,
    ) -> ScoredWindows:
        """Raises OptionError for options out of range, and for too few tokens to score one of them."""
        check_options(n_ctx=n_ctx, method=method, stride=stride, max_windows=max_windows)
        least = LEAST_TOKENS[method]
        if len(tokens) < least:
            found = f"{len(tokens)} token{'s' * (len(tokens) != 1)}"
            raise OptionError(f"text: found {found}, expected at least {least}, to score one")
        n_ctx = min(n_ctx, len(tokens))
        stride = n_ctx if stride is None else min(stride, n_ctx)
        n_windows = (len(tokens) - n_ctx) // stride + 1
        if max_windows is not None:
            n_windows = min(n_windows, max_windows)
        return cls(tokens, method, n_ctx, stride, n_windows, bos if method == "llama.cpp" else None)

    @property
    def n_scored(self) -> int:
        """Tokens scored in all windows."""
        return self.n_scored_of(self.n_windows)

    def n_scored_of(self, n_windows: int) -> int:
        """Tokens scored in the first n windows: all but the first score as many as each other."""
        if n_windows == 0:
            return 0
        return self.n_ctx - self._first_scored(0) + (n_windows - 1) * (self.n_ctx - self._first_scored(1))

    @property
    def error_over(self) -> str:
        """What standard errors take as independent: windows, as the tokens of one belong to one text, and of
        those that overlap n_ctx // stride together; by the method llama.cpp tokens, as there, which makes
        them smaller."""
        return "tokens" if self.method == "llama.cpp" else "windows"

    def __iter__(self) -> Iterator[tuple[list[int], int]]:
        for index in range(self.n_windows):
            start = index * self.stride
            window = list(self.tokens[start : start + self.n_ctx])
            if self.bos is not None:
                window[0] = self.bos
            yield window, self._first_scored(index)

    def _first_scored(self, index: int) -> int:
        if self.method == "llama.cpp":
            return self.n_ctx // 2 + 1
        return 1 if index == 0 else max(1, self.n_ctx - self.stride)
