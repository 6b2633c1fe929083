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
from typing import TYPE_CHECKING, TypeVar

from vptq_runtime.engine.forks import Forked
from vptq_runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

T = TypeVar("T")
CPU_S = 3  # processor time of a trial; ordinary grammars take some milliseconds
WALL_S = 60  # where other processes have the processors
MEMORY = 1 << 30  # address space of a trial
STACK = 1 << 27  # the library recurses over rules, 3 KB each, and ends the process where the stack does
CHILD = "import sys; sys.path[:] = sys.argv[1:]; from vptq_runtime.engine.grammar.trial import main; main()"
READY = b"ready\n"  # what a trial says when it has all that it needs: what fails then is the grammar
MOST_TRIALS = 2  # at once: each has a processor, and up to MEMORY
MOST_KNOWN = 256  # grammars whose trial is not made again; the longest have 256 KB


class GrammarError(Exception):
    """Why a grammar cannot be used: a line."""


@dataclass(frozen=True)
class VisibleTokens:
    """What a grammar can see of a tokenizer: how many tokens, and the special ones by name."""

    n_tokens: int
    special: tuple[tuple[int, str], ...]
    end_tokens: tuple[int, ...]


class Trials(Forked):
    """What trials have said of grammars, and the right to make one."""

    def __init__(self) -> None:
        super().__init__()
        self._reasons: dict[tuple[str, VisibleTokens], str] = {}  # why not; empty of what can be used
        self.renew()

    def renew(self) -> None:
        self._free = threading.BoundedSemaphore(MOST_TRIALS)
        self._lock = threading.Lock()  # of _reasons
        self.stack_lock = threading.Lock()  # of the size of the next thread's stack

    def reason(self, grammar: str, tokens: VisibleTokens) -> str:
        """Why a grammar cannot be used, by a trial or by one before; empty where it can."""
        asked = grammar, tokens
        if (reason := self._reasons.get(asked)) is not None:
            return reason
        with self._free:
            if (reason := self._reasons.get(asked)) is not None:  # by another thread, meanwhile
                return reason
            reason = _try(grammar, tokens)
            with self._lock:
                self._reasons[asked] = reason
                if len(self._reasons) > MOST_KNOWN:
                    del self._reasons[next(iter(self._reasons))]
        return reason


_trials = Trials()


def check_grammar(grammar: str, tokens: VisibleTokens) -> None:
    """Tries a grammar, as the library has it, in another process, unless that has been done.

    Raises GrammarError, and UnsupportedError where there can be no other process.
    """
    if reason := _trials.reason(grammar, tokens):
        raise GrammarError(reason)


def _try(grammar: str, tokens: VisibleTokens) -> str:
    """Why a grammar cannot be used; raises GrammarError for a reason that may be another one next time."""
    command = [sys.executable, "-c", CHILD, *sys.path]
    request = json.dumps([grammar, tokens.n_tokens, tokens.special, tokens.end_tokens]).encode()
    try:
        result = subprocess.run(command, input=request, capture_output=True, timeout=WALL_S)
    except OSError as error:
        raise UnsupportedError(
            f"constrained output: cannot start {sys.executable}: {error.strerror}"
        ) from None
    except subprocess.TimeoutExpired:
        raise GrammarError(f"takes more than {WALL_S} s to make ready") from None
    if not result.stdout.startswith(READY):
        said = result.stderr.decode(errors="replace").split("\n")
        last = next((line for line in reversed(said) if line.strip()), f"status {result.returncode}")
        raise UnsupportedError(f"constrained output: cannot try a grammar in another process: {last}")
    if result.returncode == 0:
        return str(json.loads(result.stdout.removeprefix(READY)))
    if result.returncode == -signal.SIGSEGV:
        return "its rules are nested too deeply"
    if result.returncode == -signal.SIGXCPU:
        return f"takes more than {CPU_S} s to make ready: it is too complex"
    if result.returncode == -signal.SIGKILL:  # of a system that lacks memory
        raise GrammarError("takes too much to make ready: the system has ended its trial")
    return f"takes more than {MEMORY >> 20} MiB to make ready: it is too complex"


def main() -> None:
    """The other process: reads a request, writes READY, and why the grammar cannot be used, or nothing."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from llguidance import LLTokenizer, TokenizerWrapper

    grammar, n_tokens, special, end_tokens = json.load(sys.stdin)
    tokenizer = LLTokenizer(
        TokenizerWrapper(_Bytes(n_tokens, dict(special), end_tokens)), eos_token=end_tokens
    )
    sys.stdout.buffer.write(READY)
    sys.stdout.flush()
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

    with _trials.stack_lock:
        usual = threading.stack_size(size)
        thread = threading.Thread(target=run)
        thread.start()
        threading.stack_size(usual)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
