"""Measures how fast a model reads a prompt and decodes, and what it reads from memory for that."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from vptq_runtime import _native
from vptq_runtime.errors import OutOfMemoryError

BLOCK_TOKENS = 32  # of the KV cache
REST_BYTES = 150 << 20  # the interpreter, its libraries, the activations
# What every token needs of the last layer, for its keys and values; the rest of it is for those whose logits
# are wanted.
LAST_FOR_ALL = ("attn_q", "attn_k", "attn_v")
ENGINE_KINDS = ("eg", "ng")
GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0, "seed": 0}

Status = Callable[[str], AbstractContextManager[object]]  # says what is being done as long as it lasts


@dataclass(frozen=True)
class SpeedTest:
    """pp512: a prompt of 512 tokens, without logits; tg128: 128 tokens decoded one by one, tg128x8: by 8
    sequences together; layers128: as tg128, but without logits; eg128x8: as tg128x8, by requests through the
    engine; ng128: as eg128, with n-gram drafts that are all right. All from an empty context."""

    kind: str
    n_tokens: int  # of a sequence
    threads: int  # of the CPU; 0 on a GPU
    n_sequences: int = 1

    @property
    def name(self) -> str:
        together = f"x{self.n_sequences}" if self.n_sequences > 1 else ""
        return f"{self.kind}{self.n_tokens}{together}"

    @property
    def n_all(self) -> int:
        """The tokens of all sequences."""
        return self.n_tokens * self.n_sequences

    def calls(self, n_batch: int) -> Iterator[tuple[int, int]]:
        """The tokens [start, end) that each native call feeds, of each sequence."""
        step = n_batch if self.kind == "pp" else 1
        for start in range(0, self.n_tokens, step):
            yield start, min(start + step, self.n_tokens)


@dataclass(frozen=True)
class ModelFacts:
    """What a model is and how many bytes it takes and reads."""

    name: str
    quant: str
    n_layer: int
    model_bytes: int
    layers_bytes: int  # the weights of all layers
    prompt_bytes: int  # those of them that tokens without logits go through
    output_bytes: int  # the output matrix, or the embedding where it is tied to that
    embedding_row_bytes: int
    kv_bytes: int  # keys and values of one token

    @classmethod
    def of_tensors(
        cls,
        tensor_bytes: Mapping[str, int],
        *,
        name: str,
        quant: str,
        n_layer: int,
        n_vocab: int,
        model_bytes: int,
        kv_bytes: int,
    ) -> ModelFacts:
        def total(prefix: str) -> int:
            return sum(n for tensor, n in tensor_bytes.items() if tensor.startswith(prefix))

        embedding, last = total("token_embd."), f"blk.{n_layer - 1}."
        needed = sum(total(f"{last}{name}.") for name in ("attn_norm", *LAST_FOR_ALL))
        return cls(
            name=name,
            quant=quant,
            n_layer=n_layer,
            model_bytes=model_bytes,
            layers_bytes=total("blk."),
            prompt_bytes=total("blk.") - total(last) + needed,
            output_bytes=total("output.") or embedding,
            embedding_row_bytes=embedding // n_vocab,
            kv_bytes=kv_bytes,
        )

    @classmethod
    def of_model(cls, model: _native.Model, name: str, kv_type: str) -> ModelFacts:
        value, arch = model.metadata_value, model.metadata_value("general.architecture")
        return cls.of_tensors(
            {tensor: n_bytes for tensor, (_, n_bytes) in model.tensors.items()},
            name=name,
            quant=_quants(model),
            n_layer=model.n_layer,
            n_vocab=model.n_vocab,
            model_bytes=model.file_bytes,
            kv_bytes=kv_bytes(
                model.n_layer,
                value(f"{arch}.attention.head_count_kv"),
                value(f"{arch}.attention.key_length"),
                kv_type,
            ),
        )

    def memory_bytes(self, n_cached: int, rest: int = REST_BYTES) -> int:
        """What running it takes with so many tokens in the KV cache."""
        return self.model_bytes + self.kv_bytes * n_cached + rest

    def check_memory(
        self,
        n_cached: int,
        available: int,
        *,
        rest: int = REST_BYTES,
        memory_name: str = "memory",
        hint: str = "",
    ) -> None:
        """Raises OutOfMemoryError where more than what is available is needed; hint: what to do then."""
        need = self.memory_bytes(n_cached, rest)
        if need > available:
            cache = f", KV cache of {n_cached} tokens {_gib(self.kv_bytes * n_cached)}" if n_cached else ""
            raise OutOfMemoryError(
                f"{self.name}, {self.n_layer} layers: needs {_gib(need)} of {memory_name} "
                f"(model {_gib(self.model_bytes)}{cache}), {_gib(available)} are available"
                + (f": {hint}" if hint else "")
            )

    def bytes_per_token(self, test: SpeedTest, n_batch: int) -> float:
        """That a test has to read at least: once for each call the layers' weights, in decoding the output's,
        too, and the keys and values up to there (a prompt's last layer has no use for them); and each
        token's row of the embedding."""
        weights, kv = self.layers_bytes + self.output_bytes, self.kv_bytes
        if test.kind == "pp":
            weights, kv = self.prompt_bytes, self.kv_bytes // self.n_layer * (self.n_layer - 1)
        read = sum(weights + kv * end * test.n_sequences for _, end in test.calls(n_batch))
        return read / test.n_all + self.embedding_row_bytes


@dataclass(frozen=True)
class Measured:
    device: str
    n_batch: int
    load_s: float  # until the first token could be fed
    seconds: dict[SpeedTest, list[float]]  # one a repetition
    peak_memory: int = 0  # bytes


def kv_bytes(n_layer: int, n_head_kv: int, head_dim: int, kv_type: str) -> int:
    """Of the keys and values of one token."""
    block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kv_type.upper()]]
    return 2 * n_layer * n_head_kv * head_dim * block_bytes // block_size


def open_model(path: str) -> tuple[_native.Model, float]:
    """The model, and the seconds it took to open and check its file."""
    begin = time.perf_counter()
    model = _native.Model(path)
    return model, time.perf_counter() - begin


def measure(
    model: _native.Model,
    open_s: float,
    tests: Sequence[SpeedTest],
    *,
    device: str,
    gpu_layers: int = -1,
    kv_type: str,
    precision: str,
    repetitions: int,
    peak_memory: Callable[[], int],
    status: Status,
) -> Measured:
    """Runs each test for warming up, a batch of a prompt or a few tokens, and `repetitions` times.

    The "layers" tests always in f32: what they feed is a prompt only to the runtime, and stands for tokens
    that are generated. peak_memory is asked before each context ends.
    """
    from vptq_runtime.bench.engine_speed import run_engine

    n_ctx = max(test.n_tokens for test in tests) + 1  # requests begin with a token
    # A sequence's last block may be almost empty.
    kv_tokens = max(test.n_sequences * (test.n_tokens + BLOCK_TOKENS) for test in tests)
    load_s, peak = 0.0, 0
    seconds: dict[SpeedTest, list[float]] = {}
    groups: dict[tuple[int, str], list[SpeedTest]] = {}
    for test in tests:
        test_precision = "f32" if test.kind == "layers" else precision
        groups.setdefault((test.threads, test_precision), []).append(test)
    for (n_threads, context_precision), group in groups.items():
        begin = time.perf_counter()
        context = _native.Context(
            model,
            device=device,
            gpu_layers=gpu_layers,
            n_ctx=n_ctx,
            n_threads=n_threads,
            kv_type=kv_type,
            precision=context_precision,
            kv_tokens=kv_tokens,
        )
        load_s = load_s or open_s + time.perf_counter() - begin
        for test in group:
            with status(test.name + (f", threads: {n_threads}" if n_threads else "")):
                run = run_engine if test.kind in ENGINE_KINDS else _run
                seconds[test] = run(context, test, repetitions, model.n_vocab)
        device_name, n_batch = context.device, context.n_batch
        peak = max(peak, peak_memory())
        del context  # before the next one takes its memory
    return Measured(device_name, n_batch, load_s, seconds, peak)


def extrapolated(
    measured: Measured, n_measured: int, n_layer: int, left_out: Mapping[str, float]
) -> Measured:
    """The seconds that n_layer layers would take, from those of n_measured.

    A prompt's time is all in the layers, as it computes no logits. How much of decoding's is in them, the
    "layers" test says, which has to be there for each "tg" test. left_out: of each of the two, "pp" and
    "layers", the part of the last layer that it leaves out, which is for tokens with logits.
    """
    seconds = {}
    for test, times in measured.seconds.items():
        if test.kind != "layers":
            kind = "pp" if test.kind == "pp" else "layers"
            in_layers = measured.seconds[replace(test, kind=kind)]
            lacking = (n_layer - n_measured) / (n_measured - left_out[kind])
            seconds[test] = [s + lacking * layers for s, layers in zip(times, in_layers, strict=True)]
    return replace(measured, seconds=seconds)


def _run(context: _native.Context, test: SpeedTest, repetitions: int, n_vocab: int) -> list[float]:
    tokens = np.random.default_rng(0).integers(n_vocab, size=(test.n_sequences, test.n_tokens)).tolist()
    samplers = [_native.Sampler(**GREEDY) for _ in tokens]  # type: ignore[arg-type]
    sequences = [context.new_sequence() for _ in tokens]

    def call(start: int, end: int) -> None:
        fed = [each[start:end] for each in tokens]
        if test.kind == "tg":
            context.forward(sequences, fed, samplers=samplers)
            context.sample(samplers)
        else:
            context.forward(sequences, fed, [True] * len(fed), ["none"] * len(fed))

    calls = list(test.calls(context.n_batch))
    # A GPU's first steps are run, recorded and played; of a prompt's all are run.
    for start, end in calls[: 1 if test.kind == "pp" else 3]:
        call(start, end)
    seconds = []
    for _ in range(repetitions):
        for sequence in sequences:
            context.truncate(sequence, 0)
        begin = time.perf_counter()
        for start, end in calls:
            call(start, end)
        seconds.append(time.perf_counter() - begin)
    for sequence in sequences:
        context.free_sequence(sequence)
    return seconds


def _quants(model: _native.Model) -> str:
    """The most frequent configuration of the VPTQ layers, and how many others there are."""
    shapes = {name: shape for name, (shape, _) in model.tensors.items()}
    found: Counter[str] = Counter()
    for name in model.linear_names():
        centroids = shapes.get(f"{name}.vptq_centroids")
        if centroids is not None:
            _, k, v = centroids
            _, r, _ = shapes.get(f"{name}.vptq_res_centroids", (0, 0, 0))
            found[f"v{v}-k{k}-{r}"] += 1
    if not found:
        return "dense"
    others = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return found.most_common(1)[0][0] + others


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"
