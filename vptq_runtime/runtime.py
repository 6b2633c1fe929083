"""Text in, text out: a model file, its tokenizer and an engine behind one class."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

from vptq_runtime import _native
from vptq_runtime.checks import check_choice, check_int, shown
from vptq_runtime.engine.engine import Engine, EngineStats
from vptq_runtime.engine.prefix_cache import CacheMode
from vptq_runtime.engine.request import LogitsRequest, Request
from vptq_runtime.engine.stream import GenerationStream
from vptq_runtime.errors import OptionError, OutOfMemoryError
from vptq_runtime.generation import Generation, Timings
from vptq_runtime.metadata import Metadata
from vptq_runtime.models.model import model_file, open_model
from vptq_runtime.options import Options
from vptq_runtime.requests import Requests
from vptq_runtime.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Unpack

    from vptq_runtime.options import GenerateOptions
    from vptq_runtime.text.chat_template import Message

    Prompts = list[str] | list[list[int]] | list[str | list[int]]

__all__ = ["EngineStats", "Generation", "GenerationStream", "Runtime", "Timings"]

DEFAULT_N_CTX = 4096  # at most; a KV cache for all that a model was trained on can be larger than the model
MAX_INT = 2**31 - 1
DEVICES = ("auto", "cpu", "cuda")
KV_TYPES = ("f16", "f32", "q8_0")
PRECISIONS = ("auto", "f32")
PARALLEL = {"cpu": 8, "cuda": 64}  # more decode faster all together, and each for itself slower
QUEUE = 1024
LEAST_QUEUE_TOKENS, QUEUE_CONTEXTS = 2**20, 16  # where nothing else is asked for
_log = logging.getLogger("vptq_runtime")


class Runtime:
    """A VPTQ model in a GGUF file, ready to run.

    path: the file, as `vptq-convert` writes it; or a checkpoint's directory, or owner/model[@revision] on the
        Hugging Face hub: downloaded and converted into a cache, or found there (docs/models.md). What is done
        about it is logged, as warnings of "vptq_runtime".
    device: "auto" (the best there is), "cpu" or "cuda"; `.device` says what it became.
    gpu_layers: so many of the last layers, and the output, on the GPU, or on several where one cannot hold
        them, the others on the CPU. None: all, and with "auto" as many as fit. More than there are: all.
    n_ctx: most tokens of one sequence, prompt and continuation; 0 for what the model was trained on,
        which is the default up to 4096.
    n_threads: by default one for each physical core.
    kv_type: element type of the KV cache, "f16", "f32", or "q8_0" (half of f16's bytes).
    precision: "auto" puts prompts (never generated tokens) through the linear layers in 16-bit integers where
        that is faster; docs/exactness.md says what it changes. "f32": all in float32.
    kv_tokens: most tokens of the KV cache, of all requests and of what is kept for later ones, at least
        n_ctx. None: as many as three quarters of the available memory hold, but no more than 64 n_ctx. Memory
        is taken when it is needed.
    cache: whose computed prompts and texts serve a new prompt that begins so. "shared": everybody's. "exact":
        prompts serve, but not what was generated, so that no result depends on the cache, by a rounding (see
        precision). "off": nobody's.
    parallel: most requests that are computed together, the others wait; None for 8, on a GPU 64.
    queue, queue_tokens: most requests that wait, and most tokens of their prompts; one more is a BusyError. A
        prompt that would wait alone always may. None: 16 n_ctx, at least 2**20.
    progress: called while the weights are made ready, with how many layers are and how many there are.

    Calls from several threads are computed together, and each gives what it gives alone. Use it in a `with`
    block, or call `close()`. Raises FileError (missing, damaged, contradictory), UnsupportedError
    (architecture, device), OptionError, OutOfMemoryError and DeviceError (a GPU that fails, or computes other
    numbers than the CPU), all of them VPTQError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        device: str = "auto",
        n_ctx: int | None = None,
        n_threads: int | None = None,
        kv_type: str = "f16",
        precision: str = "auto",
        gpu_layers: int | None = None,
        kv_tokens: int | None = None,
        cache: CacheMode = "shared",
        parallel: int | None = None,
        queue: int = QUEUE,
        queue_tokens: int | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        for option, number, least, most in (
            ("n_ctx", n_ctx, 0, MAX_INT),
            ("n_threads", n_threads, 1, 1024),
            ("gpu_layers", gpu_layers, 0, MAX_INT),
            ("kv_tokens", kv_tokens, 1, MAX_INT),
            ("parallel", parallel, 1, 1024),
            ("queue_tokens", queue_tokens, 0, None),
        ):
            if number is not None:
                check_int(option, number, least, most)
        check_int("queue", queue, 0, MAX_INT)
        check_choice("kv_type", kv_type, KV_TYPES)
        check_choice("precision", precision, PRECISIONS)
        check_choice("device", device, DEVICES)
        if progress is not None and not callable(progress):
            raise OptionError(f"progress: found {shown(progress)}, expected a function")
        check_choice("cache", cache, get_args(CacheMode))
        self._path = model_file(_checked_path(path), _log.warning)
        start = time.perf_counter()
        model = open_model(self._path)
        self._model: _native.Model | None = model
        self._metadata = Metadata(model)
        self._vocabulary = Vocabulary(self._metadata, model.n_vocab, self._path)
        self._n_ctx_train = model.n_ctx_train
        self._context_options: dict[str, Any] = {
            "device": device,
            "gpu_layers": -1 if gpu_layers is None else gpu_layers,
            "n_threads": n_threads or 0,
            "kv_type": kv_type,
            "precision": precision,
        }
        context = _native.Context(
            model,
            **self._context_options,
            n_ctx=min(model.n_ctx_train, DEFAULT_N_CTX) if n_ctx is None else n_ctx or model.n_ctx_train,
            kv_tokens=kv_tokens or 0,
            progress=progress,
        )
        self._device = context.device
        self._why_not_cuda = context.why_not_cuda
        self._n_ctx = context.n_ctx
        self._n_batch = context.n_batch
        closed = f"{self._path}: the Runtime is closed, expected an open one"
        self._parallel = parallel or PARALLEL["cuda" if self._device.startswith("cuda") else "cpu"]
        self._engine = Engine(
            context,
            parallel=self._parallel,
            queue=queue,
            queue_tokens=max(LEAST_QUEUE_TOKENS, QUEUE_CONTEXTS * self._n_ctx)
            if queue_tokens is None
            else queue_tokens,
            cache=cache,
            closed=lambda: OptionError(closed),
        )
        # Without a word to it: before the interpreter's end, or where nobody has it any more.
        self._close_engine = weakref.finalize(self, self._engine.close)
        self._requests = Requests(self._vocabulary, self._n_ctx, time.perf_counter() - start)

    def __repr__(self) -> str:
        state = f"on {self._device}, n_ctx {self._n_ctx}" if self._model else "closed"
        return f"<Runtime {self._path!r} {state}>"

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives back the file and the memory. Requests at work end with an OptionError that says so."""
        self._close_engine()
        self._model = None
        self._requests.forget_draft_models()

    @property
    def metadata(self) -> Mapping[str, Any]:
        """All key-value pairs of the file, read only; arrays are lists, made when they are asked for."""
        self._engine.check_open()
        return self._metadata

    @property
    def device(self) -> str:
        """What the model runs on, for people: `cpu (avx512, 2 threads)`."""
        return self._device

    @property
    def why_not_cuda(self) -> str:
        """Why device="auto" has not put all layers on GPUs; else empty."""
        return self._why_not_cuda

    @property
    def n_ctx(self) -> int:
        """Most tokens of one sequence."""
        return self._n_ctx

    @property
    def n_ctx_train(self) -> int:
        """Most tokens of the sequences that the model was trained on; past that its text may be poor."""
        return self._n_ctx_train

    @property
    def n_vocab(self) -> int:
        """Tokens that the model knows; ids are below it."""
        return self._vocabulary.n_vocab

    @property
    def bos_token(self) -> int | None:
        """The token that the model's tokenizer puts in front of a text; None where it puts none."""
        self._engine.check_open()
        return self._vocabulary.bos_token

    @property
    def parallel(self) -> int:
        """Most requests that are computed together."""
        return self._parallel

    def stats(self) -> EngineStats:
        """What is being done, and what has been done since the start."""
        return self._engine.stats

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of a text. `add_special`: with BOS, where the model's tokenizer adds it."""
        return self._vocabulary.encode(text, add_special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of token ids; special tokens have none, bytes that are not UTF-8 become U+FFFD."""
        return self._vocabulary.tokenizer.decode(self._vocabulary.checked("tokens", tokens))

    def token_text(self, token: int) -> str:
        """A token where it is shown by itself: its text, or, of a special one, its spelling."""
        return self._vocabulary.shown(token)

    @overload
    def generate(
        self, prompt: str | list[int], *, stream: Literal[False] = ..., **options: Unpack[GenerateOptions]
    ) -> Generation: ...
    @overload
    def generate(
        self, prompt: Prompts, *, stream: Literal[False] = ..., **options: Unpack[GenerateOptions]
    ) -> list[Generation]: ...
    @overload
    def generate(
        self, prompt: str | list[int], *, stream: Literal[True], **options: Unpack[GenerateOptions]
    ) -> GenerationStream: ...
    def generate(
        self, prompt: Any, *, stream: bool = False, **options: Any
    ) -> Generation | list[Generation] | GenerationStream:
        """Continues a text.

        prompt: a text, a list of token ids, or a list of either, computed together. A text gets the model's
            BOS where its tokenizer adds it; an empty one is only that.
        stream: return a GenerationStream, an iterator over pieces of the text (one prompt only).

        max_tokens = 128: most new tokens, and never more than the context has room for: None asks for all of
            it. 0 is for prompt_logprobs alone.
        temperature = 0.8: 0 is greedy, always the most likely token.
        top_k = 40: sample among the k most likely tokens; 0 is off.
        top_p = 0.95: ... the most likely tokens, as few as it takes for their probabilities to reach p; 1 is
            off.
        min_p = 0.05: ... the tokens at least this likely, relative to the most likely one; 0 is off.
        repeat_penalty = 1: divides the logits of the last 64 tokens where they are positive, and multiplies
            negative ones; 1 is off.
        presence_penalty, frequency_penalty = 0: taken from the logit of each token that was generated, once,
            and as often as it was; from -2 to 2.
        logit_bias: token ids with numbers from -100 to 100, which are added to their logits.
        seed: the same seed gives the same text; None draws one. Prompt i of a list has seed + i.
        stop: a string or several that end the text, which ends before them.
        min_tokens = 0: so many tokens come before the text may end by an end token or a stop string.
        logprobs = 0: at each new token its log-probability, and of so many likeliest ones there; 0 is off.
        prompt_logprobs: the same at each token of the prompt; 0 tells only of these; None is off.
        json_schema, regex, grammar: one of them that the text has to match: a JSON schema (as a dict or as
            JSON), a regular expression, a grammar as of Lark. docs/python-api.md says what may stand there.
        speculate = "auto": guess tokens ahead, which changes the speed and never the text: from the text
            itself ("ngram"), or by a Runtime of a small model with the same tokens; "off". "auto" is "ngram".
        cache_salt: prompts share computed blocks only with prompts of the same one.

        Returns a Generation, or a list of them for a list of prompts ([] is a prompt of no tokens). Ctrl-C,
        as any exception, ends the call and leaves the Runtime usable. Raises OptionError for an option out of
        range and for a prompt that leaves no room in the context, OutOfMemoryError where the cache does not
        fit.
        """
        checked = Options.of(options)
        several = isinstance(prompt, list | tuple) and any(not isinstance(item, int) for item in prompt)
        if several and stream:
            raise OptionError("stream: found a list of prompts, expected one prompt")
        if not several:
            one = self._submit(prompt, checked)
            return one if stream else one.result()
        self._engine.check_open()
        requests = [self._requests.new(item, checked, index) for index, item in enumerate(prompt)]
        streams: list[GenerationStream] = []
        try:
            for request in requests:
                self._engine.submit(request, wait=True)
                streams.append(self._stream(request))
            return [each.result() for each in streams]
        except BaseException:
            for each in streams:
                each.cancel()
            for each in streams:
                each.close()
            raise

    def submit(self, prompt: str | list[int], **options: Unpack[GenerateOptions]) -> GenerationStream:
        """Begins to continue a text, and does not wait for it: see `generate`, with stream=True.

        Before it returns, it makes tokens of the prompt (milliseconds), tries a form that is asked for the
        first time (json_schema, regex, grammar: 0.1 to 3 s), and makes a context for a new draft model. An
        event loop is not to wait for that: `await asyncio.to_thread(runtime.submit, prompt, regex=...)`.

        Raises BusyError where too many requests wait, beside what `generate` raises.
        """
        return self._submit(prompt, Options.of(options))

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[False] = ..., **options: Unpack[GenerateOptions]
    ) -> Generation: ...
    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[True], **options: Unpack[GenerateOptions]
    ) -> GenerationStream: ...
    def chat(
        self, messages: Sequence[Message], *, stream: bool = False, **options: Unpack[GenerateOptions]
    ) -> Generation | GenerationStream:
        """The assistant's next message, by the model's own chat template.

        messages: dicts with the strings `role` (system, user, assistant) and `content`. All else is as in
        `generate`; UnsupportedError says that the model has no template.
        """
        tokens = self.chat_tokens(messages)
        return self.generate(tokens, stream=True, **options) if stream else self.generate(tokens, **options)

    def chat_tokens(self, messages: Sequence[Message]) -> list[int]:
        """The prompt that `chat` makes of messages, as token ids."""
        self._engine.check_open()
        return self.tokenize(self._vocabulary.chat_template.render(messages), add_special=False)

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits of the token after each of `tokens`: float32 (n_tokens, n_vocab).

        Raises OptionError for no tokens or more than n_ctx.
        """
        import numpy as np

        pieces = self.logits_in_pieces(tokens)
        shape = (len(tokens), self.n_vocab)
        try:
            logits = np.empty(shape, np.float32)
        except MemoryError:
            raise OutOfMemoryError(
                f"tokens: found no memory for float32 logits {shape}, expected some"
            ) from None
        for start, piece in zip(range(0, len(tokens), self._n_batch), pieces, strict=True):
            logits[start : start + len(piece)] = piece
        return logits

    def logits_in_pieces(self, tokens: Sequence[int], *, first: int = 0) -> Generator[NDArray[np.float32]]:
        """`logits` of tokens[first:], as many tokens at a time as are fed at once: a multiple of 128.

        For sums over them: with a vocabulary of 128K they are 0.5 MB a token.
        """
        prompt = self._vocabulary.checked("tokens", tokens)
        self._engine.check_open()
        if not 1 <= len(prompt) <= self._n_ctx:
            raise OptionError(f"tokens: found {len(prompt)} tokens, expected 1 to n_ctx = {self._n_ctx}")
        check_int("first", first, 0, len(prompt) - 1)
        request = LogitsRequest(prompt, sampler=None, max_tokens=0, uses_cache=False, alone=True, first=first)
        return self._logits_in_pieces(request)

    def _logits_in_pieces(self, request: LogitsRequest) -> Generator[NDArray[np.float32]]:
        self._engine.submit(request, wait=True)
        with self._stream(request) as news:
            while news.next_delta() is not None:
                piece, request.piece = request.piece, None
                self._engine.resume()
                assert piece is not None
                yield piece

    def _submit(self, prompt: object, options: Options) -> GenerationStream:
        self._engine.check_room()
        request = self._requests.new(prompt, options)
        self._engine.submit(request)
        return self._stream(request)

    def _stream(self, request: Request) -> GenerationStream:
        # It holds on to this Runtime: while somebody has a stream of it, it goes on.
        return GenerationStream(self._engine, request, lambda r: self._requests.generation(r))


def _checked_path(path: object) -> str:
    try:
        text = os.fsdecode(path)  # type: ignore[arg-type]
        text.encode()
    except (TypeError, UnicodeError):
        raise OptionError(f"path: found {shown(path)}, expected a file name in valid UTF-8") from None
    if not text or "\0" in text:
        raise OptionError(f"path: found {shown(text)}, expected a file name")
    return text
