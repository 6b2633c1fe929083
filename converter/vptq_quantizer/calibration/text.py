"""Calibration text -> windows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from vptq_converter.checkpoint import Checkpoint
from vptq_converter.tokenizer import read_tokenizer

from vptq_quantizer.options import option_error
from vptq_runtime.errors import OptionError
from vptq_runtime.text.tokenizer import Tokenizer
from vptq_runtime.text_file import read_text


@dataclass(frozen=True)
class Calibration:
    """Text as tokens: `stream` (n,) all of it, `windows` (n_windows, seq_len) for the Hessians."""

    stream: NDArray[np.int64]
    windows: NDArray[np.int64]

    @property
    def key(self) -> str:
        """Names the windows: Hessians with the same key come from the same tokens."""
        digest = hashlib.sha256(str(self.windows.shape).encode())
        digest.update(self.windows.astype("<i8").tobytes())
        return digest.hexdigest()[:32]

    @property
    def n_trained(self) -> int:
        """Tokens at the start of the stream that may be trained on; the rest, 5 %, is for measuring."""
        return len(self.stream) - max(1, len(self.stream) // 20)

    def batch(self, step: int, n_windows: int, seed: int) -> NDArray[np.int64]:
        """Windows (n_windows, seq_len, or all of a shorter text) of step `step` of a training."""
        seq_len = min(self.windows.shape[1], self.n_trained)
        rng = np.random.default_rng([seed, step])
        starts = rng.integers(self.n_trained - seq_len + 1, size=n_windows)
        return np.stack([self.stream[start : start + seq_len] for start in starts])

    def held_out(self, most: int) -> NDArray[np.int64]:
        """At most so many windows (n, seq_len, or all of a shorter text) of what is not trained on."""
        rest = self.stream[self.n_trained :]
        seq_len = min(self.windows.shape[1], len(rest))
        n_windows = len(rest) // seq_len
        windows = rest[: n_windows * seq_len].reshape(n_windows, seq_len)
        chosen: NDArray[np.int64] = np.linspace(0, n_windows - 1, min(most, n_windows)).astype(np.int64)
        return windows[chosen]


def read_calibration(
    checkpoint: Checkpoint, n_vocab: int, files: Sequence[str | Path], samples: int, seq_len: int, seed: int
) -> Calibration:
    """Tokenises the files with the model's own tokenizer and draws windows that do not overlap.

    Each file's text is one document: the tokenizer puts around it what it puts around a prompt. Text of less
    than one window is one shorter window; of less than `samples` windows, all that there are. Raises
    FileError for a file that cannot be read, OptionError for text without tokens.
    """
    json = read_tokenizer(checkpoint, n_vocab).json
    tokenizer = Tokenizer(json, n_vocab, str(checkpoint.path("tokenizer.json")))
    stream = np.concatenate(
        [np.array(tokenizer.encode(read_text(Path(file)), add_special=True), np.int64) for file in files]
    )
    if len(stream) < 2:
        names = ", ".join(map(str, files))
        raise OptionError(f"--calibration: found {len(stream)} tokens in {names}, expected text")
    seq_len = min(seq_len, len(stream))
    n_windows = len(stream) // seq_len
    chosen = np.random.default_rng(seed).permutation(n_windows)[:samples]
    windows = stream[: n_windows * seq_len].reshape(n_windows, seq_len)[np.sort(chosen)]
    return Calibration(stream, windows)


def check_context(seq_len: int, n_ctx_train: int) -> None:
    """Refuses windows that the model was not trained on."""
    if seq_len > n_ctx_train:
        raise option_error("seq_len", seq_len, f"at most the model's context, {n_ctx_train} tokens")
