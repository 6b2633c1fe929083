"""Output held to a JSON schema, a regular expression or a grammar: which tokens may come next.

The library `llguidance` knows; here is what it is asked, and how its errors reach whoever asked.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vptq_runtime.checks import shown
from vptq_runtime.engine.forks import Forked
from vptq_runtime.engine.grammar.schema_keywords import check_embedded_schemas, check_schema
from vptq_runtime.engine.grammar.trial import (
    GrammarError,
    VisibleTokens,
    check_grammar,
    matcher_of,
    reason_of,
)
from vptq_runtime.errors import OptionError, UnsupportedError

if TYPE_CHECKING:
    from llguidance import LLMatcher

    Mask = NDArray[np.int32]

MAX_BYTES = 1 << 18  # of a schema, regular expression or grammar
WHITESPACE = r"[ \n\r\t]{1,40}"  # at most, between two tokens of JSON: a model could go on for ever
MASK_THREADS = 4
SLOW_SECONDS = 0.002


class Constraints(Forked):
    """What one model's tokenizer allows to be asked for. Made once a model, on first use: it takes 30 ms for
    a vocabulary of 4096 tokens, a second for one of 128K.

    tokenizer_json: the model's, as its file has it. n_vocab: the length of its logits. end_tokens: each of
        them ends a text.

    Raises UnsupportedError where llguidance is missing or cannot read the tokenizer, and where there are no
    end tokens.
    """

    def __init__(self, tokenizer_json: str, n_vocab: int, end_tokens: Collection[int]) -> None:
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            expected = 'expected it installed: pip install "vptq-runtime[serve]"'
            raise UnsupportedError(f"constrained output: found no llguidance ({error}), {expected}") from None
        if not end_tokens:
            raise UnsupportedError("constrained output: found no end token of the model, expected one")
        ends = sorted(set(end_tokens))
        try:
            added = json.loads(tokenizer_json)["added_tokens"]
            # Behind its whitespace an object: the library takes anything else for the path of a file.
            self._tokenizer = LLTokenizer(tokenizer_json.lstrip(), eos_token=ends)
            self.n_tokens: int = self._tokenizer.vocab_size
            if self.n_tokens > n_vocab:
                raise ValueError(f"it has {self.n_tokens} tokens, the model {n_vocab}")
            names = {token["id"]: token["content"] for token in added}
            special = {id_: name for id_, name in names.items() if self._tokenizer.is_special_token(id_)}
        except BaseException as error:
            # The library reports some tokenizers as a Rust panic, which is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = reason_of(str(error))
            raise UnsupportedError(
                f"constrained output: cannot use the model's tokenizer: {reason}"
            ) from None
        self.n_vocab = n_vocab
        self.end_tokens = frozenset(ends)
        self._visible = VisibleTokens(self.n_tokens, tuple(special.items()), tuple(ends))
        super().__init__()
        self.renew()

    def renew(self) -> None:
        from llguidance import LLExecutor

        self.executor = LLExecutor(max(1, min(MASK_THREADS, (os.cpu_count() or 1) // 2)))
        self.thread = ThreadPoolExecutor(1, "vptq-masks")

    def compile(
        self,
        *,
        json_schema: str | Mapping[str, Any] | bool | None = None,
        regex: str | None = None,
        grammar: str | None = None,
    ) -> Constraint:
        """Exactly one of them, made ready for one sequence.

        json_schema: a JSON schema, as text or parsed. Properties come in its order, and between the tokens of
            JSON there are at most 40 characters of whitespace.
        regex: for the whole text, in the syntax of Rust's crate regex.
        grammar: a context-free grammar in llguidance's dialect of Lark.

        The first time that something is asked for, another process tries it: that takes 0.1 s, and up to 3 s
        for what is then refused. Raises OptionError, which names the option: for what is none, what the
        library cannot express, what no text fulfils, and what takes too much time or memory.
        """
        options = {"json_schema": json_schema, "regex": regex, "grammar": grammar}
        given = {option: value for option, value in options.items() if value is not None}
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise OptionError(f"json_schema, regex, grammar: found {found}, expected exactly one")
        [(option, source)] = given.items()
        text = _for_library(option, source)
        try:
            check_grammar(text, self._visible)
            matcher = matcher_of(self._tokenizer, text)
        except GrammarError as error:
            raise OptionError(f"{option}: found {_shown(source)}: {error}") from None
        return Constraint(self, option, matcher)


class Constraint:
    """One sequence's way through what it is held to.

    While a Masks has it, between being made and its result, nothing else may use it.
    """

    def __init__(self, constraints: Constraints, option: str, matcher: LLMatcher) -> None:
        self.constraints = constraints
        self.matcher = matcher
        self._option = option
        self._quiet_until = 0.0  # the clock's seconds until which nothing is forced

    @property
    def ended(self) -> bool:
        """Whether nothing may follow but an end token, or one has come."""
        return self.matcher.is_stopped() and not self.matcher.is_error()

    def accept(self, tokens: Sequence[int]) -> None:
        """Goes on by tokens that were generated.

        Raises OptionError where one of them is not allowed, and where the grammar has got stuck in one of the
        library's limits: after that, masks allow end tokens, and none is accepted.
        """
        for token in tokens:
            # Of an end token, the library says yes also where it is stuck.
            if self.matcher.is_error() or not self.matcher.consume_token(token):
                reason = reason_of(self.matcher.get_error())
                raise OptionError(f"{self._option}: found no way on at token {token}: {reason}")

    def allowed(self, drafts: Sequence[int]) -> list[int]:
        """The drafts before the first one that is not allowed, or that ends the text."""
        drafts = self._before_end(drafts)
        return drafts[: self.matcher.deep_copy().try_consume_tokens(drafts)]

    def forced(self, n: int) -> list[int]:
        """Up to n tokens that come next whatever the model says: good drafts. Not always all that do."""
        begin = time.perf_counter()
        if begin < self._quiet_until:
            return []
        tokens = self.matcher.deep_copy().compute_ff_tokens()
        end = time.perf_counter()
        if end - begin > SLOW_SECONDS:  # of an ambiguous grammar, say: others wait for it meanwhile
            self._quiet_until = end + 100 * (end - begin)
        return self._before_end(tokens[:n])

    def _before_end(self, tokens: Sequence[int]) -> list[int]:
        ends, n_vocab = self.constraints.end_tokens, self.constraints.n_vocab
        wrong = (index for index, t in enumerate(tokens) if t in ends or not 0 <= t < n_vocab)
        return list(tokens[: next(wrong, len(tokens))])


class Masks:
    """Which tokens each of some sequences of one model may have next, after each of its drafts, too.

    Making it begins the computation, in threads of its own, and returns at once. One thread of Python asks
    for all of them, and the library's threads compute.
    """

    def __init__(self, requests: Sequence[tuple[Constraint, Sequence[int]]]) -> None:
        self._requests = [(constraint, list(drafts)) for constraint, drafts in requests]
        self._future: Future[list[Mask]] | None = None
        if self._requests:
            self._thread = self._requests[0][0].constraints.thread
            self._future = self._thread.submit(_masks, self._requests)

    def result(self) -> list[Mask]:
        """For each sequence int32 (1 + len(drafts), ceil(n_vocab / 32)): bit t % 32 of word t // 32 says
        whether token t may follow the sequence, in row 0, and its first i drafts, in row i.

        Where the text may end, end tokens are among them; no row is empty. A row behind a draft that is not
        allowed has the end tokens, and so has one where the grammar is stuck: `Constraint.accept` raises.
        """
        return self._future.result() if self._future else []

    def wait(self) -> None:
        """Until the computation has ended, whatever came of it: the constraints are free again.

        In a child by fork, one of the parent's never ends, and nobody else has the child's constraints.
        """
        if self._future and self._thread is self._requests[0][0].constraints.thread:
            wait([self._future])


def _masks(requests: list[tuple[Constraint, list[int]]]) -> list[Mask]:
    constraints = requests[0][0].constraints
    ends = np.zeros(32 * _words(constraints.n_vocab), np.bool_)
    ends[list(constraints.end_tokens)] = True
    firsts = [0, *accumulate(1 + len(drafts) for _, drafts in requests)]
    rows = np.tile(np.packbits(ends, bitorder="little").view(np.int32), (firsts[-1], 1))
    # The library's rows are as long as its tokenizer's vocabulary, which may be shorter than the model's.
    computed = np.empty((firsts[-1], _words(constraints.n_tokens)), np.int32)
    # All sequences' next tokens, then what follows their first drafts, their second ones, ...
    ahead = [(c.matcher, row, drafts) for (c, drafts), row in zip(requests, firsts[:-1], strict=True)]
    while ahead:
        address, row_bytes = computed.ctypes.data, computed.strides[0]
        places = [(matcher, row) for matcher, row, _ in ahead]
        constraints.executor.unsafe_compute_mask_ptr(places, address, row_bytes, len(computed))
        further = []
        for matcher, row, drafts in ahead:
            if matcher.is_error():
                continue
            rows[row] = 0
            rows[row, : computed.shape[1]] = computed[row]
            if drafts and _has(rows[row], drafts[0]) and drafts[0] not in constraints.end_tokens:
                matcher = matcher.deep_copy()  # the library could go back, but not in all grammars
                if matcher.consume_token(drafts[0]):
                    further.append((matcher, row + 1, drafts[1:]))
        ahead = further
    return [rows[begin:end] for begin, end in pairwise(firsts)]


def _words(n_tokens: int) -> int:
    return -(-n_tokens // 32)


def _has(row: Mask, token: int) -> bool:
    return 0 <= token < 32 * len(row) and bool(int(row[token // 32]) >> token % 32 & 1)


def _for_library(option: str, source: object) -> str:
    """The option's value as the library has it; raises OptionError for what is wrong with it at a glance."""
    from llguidance import LLMatcher

    text = _text(option, source)
    try:
        n_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise OptionError(f"{option}: found invalid Unicode at character {error.start}") from None
    if n_bytes > MAX_BYTES:
        raise OptionError(f"{option}: found {n_bytes} bytes, expected at most {MAX_BYTES}")
    if option == "regex":
        return LLMatcher.grammar_from_regex(text)
    if option == "grammar":
        check_embedded_schemas(option, text)
        if re.search(r"\[[^][\n]*\btemperature\s*=", text):
            raise OptionError(f"{option}: found a temperature, expected none: it is an option of its own")
        return json.dumps({"grammars": [{"lark_grammar": text}]})  # whatever else the text looks like
    try:
        schema = json.loads(text)
        plain = json.dumps({} if schema is True else schema, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{option}: found {_shown(source)}, expected JSON: {error}") from None
    if schema is False or not isinstance(schema, dict | bool):
        raise OptionError(f"{option}: found {_shown(source)}, expected an object, or true")
    check_schema(option, schema)
    try:
        return LLMatcher.grammar_from_json_schema(plain, overrides={"whitespace_pattern": WHITESPACE})
    except ValueError as error:  # of what Python can read and the library cannot: a hundred levels, say
        raise OptionError(f"{option}: found {_shown(source)}: {error}") from None


def _shown(source: object) -> str:
    """A value as messages quote it; one that is nested, not to its ends."""
    try:
        return shown(source) if isinstance(source, str) else reprlib.repr(source)[:80]
    except ValueError:  # of a number of thousands of digits
        return shown(source)


def _text(option: str, source: object) -> str:
    if isinstance(source, str):
        return source
    if option != "json_schema" or not isinstance(source, Mapping | bool):
        expected = "a JSON schema" if option == "json_schema" else "a string"
        raise OptionError(f"{option}: found {_shown(source)}, expected {expected}")
    try:
        return json.dumps(source if isinstance(source, bool) else dict(source))
    except Exception as error:  # what a Mapping of the caller's raises, too
        raise OptionError(f"{option}: found {_shown(source)}, expected what JSON can hold: {error}") from None
