"""Text in, text out: a model file, its tokenizer and a native context behind one class."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, overload

from vptq_runtime import _native
from vptq_runtime.errors import FileError, OptionError, OutOfMemoryError, UnsupportedError
from vptq_runtime.generation import (
    Generation,
    GenerationStream,
    Options,
    Timings,
    check_choice,
    check_int,
    shown,
)
from vptq_runtime.kept_sequence import KeptSequence
from vptq_runtime.metadata import Metadata
from vptq_runtime.sequence import DecodingSequence
from vptq_runtime.text.text_stream import TextStream
from vptq_runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Unpack

    from vptq_runtime.generation import GenerateOptions
    from vptq_runtime.text.chat_template import ChatTemplate, Message

    Prompts = list[str] | list[list[int]] | list[str | list[int]]

__all__ = ["Generation", "GenerationStream", "Runtime", "Timings"]

DEFAULT_N_CTX = 4096  # at most; a KV cache for all that a model was trained on can be larger than the model
LONG_TOKEN = 64  # characters; some more than tokens have, for what normalizers drop
MAX_INT = 2**31 - 1
DEVICES = ("auto", "cpu", "cuda")
KV_TYPES = ("f16", "f32", "q8_0")
PRECISIONS = ("auto", "f32")


class Runtime:
    """A VPTQ model in a GGUF file, ready to run.

    path: the file, as `vptq-convert` writes it.
    device: "auto" (the best there is), "cpu" or "cuda"; `.device` says what it became.
    gpu_layers: so many of the last layers, and the output, on the GPU, or on several where one cannot hold
        them, the others on the CPU. None: all, and with "auto" as many as fit. More than there are: all.
    n_ctx: most tokens of one sequence, prompt and continuation; 0 for what the model was trained on,
        which is the default up to 4096. The cache's memory is taken per sequence, when it is needed.
    n_threads: by default one for each physical core.
    kv_type: element type of the KV cache, "f16", "f32", or "q8_0" (half of f16's bytes).
    precision: "auto" puts prompts (never generated tokens) through the linear layers in 16-bit integers where
        that is faster; docs/exactness.md says what it changes. "f32": all in float32.

    progress: called while the weights are made ready, with how many layers are and how many there are.

    The KV cache of the last single prompt is kept: of a next one that begins like it, only the rest is fed.

    Use it in a `with` block, or call `close()`. Threads may share it: their calls take turns, token by token.
    Raises FileError (missing, damaged, contradictory), UnsupportedError (architecture, device), OptionError,
    OutOfMemoryError and DeviceError (a GPU that fails, or computes other numbers than the CPU), all of them
    VPTQError.
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
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        start = time.perf_counter()
        if n_ctx is not None:
            check_int("n_ctx", n_ctx, 0, MAX_INT)
        if n_threads is not None:
            check_int("n_threads", n_threads, 1, 1024)
        check_choice("kv_type", kv_type, KV_TYPES)
        check_choice("precision", precision, PRECISIONS)
        check_choice("device", device, DEVICES)
        if gpu_layers is not None:
            check_int("gpu_layers", gpu_layers, 0, MAX_INT)
        self._path = _checked_path(path)
        model = _native.Model(self._path)
        self._metadata: Metadata | None = Metadata(model)
        self._n_vocab = model.n_vocab
        self._n_ctx_train = model.n_ctx_train
        tokenizer_json = self.metadata.get("tokenizer.huggingface.json")
        self._tokenizer = None
        if tokenizer_json is not None:
            self._tokenizer = Tokenizer(tokenizer_json, self._n_vocab, self._path)
            del tokenizer_json  # it and its parts were tens of MB
            _native.return_freed_memory()
        self._end_tokens = frozenset(self._file_tokens("vptq.eos_token_ids"))
        self._lock = threading.RLock()  # reentrant: the garbage collector may close a stream anywhere
        self._context: _native.Context | None = _native.Context(
            model,
            device=device,
            gpu_layers=-1 if gpu_layers is None else gpu_layers,
            n_ctx=min(model.n_ctx_train, DEFAULT_N_CTX) if n_ctx is None else n_ctx or model.n_ctx_train,
            n_threads=n_threads or 0,
            kv_type=kv_type,
            precision=precision,
            progress=progress,
        )
        self._kept = KeptSequence()
        self._device = self._context.device
        self._why_not_cuda = self._context.why_not_cuda
        self._n_ctx = self._context.n_ctx
        self._n_batch = self._context.n_batch
        self._load_s = time.perf_counter() - start

    def __repr__(self) -> str:
        state = f"on {self._device}, n_ctx {self._n_ctx}" if self._context else "closed"
        return f"<Runtime {self._path!r} {state}>"

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives back the file and the memory. Waits for a native call that another thread is in."""
        with self._lock:
            self._context = self._metadata = None

    @property
    def metadata(self) -> Mapping[str, Any]:
        """All key-value pairs of the file, read only; arrays are lists, made when they are asked for."""
        if self._metadata is None:
            raise self._closed()
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
        return self._n_vocab

    @property
    def bos_token(self) -> int | None:
        """The token that the model's tokenizer puts in front of a text; None where it puts none."""
        if self.metadata.get("tokenizer.ggml.add_bos_token") is not True:
            return None
        return next(iter(self._file_tokens("tokenizer.ggml.bos_token_id")), None)

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of a text. `add_special`: with BOS, where the model's tokenizer adds it."""
        if not isinstance(text, str):
            raise OptionError(f"text: found {shown(text)}, expected a string")
        return self._need_tokenizer().encode(text, add_special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of token ids; special tokens have none, bytes that are not UTF-8 become U+FFFD."""
        return self._need_tokenizer().decode(self._checked_tokens("tokens", tokens))

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
        self,
        prompt: Any,
        *,
        max_tokens: int | None = 128,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repeat_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        stream: bool = False,
    ) -> Generation | list[Generation] | GenerationStream:
        """Continues a text.

        prompt: a text, a list of token ids, or a list of either, decoded together as one batch. A text gets
            the model's BOS where its tokenizer adds it; an empty one is only that.
        max_tokens: most new tokens, and never more than the context has room for: None asks for all of it.
        temperature: 0 is greedy, always the most likely token.
        top_k: sample among the k most likely tokens; 0 is off.
        top_p: ... the most likely tokens, as few as it takes for their probabilities to reach p; 1 is off.
        min_p: ... the tokens at least this likely, relative to the most likely one; 0 is off.
        repeat_penalty: makes the last 64 tokens less likely; 1 is off.
        seed: the same seed gives the same text; None draws one. Prompt i of a list has seed + i.
        stop: a string or several that end the text, which ends before them.
        stream: return a GenerationStream, an iterator over pieces of the text (one prompt only).

        Returns a Generation, or a list of them for a list of prompts. Ctrl-C, as any exception, ends the call
        between two native ones and leaves the Runtime usable. Raises OptionError for an option out of range
        and for a prompt that leaves no room in the context, OutOfMemoryError where the cache does not fit.
        """
        options = Options.checked(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repeat_penalty=repeat_penalty,
            seed=seed,
            stop=stop,
        )
        several = isinstance(prompt, list | tuple) and any(not isinstance(item, int) for item in prompt)
        if several and stream:
            raise OptionError("stream: found a list of prompts, expected one prompt")
        prompts = [self._prompt_tokens(item) for item in (prompt if several else [prompt])]
        sequences = [self._new_sequence(index, tokens, options) for index, tokens in enumerate(prompts)]
        seconds: list[float] = []
        pieces = self._decode(sequences, seconds)
        if stream:
            return GenerationStream(pieces, lambda: self._generations(sequences, seconds)[0])
        with contextlib.closing(pieces):
            for _ in pieces:
                pass
        generations = self._generations(sequences, seconds)
        return generations if several else generations[0]

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
        return self.tokenize(self._chat_template.render(messages), add_special=False)

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits of the token after each of `tokens`: float32 (n_tokens, n_vocab).

        Raises OptionError for no tokens or more than n_ctx.
        """
        import numpy as np

        pieces = self.logits_in_pieces(tokens)
        shape = (len(tokens), self._n_vocab)
        try:
            logits = np.empty(shape, np.float32)
        except MemoryError:
            raise OutOfMemoryError(
                f"tokens: found no memory for float32 logits {shape}, expected some"
            ) from None
        with contextlib.closing(pieces):
            for start, piece in zip(range(0, len(tokens), self._n_batch), pieces, strict=True):
                logits[start : start + len(piece)] = piece
        return logits

    def logits_in_pieces(self, tokens: Sequence[int], *, first: int = 0) -> Generator[NDArray[np.float32]]:
        """`logits` of tokens[first:], as many tokens at a time as are fed at once: a multiple of 128.

        For sums over them: with a vocabulary of 128K they are 0.5 MB a token.
        """
        prompt = self._checked_tokens("tokens", tokens)
        self._check_open()
        if not 1 <= len(prompt) <= self._n_ctx:
            raise OptionError(f"tokens: found {len(prompt)} tokens, expected 1 to n_ctx = {self._n_ctx}")
        check_int("first", first, 0, len(prompt) - 1)
        return self._logits_in_pieces(prompt, first)

    def _logits_in_pieces(self, prompt: list[int], first: int) -> Generator[NDArray[np.float32]]:
        opened: list[int] = []
        try:
            with self._native() as context:
                opened.append(self._kept.new(context, len(prompt)))
            for start in range(0, first, self._n_batch):
                with self._native() as context:
                    context.prefill(opened, [prompt[start : min(start + self._n_batch, first)]])
            for start in range(first, len(prompt), self._n_batch):
                with self._native() as context:
                    logits = context.logits(opened[0], prompt[start : start + self._n_batch])
                yield logits
        finally:
            self._free(opened)

    def _decode(self, sequences: list[DecodingSequence], seconds: list[float]) -> Generator[str]:
        """Decodes sequences in lockstep; yields pieces of their texts.

        seconds: gets those of each step, the first one with the whole prompt.
        """
        try:
            start = time.perf_counter()
            for sequence in sequences:
                n_tokens = len(sequence.prompt) + sequence.max_tokens
                with self._native() as context:
                    if len(sequences) == 1:
                        sequence.id, sequence.n_cached = self._kept.take(context, sequence.prompt, n_tokens)
                    else:
                        sequence.id = self._kept.new(context, n_tokens)
            active = sequences
            feeds = [self._prefill(sequence) for sequence in sequences]
            while active:
                sampled = self._step(active, feeds)
                pieces = [sequence.accept(token) for sequence, token in zip(active, sampled, strict=True)]
                active = [sequence for sequence in active if not sequence.finish_reason]
                feeds = [sequence.tokens[-1:] for sequence in active]
                seconds.append(time.perf_counter() - start)
                yield from filter(None, pieces)
                start = time.perf_counter()
        finally:
            if len(sequences) == 1:
                self._keep(sequences[0])
            else:
                self._free([sequence.id for sequence in sequences if sequence.id >= 0])

    def _generations(self, sequences: list[DecodingSequence], seconds: list[float]) -> list[Generation]:
        """What `_decode` has made of the sequences by now."""
        fed = sum(len(sequence.prompt) - sequence.n_cached for sequence in sequences)
        timings = Timings(
            load_s=self._load_s,
            prompt_tokens=fed if seconds else 0,
            prompt_s=sum(seconds[:1]),
            decode_tokens=sum(sequence.n_decoded for sequence in sequences),
            decode_s=sum(seconds[1:]),
        )
        return [sequence.generation(timings) for sequence in sequences]

    def _new_sequence(self, index: int, prompt: list[int], options: Options) -> DecodingSequence:
        self._check_open()
        room = self._n_ctx - len(prompt)
        if room < 1:
            expected = f"expected at most {self._n_ctx - 1}: n_ctx is {self._n_ctx}, and one has to be free"
            raise OptionError(f"prompt: found {len(prompt)} tokens, {expected}")
        tokenizer = self._need_tokenizer() if options.stop else self._tokenizer
        sampler = options.sampler(index)
        sampler.accept(prompt)
        return DecodingSequence(
            prompt=prompt,
            max_tokens=min(room, options.max_tokens or room),
            sampler=sampler,
            end_tokens=self._end_tokens,
            text=TextStream(tokenizer, options.stop) if tokenizer else None,
        )

    def _prefill(self, sequence: DecodingSequence) -> list[int]:
        """Feeds what is new of a prompt but for its last chunk, which is left for the step that samples."""
        prompt = sequence.prompt[sequence.n_cached :]
        last = (len(prompt) - 1) // self._n_batch * self._n_batch
        for start in range(0, last, self._n_batch):
            with self._native() as context:
                context.prefill([sequence.id], [prompt[start : start + self._n_batch]])
        return prompt[last:]

    def _step(self, sequences: list[DecodingSequence], feeds: list[list[int]]) -> list[int]:
        """Feeds each sequence its tokens and samples the next ones, in as few batches as n_batch allows."""
        sampled: list[int] = []
        first = n_tokens = 0
        for end in range(1, len(sequences) + 1):
            n_tokens += len(feeds[end - 1])
            if end < len(sequences) and n_tokens + len(feeds[end]) <= self._n_batch:
                continue
            batch = sequences[first:end]
            with self._native() as context:
                sampled += context.step(
                    [sequence.id for sequence in batch],
                    feeds[first:end],
                    [sequence.sampler for sequence in batch],
                    [not sequence.tokens for sequence in batch],
                )
            first, n_tokens = end, 0
        return sampled

    def _keep(self, sequence: DecodingSequence) -> None:
        with self._lock:
            if self._context is not None and sequence.id >= 0:
                self._kept.keep(self._context, sequence.id, sequence.prompt + sequence.tokens)

    def _free(self, ids: list[int]) -> None:
        with self._lock:
            if self._context is not None:
                for sequence_id in ids:
                    self._context.free_sequence(sequence_id)

    def _check_open(self) -> None:
        if self._context is None:
            raise self._closed()

    def _closed(self) -> OptionError:
        return OptionError(f"{self._path}: the Runtime is closed, expected an open one")

    @contextlib.contextmanager
    def _native(self) -> Iterator[_native.Context]:
        """The context, for one call: between calls other threads get their turn, and close() its chance."""
        with self._lock:
            self._check_open()
            assert self._context is not None
            yield self._context

    def _prompt_tokens(self, prompt: object) -> list[int]:
        if isinstance(prompt, str):
            # A text that cannot fit is refused before the tokenizer spends minutes on it.
            most = self._n_ctx * max(self._need_tokenizer().longest, LONG_TOKEN)
            if len(prompt) > most:
                expected = f"expected at most {most}: n_ctx is {self._n_ctx}"
                raise OptionError(f"prompt: found {len(prompt)} characters, {expected}")
            tokens = self.tokenize(prompt)
        elif isinstance(prompt, list | tuple):
            tokens = self._checked_tokens("prompt", prompt)
        else:
            raise OptionError(f"prompt: found {shown(prompt)}, expected a string or a list of token ids")
        tokens = tokens or self._file_tokens("tokenizer.ggml.bos_token_id")
        if not tokens:
            raise OptionError(
                "prompt: found no tokens, expected some: the model has no BOS token to start from"
            )
        return tokens

    def _checked_tokens(self, option: str, tokens: Sequence[int]) -> list[int]:
        if not isinstance(tokens, list | tuple):
            raise OptionError(f"{option}: found {shown(tokens)}, expected a list of token ids")
        for index, token in enumerate(tokens):
            if type(token) is not int or not 0 <= token < self._n_vocab:
                check_int(f"{option}[{index}]", token, 0, self._n_vocab - 1)
        return list(tokens)

    def _need_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            found = "the model has no tokenizer (tokenizer.huggingface.json)"
            raise UnsupportedError(f"{self._path}: {found}, expected one: use token ids, not text")
        return self._tokenizer

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        from vptq_runtime.text.chat_template import ChatTemplate  # jinja2 is only loaded for a chat

        return ChatTemplate.of_file(self.metadata, self._need_tokenizer(), self._path)

    def _file_tokens(self, key: str) -> list[int]:
        """Token ids that the file has under a key: one, several or none."""
        tokens, checked = self.metadata.get(key, []), list[int]()
        for token in tokens if isinstance(tokens, list) else [tokens]:
            if not isinstance(token, int) or not 0 <= token < self._n_vocab:
                expected = f"expected token ids below {self._n_vocab}"
                raise FileError(f"{self._path}: {key}: found {shown(token)}, {expected}")
            checked.append(token)
        return checked


def _checked_path(path: object) -> str:
    try:
        text = os.fsdecode(path)  # type: ignore[arg-type]
        text.encode()
    except (TypeError, UnicodeError):
        raise OptionError(f"path: found {shown(path)}, expected a file name in valid UTF-8") from None
    if not text or "\0" in text:
        raise OptionError(f"path: found {shown(text)}, expected a file name")
    return text
