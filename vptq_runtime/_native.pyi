"""The native runtime. Loading, computing and sampling release the GIL; errors are vptq_runtime.errors."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

# What the library was built from: the version of the sources, and the SHA-256 of this file.
version: str
interface: str

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
        """The weight (out_features, in_features) of one linear layer or `token_embd`, bit-exact, by the slow
        obvious way."""

class Sampler:
    """Logits to token for one sequence.

    First the logits are adjusted: repeat penalty, presence and frequency penalty, bias, bans (end tokens
    while there are fewer than min_tokens, and what a mask does not allow), in this order. Then top-k, top-p,
    min-p, temperature. What token number n is drawn with depends on the seed and n alone.

    One call at a time, also of a Context's with this sampler: the GIL is released while they compute.
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
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] = {},
        min_tokens: int = 0,
        end_tokens: Sequence[int] = (),
    ) -> None:
        """temperature 0 is greedy; top_k 0, top_p 1, min_p 0, repeat_penalty 1 are off.

        repeat_penalty: of the last 64 tokens, positive logits are divided by it, negative ones multiplied.
        presence_penalty, frequency_penalty: logit -= presence * (count > 0) + frequency * count, with the
            counts of generated tokens (OpenAI's API reference, "Frequency and presence penalties").
        logit_bias: token -> what is added to its logit, any finite number; numbers that are no tokens are
            ignored.
        min_tokens: the end_tokens are banned until so many tokens have been generated.
        """
    def accept(self, tokens: Sequence[int], generated: bool = False) -> None:
        """Adds tokens to the history: those of a prompt, for the repeat penalty, or generated ones.

        Generated ones count for all penalties and for min_tokens, and each is one draw: with
        accept(tokens so far, generated=True) a new Sampler goes on, bit for bit, where another one was.
        """
    def sample(self, logits: NDArray[np.float32], mask: NDArray[np.int32] | None = None) -> int:
        """Draws a token from logits (n_vocab,) and adds it to the history as generated.

        mask (ceil(n_vocab / 32),): bit t % 32 of word t // 32 says whether token t is allowed. Where it
        allows only end tokens that min_tokens bans, they are not banned.
        Raises OptionError where a logit is not finite, and where no token is left.
        """
    def sample_candidates(self, tokens: Sequence[int], logits: Sequence[float]) -> int:
        """The same token from a part of the logits: the n_candidates largest, and the adjusted ones."""
    @property
    def n_generated(self) -> int:
        """Tokens drawn, or accepted as generated: the number of the next draw."""
    @property
    def n_candidates(self) -> int:
        """0: all logits are needed."""
    @property
    def adjusted_tokens(self) -> list[int]:
        """Whose logits are not used as they are; ascending, with numbers that are no tokens."""

class Context:
    """A model on a device with a KV cache shared by many sequences. One call at a time: the GIL is
    released while it computes.

    The cache's blocks have numbers from 0 to n_blocks - 1, and hold block_tokens tokens each. A block may
    belong to several sequences, and be held; it is free when nobody uses it.
    """

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
        kv_tokens: int = 0,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """device: auto | cpu | cuda; gpu_layers: -1 for Runtime's None; n_ctx: most tokens of a sequence;
        n_threads: 0 for the physical cores; kv_type: f16 | f32 | q8_0; precision: auto | f32; progress: see
        Runtime.

        kv_tokens: most tokens of all sequences, at least n_ctx. 0: as many as three quarters of the memory
        hold that the weights leave, from one to 64 sequences of n_ctx. Memory is taken when it is needed.
        """
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
    def n_layer(self) -> int:
        """Layers of the model, for advance()."""
    @property
    def n_batch(self) -> int:
        """Most tokens of one forward() or begin(), over all its sequences."""
    @property
    def block_tokens(self) -> int:
        """Tokens of a block of the KV cache: 32."""
    @property
    def n_blocks(self) -> int:
        """Most blocks of the KV cache. Fewer where memory has ended before, until there is no sequence:
        then they are as many as memory holds at that time."""
    @property
    def n_free_blocks(self) -> int:
        """Of the n_blocks, those that nobody uses."""
    def new_sequence(self, prefix: Sequence[int] = ()) -> int:
        """A new sequence that begins with these blocks, shared with whoever else has them.

        Each block must be full, and in use by a sequence or held. Raises OptionError.
        """
    def free_sequence(self, sequence: int) -> None: ...
    def truncate(self, sequence: int, n_tokens: int) -> None:
        """Forgets all but the first n_tokens tokens, and gives back the blocks behind them.

        Raises OptionError where a part would be left of a block that others use, too.
        """
    def length(self, sequence: int) -> int:
        """Tokens; those of a batch under way do not count."""
    def blocks(self, sequence: int) -> list[int]:
        """In the order of its tokens; those of a batch under way included."""
    def hold(self, blocks: Sequence[int]) -> None:
        """One more user of each of these blocks, which must be in use."""
    def release(self, blocks: Sequence[int]) -> None:
        """Takes back as many hold()s of these blocks."""
    def forward(
        self,
        sequences: Sequence[int],
        tokens: Sequence[Sequence[int]],
        prompts: Sequence[bool] = (),
        wants: Sequence[Literal["none", "last", "all"]] = (),
        samplers: Sequence[Sampler | None] = (),
    ) -> None:
        """Appends tokens[i] to sequences[i], each of them at least one token, as one batch.

        prompts[i]: tokens[i] are part of a prompt, not generated (precision "auto"); (): none are.
        wants[i]: whose logits of tokens[i]; (): each one's last.
        samplers[i]: who will draw from them. Where every feed with wanted logits has one, a GPU brings only
            what these need, and logits(), log_probs() and masks are not to be asked for.

        An error leaves all sequences as they were. Raises OptionError, OutOfMemoryError (no blocks, no
        memory), FileError (logits that are not finite), DeviceError.
        """
    def begin(
        self,
        sequences: Sequence[int],
        tokens: Sequence[Sequence[int]],
        prompts: Sequence[bool] = (),
        wants: Sequence[Literal["none", "last", "all"]] = (),
        samplers: Sequence[Sampler | None] = (),
    ) -> None:
        """The same, but computed by advance(), some layers at a time. At most one batch is under way.

        forward() may come in between, with other sequences: those of the batch under way are busy, and
        feeding, truncating or freeing one is an OptionError.
        """
    def advance(self, n_layers: int) -> bool:
        """Computes so many more layers of the batch under way.

        True: it has come to its end, as forward() does. An error abandons it.
        """
    def abandon(self) -> None:
        """The batch under way never was. Without one nothing happens."""
    def sample(
        self, samplers: Sequence[Sampler | None], masks: Sequence[NDArray[np.int32] | None] = ()
    ) -> list[list[int]]:
        """Each feed's next tokens, of the batch that came to its end last; [] without a sampler.

        They are drawn from the logits of the feed's first wanted token on, as long as the token drawn is the
        next one of the feed: of [last, d1, d2, d3] with all logits wanted come one to four tokens, and drafts
        that were right are drawn again from their own logits.

        masks[i]: (wanted tokens of the feed, ceil(n_vocab / 32)), each row as Sampler.sample has it.
        An error leaves all samplers as they were.
        """
    def log_probs(
        self, feed: int, tokens: Sequence[int], n_top: int
    ) -> tuple[list[float], list[list[tuple[int, float]]]]:
        """Log-softmax of tokens[i] at the feed's i-th wanted token, of the batch that came to its end last.

        And there the n_top (0 to 64) likeliest tokens, likeliest first, of equal ones the lower token first.
        In float64, of the logits as the model gives them: without penalties and temperature.
        """
    def logits(self, feed: int) -> NDArray[np.float32]:
        """(wanted tokens of the feed, n_vocab), of the batch that came to its end last.

        The array shares its memory with the context until the next batch comes to its end.
        """

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
    def embed(
        self, tensors: dict[str, RawTensor], in_features: int, out_features: int, tokens: Sequence[int]
    ) -> Array:
        """Rows of the layer's weight: (tokens, in_features)."""
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
    """For tests: how many of the last n_layers layers each GPU gets, as native/src/context/placement.h says.

    An empty list where they do not fit. Sizes are bytes.
    """

def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """For tests: Philox4x32-10 (Salmon et al. 2011), four words of 32 bits from four and two."""

def cpu_isas() -> list[str]:
    """Instruction sets that this build has and this processor can run, best first; the last is generic."""

def physical_cores() -> int:
    """That this process may run on; what n_threads = 0 stands for."""

def available_memory() -> int:
    """Bytes that can be allocated without swapping, the container's limits heeded."""

def return_freed_memory() -> None:
    """Gives the system back what malloc keeps of freed memory, where it can."""
