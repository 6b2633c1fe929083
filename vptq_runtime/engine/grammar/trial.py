"""Grammars made ready by llguidance, which a small one can keep busy for hours, fill the memory of, or crash.

Its limits count steps, not what a step costs. So another process tries a grammar first, with limits on time
and memory that hold; what it survives, this process survives, too.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

from vptq_runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

T = TypeVar("T")
CPU_S = 3  # processor time of a trial; ordinary grammars take some milliseconds
WALL_S = 60  # where other processes have the processors
MEMORY = 1 << 30  # address space of a trial
STACK = 1 << 27  # the library recurses over rules, 3 KB each, and ends the process where the stack does
CHILD = "import sys; sys.path[:] = sys.argv[1:]; from vptq_runtime.engine.grammar.trial import main; main()"
_stack_lock = threading.Lock()


class GrammarError(Exception):
    """Why a grammar cannot be used: a line."""


@dataclass(frozen=True)
class Vocabulary:
    """What a grammar can see of a tokenizer: how many tokens, and the special ones by name."""

    n_tokens: int
    special: tuple[tuple[int, str], ...]
    end_tokens: tuple[int, ...]


@lru_cache(maxsize=256)  # of those that have passed
def check_grammar(grammar: str, vocabulary: Vocabulary) -> None:
    """Tries a grammar, as the library has it, in another process.

    Raises GrammarError, and UnsupportedError where there can be no other process.
    """
    command = [sys.executable, "-c", CHILD, *sys.path]
    special, end_tokens = vocabulary.special, vocabulary.end_tokens
    request = json.dumps([grammar, vocabulary.n_tokens, special, end_tokens]).encode()
    try:
        result = subprocess.run(command, input=request, capture_output=True, timeout=WALL_S)
    except OSError as error:
        raise UnsupportedError(
            f"constrained output: cannot start {sys.executable}: {error.strerror}"
        ) from None
    except subprocess.TimeoutExpired:
        raise GrammarError(f"takes more than {WALL_S} s to make ready") from None
    if result.returncode == -signal.SIGSEGV:
        raise GrammarError("its rules are nested too deeply")
    if result.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise GrammarError(f"takes more than {CPU_S} s to make ready: it is too complex")
    if result.returncode != 0:
        raise GrammarError(f"takes more than {MEMORY >> 20} MiB to make ready: it is too complex")
    if reason := json.loads(result.stdout):
        raise GrammarError(reason)


def main() -> None:
    """The other process: reads a request, writes the reason why the grammar cannot be used, or nothing."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from llguidance import LLTokenizer, TokenizerWrapper

    grammar, n_tokens, special, end_tokens = json.load(sys.stdin)
    tokenizer = LLTokenizer(
        TokenizerWrapper(_Bytes(n_tokens, dict(special), end_tokens)), eos_token=end_tokens
    )
    reason = ""
    try:
        _with_stack(STACK, lambda: _first_steps(tokenizer, grammar))
    except GrammarError as error:
        reason = str(error)
    json.dump(reason, sys.stdout)


def matcher_of(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """The library's matcher of a grammar that has passed check_grammar; raises GrammarError."""
    return _with_stack(2 * STACK, lambda: _first_steps(tokenizer, grammar))


def reason_of(message: str) -> str:
    """The one line of the library's errors that says what is wrong."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["no reason given"]
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])


def _first_steps(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """Its matcher, if it begins: a token is allowed, and what may follow that one can be computed."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        if warnings := matcher.get_grammar_warnings():
            raise GrammarError(reason_of(warnings[0]))
        matcher.consume_tokens([])  # looks whether anything may follow at all
        mask = matcher.compute_bitmask()
        ahead = matcher.deep_copy()
        byte = next(index for index, bits in enumerate(mask) if bits)
        ahead.consume_token(8 * byte + (mask[byte] & -mask[byte]).bit_length() - 1)
        ahead.compute_bitmask()
        if not ahead.is_error():
            return matcher
        matcher = ahead
    reason = reason_of(matcher.get_error())
    raise GrammarError("no text fulfils it" if reason.startswith("NoExtension") else reason)


class _Bytes:
    """A vocabulary with the same special tokens; the others are the 256 bytes, which is all a trial needs."""

    def __init__(self, n_tokens: int, special: dict[int, str], end_tokens: list[int]) -> None:
        self.eos_token_id = end_tokens[0]
        self.bos_token_id = None
        self.special_token_ids = list(special)
        taken = {*special, *end_tokens}
        self.tokens = [special.get(token, "").encode() for token in range(max(n_tokens, 256 + len(taken)))]
        self.numbers = [token for token in range(len(self.tokens)) if token not in taken][:256]
        for byte, token in enumerate(self.numbers):
            self.tokens[token] = bytes([byte])

    def __call__(self, text: bytes) -> list[int]:
        return [self.numbers[byte] for byte in text]


def _with_stack(size: int, call: Callable[[], T]) -> T:
    """What the call returns or raises, from a thread with a stack of that many bytes."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    with _stack_lock:
        usual = threading.stack_size(size)
        thread = threading.Thread(target=run)
        thread.start()
        threading.stack_size(usual)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
