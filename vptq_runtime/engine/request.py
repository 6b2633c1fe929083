"""One request on its way: what is asked for, what is known so far, and what ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from vptq_runtime.engine.mailbox import Mailbox
from vptq_runtime.errors import OptionError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vptq_runtime.engine.constraints import Constraint
    from vptq_runtime.engine.prefix_cache import Block
    from vptq_runtime.engine.speculation import Drafter
    from vptq_runtime.generation import FinishReason, TokenLogprob
    from vptq_runtime.text.text_stream import TextStream


class Sampler(Protocol):
    """What the engine needs of a native Sampler; a context draws from it."""

    def accept(self, tokens: Sequence[int], generated: bool = False) -> None: ...


class Delta(NamedTuple):
    """What a step adds to a request: tokens, and the text that is certain with them."""

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob]  # of the tokens, where asked for


def _no_sampler(n_drawn: int) -> Sampler:
    raise OptionError("draft_sampler: found none, expected one beside a draft model")


@dataclass(eq=False)
class Request:
    """A prompt and its continuation.

    `ids` are the prompt's tokens and those that were generated, `generated` says of each which it is: it
    decides in what precision it is fed, also when it has to be fed again. The first n_fed of them are in the
    context's sequence.
    """

    prompt: list[int]
    sampler: Sampler | None  # None where nothing is drawn
    max_tokens: int  # 0: only the prompt's log-probabilities are wanted
    min_tokens: int = 0
    end_tokens: frozenset[int] = frozenset()
    text: TextStream | None = None  # None for a model without a tokenizer
    n_logprobs: int = 0  # likeliest tokens to tell of at each generated token; 0: no log-probabilities
    n_prompt_logprobs: int | None = None  # the same of the prompt's; None: none
    constraint: Constraint | None = None
    drafter: Drafter | None = None
    draft_sampler: Callable[[int], Sampler] = _no_sampler  # for a draft model, from so many draws on
    uses_cache: bool = True
    salt: str = ""  # requests with different ones share no cached blocks

    number: int = 0  # in the order of arrival
    ids: list[int] = field(init=False)
    generated: bytearray = field(init=False)
    sequence: int = -1  # in the context, while it has one
    n_fed: int = 0
    path: list[Block] = field(default_factory=list)  # in the prefix cache
    n_found: int = 0  # tokens that the cache had for it when it was looked at last
    n_published: int = 0  # blocks
    waits_for: Block | None = None  # somebody else computes it right now
    n_passed_over: int = 0  # passes that later requests got first
    alone: bool = False  # it shares no pass: one that it was in has failed

    n_cached: int = 0  # tokens of the prompt that the cache had
    n_sampled: int = 0  # with the end token
    n_drafted: int = 0
    n_accepted: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])  # the first has none
    pieces: list[str] = field(default_factory=list)
    news: list[Delta] = field(default_factory=list)  # that have not been delivered
    mailbox: Mailbox = field(default_factory=Mailbox)
    finish_reason: FinishReason | None = None
    error: BaseException | None = None
    ended: bool = False

    arrived: float = 0.0  # the clock's seconds
    admitted: float | None = None  # when it first got a place
    first_token: float | None = None
    last_token: float | None = None
    left: float | None = None  # when it had ended

    def __post_init__(self) -> None:
        self.ids = list(self.prompt)
        self.generated = bytearray(len(self.prompt))

    @property
    def tokens(self) -> list[int]:
        """The generated ones, without the end token."""
        return self.ids[len(self.prompt) :]

    @property
    def n_rest(self) -> int:
        """Tokens that have to be fed."""
        return len(self.ids) - self.n_fed

    @property
    def decodes(self) -> bool:
        """Whether all that is left to feed is the token that was generated last."""
        return self.n_rest == 1 and self.generated[-1] == 1

    @property
    def rests(self) -> bool:
        """Whether it waits for its reader."""
        return False

    @property
    def needs_all_logits(self) -> bool:
        """Whether more is made of its logits than a sampler's draw."""
        return self.n_logprobs > 0 or self.constraint is not None

    @property
    def scored(self) -> range:
        """The prompt's tokens that are still to be fed for the logits of each of them."""
        if self.n_prompt_logprobs is None:
            return range(0)
        return range(len(self.prompt_logprobs) - 1, len(self.prompt) - 1)

    @property
    def most_cached(self) -> int:
        """Tokens that need not be fed if the cache has them."""
        if not self.uses_cache:
            return 0
        scored = self.scored
        return scored.start if scored else len(self.ids) - 1

    def accept(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob], now: float) -> int:
        """Takes the tokens that a step has drawn, up to the one that ends it; returns how many."""
        if self.first_token is None:
            self.first_token = now
        self.last_token = now
        text, taken = "", 0
        n_before = len(self.ids)
        for token in tokens:
            taken += 1
            text += self._accept(token)
            if self.finish_reason:
                break
        new = self.ids[n_before:]
        told = list(logprobs[: len(new)])
        self.logprobs += told
        if self.constraint is not None:
            # An end token, too: where the grammar is stuck it is refused.
            self.constraint.accept(tokens[:taken])
            if self.constraint.ended and not self.finish_reason:
                self.finish_reason = "stop"
                text += self.text.flush() if self.text else ""
        self.pieces.append(text)
        if text or new:
            self.news.append(Delta(text, new, told))
        return taken

    def _accept(self, token: int) -> str:
        self.n_sampled += 1
        piece = ""
        if token in self.end_tokens:
            self.finish_reason = "stop"
        else:
            self.ids.append(token)
            self.generated.append(1)
            n_tokens = len(self.ids) - len(self.prompt)
            piece = self.text.push(token, stops=n_tokens >= self.min_tokens) if self.text else ""
            if n_tokens == self.max_tokens:
                self.finish_reason = "length"
        if self.text:
            if self.finish_reason:
                piece += self.text.flush()
            if self.text.stopped:  # by this token or by what was held back: a stop string goes before length
                self.finish_reason = "stop"
        return piece


@dataclass(eq=False)
class LogitsRequest(Request):
    """A request for the logits of prompt[first:]; nothing is generated.

    It rests while `piece` waits to be taken: with a vocabulary of 128K one of 128 tokens is 64 MB.
    """

    first: int = 0  # moves on with what has been computed
    piece: NDArray[np.float32] | None = None  # (n, n_vocab)

    @property
    def rests(self) -> bool:
        return self.piece is not None

    @property
    def scored(self) -> range:
        return range(self.first, len(self.prompt))
