"""What is particular to each architecture: Hugging Face names -> GGUF names, hyperparameters.

A new architecture is a row of ARCHITECTURES (and, where its formula differs, a branch in the runtime).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGUFValueType
from numpy.typing import NDArray

from vptq_converter.checkpoint import FLOAT_TYPES, Checkpoint, Tensor
from vptq_converter.config import Section
from vptq_converter.layer import LayerConfig, LayerTensors
from vptq_runtime.errors import UnsupportedError

# One key of a GGUF file: name, value, type, and the type of an array's elements.
Key = tuple[str, Any, GGUFValueType, GGUFValueType | None]


@dataclass(frozen=True)
class Architecture:
    gguf_name: str
    permute_qk: (
        bool  # llama.cpp rotates neighbouring rows here, and its files have the rows of q and k reordered
    )
    biases: Mapping[str, str | bool]  # linear layer -> whether it has a bias: a key of the config, or always
    has_window: bool = False  # `sliding_window` limits how many tokens attention sees
    window_switch: str | None = None  # the key that turns the window on; None: it always is
    n_head_kv: int | None = None  # where the config leaves it out; None: as many as query heads


# Linear layers of one transformer layer, in the file's order.
LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Both (n_vocab, n_embd), dense or quantised as the linear layers are.
EMBEDDING = "model.embed_tokens"
OUTPUT = "lm_head"
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}

ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(
        gguf_name="llama",
        permute_qk=True,
        biases={name: "attention_bias" if name.startswith("self_attn") else "mlp_bias" for name in LINEARS},
    ),
    "MistralForCausalLM": Architecture(
        gguf_name="llama", permute_qk=True, biases={}, has_window=True, n_head_kv=8
    ),
    "Qwen2ForCausalLM": Architecture(
        gguf_name="qwen2",
        permute_qk=False,
        biases={"self_attn.q_proj": True, "self_attn.k_proj": True, "self_attn.v_proj": True},
        has_window=True,
        window_switch="use_sliding_window",
        n_head_kv=32,
    ),
}
ROPE_TYPES = ("default", "linear", "llama3")
MAX_HEAD_DIM = 1024  # of readers
DEFAULT_WINDOW = 4096  # of Mistral and Qwen2, where the key is absent; null means none
DEFAULT_MAX_WINDOW_LAYERS = 28  # of Qwen2


@dataclass(frozen=True)
class Hyperparameters:
    n_layer: int
    n_ctx_train: int
    n_embd: int
    n_ff: int
    n_vocab: int
    n_head: int
    n_head_kv: int
    head_dim: int
    norm_rms_eps: float
    rope_theta: float
    rope_linear_factor: float | None
    rope_freqs: NDArray[np.float32] | None  # (head_dim / 2,): divides the inverse frequencies (llama3)
    sliding_window: int | None
    sliding_window_pattern: list[bool] | None  # None: all layers have the window

    def keys(self, arch: str) -> list[Key]:
        """The keys of docs/file-format.md that begin with the architecture's name."""
        keys: list[Key] = [
            (f"{arch}.{name}", value, GGUFValueType.UINT32, None)
            for name, value in (
                ("block_count", self.n_layer),
                ("context_length", self.n_ctx_train),
                ("embedding_length", self.n_embd),
                ("feed_forward_length", self.n_ff),
                ("vocab_size", self.n_vocab),
                ("attention.head_count", self.n_head),
                ("attention.head_count_kv", self.n_head_kv),
                ("attention.key_length", self.head_dim),
                ("attention.value_length", self.head_dim),
                ("rope.dimension_count", self.head_dim),
            )
        ]
        keys.append(
            (f"{arch}.attention.layer_norm_rms_epsilon", self.norm_rms_eps, GGUFValueType.FLOAT32, None)
        )
        keys.append((f"{arch}.rope.freq_base", self.rope_theta, GGUFValueType.FLOAT32, None))
        if self.rope_linear_factor is not None:
            keys.append((f"{arch}.rope.scaling.type", "linear", GGUFValueType.STRING, None))
            keys.append((f"{arch}.rope.scaling.factor", self.rope_linear_factor, GGUFValueType.FLOAT32, None))
        if self.sliding_window is not None:
            keys.append((f"{arch}.attention.sliding_window", self.sliding_window, GGUFValueType.UINT32, None))
        if self.sliding_window_pattern is not None:
            name = f"{arch}.attention.sliding_window_pattern"
            keys.append((name, self.sliding_window_pattern, GGUFValueType.ARRAY, GGUFValueType.BOOL))
        return keys


@dataclass(frozen=True)
class Weight:
    """A norm, the embedding or a linear layer under its GGUF name without `.weight`."""

    name: str
    weight: Tensor | LayerTensors
    bias: Tensor | None = None
    n_heads_permuted: int = 0  # heads whose rows llama.cpp wants reordered


@dataclass(frozen=True)
class Model:
    architecture: Architecture
    hyperparameters: Hyperparameters
    weights: list[Weight]  # in the file's order: token_embd, layers, output_norm and, unless tied, output


def read_model(checkpoint: Checkpoint) -> Model:
    """Reads the config and finds every tensor, checking types and shapes, not values.

    Raises UnsupportedError for what the config asks for and this lacks, FileError for what is missing,
    contradicts itself or has no place in the architecture.
    """
    config = checkpoint.config
    architecture = find_architecture(config)
    h = _hyperparameters(config, architecture, len(checkpoint.tensors))
    quantization = config.section("quantization_config")
    method = quantization.values.get("quant_method", "vptq")
    if method != "vptq":
        raise UnsupportedError(
            f"{config.path}: quantization_config.quant_method: found {method!r}, expected 'vptq'"
        )
    finder = _Finder(checkpoint, quantization)

    shapes = {
        "self_attn.q_proj": (h.n_head * h.head_dim, h.n_embd),
        "self_attn.k_proj": (h.n_head_kv * h.head_dim, h.n_embd),
        "self_attn.v_proj": (h.n_head_kv * h.head_dim, h.n_embd),
        "self_attn.o_proj": (h.n_embd, h.n_head * h.head_dim),
        "mlp.gate_proj": (h.n_ff, h.n_embd),
        "mlp.up_proj": (h.n_ff, h.n_embd),
        "mlp.down_proj": (h.n_embd, h.n_ff),
    }
    heads = {"self_attn.q_proj": h.n_head, "self_attn.k_proj": h.n_head_kv} if architecture.permute_qk else {}
    biases = {
        name: has if isinstance(has, bool) else config.boolean(has, default=False)
        for name, has in architecture.biases.items()
    }
    weights = [Weight("token_embd", *finder.linear(EMBEDDING, h.n_vocab, h.n_embd, bias=False))]
    for n in range(h.n_layer):
        for name, gguf_name in NORMS.items():
            weights.append(Weight(f"blk.{n}.{gguf_name}", finder.dense(f"model.layers.{n}.{name}", h.n_embd)))
        for name, gguf_name in LINEARS.items():
            linear = finder.linear(f"model.layers.{n}.{name}", *shapes[name], bias=biases.get(name, False))
            weights.append(Weight(f"blk.{n}.{gguf_name}", *linear, n_heads_permuted=heads.get(name, 0)))
    weights.append(Weight("output_norm", finder.dense("model.norm", h.n_embd)))
    if not _tied(checkpoint, finder):
        weights.append(Weight("output", *finder.linear(OUTPUT, h.n_vocab, h.n_embd, bias=False)))
    finder.check_nothing_left()
    return Model(architecture, h, weights)


class _Finder:
    """Finds the tensors of a layer, VPTQ or dense as `quantization_config` says."""

    def __init__(self, checkpoint: Checkpoint, quantization: Section) -> None:
        self.checkpoint = checkpoint
        self.by_module = quantization.section("config_for_layers")
        self.by_last_part = quantization.section("shared_layer_config")
        self.modules: set[str] = set()

    def entry(self, module: str) -> Section | None:
        if module in self.by_module.values:
            return self.by_module.section(module)
        last_part = module.rpartition(".")[2]
        return self.by_last_part.section(last_part) if last_part in self.by_last_part.values else None

    def dense(self, module: str, *shape: int) -> Tensor:
        return self.checkpoint.tensor(f"{module}.weight").expect(FLOAT_TYPES, shape)

    def linear(
        self, module: str, out_features: int, in_features: int, bias: bool
    ) -> tuple[Tensor | LayerTensors, Tensor | None]:
        self.modules.add(module)
        entry = self.entry(module)
        weight: Tensor | LayerTensors
        if entry is None:
            weight = self.dense(module, out_features, in_features)
        else:
            layer_config = LayerConfig.parse(entry, out_features, in_features, bias)
            weight = LayerTensors.find(self.checkpoint, module, layer_config)
        if not bias:
            return weight, None
        return weight, self.checkpoint.tensor(f"{module}.bias").expect(FLOAT_TYPES, (out_features,))

    def check_nothing_left(self) -> None:
        for module in self.by_module.values:
            if module not in self.modules:
                raise self.by_module.error("", module, "only linear layers that the model has")
        for name in sorted(self.checkpoint.unused):
            if not name.endswith(".rotary_emb.inv_freq"):  # old checkpoints: follows from rope_theta
                tensor = self.checkpoint.tensors[name]
                raise tensor.error(
                    f"{tensor.dtype} {tensor.shape}", "no such tensor, by the architecture and the config"
                )


def find_architecture(config: Section) -> Architecture:
    """The architecture that a config.json names; raises FileError, UnsupportedError."""
    names = config.values.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise config.error("architectures", names, f"one of {', '.join(ARCHITECTURES)}")
    if names[0] not in ARCHITECTURES:
        raise _unsupported(config, "architectures", names[0], ARCHITECTURES)
    return ARCHITECTURES[names[0]]


def _unsupported(config: Section, key: str, found: Any, supported: Any) -> UnsupportedError:
    where = f"{config.where}.{key}" if config.where else key
    return UnsupportedError(
        f"{config.path}: {where}: {found!r} is not supported, only {', '.join(map(str, supported))}"
    )


def _hyperparameters(config: Section, architecture: Architecture, n_tensors: int) -> Hyperparameters:
    n_embd = config.integer("hidden_size")
    n_layer = config.integer("num_hidden_layers")
    if n_layer > n_tensors:  # before anything is sized by it
        raise config.error("num_hidden_layers", n_layer, f"fewer than the checkpoint's {n_tensors} tensors")
    n_head = config.integer("num_attention_heads")
    default_kv = n_head if "num_key_value_heads" in config.values else architecture.n_head_kv or n_head
    n_head_kv = config.integer("num_key_value_heads", default=default_kv)
    if n_head % n_head_kv:
        raise config.error("num_key_value_heads", n_head_kv, f"a divisor of num_attention_heads ({n_head})")
    if config.values.get("head_dim") is None and n_embd % n_head:
        raise config.error(
            "hidden_size", n_embd, f"a multiple of num_attention_heads ({n_head}), or a head_dim"
        )
    head_dim = config.integer("head_dim", default=n_embd // n_head)
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        raise config.error(
            "head_dim", head_dim, f"an even number (RoPE rotates halves), at most {MAX_HEAD_DIM}"
        )
    activation = config.values.get("hidden_act", "silu")
    if activation != "silu":
        raise _unsupported(config, "hidden_act", activation, ["silu"])
    n_ctx_train = config.integer("max_position_embeddings")
    rope_theta, linear_factor, freqs = _rope(config, head_dim, n_ctx_train)
    window, pattern = _sliding_window(config, architecture, n_layer)
    return Hyperparameters(
        n_layer=n_layer,
        n_ctx_train=n_ctx_train,
        n_embd=n_embd,
        n_ff=config.integer("intermediate_size"),
        n_vocab=config.integer("vocab_size"),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        norm_rms_eps=config.number("rms_norm_eps", default=1e-6),
        rope_theta=rope_theta,
        rope_linear_factor=linear_factor,
        rope_freqs=freqs,
        sliding_window=window,
        sliding_window_pattern=pattern,
    )


def _rope(
    config: Section, head_dim: int, n_ctx_train: int
) -> tuple[float, float | None, NDArray[np.float32] | None]:
    """rope_theta, the factor of linear scaling, the divisors of llama3 scaling; from either spelling."""
    rope = config.section("rope_scaling" if config.values.get("rope_scaling") else "rope_parameters")
    rope_type = rope.values.get("rope_type", rope.values.get("type", "default"))
    if rope_type not in ROPE_TYPES or any(isinstance(value, dict) for value in rope.values.values()):
        found = rope_type if rope_type not in ROPE_TYPES else "one RoPE for each layer type"
        raise _unsupported(rope, "rope_type", found, ROPE_TYPES)
    for section in (config, rope):
        if section.number("partial_rotary_factor", default=1.0) != 1.0:
            raise _unsupported(section, "partial_rotary_factor", section.values["partial_rotary_factor"], [1])
    theta = rope.number("rope_theta", default=config.number("rope_theta", default=10000.0))
    linear_factor = rope.number("factor") if rope_type == "linear" else None
    if rope_type != "llama3":
        return theta, linear_factor, None

    factor, low, high = (rope.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise rope.error("low_freq_factor", low, f"less than high_freq_factor ({high})")
    original = rope.integer("original_max_position_embeddings", default=n_ctx_train)
    original = config.integer("original_max_position_embeddings", default=original)
    return theta, None, llama3_divisors(head_dim, theta, factor, low, high, original)


def llama3_divisors(
    head_dim: int, theta: float, factor: float, low: float, high: float, original: int
) -> NDArray[np.float32]:
    """What llama3 scaling divides the inverse frequencies by: (head_dim / 2,).

    low, high: low_freq_factor and high_freq_factor; original: original_max_position_embeddings.
    """
    # In float32, as transformers computes them: short wavelengths stay, long ones are divided by the factor,
    # those between are interpolated.
    frequency = inverse_frequencies(head_dim, theta)
    turns = np.float32(original) / (np.float32(2 * np.pi) / frequency)  # in the original context
    smooth = (turns - np.float32(low)) / np.float32(high - low)
    scaled = (1 - smooth) * frequency / np.float32(factor) + smooth * frequency
    scaled = np.where(turns < low, frequency / np.float32(factor), np.where(turns > high, frequency, scaled))
    divisors: NDArray[np.float32] = (frequency / scaled).astype(np.float32)
    return divisors


def inverse_frequencies(head_dim: int, theta: float) -> NDArray[np.float32]:
    """RoPE's angle per position of each pair of rows: (head_dim / 2,)."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency: NDArray[np.float32] = np.float32(1) / np.float32(theta) ** exponent
    return frequency


def _sliding_window(
    config: Section, architecture: Architecture, n_layer: int
) -> tuple[int | None, list[bool] | None]:
    """How many tokens attention sees, and in which layers (None: in all)."""
    switch = architecture.window_switch
    window: int | None = None
    if architecture.has_window and (switch is None or config.boolean(switch, default=False)):
        null = config.values.get("sliding_window", DEFAULT_WINDOW) is None
        window = None if null else config.integer("sliding_window", default=DEFAULT_WINDOW)
    first = 0
    if window is not None and switch is not None:
        first = config.integer("max_window_layers", minimum=0, default=DEFAULT_MAX_WINDOW_LAYERS)
    pattern = [window is not None and n >= first for n in range(n_layer)]
    types = config.values.get("layer_types")
    if types is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != n_layer or any(t not in known for t in types):
            raise config.error("layer_types", types, f"{n_layer} times one of {', '.join(known)}")
        stated = [t == "sliding_attention" for t in types]
        if stated != pattern and (switch is None or window is None):
            raise _unsupported(config, "layer_types", types, ["windows in all layers, or in none"])
        pattern = stated
    if not any(pattern):
        return None, None
    return window, None if all(pattern) else pattern


def _tied(checkpoint: Checkpoint, finder: _Finder) -> bool:
    """Whether the output shares the embedding's weight. A second copy of it in the checkpoint is left out."""
    if (
        not checkpoint.config.boolean("tie_word_embeddings", default=False)
        or finder.entry(OUTPUT) is not None
    ):
        return False
    if f"{OUTPUT}.weight" in checkpoint.tensors:
        if finder.entry(EMBEDDING) is not None:
            raise checkpoint.tensor(f"{OUTPUT}.weight").error(
                "a matrix beside an embedding that is a VPTQ layer", "none: tie_word_embeddings is true"
            )
        embedding = checkpoint.tensor(f"{EMBEDDING}.weight")
        output = checkpoint.tensor(f"{OUTPUT}.weight").expect((embedding.dtype,), embedding.shape)
        if not all(np.array_equal(a, b) for a, b in zip(output.chunks(), embedding.chunks(), strict=True)):
            raise output.error("other values than the embedding's", "the same: tie_word_embeddings is true")
    return True
