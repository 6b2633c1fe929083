"""How good a model is: perplexity of a text, and distance from another model; vptq-perplexity."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vptq_runtime.evaluate.dense_model import DenseModel
    from vptq_runtime.evaluate.scoring import (
        Comparison,
        Estimate,
        Perplexity,
        compare,
        perplexity,
        running_comparison,
        running_perplexity,
    )

__all__ = [
    "Comparison",
    "DenseModel",
    "Estimate",
    "Perplexity",
    "compare",
    "perplexity",
    "running_comparison",
    "running_perplexity",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use, as in vptq_runtime.
    if name not in __all__:
        raise AttributeError(f"module 'vptq_runtime.evaluate' has no attribute {name!r}")
    room = "dense_model" if name == "DenseModel" else "scoring"
    return getattr(import_module(f"vptq_runtime.evaluate.{room}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
