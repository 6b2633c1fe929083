"""OUT_DIR: finished decoder layers as files in .parts; when all are there, they become the checkpoint."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vptq_converter.checkpoint import Checkpoint
from vptq_converter.checkpoint import Tensor as StoredTensor
from vptq_converter.config import Section

from vptq_quantizer.dense_model import DenseModel
from vptq_quantizer.run.safe_files import (
    REMEDY,
    copy,
    link,
    opened,
    temporary_files,
    write_json,
    write_tensors,
)
from vptq_runtime.errors import FileError, OptionError, VPTQError

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
    """One decoder layer, or under the number n_layers the matrices outside of them: tensors by full name, and
    what the report says of them."""

    tensors: dict[str, Tensor]
    report: dict[str, Any]


class CheckpointWriter:
    """The files of one run, which may be a later attempt at it; a context in which it is this process's own.

    run: everything that decides what comes out, by name; attempts with another one are refused, with
    OptionError, and so are two at a time. Raises FileError for a directory that cannot be used.
    """

    def __init__(self, out_dir: Path, run: Mapping[str, Any]) -> None:
        self.out_dir = out_dir
        self.run = dict(run)
        self.parts = out_dir / ".parts"
        self._run_file, self._lock_file = self.parts / "run.json", self.parts / "lock"
        self._training_file = self.parts / "training.safetensors"
        try:
            if not self._run_file.exists():
                self._expect_new()
            self.parts.mkdir(parents=True, exist_ok=True)
            # Not waiting: a pipe of that name would block.
            self._lock = os.open(self._lock_file, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o666)
            try:
                self._begin()
            except BaseException:
                os.close(self._lock)
                raise
        except VPTQError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a null byte in its name
            raise FileError(f"{out_dir}: cannot be used: {getattr(error, 'strerror', error)}") from error

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def _expect_new(self) -> None:
        if (self.out_dir / "config.json").exists():
            raise OptionError(
                f"{self.out_dir}: found a finished model (config.json), expected a new directory"
            )
        others: set[Path] = set()
        if self.out_dir.exists():
            others = set(self.out_dir.iterdir()) - {self.parts} if self.out_dir.is_dir() else {self.out_dir}
        if self.parts.exists():  # a run that was killed before it had a run.json
            others |= set(self.parts.iterdir()) - {self._lock_file, *temporary_files(self.parts)}
        if others:
            raise OptionError(
                f"{self.out_dir}: found other files, expected a new directory, or a run to go on with"
            )

    def _begin(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OptionError(
                f"{self.out_dir}: found another process at work, expected to be the only one"
            ) from error
        except OSError:
            pass  # a file system without locks
        if not self._run_file.exists():
            self._expect_new()  # whoever had the lock may have finished just now
        if self._parts():
            before = Section.read(self._run_file).values
            for name, value in self.run.items():
                if before.get(name) != value:
                    raise OptionError(
                        f"{self.out_dir}: found layers of a run with {name} {before.get(name)}, "
                        f"expected {value}: go on with the same options, or in another directory"
                    )
        else:
            write_json(self._run_file, self.run)
        for path in temporary_files(self.out_dir) + temporary_files(self.parts):
            path.unlink(missing_ok=True)

    def _parts(self) -> list[Path]:
        return [path for kind in ("layer", "tuned") for path in self.parts.glob(f"{kind}-*.safetensors")]

    def write_training(self, part: Part) -> None:
        """The state of an end-to-end training, in the place of the one before; raises as `write` does."""
        self._write(self._training_file, part)

    def read_training(self) -> Part | None:
        """That state, None where there is none; raises as `read` does."""
        return self._read(self._training_file, True) if self._training_file.exists() else None

    def path(self, n: int, tuned: bool) -> Path:
        return self.parts / f"{'tuned' if tuned else 'layer'}-{n:05}.safetensors"

    def has(self, n: int, tuned: bool = False) -> bool:
        """Whether decoder layer n is there (tuned: after end-to-end fine-tuning); raises as `read` does."""
        return self.path(n, tuned).exists() and bool(self.read(n, tuned, with_tensors=False))

    def has_tuned(self, n_layers: int) -> bool:
        """Whether all is there that end-to-end fine-tuning gives: the decoder layers, and the rest."""
        return all(self.has(n, tuned=True) for n in range(n_layers + 1))

    def write(self, n: int, part: Part, tuned: bool = False) -> None:
        """Raises FileError when it cannot be written; all others are untouched."""
        self._write(self.path(n, tuned), part)

    def _write(self, path: Path, part: Part) -> None:
        report = json.dumps(part.report)
        kinds = {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in part.tensors.items()}
        write_tensors(path, part.tensors, {"report": report, "key": self._key(path, report, kinds)})

    def read(self, n: int, tuned: bool = False, with_tensors: bool = True) -> Part:
        """Raises FileError for a damaged file and for one of another run or layer; without tensors, only the
        report is read."""
        return self._read(self.path(n, tuned), with_tensors)

    def _read(self, path: Path, with_tensors: bool) -> Part:
        with opened(path) as file:
            metadata = file.metadata() or {}
            report = metadata.get("report", "")
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            shapes = {name: part.get_shape() for name, part in slices.items()}
            kinds = {  # a single number, of which there are no slices, is never right
                name: f"{slices[name][:0].dtype} {shape}" if shape else "" for name, shape in shapes.items()
            }
            if metadata.get("key") != self._key(path, report, kinds):
                raise FileError(
                    f"{path}: found a part of another run or another layer, or a changed one; {REMEDY}"
                )
            names = slices if with_tensors else ()
            return Part({name: file.get_tensor(name) for name in names}, json.loads(report))

    def _key(self, path: Path, report: str, kinds: Mapping[str, str]) -> str:
        """Goes with a part wherever it is copied: says which part of which run it is, and what is in it.

        kinds: type and shape of each tensor.
        """
        text = json.dumps([self.run, path.name, report, kinds], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def finish(
        self,
        dense: DenseModel,
        dtype: torch.dtype,
        quantization: Mapping[str, Any],
        report: Mapping[str, Any],
    ) -> None:
        """The checkpoint: a shard for each decoder layer, one for the rest; config.json comes last."""
        n_shards = dense.n_layers + 1
        names = [f"model-{n + 1:05}-of-{n_shards:05}.safetensors" for n in range(n_shards)]
        quantised = {f"{module}.weight" for module in quantization["config_for_layers"]}
        rest = {
            weight.weight.name: stored(weight.weight, dtype)
            for weight in dense.model.weights
            if not weight.name.startswith("blk.")
            and isinstance(weight.weight, StoredTensor)
            and weight.weight.name not in quantised
        }
        if self.has(dense.n_layers):
            rest |= self.read(dense.n_layers).tensors
        tuned = self.has_tuned(dense.n_layers)
        if tuned:
            rest |= self.read(dense.n_layers, tuned=True).tensors
        write_tensors(self.out_dir / names[0], rest, {})
        weight_map = dict.fromkeys(rest, names[0])
        total = sum(tensor.nbytes for tensor in rest.values())
        for n in range(dense.n_layers):
            tensors = self.read(n, tuned).tensors
            weight_map |= dict.fromkeys(tensors, names[n + 1])
            total += sum(tensor.nbytes for tensor in tensors.values())
            link(self.path(n, tuned), self.out_dir / names[n + 1])
        write_json(
            self.out_dir / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
        for name in copied_files(dense.checkpoint):
            with dense.checkpoint.open(name) as file:
                copy(file, self.out_dir / name, str(dense.checkpoint.path(name)))
        write_json(self.out_dir / "report.json", dict(report))
        config = dict(dense.checkpoint.config.values)
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
        config["quantization_config"] = {"quant_method": "vptq", **quantization}
        write_json(self.out_dir / "config.json", config)
        self._tidy()

    def _tidy(self) -> None:
        """Takes away what was the run's own; what it is a run of goes first: with it, all parts are there."""
        with contextlib.suppress(OSError):  # the checkpoint is there, with or without this
            for path in (self._run_file, *self._parts(), self._training_file, self._lock_file):
                path.unlink(missing_ok=True)
            self.parts.rmdir()


def earlier_plan(out_dir: Path, run: Mapping[str, Any]) -> Section | None:
    """The plan of an earlier attempt at the same run, None where there is none; raises FileError for a
    damaged file."""
    path = out_dir / ".parts" / "run.json"
    try:
        if not path.is_file():
            return None
    except (OSError, ValueError):  # that is said by whoever writes there
        return None
    before = Section.read(path)
    same = all(before.values.get(name) == value for name, value in run.items())
    return before.section("plan") if same and "plan" in before.values else None


def copied_files(checkpoint: Checkpoint) -> list[str]:
    """The files that the new checkpoint has unchanged; raises FileError for one that cannot be read, and for
    one that has changed since the first call."""
    names = [name for name in COPIED_FILES if checkpoint.has(name)]
    for name in names:
        checkpoint.open(name).close()
    return names


def stored(tensor: StoredTensor, dtype: torch.dtype) -> Tensor:
    """A dense tensor in the type that the new checkpoint has; raises FileError where it does not fit."""
    values = torch.from_numpy(tensor.finite()).to(dtype)
    tensor.release()
    if not values.isfinite().all():
        raise tensor.error(
            f"a number beyond {torch.finfo(dtype).max:g}",
            f"numbers that {str(dtype).removeprefix('torch.')} holds",
        )
    return values
