"""How good a model is: perplexity, multiple choice, distance from another model; vptq-perplexity."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vptq_runtime.evaluate.dense_model import DenseModel
    from vptq_runtime.evaluate.multiple_choice import Choices, Item, choices, read_items, running_choices
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
    "Choices",
    "Comparison",
    "DenseModel",
    "Estimate",
    "Item",
    "Perplexity",
    "choices",
    "compare",
    "perplexity",
    "read_items",
    "running_choices",
    "running_comparison",
    "running_perplexity",
]

CHOICES = ("Choices", "Item", "choices", "read_items", "running_choices")


def __getattr__(name: str) -> Any:
    # Loaded on first use, as in vptq_runtime.
    if name not in __all__:
        raise AttributeError(f"module 'vptq_runtime.evaluate' has no attribute {name!r}")
    room = {"DenseModel": "dense_model"} | dict.fromkeys(CHOICES, "multiple_choice")
    return getattr(import_module(f"vptq_runtime.evaluate.{room.get(name, 'scoring')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
