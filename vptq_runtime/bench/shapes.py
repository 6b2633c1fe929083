"""The shapes of known models, as their config.json has them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vptq_runtime.errors import OptionError


@dataclass(frozen=True)
class Shape:
    """What a model's size and speed depend on."""

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_vocab: int
    n_ctx_train: int
    rope_theta: float
    head_dim: int = 128
    arch: str = "llama"  # qwen2: q, k and v have biases
    sliding_window: int | None = None
    tied: bool = False  # the output matrix is the embedding

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of a block's linear layers, by GGUF name."""
        q_dim, kv_dim = self.n_head * self.head_dim, self.n_head_kv * self.head_dim
        return {
            "attn_q": (q_dim, self.n_embd),
            "attn_k": (kv_dim, self.n_embd),
            "attn_v": (kv_dim, self.n_embd),
            "attn_output": (self.n_embd, q_dim),
            "ffn_gate": (self.n_ff, self.n_embd),
            "ffn_up": (self.n_ff, self.n_embd),
            "ffn_down": (self.n_embd, self.n_ff),
        }

    def share(self, linears: Iterable[str]) -> float:
        """Of a block's weights, those that are in these linear layers."""
        weights = {linear: rows * columns for linear, (rows, columns) in self.linears.items()}
        return sum(weights[linear] for linear in linears) / sum(weights.values())


# Of these there are public VPTQ checkpoints.
SHAPES = {
    "llama-2-7b": Shape(32, 4096, 11008, 32, 32, 32000, 4096, 1e4),
    "llama-2-13b": Shape(40, 5120, 13824, 40, 40, 32000, 4096, 1e4),
    "llama-2-70b": Shape(80, 8192, 28672, 64, 8, 32000, 4096, 1e4),
    "llama-3-8b": Shape(32, 4096, 14336, 32, 8, 128256, 8192, 5e5),
    "llama-3-70b": Shape(80, 8192, 28672, 64, 8, 128256, 8192, 5e5),
    "llama-3.1-8b": Shape(32, 4096, 14336, 32, 8, 128256, 131072, 5e5),
    "llama-3.1-70b": Shape(80, 8192, 28672, 64, 8, 128256, 131072, 5e5),
    "llama-3.1-405b": Shape(126, 16384, 53248, 128, 8, 128256, 131072, 5e5),
    "nemotron-70b": Shape(80, 8192, 28672, 64, 8, 128256, 131072, 5e5),
    "mistral-7b": Shape(32, 4096, 14336, 32, 8, 32000, 32768, 1e4, sliding_window=4096),  # v0.1
    "mistral-large-2407": Shape(88, 12288, 28672, 96, 8, 32768, 131072, 1e6),
    "qwen2.5-7b": Shape(28, 3584, 18944, 28, 4, 152064, 32768, 1e6, arch="qwen2"),
    "qwen2.5-14b": Shape(48, 5120, 13824, 40, 8, 152064, 32768, 1e6, arch="qwen2"),
    "qwen2.5-32b": Shape(64, 5120, 27648, 40, 8, 152064, 32768, 1e6, arch="qwen2"),
    "qwen2.5-72b": Shape(80, 8192, 29568, 64, 8, 152064, 32768, 1e6, arch="qwen2"),
}
# Of these there are none; they are small enough to try things with.
SMALL_SHAPES = {
    "llama-3.2-1b": Shape(16, 2048, 8192, 32, 8, 128256, 131072, 5e5, head_dim=64, tied=True),
    "llama-3.2-3b": Shape(28, 3072, 8192, 24, 8, 128256, 131072, 5e5, tied=True),
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 49152, 8192, 1e5, head_dim=64, tied=True),
    "smollm2-360m": Shape(32, 960, 2560, 15, 5, 49152, 8192, 1e5, head_dim=64, tied=True),
    "smollm2-1.7b": Shape(24, 2048, 8192, 32, 32, 49152, 8192, 1.3e5, head_dim=64, tied=True),
}


def known_shapes() -> dict[str, Shape]:
    """All of them, by name."""
    return SHAPES | SMALL_SHAPES


def find_shape(name: str) -> Shape:
    """Raises OptionError, which lists the known names."""
    shapes = known_shapes()
    if name not in shapes:
        raise OptionError(f"--synthetic: found {name!r:.80}, expected one of {', '.join(shapes)}")
    return shapes[name]
