"""Small dense models of every architecture, text to calibrate them with, and options that suit them."""

from dataclasses import replace
from pathlib import Path

import torch
from checkpoints import write_checkpoint
from configurations import ARCHITECTURES
from converted import change_json
from vptq_quantizer import QuantizeOptions

SEQ_LEN = 48
# Small enough for the smallest matrix, k_proj (20 x 100).
SMALL = QuantizeOptions(vector_len=4, centroids=16, res_centroids=8, samples=16, seq_len=SEQ_LEN)


def write_dense(directory: Path, architecture: str, shards: int = 1) -> Path:
    """The dense model of an architecture by its name in ARCHITECTURES."""
    write_checkpoint(directory, ARCHITECTURES[architecture], {}, shards=shards)
    change_json(directory / "config.json", lambda config: config.pop("quantization_config"))
    return directory


def write_wide(directory: Path, tied: bool) -> Path:
    """A dense Llama whose rows hold whole blocks of 32 weights, as those of real models do."""
    architecture = replace(ARCHITECTURES["llama"], tied=tied, hidden_size=128, n_heads=4, n_kv_heads=2)
    write_checkpoint(directory, architecture, {})
    change_json(directory / "config.json", lambda config: config.pop("quantization_config"))
    return directory


def write_text(path: Path, n_words: int = 3000) -> Path:
    """Words in random order: about a token each."""
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "and",
        "is",
        "model",
        "file",
    ]
    numbers = torch.randint(len(words), (n_words,), generator=torch.Generator().manual_seed(0))
    path.write_text(" ".join(words[n] for n in numbers.tolist()), encoding="utf-8")
    return path
