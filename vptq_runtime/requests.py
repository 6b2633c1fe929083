"""What a Runtime is asked for, as requests to its engine, and what comes of them, as Generations."""

from __future__ import annotations

import threading
import time
import weakref
from functools import partial
from typing import TYPE_CHECKING

from vptq_runtime import _native
from vptq_runtime.engine.drafters.draft_model import DraftModel
from vptq_runtime.engine.drafters.ngram import NgramDrafter
from vptq_runtime.engine.forks import Forked
from vptq_runtime.engine.request import Request
from vptq_runtime.errors import OptionError
from vptq_runtime.generation import Generation, Timings
from vptq_runtime.text.text_stream import TextStream

if TYPE_CHECKING:
    from vptq_runtime.engine.constraints import Constraint, Constraints
    from vptq_runtime.engine.speculation import Drafter
    from vptq_runtime.options import Options
    from vptq_runtime.runtime import Runtime
    from vptq_runtime.text.vocabulary import Vocabulary


class Requests(Forked):
    """Makes the requests to one model: it has what they share, drafters and compiled constraints.

    n_ctx: most tokens of one sequence. load_s: seconds that loading the model took, for the Generations.
    """

    def __init__(self, vocabulary: Vocabulary, n_ctx: int, load_s: float) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        self._n_ctx = n_ctx
        self._load_s = load_s
        self._ngrams = NgramDrafter()
        self._draft_models: weakref.WeakKeyDictionary[Runtime, DraftModel] = weakref.WeakKeyDictionary()
        self._draft_models_lock = threading.Lock()
        self._constraints: Constraints | None = None
        self._constraints_lock = threading.Lock()

    def renew(self) -> None:
        self._draft_models_lock = threading.Lock()
        self._constraints_lock = threading.Lock()

    def new(self, prompt: object, options: Options, index: int = 0) -> Request:
        """Of a text or a list of token ids; index: its number in a list of prompts."""
        tokens = self._vocabulary.prompt(prompt, self._n_ctx)
        end_tokens = self._vocabulary.end_tokens
        text = None
        if options.stops or self._vocabulary.has_tokenizer:
            text = TextStream(self._vocabulary.tokenizer, options.stops)
        sampler = options.sampler(index, sorted(end_tokens), self._vocabulary.n_vocab)
        sampler.accept(tokens)
        room = self._n_ctx - len(tokens)
        return Request(
            prompt=tokens,
            sampler=sampler,
            max_tokens=room if options.max_tokens is None else min(room, options.max_tokens),
            min_tokens=options.min_tokens,
            end_tokens=end_tokens,
            text=text,
            n_logprobs=options.logprobs,
            n_prompt_logprobs=options.prompt_logprobs,
            constraint=self._constraint(options),
            drafter=self._drafter(options),
            draft_sampler=partial(options.draft_sampler, index),
            salt=options.cache_salt,
        )

    def generation(self, request: Request) -> Generation:
        """What has become of a request by its end."""
        admitted, first, last = request.admitted, request.first_token, request.last_token
        n_fed = len(request.prompt) - request.n_cached
        if request.max_tokens == 0 and request.finish_reason:
            first = request.left  # nothing is drawn: the prompt's end is the request's
            n_fed = max(1, n_fed - 1)  # of its last token, nothing is told
        timings = Timings(
            load_s=self._load_s,
            queue_s=0.0 if admitted is None else admitted - request.arrived,
            prompt_tokens=0 if first is None else n_fed,
            prompt_s=0.0 if first is None or admitted is None else first - admitted,
            decode_tokens=max(request.n_sampled - 1, 0),
            decode_s=0.0 if first is None or last is None else last - first,
        )
        return Generation(
            text="".join(request.pieces),
            tokens=request.tokens,
            finish_reason=request.finish_reason,
            timings=timings,
            n_cached=request.n_cached,
            logprobs=request.logprobs if request.n_logprobs else None,
            prompt_logprobs=None if request.n_prompt_logprobs is None else request.prompt_logprobs,
            n_drafted=request.n_drafted,
            n_accepted=request.n_accepted,
        )

    def forget_draft_models(self) -> None:
        """Lets their contexts go, when no request drafts any more."""
        self._draft_models.clear()

    def _constraint(self, options: Options) -> Constraint | None:
        if not options.constraints:
            return None
        from vptq_runtime.engine.constraints import Constraints  # llguidance is only loaded for them

        with self._constraints_lock:
            if self._constraints is None:
                vocabulary = self._vocabulary
                self._constraints = Constraints(
                    vocabulary.tokenizer.json, vocabulary.n_vocab, vocabulary.end_tokens
                )
        return self._constraints.compile(**options.constraints)

    def _drafter(self, options: Options) -> Drafter | None:
        if isinstance(options.speculate, str):
            return None if options.speculate == "off" else self._ngrams
        return self._draft_model(options.speculate)

    def _draft_model(self, small: Runtime) -> DraftModel:
        """The model of another Runtime, on a context of its own: two engines never wait for one another."""
        model, vocabulary = small._model, small._vocabulary
        if model is None or vocabulary is self._vocabulary:
            found = "a closed Runtime" if model is None else "this Runtime itself"
            raise OptionError(f"speculate: found {found}, expected an open one of a smaller model")
        with self._draft_models_lock:
            if small not in self._draft_models:
                if not self._vocabulary.same_tokens(vocabulary):
                    raise OptionError(
                        f"speculate: found other tokens in {vocabulary.path}, "
                        f"expected those of {self._vocabulary.path}"
                    )
                context = _native.Context(model, **small._context_options, n_ctx=self._n_ctx)
                n_vocab = min(vocabulary.n_vocab, self._vocabulary.n_vocab)
                self._draft_models[small] = DraftModel(context, n_vocab, time.perf_counter)
            return self._draft_models[small]
