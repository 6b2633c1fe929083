"""OUT_DIR: whose parts are taken, who may write there, and what a run that was killed has left."""

import fcntl
import json
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_models import SMALL
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from vptq_converter.checkpoint import Checkpoint
from vptq_quantizer import quantize
from vptq_quantizer.run import checkpoint_writer, model_quantizer, safe_files
from vptq_quantizer.run.checkpoint_writer import stored

from vptq_runtime import FileError, OptionError
from vptq_runtime.errors import OutOfMemoryError

OPTIONS = replace(SMALL, second_order=False)
CENTROIDS = "model.layers.1.mlp.up_proj.centroids.weight"
FOREIGN = r"layer-00001\.safetensors: found a part of another run or another layer, .*; delete it"


@pytest.fixture(scope="module")
def whole(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both decoder layers are there, but no checkpoint yet: not to be changed."""
    out = tmp_path_factory.mktemp("whole") / "out"

    def full(*_: Any) -> Any:
        raise FileError("No space left on device")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(FileError, match="No space left"):
        patch.setattr(checkpoint_writer.CheckpointWriter, "finish", full)
        quantize(model, out, OPTIONS, calibration=[text])
    return out


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


def part(out: Path, n: int) -> Path:
    return out / ".parts" / f"layer-{n:05}.safetensors"


def change_part(path: Path, change: Callable[[dict[str, Tensor]], Any], **changes: str) -> None:
    """change: what is done to its tensors; changes: to its metadata."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        metadata = file.metadata() | changes
    change(tensors)
    save_file(tensors, path, metadata)


def test_a_part_of_a_run_with_other_options(model: Path, text: Path, out: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    quantize(model, other, replace(OPTIONS, centroids=8), calibration=[text], layers=(1, 1))
    shutil.copy(part(other, 1), part(out, 1))
    with pytest.raises(FileError, match=FOREIGN):
        quantize(model, out, OPTIONS, calibration=[text])


def test_a_part_of_another_layer(model: Path, text: Path, out: Path) -> None:
    shutil.copy(part(out, 0), part(out, 1))
    with pytest.raises(FileError, match=FOREIGN):
        quantize(model, out, OPTIONS, calibration=[text])
    part(out, 1).unlink()
    assert quantize(model, out, OPTIONS, calibration=[text])["finished"]


@pytest.mark.parametrize("report", ["{}", "[]", "3", "null", "", "[" * 10000])
def test_a_part_with_a_changed_report(report: str, model: Path, text: Path, out: Path) -> None:
    change_part(part(out, 1), lambda _: None, report=report)
    with pytest.raises(FileError, match=FOREIGN):
        quantize(model, out, OPTIONS, calibration=[text])


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(CENTROIDS),
        lambda tensors: tensors.update(other=torch.ones(3)),
        lambda tensors: tensors.update({CENTROIDS: tensors[CENTROIDS][:, 1:].contiguous()}),
        lambda tensors: tensors.update({CENTROIDS: tensors[CENTROIDS].float()}),
        lambda tensors: tensors.update(other=torch.tensor(1.0)),
    ],
)
def test_a_part_with_changed_tensors(
    change: Callable[[dict[str, Tensor]], Any], model: Path, text: Path, out: Path
) -> None:
    change_part(part(out, 1), change)
    with pytest.raises(FileError, match=FOREIGN):
        quantize(model, out, OPTIONS, calibration=[text])


def test_end_to_end_parts_that_are_damaged_or_missing(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, options = tmp_path / "out", replace(OPTIONS, end_to_end=1)

    def full(*_: Any) -> Any:
        raise FileError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(FileError, match="No space left"):
        patch.setattr(checkpoint_writer.CheckpointWriter, "finish", full)
        quantize(model, out, options, calibration=[text])
    tuned = out / ".parts" / "tuned-00000.safetensors"
    tuned.write_bytes(tuned.read_bytes()[:-1])
    with pytest.raises(
        FileError, match=r"tuned-00000.safetensors: not a whole safetensors file: .*; delete it"
    ):
        quantize(model, out, options, calibration=[text])
    tuned.unlink()
    assert quantize(model, out, options, calibration=[text])["finished"]
    assert not (out / ".parts").exists()


@pytest.mark.parametrize("report", [None, "", "[]", '{"layers": [], "finished": 1e999}'])
def test_a_run_that_was_killed_before_tidying_up(
    report: str | None, model: Path, text: Path, out: Path, tmp_path: Path
) -> None:
    """All parts are there, so all that is made of them is made again: none of it is read."""
    shutil.copytree(out / ".parts", tmp_path / "parts")
    expected = quantize(model, out, OPTIONS, calibration=[text])
    shutil.move(tmp_path / "parts", out / ".parts")
    if report is not None:
        (out / "report.json").write_text(report)
    with pytest.raises(OptionError, match="found layers of a run with seed 0, expected 1"):
        quantize(model, out, replace(OPTIONS, seed=1), calibration=[text])
    assert quantize(model, out, OPTIONS, calibration=[text]) == expected
    assert json.loads((out / "report.json").read_text()) == expected
    assert not (out / ".parts").exists()


def test_a_run_that_was_killed_while_tidying_up(
    model: Path, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is finished: what parts are left are nobody's."""
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path == part(out, 1):
            raise KeyboardInterrupt
        real(path, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", unlink)
        quantize(model, out, OPTIONS, calibration=[text])
    assert part(out, 1).exists()
    with pytest.raises(OptionError, match=r"found a finished model"):
        quantize(model, out, OPTIONS, calibration=[text])


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_parts_that_are_no_files(make: Callable[[Path], Any], model: Path, text: Path, out: Path) -> None:
    part(out, 1).unlink()
    make(part(out, 1))
    with pytest.raises(FileError, match=r"layer-00001\.safetensors: found something that is not a regular"):
        quantize(model, out, OPTIONS, calibration=[text])


def test_a_lock_that_is_a_pipe(model: Path, text: Path, tmp_path: Path) -> None:
    lock = tmp_path / "out" / ".parts" / "lock"
    lock.parent.mkdir(parents=True)
    os.mkfifo(lock)
    with pytest.raises(FileError, match="out: cannot be used: No such device"):
        quantize(model, tmp_path / "out", OPTIONS, calibration=[text])


def test_what_killed_writers_have_left(model: Path, text: Path, out: Path) -> None:
    (out / ".parts" / ".layer-00001.safetensors.01234567.tmp").touch()
    (out / ".config.json.01234567.tmp").touch()
    for directory in (out, out / ".parts"):
        (directory / ".tmpAbC012").touch()  # safetensors' own
    quantize(model, out, OPTIONS, calibration=[text])
    assert not list(out.rglob(".*"))


def test_a_run_that_was_killed_before_it_began(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / ".parts").mkdir(parents=True)
    (tmp_path / "out" / ".parts" / ".run.json.01234567.tmp").touch()
    quantize(model, tmp_path / "out", OPTIONS, calibration=[text], layers=(0, 0))
    assert part(tmp_path / "out", 0).exists()


def test_two_processes(model: Path, text: Path, out: Path) -> None:
    with (out / ".parts" / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OptionError, match="out: found another process at work"):
            quantize(model, out, OPTIONS, calibration=[text])
    assert quantize(model, out, OPTIONS, calibration=[text])["finished"]


@pytest.mark.parametrize(("name", "reason"), [("x" * 300, "File name too long"), ("a\0b", "null byte")])
def test_names_that_no_directory_has(name: str, reason: str, model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=f"cannot be used: .*{reason}"):
        quantize(model, tmp_path / name, OPTIONS, calibration=[text])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.symlink_to("nowhere"), "cannot be read: No such file"),
        (Path.mkdir, "not a regular file"),
        (os.mkfifo, "not a regular file"),
    ],
)
def test_files_that_cannot_be_copied(
    make: Callable[[Path], Any], reason: str, model: Path, text: Path, tmp_path: Path
) -> None:
    """The model's file is named, and nothing is begun."""
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    make(copy / "merges.txt")
    with pytest.raises(FileError, match=rf"model/merges\.txt: .*{reason}"):
        quantize(copy, tmp_path / "out", OPTIONS, calibration=[text])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_out_of_memory(
    error: Exception, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collect(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(model_quantizer, "collect", collect)
    with pytest.raises(OutOfMemoryError, match=r"out of memory: .*memory"):
        quantize(model, tmp_path / "out", OPTIONS, calibration=[text])


def test_hessians_among_the_parts(model: Path, text: Path, tmp_path: Path) -> None:
    parts = tmp_path / "out" / ".parts"
    assert quantize(model, parts.parent, OPTIONS, calibration=[text], hessians=parts)["finished"]
    assert sorted(path.name for path in parts.iterdir()) == [f"hessian-0000{n}.safetensors" for n in (0, 1)]


def test_a_number_that_bfloat16_cannot_hold(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = Checkpoint(model).tensor("model.norm.weight")
    monkeypatch.setattr(
        type(tensor), "finite", lambda self: torch.full(self.shape, 3.4e38, dtype=torch.float32).numpy()
    )
    with pytest.raises(FileError, match=r"found a number beyond 3\.38953e\+38, .* bfloat16 holds"):
        stored(tensor, torch.bfloat16)


def test_names_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's bytes before its name, and a name only lasts once its directory is there too."""
    synced: list[bool] = []
    monkeypatch.setattr(
        safe_files.os, "fsync", lambda file: synced.append(stat.S_ISDIR(os.fstat(file).st_mode))
    )
    safe_files.write_json(tmp_path / "a.json", {})
    assert synced == [False, True]
