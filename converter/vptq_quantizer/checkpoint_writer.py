"""OUT_DIR: finished decoder layers as files in .parts; when all are there, they become the checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from vptq_converter.checkpoint import Checkpoint
from vptq_converter.checkpoint import Tensor as StoredTensor
from vptq_converter.config import Section

from vptq_quantizer.dense_model import DenseModel
from vptq_quantizer.safe_files import write_json, write_tensors
from vptq_runtime.errors import FileError, OptionError

COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class Part:
    """One decoder layer: its tensors by full name, and what the report says of it."""

    tensors: dict[str, Tensor]
    report: dict[str, Any]


class CheckpointWriter:
    """The files of one run, which may be a later attempt at it.

    run: everything that decides what comes out, by name; attempts with another one are refused, with
    OptionError.
    """

    def __init__(self, out_dir: Path, run: Mapping[str, Any]) -> None:
        self.out_dir = out_dir
        self.parts = out_dir / ".parts"
        path = self.parts / "run.json"
        if (out_dir / "config.json").exists():
            raise OptionError(f"{out_dir}: found a config.json, so a whole model; expected a new directory")
        if path.exists():
            before = Section.read(path).values
            for name, value in run.items():
                if before.get(name) != value:
                    raise OptionError(
                        f"{out_dir}: found a run with {name} {before.get(name)}, expected {value}, as now: "
                        "go on with the same options, or in another directory"
                    )
            return
        if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
            raise OptionError(
                f"{out_dir}: found other files, expected a new directory, or a run to go on with"
            )
        write_json(path, dict(run))

    def path(self, n: int, tuned: bool) -> Path:
        return self.parts / f"{'tuned' if tuned else 'layer'}-{n:05}.safetensors"

    def has(self, n: int, tuned: bool = False) -> bool:
        """Whether decoder layer n is there (tuned: after end-to-end fine-tuning)."""
        return self.path(n, tuned).exists()

    def write(self, n: int, part: Part, tuned: bool = False) -> None:
        """Raises FileError when it cannot be written; all others are untouched."""
        write_tensors(self.path(n, tuned), part.tensors, {"report": json.dumps(part.report)})

    def read(self, n: int, tuned: bool = False, with_tensors: bool = True) -> Part:
        """Raises FileError for a damaged file; without tensors, only the report is read."""
        path = self.path(n, tuned)
        try:
            with safe_open(path, "pt") as file:
                names = list(file.keys()) if with_tensors else []
                tensors = {name: file.get_tensor(name) for name in names}
                return Part(tensors, json.loads(file.metadata()["report"]))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise FileError(
                f"{path}: not a whole part of a checkpoint: {error}; delete it to have it made again"
            ) from error

    def finish(
        self, dense: DenseModel, dtype: torch.dtype, entries: dict[str, Any], report: Mapping[str, Any]
    ) -> None:
        """The checkpoint: a shard for each decoder layer, one for the rest; config.json comes last."""
        n_shards = dense.n_layers + 1
        names = [f"model-{n + 1:05}-of-{n_shards:05}.safetensors" for n in range(n_shards)]
        rest = {
            weight.weight.name: stored(weight.weight, dtype)
            for weight in dense.model.weights
            if not weight.name.startswith("blk.") and isinstance(weight.weight, StoredTensor)
        }
        tuned = self.has(dense.n_layers, tuned=True)  # the last that is written
        if tuned:
            rest |= self.read(dense.n_layers, tuned=True).tensors
        write_tensors(self.out_dir / names[0], rest, {})
        weight_map = dict.fromkeys(rest, names[0])
        total = sum(tensor.nbytes for tensor in rest.values())
        for n in range(dense.n_layers):
            path, target = self.path(n, tuned), self.out_dir / names[n + 1]
            with safe_open(path, "pt") as file:
                weight_map |= dict.fromkeys(file.keys(), target.name)
                total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 (no mapping)
            _link(path, target)
        write_json(
            self.out_dir / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
        self._copy_files(dense.checkpoint)
        write_json(self.out_dir / "report.json", dict(report))
        config = dict(dense.checkpoint.config.values)
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
        config["quantization_config"] = {"quant_method": "vptq", "config_for_layers": entries}
        write_json(self.out_dir / "config.json", config)
        shutil.rmtree(self.parts, ignore_errors=True)

    def _copy_files(self, checkpoint: Checkpoint) -> None:
        for name in COPIED_FILES:
            try:
                if checkpoint.has(name):
                    shutil.copyfile(checkpoint.directory / name, self.out_dir / name)
            except OSError as error:
                raise FileError(f"{self.out_dir / name}: cannot be written: {error.strerror}") from error


def stored(tensor: StoredTensor, dtype: torch.dtype) -> Tensor:
    """A dense tensor in the type that the new checkpoint has; raises FileError where it does not fit."""
    values = torch.from_numpy(tensor.finite()).to(dtype)
    tensor.release()
    if not values.isfinite().all():
        raise tensor.error("a number beyond 65504", f"numbers that {str(dtype).removeprefix('torch.')} holds")
    return values


def _link(path: Path, target: Path) -> None:
    """A second name for a file, which takes no room; a copy where the file system has no such thing."""
    try:
        target.unlink(missing_ok=True)
        try:
            os.link(path, target)
        except OSError:
            shutil.copyfile(path, target)
    except OSError as error:
        raise FileError(f"{target}: cannot be written: {error.strerror}") from error
