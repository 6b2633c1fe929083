"""vptq-bench --fits: the memory that each model needs, and the smallest device that has it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from vptq_runtime import _native
from vptq_runtime.bench.report import print_table
from vptq_runtime.bench.shapes import SHAPES
from vptq_runtime.bench.speed import REST_BYTES
from vptq_runtime.bench.synthetic import Quant, SyntheticModel

N_CTX = 4096  # tokens: the context that a model runs with unless another is asked for
QUANTS = ("v8-k4096-0", "v8-k65536-0", "v8-k65536-256", "v8-k65536-65536")  # 1.5, 2, 3 and 4 bits a weight
DEVICES = (2, 4, 8, 16, 24, 32, 64, 128, 192, 256)  # GiB of memory, as they are sold (there as "GB")
SYSTEM_SHARE = 0.1  # of a device's memory that is not for the model


@dataclass(frozen=True)
class Fit:
    """What one model needs; all in bytes but the device, which is in GiB, None where none is large enough."""

    model: str
    quant: str
    file_bytes: int  # a tokenizer aside
    kv_bytes: int  # of N_CTX tokens
    memory_bytes: int  # both, and what a process takes beside them
    device_gib: int | None

    @classmethod
    def of(cls, model: SyntheticModel, kv_type: str) -> Fit:
        facts = model.facts(model.shape.n_layer, kv_type)
        need = facts.memory_bytes(N_CTX)
        large_enough = (gib for gib in DEVICES if need <= (1 - SYSTEM_SHARE) * (gib << 30))
        return cls(
            model=model.name,
            quant=model.quant.name,
            file_bytes=facts.model_bytes,
            kv_bytes=facts.kv_bytes * N_CTX,
            memory_bytes=need,
            device_gib=next(large_enough, None),
        )


def print_fits(
    quants: Sequence[str], embedding_type: str, output_type: str, kv_type: str, *, json_: bool, markdown: bool
) -> None:
    """Prints what every known shape needs in each of the configurations."""
    parsed = [Quant.parse(quant) for quant in quants]
    fits = [
        [Fit.of(SyntheticModel(name, shape, quant, embedding_type, output_type), kv_type) for quant in parsed]
        for name, shape in SHAPES.items()
    ]
    if json_:
        report = {
            "n_ctx": N_CTX,
            "kv_type": kv_type,
            "embedding_type": embedding_type,
            "output_type": output_type,
            "available_bytes": _native.available_memory(),
            "fits": [asdict(fit) for row in fits for fit in row],
        }
        print(json.dumps(report, indent=2))
        return
    headings = {"model": "left", f"KV cache, {N_CTX} tokens": "right"}
    headings |= {f"{quant.bits / quant.v:.3g} bits: {quant.name}": "right" for quant in parsed}
    print_table(
        headings, [[row[0].model, _gib(row[0].kv_bytes), *map(_cell, row)] for row in fits], markdown=markdown
    )
    print(
        f"\nSize of the file (embedding {embedding_type}, output matrix {output_type}) and the smallest "
        f"device with room for it,\na KV cache in {kv_type} and {REST_BYTES >> 20} MiB for the process, "
        f"{SYSTEM_SHARE:.0%} of its memory being left to the system."
    )
    if not markdown:
        print(f"Available here: {_gib(_native.available_memory())}")


def _cell(fit: Fit) -> str:
    device = f"{fit.device_gib} GB" if fit.device_gib else f"over {DEVICES[-1]} GB"
    return f"{_gib(fit.file_bytes)}: {device}"


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.{2 if n_bytes < 100 << 30 else 0}f} GiB"
