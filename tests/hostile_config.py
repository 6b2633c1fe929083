"""Entries of a dense model's config.json that a forward pass has no use for, as no one should write them."""

from typing import Any


def _nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


NESTED = {"rope_theta": 10000.0, "deep": _nested(800)}
NOT_NEEDED: dict[str, Any] = {
    "attention_dropout": "x",
    "pad_token_id": 10**6,
    "bos_token_id": [[1]],
    "eos_token_id": {},
    "initializer_range": "a",
    "use_cache": "no",
    "pretraining_tp": "a",
    "torch_dtype": ["float16"],
    "attribute_map": {"hidden_size": "vocab_size"},
    "get_text_config": 3,
    "num_labels": 10**12,  # transformers would make a name for each
    "model_type": "nothing",
    "anything": _nested(800),
}
