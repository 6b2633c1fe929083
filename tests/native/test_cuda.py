"""What only a GPU has: that it is found or not, that a model fits or not, recorded steps, sampling."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feeding import all_logits, prefill, step
from gpu import need_gpu
from numpy.typing import NDArray
from relative_error import relative_l2
from tiny_gguf import KEYS, N_EMBD, tensors, write

from vptq_runtime import _native, demo_path
from vptq_runtime.errors import FileError, OptionError, OutOfMemoryError, UnsupportedError

GREEDY = dict(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0, seed=0)


def context(device: str, **options: int | str) -> _native.Context:
    return _native.Context(
        _native.Model(demo_path()),
        device=device,
        **{"n_ctx": 256, "n_threads": 1, "kv_type": "f16"} | options,
    )


@pytest.fixture
def on_gpu() -> Iterator[_native.Context]:
    need_gpu()
    yield context("cuda")


def greedy(context: _native.Context, n_steps: int) -> list[int]:
    sequence = context.new_sequence()
    tokens = [1]
    for _ in range(n_steps):
        tokens += step(context, [sequence], [tokens[-1:]], [_native.Sampler(**GREEDY)])
    return tokens


class TestWithoutAGpu:
    @pytest.fixture(autouse=True)
    def no_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VPTQ_CUDA_LIBRARY", "/nowhere/libvptq_cuda.so")

    def test_cuda_is_refused(self) -> None:
        with pytest.raises(UnsupportedError, match=r"^device cuda: this build has no CUDA backend: /n"):
            context("cuda")

    def test_auto_says_why_it_is_the_cpu(self) -> None:
        found = context("auto")
        assert found.device.startswith("cpu (")
        assert found.why_not_cuda.startswith("device cuda: this build has no CUDA backend: /nowhere/")

    def test_the_cpu_that_was_asked_for_needs_no_reason(self) -> None:
        assert context("cpu").why_not_cuda == ""

    def test_another_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VPTQ_CUDA_LIBRARY", "libm.so.6")
        with pytest.raises(UnsupportedError, match=r"^device cuda: libm.so.6 is not this runtime's"):
            context("cuda")


@pytest.mark.gpu
class TestOnAGpu:
    def test_auto_is_the_gpu(self, on_gpu: _native.Context) -> None:
        found = context("auto")
        assert found.device == on_gpu.device and found.device.startswith("cuda (")
        assert found.why_not_cuda == ""

    def test_same_tokens_as_on_the_cpu(self, on_gpu: _native.Context) -> None:
        assert greedy(on_gpu, 32) == greedy(context("cpu"), 32)

    def test_recorded_steps_change_nothing(self, on_gpu: _native.Context) -> None:
        """A context's first step of one token is run as it is, the second recorded, the others played."""
        sequences = [on_gpu.new_sequence() for _ in range(3)]
        prefill(on_gpu, sequences, [[1, 5, 9]] * 3)
        for sequence in sequences:
            for token in (3, 4):
                step(on_gpu, [sequence], [[token]], [_native.Sampler(**GREEDY)], [False])
        logits = [all_logits(on_gpu, sequence, [7]) for sequence in sequences]
        assert np.array_equal(logits[0], logits[1]) and np.array_equal(logits[0], logits[2])

    def test_memory_of_200_steps(self, on_gpu: _native.Context) -> None:
        sequence = on_gpu.new_sequence()
        prefill(on_gpu, [sequence], [[1] * 240])  # memory for its blocks
        on_gpu.truncate(sequence, 0)
        tokens = [1]
        free = []
        for _ in range(240):
            tokens = step(on_gpu, [sequence], [tokens], [_native.Sampler(**GREEDY)])
            free.append(on_gpu.available_memory)
        assert free[40:] == [free[40]] * 200

    def test_a_cache_that_does_not_fit(self, on_gpu: _native.Context) -> None:
        expected = r"weights of .* GiB and the KV cache for \d+ tokens .* need .* GiB, .* are available"
        with pytest.raises(OutOfMemoryError, match=expected):
            context("cuda", n_ctx=2**30, kv_type="f32")


def heads_model(directory: Path, n_head: int, n_head_kv: int, head_dim: int) -> _native.Model:
    keys = KEYS | {
        "llama.attention.head_count": n_head,
        "llama.attention.head_count_kv": n_head_kv,
        **{f"llama.{key}": head_dim for key in ("attention.key_length", "attention.value_length")},
        "llama.rope.dimension_count": head_dim,
    }
    rng = np.random.default_rng(0)
    q, kv = n_head * head_dim, n_head_kv * head_dim
    shapes = {
        "attn_q": (q, N_EMBD),
        "attn_k": (kv, N_EMBD),
        "attn_v": (kv, N_EMBD),
        "attn_output": (N_EMBD, q),
    }
    arrays = {
        f"blk.0.{name}.weight": (0.1 * rng.normal(size=shape)).astype(np.float16)
        for name, shape in shapes.items()
    }
    return _native.Model(str(write(directory / "heads.gguf", keys, tensors() | arrays)))


@pytest.mark.gpu
class TestModelsBeyondTheKernels:
    """Refused by name; not run over the end of an array, nor into a launch that fails."""

    @staticmethod
    def context(model: _native.Model, device: str, n_ctx: int = 64) -> _native.Context:
        need_gpu()
        return _native.Context(model, device=device, n_ctx=n_ctx, n_threads=1, kv_type="f16")

    @pytest.mark.parametrize(
        ("heads", "expected"),
        [
            ((2, 1, 258), "attention.key_length': 258, expected at most 256"),
            ((1, 1, 1024), "attention.key_length': 1024, expected at most 256"),
            ((65536, 1, 2), "attention.head_count': 65536, expected at most 65535"),
            ((65536, 65536, 2), "attention.head_count': 65536, expected at most 65535"),
        ],
    )
    def test_heads(self, tmp_path: Path, heads: tuple[int, int, int], expected: str) -> None:
        model = heads_model(tmp_path, *heads)
        why = f"{tmp_path}/heads.gguf: key 'llama.{expected} on a GPU"
        with pytest.raises(UnsupportedError) as error:
            self.context(model, "cuda")
        assert str(error.value) == why
        on_cpu = self.context(model, "auto")
        assert on_cpu.device.startswith("cpu (") and on_cpu.why_not_cuda == why
        assert np.isfinite(all_logits(on_cpu, on_cpu.new_sequence(), [1, 2])).all()

    def test_a_context_of_two_to_the_31st(self, tmp_path: Path) -> None:
        model = heads_model(tmp_path, 1, 1, 2)
        why = "n_ctx: found 2147483647, expected at most 2147479552 on a GPU"
        with pytest.raises(OptionError, match=f"^{why}$"):
            self.context(model, "cuda", 2**31 - 1)

    def test_the_widest_heads_that_there_are(self, tmp_path: Path) -> None:
        """As a prompt's tokens and as generated ones."""
        model = heads_model(tmp_path, 6, 3, 256)
        on_gpu, on_cpu = (self.context(model, device) for device in ("cuda", "cpu"))
        logits = []
        for found in (on_gpu, on_cpu):
            sequence = found.new_sequence()
            logits.append(all_logits(found, sequence, list(range(35))))
            step(found, [sequence], [[7]], [_native.Sampler(**GREEDY)], [False])
            logits.append(all_logits(found, sequence, [9]))
        assert relative_l2(logits[0], logits[2]) < 1e-3
        assert relative_l2(logits[1], logits[3]) < 1e-3


@pytest.mark.gpu
class TestSampling:
    """From what a step reads of its logits, as from all of them."""

    @pytest.fixture
    def tiny(self, tmp_path: Path) -> _native.Context:
        return self.context(tmp_path, tensors())

    @staticmethod
    def context(directory: Path, arrays: dict[str, NDArray[Any]]) -> _native.Context:
        need_gpu()
        n_vocab = 600  # more than any sampler here needs
        embeddings = np.random.default_rng(0).normal(size=(n_vocab, N_EMBD)).astype(np.float16)
        keys, arrays = KEYS | {"llama.vocab_size": n_vocab}, arrays | {"token_embd.weight": embeddings}
        model = _native.Model(str(write(directory / "tiny.gguf", keys, arrays)))
        return _native.Context(model, device="cuda", n_ctx=64, n_threads=1, kv_type="f32")

    def test_samples_as_from_all_logits(self, tiny: _native.Context) -> None:
        """A sampler that needs all logits makes the host sample for the others of its batch, too."""
        options: list[dict[str, float]] = [
            {"temperature": 0.9, "top_k": 40, "repeat_penalty": 1.3, "seed": 3},
            {"temperature": 0.0, "repeat_penalty": 1.1},
            {"temperature": 2.0, "top_k": 400, "seed": 4},
        ]

        def generate(*, from_all: bool) -> list[list[int]]:
            samplers = [_native.Sampler(**GREEDY | o) for o in options]
            sequences = [tiny.new_sequence() for _ in range(4 if from_all else 3)]
            if from_all:
                samplers.append(_native.Sampler(**GREEDY | {"temperature": 1.0}))
            fed = [[1], [5, 9], [7], [1]][: len(sequences)]
            tokens = []
            for n in range(32):
                prompts = [n == 0 and len(feed) > 1 for feed in fed]  # another order in the batch
                fed = [[token] for token in step(tiny, sequences, fed, samplers, prompts)]
                tokens.append([feed[0] for feed in fed[:3]])
            return tokens

        assert generate(from_all=False) == generate(from_all=True)

    def test_a_sampler_of_two_sequences(self, tiny: _native.Context) -> None:
        def generate(n_others: int) -> list[int]:
            sampler = _native.Sampler(**GREEDY | {"temperature": 1.0, "top_k": 2, "repeat_penalty": 0.01})
            others = [_native.Sampler(**GREEDY | {"temperature": 1.0}) for _ in range(n_others)]
            sequences = [tiny.new_sequence() for _ in range(2 + n_others)]
            n = len(sequences)
            return [
                token
                for _ in range(8)
                for token in step(tiny, sequences, [[1]] * n, [sampler, sampler, *others])[:2]
            ]

        assert generate(0) == generate(1)

    def test_logits_that_are_not_finite(self, tmp_path: Path) -> None:
        arrays = tensors()
        arrays["blk.0.ffn_up.weight"][3, 4] = np.nan
        context = self.context(tmp_path, arrays)
        sequence = context.new_sequence()
        with pytest.raises(FileError, match=r"tiny\.gguf: the logits are not finite"):
            step(context, [sequence], [[1, 2]], [_native.Sampler(**GREEDY)])
        assert context.length(sequence) == 0
