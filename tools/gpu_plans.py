"""What tools/check_gpu.py runs, and what is wanted of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from vptq_runtime.bench.shapes import SHAPES, Shape


@dataclass(frozen=True)
class Model:
    """One run of vptq-bench, with embedding and output matrix in Q8_0."""

    name: str  # of the shape
    quant: str
    layers: int | None = None  # run so many and extrapolate
    batches: tuple[int, ...] = (1,)  # sequences decoded together
    # What decoding by one is to reach: as a share of the copy bandwidth, or in tokens a second.
    at_least: float | None = None
    aim: float | None = None
    in_tok_s: bool = False
    kernel: str = ""  # what VPTQ_CUDA_KERNEL is to say

    @property
    def title(self) -> str:
        return f"{self.name} {self.quant}{f' ({self.kernel})' if self.kernel else ''}"


@dataclass(frozen=True)
class Plan:
    models: tuple[Model, ...]
    large: tuple[Model, ...]  # the same, but they take more time or memory than there may be
    prompts: tuple[int, ...]  # tokens
    n_gen: int
    quants: tuple[str, ...]  # of the single layers
    kernels: tuple[str, ...]  # for these, as VPTQ_CUDA_KERNEL names them; "" is what the backend chooses
    sizes: tuple[tuple[int, int], ...]  # (out_features, in_features)
    prompt_tokens: int  # that a single layer gets at once, beside 1 and 8
    rotating_bytes: int  # of the layers that take turns
    test_options: tuple[str, ...]  # beside -m gpu
    sanitized: str  # the tests, as pytest -k takes it
    shapes: dict[str, Shape] = field(default_factory=dict)  # by name
    host_memory: int | None = None  # bytes that the host has available; None: as it says

    def shape(self, name: str) -> Shape:
        return self.shapes.get(name) or SHAPES[name]


PREFILL_AT_LEAST = 0.5  # of the rate of the GPU's own library
KERNEL_AT_LEAST = 5.0  # times as fast as the published package's kernel

FULL = Plan(
    models=(
        Model("llama-3.1-8b", "v8-k65536-0", batches=(1, 8), at_least=0.15, aim=0.30),
        Model("llama-3.1-8b", "v8-k65536-0", kernel="plain"),
        Model("llama-3.1-8b", "v6-k4096-0", at_least=0.20, aim=0.40),
        Model("llama-3.1-8b", "v8-k65536-256", at_least=0.12, aim=0.25),
        Model("llama-3.1-8b", "v16-k65536-65536", at_least=0.12, aim=0.25),
        Model("llama-3.1-8b", "v8-k4096-0"),
        Model("llama-3.1-70b", "v8-k65536-0", at_least=30, aim=60, in_tok_s=True),
        Model("llama-3.1-405b", "v16-k65536-1024", layers=8),
    ),
    large=(Model("llama-3.1-405b", "v16-k65536-1024"),),
    prompts=(512, 2048),
    n_gen=64,
    quants=("v8-k65536-0", "v6-k4096-0", "v8-k65536-256", "v16-k65536-65536", "v8-k4096-0"),
    kernels=("", "plain"),
    sizes=((4096, 4096), (14336, 4096), (4096, 14336)),
    prompt_tokens=512,
    rotating_bytes=192 << 20,  # several times the largest L2
    test_options=(),
    sanitized="test_rms_norm or test_rope or test_swiglu or (test_dense_linear and 33)"
    " or (test_vptq_linear and (v8-k65536-256 or v12-k4096-4096 or v5-k7-3))"
    " or (test_every_index_width and 13) or (test_attention and f16 and heads4)",
)
TINY = Plan(
    models=(
        Model("tiny", "v6-k256-16", batches=(1, 3), at_least=0.15, aim=0.30),
        Model("tiny", "v8-k256-0", layers=2, at_least=30, aim=60, in_tok_s=True),
    ),
    large=(Model("tiny", "v6-k256-16"),),
    prompts=(8, 20),
    n_gen=3,
    quants=("v6-k256-16",),
    kernels=("", "plain"),
    sizes=((96, 64),),
    prompt_tokens=12,
    rotating_bytes=1 << 13,
    test_options=("-k", "test_rms_norm"),
    sanitized="test_swiglu",
    shapes={"tiny": Shape(3, 64, 96, 4, 2, 160, 256, 1e4, head_dim=16)},
)
