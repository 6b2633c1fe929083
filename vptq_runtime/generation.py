"""What a generation is asked for (Options) and what it gives (Generation, GenerationStream)."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict

from vptq_runtime.errors import OptionError

if TYPE_CHECKING:
    from vptq_runtime._native import Sampler

SEEDS = 2**64
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Timings:
    """Where the time of one call went, in seconds of wall time.

    A batch has one Timings: its tokens are those of all its sequences. `prompt_tokens` are those that were
    fed, without what the KV cache had from the call before. The first new token comes out of the last pass
    over the prompt, so `decode_tokens` counts from the second one.
    """

    load_s: float
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


@dataclass(frozen=True)
class Generation:
    """The continuation of one prompt.

    `tokens` are all new tokens but the end-of-text token; `text` ends before a stop string, whose tokens are
    among `tokens`. `finish_reason` is `stop` (end of text, stop string) or `length` (max_tokens, context),
    and None of a stream that was closed early.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason | None
    timings: Timings


class GenerationStream:
    """An iterator over pieces of text; their concatenation is `.generation.text`.

    A piece never splits a UTF-8 character. `close()` stops early; so does leaving a `with` block, and
    dropping the last reference.
    """

    def __init__(self, pieces: Generator[str], generation: Callable[[], Generation]) -> None:
        self._pieces = pieces
        self._so_far = generation
        self._ended = False

    def __iter__(self) -> GenerationStream:
        return self

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration:
            self._ended = True
            raise

    def __enter__(self) -> GenerationStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._pieces.close()
        self._ended = True

    @property
    def generation(self) -> Generation:
        """The Generation, or what there is of it in a stream closed early; OptionError before its end."""
        if not self._ended:
            raise OptionError("generation: the stream has not come to its end")
        return self._so_far()


class GenerateOptions(TypedDict, total=False):
    """The keyword arguments that `Runtime.generate` and `Runtime.chat` share."""

    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    seed: int | None
    stop: str | Sequence[str]


@dataclass(frozen=True)
class Options:
    """The options of `Runtime.generate`, which documents them, checked."""

    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    seed: int
    stop: tuple[str, ...]

    @classmethod
    def checked(
        cls,
        *,
        max_tokens: int | None,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repeat_penalty: float,
        seed: int | None,
        stop: str | Sequence[str],
    ) -> Options:
        """Raises OptionError where a value has the wrong type or range. Without a seed it draws one."""
        if max_tokens is not None:
            check_int("max_tokens", max_tokens, 1)
        _check_number("temperature", temperature, 0)
        check_int("top_k", top_k, 0)
        _check_number("top_p", top_p, 0, 1)
        _check_number("min_p", min_p, 0, 1)
        _check_number("repeat_penalty", repeat_penalty, 0)
        for option, value in (("top_p", top_p), ("repeat_penalty", repeat_penalty)):
            if value == 0:
                raise OptionError(f"{option}: found 0, expected a number above 0 (1 is off)")
        if seed is None:
            seed = secrets.randbelow(SEEDS)
        check_int("seed", seed, 0, SEEDS - 1)
        stops = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Sequence) else (stop,)
        for string in stops:
            if not isinstance(string, str) or not string:
                raise OptionError(f"stop: found {shown(string)}, expected non-empty strings")
        return cls(max_tokens, temperature, top_k, top_p, min_p, repeat_penalty, seed, stops)

    def sampler(self, index: int) -> Sampler:
        """The sampler of a batch's prompt number `index`, seeded with seed + index."""
        from vptq_runtime import _native

        return _native.Sampler(
            temperature=float(self.temperature),
            top_k=min(self.top_k, 2**31 - 1),
            top_p=float(self.top_p),
            min_p=float(self.min_p),
            repeat_penalty=float(self.repeat_penalty),
            seed=(self.seed + index) % SEEDS,
        )


def check_int(option: str, found: object, least: int, most: int | None = None) -> None:
    """Raises OptionError unless `found` is a whole number in least ... most."""
    whole = isinstance(found, int) and not isinstance(found, bool)
    if not whole or found < least or (most is not None and found > most):  # type: ignore[operator]
        upper = "" if most is None else f" and at most {most}"
        raise OptionError(f"{option}: found {shown(found)}, expected a whole number, at least {least}{upper}")


def check_choice(option: str, found: object, known: Sequence[str]) -> None:
    """Raises OptionError, which lists the known values, unless `found` is one of them."""
    if found not in known:
        raise OptionError(f"{option}: found {shown(found)}, expected one of {', '.join(known)}")


def _check_number(option: str, found: object, least: float, most: float = sys.float_info.max) -> None:
    number = isinstance(found, int | float) and not isinstance(found, bool)
    # NaN fails every comparison; infinity, and a whole number that no float can hold, the last one.
    if not number or not least <= found <= most:  # type: ignore[operator]
        upper = f" and at most {most}" if most < sys.float_info.max else ""
        raise OptionError(
            f"{option}: found {shown(found)}, expected a finite number, at least {least}{upper}"
        )


def shown(found: object) -> str:
    """A value as error messages quote it: one line, not too long."""
    if isinstance(found, int) and abs(found) >= 10**40:
        return "a number of more than 40 digits"  # Python refuses to print the longest ones
    return repr(found)[:80]
