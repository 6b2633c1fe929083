"""The files of a dense model, checked before anything is made of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vptq_runtime.checks import shown
from vptq_runtime.errors import FileError, UnsupportedError, printable
from vptq_runtime.text_file import read_json, read_text

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")  # vptq-convert's
DTYPES = ("F16", "BF16", "F32")
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class DenseCheckpoint:
    """config.json, and the tensors of model.safetensors or of what its index names.

    shards: by the name of a tensor the file that has it; shapes: its shape.
    """

    directory: Path
    config: dict[str, Any]
    shards: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def open(cls, directory: Path) -> DenseCheckpoint:
        """Reads config and headers.

        Raises FileError for what is missing, damaged or quantised, UnsupportedError for an architecture that
        vptq-convert does not know.
        """
        path = directory / "config.json"
        config = read_json(path)
        if not isinstance(config, dict):
            raise _error(path, "content", config, "an object")
        if "quantization_config" in config:
            raise _error(path, "quantization_config", config["quantization_config"], "dense weights")
        names = config.get("architectures")
        if not isinstance(names, list) or len(names) != 1:
            raise _error(path, "architectures", names, f"one of {', '.join(ARCHITECTURES)}")
        if names[0] not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise UnsupportedError(f"{path}: architectures: {shown(names[0])} is not supported, only {known}")
        shards, shapes = {}, {}
        for shard in _shards(directory):
            for name, shape in _shapes(shard).items():
                if not name.endswith(".rotary_emb.inv_freq"):  # old checkpoints: follows from rope_theta
                    shards[name], shapes[name] = shard, shape
        if len(shapes.get(EMBEDDING, ())) != 2:
            raise FileError(f"{directory}: found no matrix {EMBEDDING}, expected one")
        layers = {match[1] for name in shapes if (match := re.match(r"model\.layers\.(\d+)\.", name))}
        if config.get("num_hidden_layers") != len(layers):  # before anything is sized by it
            expected = f"{len(layers)}, as many as the checkpoint has"
            raise _error(path, "num_hidden_layers", config.get("num_hidden_layers"), expected)
        return cls(directory, config, shards, shapes)

    @property
    def n_vocab(self) -> int:
        return self.shapes[EMBEDDING][0]

    @property
    def n_weights(self) -> int:
        return sum(map(prod, self.shapes.values()))

    @property
    def tokenizer(self) -> Path:
        """What holds the tokenizer, for messages."""
        return self.directory / "tokenizer.json"

    def tokenizer_json(self) -> str:
        """The text of tokenizer.json; raises FileError."""
        return read_text(self.tokenizer)

    def check_shapes(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raises FileError unless it has these tensors, and no others."""
        for name in sorted(self.shapes.keys() | expected.keys()):
            found, wanted = self.shapes.get(name), expected.get(name)
            if found != wanted:
                shapes = f"found {found or 'none'}, expected {wanted or 'none'}"
                raise FileError(f"{self.directory}: tensor {printable(name)}: {shapes}")

    def tensors(self, device: str) -> Iterator[tuple[str, Any]]:
        """Each tensor's name and itself, read by PyTorch onto that device."""
        for shard in sorted(set(self.shards.values())):
            with safe_open(shard, framework="pt", device=device) as file:
                for name in (name for name, path in self.shards.items() if path == shard):
                    yield name, file.get_tensor(name)


def _shards(directory: Path) -> list[Path]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise FileError(f"{directory}: found no {single.name}, expected it or {index.name}")
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise _error(index, "weight_map", names, "an object of file names")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            raise _error(index, "weight_map", name, "the name of a file beside the index")
    return sorted({directory / name for name in names.values()})


def _shapes(shard: Path) -> dict[str, tuple[int, ...]]:
    if shard.exists() and not shard.is_file():  # a pipe would block
        raise FileError(f"{shard}: found something that is not a regular file, expected a safetensors file")
    shapes = {}
    try:
        with safe_open(shard, framework="numpy") as file:  # checks lengths, types, that all lies in the file
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                tensor = file.get_slice(name)
                if tensor.get_dtype() not in DTYPES:
                    found = f"tensor {printable(name)}: found {tensor.get_dtype()}"
                    raise FileError(f"{shard}: {found}, expected {' or '.join(DTYPES)}")
                shapes[name] = tuple(tensor.get_shape())
    except (SafetensorError, OSError) as error:
        raise FileError(f"{shard}: not a whole safetensors file: {error}") from None
    return shapes


def _error(path: Path, key: str, found: object, expected: str) -> FileError:
    return FileError(f"{path}: {key}: found {shown(found)}, expected {expected}")
