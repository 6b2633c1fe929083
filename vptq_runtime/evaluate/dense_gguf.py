"""A dense GGUF file of llama.cpp, as the files of a dense checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from vptq_converter.dense_gguf.checkpoint import GgufCheckpoint
from vptq_converter.gguf_reader import open_gguf

from vptq_runtime.errors import FileError
from vptq_runtime.evaluate.dense_checkpoint import DenseCheckpoint


@dataclass(frozen=True)
class DenseGguf(DenseCheckpoint):
    """`directory` is the file, which has all that stands in a checkpoint's files."""

    checkpoint: GgufCheckpoint

    @classmethod
    def open(cls, directory: Path) -> DenseGguf:
        checkpoint = GgufCheckpoint(directory)
        shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        return cls(directory, checkpoint.config.values, {}, shapes, checkpoint)

    @property
    def tokenizer(self) -> Path:
        return self.directory

    def tokenizer_json(self) -> str:
        return self.checkpoint.text("tokenizer.json")

    def tensors(self, device: str) -> Iterator[tuple[str, Any]]:
        torch = import_module("torch")
        for name, tensor in self.checkpoint.tensors.items():
            yield name, torch.from_numpy(tensor.finite()).to(device)
            tensor.release()


def is_dense_gguf(path: Path) -> bool:
    """Whether it is a whole GGUF file, and not one of vptq-convert's."""
    try:
        return "vptq.version" not in open_gguf(path).fields
    except FileError:
        return False
