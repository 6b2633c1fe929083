"""What a context computes at once: some tokens of several requests, and what is drawn from their logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from vptq_runtime.engine.request import Delta, LogitsRequest, Request
from vptq_runtime.generation import TokenLogprob

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vptq_runtime.engine.constraints import Constraint, Masks

Want = Literal["none", "last", "all"]


class Context(Protocol):
    """What the engine needs of a native Context, which documents it."""

    @property
    def n_ctx(self) -> int: ...
    @property
    def n_batch(self) -> int: ...
    @property
    def n_layer(self) -> int: ...
    @property
    def block_tokens(self) -> int: ...
    @property
    def n_blocks(self) -> int: ...
    @property
    def n_free_blocks(self) -> int: ...
    def new_sequence(self, prefix: Sequence[int] = ()) -> int: ...
    def free_sequence(self, sequence: int) -> None: ...
    def truncate(self, sequence: int, n_tokens: int) -> None: ...
    def blocks(self, sequence: int) -> list[int]: ...
    def hold(self, blocks: Sequence[int]) -> None: ...
    def release(self, blocks: Sequence[int]) -> None: ...
    def forward(
        self,
        sequences: Sequence[int],
        tokens: Sequence[Sequence[int]],
        prompts: Sequence[bool] = (),
        wants: Sequence[Want] = (),
        samplers: Sequence[Any] = (),
    ) -> None: ...
    def begin(
        self,
        sequences: Sequence[int],
        tokens: Sequence[Sequence[int]],
        prompts: Sequence[bool] = (),
        wants: Sequence[Want] = (),
        samplers: Sequence[Any] = (),
    ) -> None: ...
    def advance(self, n_layers: int) -> bool: ...
    def abandon(self) -> None: ...
    def sample(
        self, samplers: Sequence[Any], masks: Sequence[NDArray[np.int32] | None] = ()
    ) -> list[list[int]]: ...
    def log_probs(
        self, feed: int, tokens: Sequence[int], n_top: int
    ) -> tuple[list[float], list[list[tuple[int, float]]]]: ...
    def logits(self, feed: int) -> NDArray[np.float32]: ...


class Feed(NamedTuple):
    """Tokens of one request to compute, the last `n_drafts` of them guesses at what it will generate."""

    request: Request
    tokens: list[int]
    prompt: bool
    want: Want
    n_drafts: int = 0

    @classmethod
    def next_of(cls, request: Request, most: int) -> Feed:
        """At most so many tokens of what a request has still to feed, those that are fed in one way."""
        start, prompt = request.n_fed, not request.generated[request.n_fed]
        run = request.generated.find(prompt, start)
        end = min(start + most, len(request.ids) if run < 0 else run)
        scored = request.scored
        if scored and start < scored.start:
            end = min(end, scored.start)
        elif scored:
            end = min(end, scored.stop)
        if not prompt and end == len(request.ids):
            end -= 1  # the last one is a decode step's
        last = end == len(request.ids) and request.max_tokens > 0
        want: Want = "all" if start in scored else "last" if last else "none"
        return cls(request, request.ids[start:end], prompt, want)

    @property
    def draws(self) -> bool:
        """Whether the request's next token is drawn from its logits."""
        return self.want == "last" or (self.want == "all" and not self.prompt)

    @property
    def constraint(self) -> Constraint | None:
        """What the tokens drawn from its logits have to obey."""
        return self.request.constraint if self.draws else None


class Drawn(NamedTuple):
    """What came of a feed: the tokens drawn, or why there are none."""

    tokens: list[int]
    logprobs: list[TokenLogprob]
    error: Exception | None = None


class Batch:
    """Feeds on their way through a context: `forward`, or `begin` and as many `advance` as it takes; then
    `draw`. Masks of constrained requests are computed meanwhile, in other threads."""

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self.feeds = feeds
        self.n_tokens = sum(len(feed.tokens) for feed in feeds)
        self._masks: Masks | None = None
        constrained = [
            (feed.constraint, feed.tokens[len(feed.tokens) - feed.n_drafts :])
            for feed in feeds
            if feed.constraint is not None
        ]
        if constrained:
            from vptq_runtime.engine.constraints import Masks

            self._masks = Masks(constrained)

    def forward(self, context: Context) -> None:
        context.forward(*self._arguments())

    def begin(self, context: Context) -> None:
        context.begin(*self._arguments())

    def drop(self) -> None:
        """Nothing will be drawn: waits for the threads that still have its requests' grammars."""
        if self._masks is not None:
            self._masks.wait()

    def draw(self, context: Context) -> list[Drawn]:
        """Of each feed the next tokens, by its request's sampler; the prompts' log-probabilities and logits
        go to the requests. What fails for one is an error of its own."""
        try:
            masks = self._finished_masks()
        except Exception as error:  # of the library: nobody knows whose grammar it was
            return [
                self._drawn(context, i, []) if feed.constraint is None else Drawn([], [], error)
                for i, feed in enumerate(self.feeds)
            ]
        try:
            tokens = self._sample(context, [i for i, feed in enumerate(self.feeds) if feed.draws], masks)
        except Exception:  # no sampler has gone on: whose it is shows when each draws by itself
            return [self._drawn(context, i, masks) for i in range(len(self.feeds))]
        return [self._scored(context, i, drawn) for i, drawn in enumerate(tokens)]

    def _sample(
        self, context: Context, drawing: Sequence[int], masks: Sequence[NDArray[np.int32] | None]
    ) -> list[list[int]]:
        """The tokens that these feeds draw; the others none."""
        if not drawing:
            return [[] for _ in self.feeds]
        samplers = [feed.request.sampler if i in drawing else None for i, feed in enumerate(self.feeds)]
        return context.sample(samplers, masks)

    def _drawn(self, context: Context, i: int, masks: Sequence[NDArray[np.int32] | None]) -> Drawn:
        """Of one feed, whatever becomes of the others."""
        try:
            drawing = [i] if self.feeds[i].draws else []
            return self._scored(context, i, self._sample(context, drawing, masks)[i])
        except Exception as error:
            return Drawn([], [], error)

    def _scored(self, context: Context, i: int, tokens: list[int]) -> Drawn:
        try:
            return Drawn(tokens, self._score(context, i, self.feeds[i], tokens))
        except Exception as error:  # no memory for the logits, say
            return Drawn([], [], error)

    def _arguments(self) -> tuple[list[int], list[list[int]], list[bool], list[Want], list[Any]]:
        # A GPU hands over only the logits that the samplers need, unless somebody needs all of them.
        all_logits = any(
            feed.want != "none" and (not feed.draws or feed.request.needs_all_logits) for feed in self.feeds
        )
        return (
            [feed.request.sequence for feed in self.feeds],
            [feed.tokens for feed in self.feeds],
            [feed.prompt for feed in self.feeds],
            [feed.want for feed in self.feeds],
            [feed.request.sampler if feed.draws and not all_logits else None for feed in self.feeds],
        )

    def _finished_masks(self) -> list[NDArray[np.int32] | None]:
        if self._masks is None:
            return []
        finished = iter(self._masks.result())
        return [next(finished) if feed.constraint is not None else None for feed in self.feeds]

    def _score(self, context: Context, i: int, feed: Feed, tokens: list[int]) -> list[TokenLogprob]:
        request = feed.request
        if feed.draws:
            if not tokens or not request.n_logprobs:
                return []
            return _told(*context.log_probs(i, tokens, request.n_logprobs), tokens)
        if feed.want != "all":
            return []
        if isinstance(request, LogitsRequest):
            request.piece = context.logits(i)
            request.first += len(feed.tokens)
            request.news.append(Delta("", [], []))
        else:
            assert request.n_prompt_logprobs is not None
            end = request.n_fed + len(feed.tokens)
            following = request.ids[request.n_fed + 1 : end + 1]
            request.prompt_logprobs += _told(
                *context.log_probs(i, following, request.n_prompt_logprobs), following
            )
        return []


def _told(
    logprobs: list[float], tops: list[list[tuple[int, float]]], tokens: Sequence[int]
) -> list[TokenLogprob]:
    return [
        TokenLogprob(token, logprob, top) for token, logprob, top in zip(tokens, logprobs, tops, strict=True)
    ]
