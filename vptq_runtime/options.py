"""The options of a generation, checked."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypedDict

from vptq_runtime.checks import check_choice, check_int, check_number, shown
from vptq_runtime.errors import OptionError

if TYPE_CHECKING:
    from vptq_runtime._native import Sampler
    from vptq_runtime.runtime import Runtime

SEEDS = 2**64
MOST_LOGPROBS = 20
MOST_BIAS = 100.0
MOST_BIASES = 1024  # tokens
MOST_STOPS, LONGEST_STOP = 64, 256  # strings, characters: each is looked for at every token
LONGEST_SALT = 256  # characters
FORMS = ("json_schema", "regex", "grammar")  # of the text; one at most
SPECULATION = ("auto", "off", "ngram")


class GenerateOptions(TypedDict, total=False):
    """The keyword arguments that a Runtime's `generate`, `chat` and `submit` share: see `generate`."""

    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    seed: int | None
    stop: str | Sequence[str]
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    min_tokens: int
    logprobs: int
    prompt_logprobs: int | None
    json_schema: str | Mapping[str, Any] | bool | None
    regex: str | None
    grammar: str | None
    speculate: str | Runtime
    cache_salt: str


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `Runtime.generate`, which documents them, checked."""

    max_tokens: int | None = 128
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    min_tokens: int = 0
    logprobs: int = 0
    prompt_logprobs: int | None = None
    json_schema: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    grammar: str | None = None
    speculate: str | Runtime = "auto"
    cache_salt: str = ""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Options:
        """From keyword arguments; raises OptionError for one that there is not, too."""
        known = [each.name for each in fields(cls)]
        for name in options:
            if name not in known:
                raise OptionError(f"{name[:40]}: found no such option, expected one of {', '.join(known)}")
        return cls(**options)

    def __post_init__(self) -> None:
        """Raises OptionError where a value has the wrong type or range. Without a seed it draws one."""
        if self.prompt_logprobs is not None:
            check_int("prompt_logprobs", self.prompt_logprobs, 0, MOST_LOGPROBS)
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, 1 if self.prompt_logprobs is None else 0)
        check_number("temperature", self.temperature, 0)
        check_int("top_k", self.top_k, 0)
        check_number("top_p", self.top_p, 0, 1)
        check_number("min_p", self.min_p, 0, 1)
        check_number("repeat_penalty", self.repeat_penalty, 0)
        for option, value in (("top_p", self.top_p), ("repeat_penalty", self.repeat_penalty)):
            if value == 0:
                raise OptionError(f"{option}: found 0, expected a number above 0 (1 is off)")
        check_number("presence_penalty", self.presence_penalty, -2, 2)
        check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        check_int("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        if self.seed is None:
            object.__setattr__(self, "seed", secrets.randbelow(SEEDS))
        check_int("seed", self.seed, 0, SEEDS - 1)
        self._check_bias()
        self._check_stops()
        if len(self.constraints) > 1:
            found = " and ".join(self.constraints)
            raise OptionError(f"{found}: found {len(self.constraints)} of them, expected one at most")
        self._check_speculate()
        if not isinstance(self.cache_salt, str):
            raise OptionError(f"cache_salt: found {shown(self.cache_salt)}, expected a string")
        if len(self.cache_salt) > LONGEST_SALT:
            found = f"found {len(self.cache_salt)} characters"
            raise OptionError(f"cache_salt: {found}, expected at most {LONGEST_SALT}")

    @property
    def stops(self) -> tuple[str, ...]:
        if isinstance(self.stop, str):
            return (self.stop,)
        return tuple(self.stop) if isinstance(self.stop, Sequence) else (self.stop,)

    @property
    def constraints(self) -> dict[str, Any]:
        """Those of json_schema, regex and grammar that are given."""
        return {form: value for form in FORMS if (value := getattr(self, form)) is not None}

    def sampler(self, index: int, end_tokens: Sequence[int], n_vocab: int) -> Sampler:
        """The sampler of a list's prompt number `index`, seeded with seed + index."""
        from vptq_runtime import _native

        for token in self.logit_bias or ():
            check_int("logit_bias", token, 0, n_vocab - 1)
        return _native.Sampler(
            **self._filters(index),
            repeat_penalty=float(self.repeat_penalty),
            presence_penalty=float(self.presence_penalty),
            frequency_penalty=float(self.frequency_penalty),
            logit_bias={token: float(bias) for token, bias in (self.logit_bias or {}).items()},
            min_tokens=min(self.min_tokens, 2**31 - 1),
            end_tokens=list(end_tokens),
        )

    def draft_sampler(self, index: int, n_drawn: int) -> Sampler:
        """What a draft model draws with, from draw n_drawn on: the same random numbers, without penalties."""
        from vptq_runtime import _native

        sampler = _native.Sampler(**self._filters(index), repeat_penalty=1.0)
        sampler.accept([0] * n_drawn, generated=True)
        return sampler

    def _filters(self, index: int) -> dict[str, Any]:
        assert self.seed is not None
        return {
            "temperature": float(self.temperature),
            "top_k": min(self.top_k, 2**31 - 1),
            "top_p": float(self.top_p),
            "min_p": float(self.min_p),
            "seed": (self.seed + index) % SEEDS,
        }

    def _check_stops(self) -> None:
        if isinstance(self.stop, Sequence) and not isinstance(self.stop, str) and len(self.stop) > MOST_STOPS:
            raise OptionError(f"stop: found {len(self.stop)} strings, expected at most {MOST_STOPS}")
        for string in self.stops:
            if not isinstance(string, str) or not string:
                raise OptionError(f"stop: found {shown(string)}, expected non-empty strings")
            if len(string) > LONGEST_STOP:
                found = f"found a string of {len(string)} characters"
                raise OptionError(f"stop: {found}, expected at most {LONGEST_STOP}")

    def _check_speculate(self) -> None:
        if not isinstance(self.speculate, str):
            from vptq_runtime.runtime import Runtime  # only now: it loads the native library

            if isinstance(self.speculate, Runtime):
                return
        check_choice("speculate", self.speculate, SPECULATION)

    def _check_bias(self) -> None:
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, Mapping):
            raise OptionError(f"logit_bias: found {shown(self.logit_bias)}, expected tokens with numbers")
        if len(self.logit_bias) > MOST_BIASES:
            found = f"found {len(self.logit_bias)} tokens"
            raise OptionError(f"logit_bias: {found}, expected at most {MOST_BIASES}")
        for token, bias in self.logit_bias.items():
            check_int("logit_bias", token, 0)
            check_number(f"logit_bias[{shown(token)}]", bias, -MOST_BIAS, MOST_BIAS)
