"""The native runtime. All methods release the GIL while they compute; errors are vptq_runtime.errors."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

class Model:
    """A GGUF file, mapped and checked."""

    def __init__(self, path: str) -> None: ...
    def metadata_keys(self) -> list[str]:
        """Of all key-value pairs of the file, but for names that are not UTF-8."""
    def metadata_value(self, key: str) -> Any:
        """Of one key, made anew (an array is a list); None where the file lacks it."""
    @property
    def file_bytes(self) -> int: ...
    @property
    def n_vocab(self) -> int: ...
    @property
    def n_ctx_train(self) -> int: ...
    @property
    def n_layer(self) -> int: ...
    @property
    def tensors(self) -> dict[str, tuple[list[int], int]]:
        """Shape, row-major, and size in bytes of each tensor of the file."""
    def linear_names(self) -> list[str]:
        """Base names of all linear layers, `blk.0.attn_q` ... `output`."""
    def dequantize(self, name: str) -> NDArray[np.float32]:
        """The weight (out_features, in_features) of one linear layer, bit-exact, by the slow obvious way."""

class Sampler:
    """Logits to token for one sequence.

    Repeat penalty over the last 64 tokens, top-k, top-p, min-p, temperature, in this order.
    """

    def __init__(
        self,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repeat_penalty: float,
        seed: int,
    ) -> None: ...
    def accept(self, tokens: Sequence[int]) -> None:
        """Adds tokens (the prompt) to the history that the repeat penalty looks at."""
    def sample(self, logits: NDArray[np.float32]) -> int:
        """Draws a token from logits (n_vocab,) and adds it to the history."""
    def sample_candidates(self, tokens: Sequence[int], logits: Sequence[float]) -> int:
        """The same token from a part of the logits: the n_candidates largest, and the penalised ones."""
    @property
    def n_candidates(self) -> int:
        """0: all logits are needed."""
    @property
    def penalised_tokens(self) -> list[int]: ...

class Context:
    """A model on a device with a KV cache shared by many sequences."""

    def __init__(
        self,
        model: Model,
        *,
        device: str,
        gpu_layers: int = -1,
        n_ctx: int,
        n_threads: int,
        kv_type: str,
        precision: str = "auto",
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """device: auto | cpu | cuda; gpu_layers: -1 for Runtime's None; n_ctx: most tokens of a sequence;
        n_threads: 0 for the physical cores; kv_type: f16 | f32 | q8_0; precision: auto | f32; progress: see
        Runtime."""
    @property
    def device(self) -> str:
        """What it runs on, for people: `cpu (avx512, 2 threads)`."""
    @property
    def why_not_cuda(self) -> str:
        """Why device "auto" has not put all layers on GPUs; else empty."""
    @property
    def available_memory(self) -> int:
        """Bytes that could still be allocated where the output is."""
    @property
    def n_ctx(self) -> int: ...
    @property
    def n_batch(self) -> int:
        """Most tokens that one call of prefill, step or logits may feed, over all its sequences."""
    def new_sequence(self, n_tokens: int) -> int:
        """A new, empty sequence with cache reserved for n_tokens tokens.

        Raises OutOfMemoryError, OptionError.
        """
    def free_sequence(self, sequence: int) -> None: ...
    def reserve(self, sequence: int, n_tokens: int) -> None:
        """Reserves cache for n_tokens tokens in all, those that it has included.

        Raises OutOfMemoryError, OptionError.
        """
    def truncate(self, sequence: int, n_tokens: int) -> None:
        """Forgets all but the first n_tokens tokens, and gives back the cache that was reserved for more."""
    def length(self, sequence: int) -> int: ...
    def prefill(self, sequences: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """Appends tokens[i] to sequences[i]; computes no logits."""
    def step(
        self,
        sequences: Sequence[int],
        tokens: Sequence[Sequence[int]],
        samplers: Sequence[Sampler],
        prompts: Sequence[bool] = (),
    ) -> list[int]:
        """Appends tokens[i] to sequences[i] as one batch and samples each one's next token (not appended).

        prompts[i]: tokens[i] are part of a prompt, not generated (precision "auto"); (): none are.
        """
    def logits(self, sequence: int, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Appends tokens and returns logits (len(tokens), n_vocab)."""

class Gpu:
    """The GPU that device "cuda" stands for, without a model. Raises UnsupportedError where there is none."""

    def __init__(self) -> None: ...
    @property
    def description(self) -> str:
        """`cuda (NVIDIA H200)`"""
    @property
    def total_memory(self) -> int: ...
    @property
    def available_memory(self) -> int:
        """Bytes that can be allocated now, by whomever."""
    def copy_bandwidth(self) -> float:
        """Bytes read and written a second by large copies within its memory, the median of several."""

# A tensor as a file holds it: GGUF's number of its type, its shape, its bytes.
RawTensor = tuple[int, list[int], bytes]
Array = NDArray[np.float32]

class Operations:
    """The operations of a backend over arrays, for tests: each against its slow, obvious twin.

    isa: an instruction set of the CPU, "" for the one that VPTQ_CPU_ISA names, or the best; or "cuda".
    Layers are given as their tensors by the suffixes that docs/file-format.md lists: weight, bias, ...
    """

    def __init__(self, isa: str, n_threads: int) -> None: ...
    @staticmethod
    def dequantize(tensors: dict[str, RawTensor], in_features: int, out_features: int) -> Array: ...
    def linear(self, tensors: dict[str, RawTensor], out_features: int, x: Array, n_prompt: int = 0) -> Array:
        """The first n_prompt tokens in 16-bit numbers, if the weights are fit for them."""
    def time_linear(
        self,
        tensors: Sequence[dict[str, RawTensor]],
        out_features: int,
        x: Array,
        repetitions: int,
        n_prompt: int = 0,
    ) -> list[float]:
        """Seconds that one of these layers takes, one a repetition, which goes through all
        of them four times.

        A GPU records a repetition and plays it: there only the first call of an Operations is right.
        """
    def linears(
        self,
        tensors: Sequence[dict[str, RawTensor]],
        out_features: Sequence[int],
        x: Array,
        n_prompt: int = 0,
    ) -> list[Array]:
        """Three layers on the same x, in one loop; n_prompt as linear() has it."""
    def embed(self, table: RawTensor, tokens: Sequence[int]) -> Array: ...
    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array: ...
    def swiglu(self, gate: Array, up: Array) -> Array: ...
    def top_logits(
        self, logits: Array, n_largest: int, tokens: Sequence[Sequence[int]]
    ) -> list[list[tuple[int, float]]]:
        """Of each row: the largest logits with their tokens, in any order, then those of tokens[row]."""
    def rope(self, x: Array, n_head: int, positions: Sequence[int], inv_freq: Sequence[float]) -> Array: ...
    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        n_head: int,
        n_head_kv: int,
        window: int,
        kv_type: str,
        prompt: bool = False,
    ) -> Array:
        """Of the last tokens, all of them parts of a prompt (which may be rounded), or all generated."""

def self_check(model: Model, *, isa: str, kv_type: str, rounded: bool, n_threads: int) -> float:
    """For tests: the self-check of a GPU that all of this model would go to, with an instruction set of the
    CPU in the GPU's place. Seconds; raises DeviceError."""

def split_layers(
    *,
    layers: Sequence[float],
    embedding: float,
    output: float,
    shared: float,
    n_layers: int,
    free: Sequence[int],
) -> list[int]:
    """For tests: how many of the last n_layers layers each GPU gets, as native/src/placement.h says.

    An empty list where they do not fit. Sizes are bytes.
    """

def cpu_isas() -> list[str]:
    """Instruction sets that this build has and this processor can run, best first; the last is generic."""

def physical_cores() -> int:
    """That this process may run on; what n_threads = 0 stands for."""

def available_memory() -> int:
    """Bytes that can be allocated without swapping, the container's limits heeded."""

def return_freed_memory() -> None:
    """Gives the system back what malloc keeps of freed memory, where it can."""
