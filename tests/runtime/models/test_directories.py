"""-m DIR: a checkpoint's directory is converted once, and again when its files have changed."""

import json
import os
import shutil
from pathlib import Path

import pytest
from converted import keys, raw_tensors

from vptq_runtime import FileError, Runtime, UnsupportedError
from vptq_runtime.models import cache, conversion, disk
from vptq_runtime.models.model import model_file


@pytest.fixture
def directory(checkpoint: Path, cache_dir: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be changed."""
    return shutil.copytree(checkpoint, tmp_path / "my model")


def entries(cache_dir: Path) -> set[str]:
    return {path.name for path in cache_dir.iterdir()} - {"locks"} if cache_dir.exists() else set()


def test_converted_once(directory: Path, model: Path, cache_dir: Path, told: list[str]) -> None:
    file = Path(model_file(str(directory), told.append))
    assert raw_tensors(file) == raw_tensors(model)
    assert keys(file)["general.name"] == "my model"
    assert told == [f"{directory}: converting into {cache_dir}"]
    assert model_file(f"{directory}/../my model/", told.append) == str(file)
    assert model_file("my model", told.append) == str(file)  # from where it lies
    assert len(told) == 1
    with Runtime(directory, device="cpu") as runtime:
        assert runtime.n_ctx


def test_its_weights_or_its_index_name_it_too(directory: Path, model: Path, told: list[str]) -> None:
    assert raw_tensors(Path(model_file(str(directory / "model.safetensors"), told.append))) == raw_tensors(
        model
    )


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_changed_files_make_another_model_and_the_old_one_goes(
    name: str, directory: Path, cache_dir: Path, told: list[str]
) -> None:
    old = Path(model_file(str(directory), told.append))
    os.utime(directory / name, ns=(0, 10**9))
    new = Path(model_file(str(directory), told.append))
    assert new != old
    assert not old.exists()
    assert entries(cache_dir) == {new.parent.name}


def test_two_directories_of_one_name_are_two_models(
    directory: Path, tmp_path: Path, cache_dir: Path, told: list[str]
) -> None:
    other = shutil.copytree(directory, tmp_path / "other" / "my model")
    assert model_file(str(directory), told.append) != model_file(str(other), told.append)
    assert len(entries(cache_dir)) == 2


def test_a_directory_that_changes_while_it_is_converted(
    directory: Path, cache_dir: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = conversion.convert

    def slow(source: Path, target: Path, name: str) -> None:
        convert(source, target, name)
        os.utime(directory / "tokenizer.json", ns=(0, 10**9))

    monkeypatch.setattr(conversion, "convert", slow)
    with pytest.raises(FileError, match="has changed while it was converted"):
        model_file(str(directory), told.append)
    assert entries(cache_dir) == set()


def test_what_is_no_vptq_checkpoint(directory: Path, cache_dir: Path, told: list[str]) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    with pytest.raises(UnsupportedError) as raised:
        model_file(str(directory), told.append)
    line = f"make it with vptq-quantize '{directory}' OUT_DIR --calibration TEXT"
    assert str(raised.value) == f"{directory}: found a dense model, expected a VPTQ one: {line}"
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileError, match=r"found no \.safetensors file"):
        model_file(str(directory), told.append)
    assert entries(cache_dir) == set()
    assert told == []


def test_a_directory_with_one_gguf_file(
    model: Path, tmp_path: Path, cache_dir: Path, told: list[str]
) -> None:
    (tmp_path / "packed").mkdir()
    shutil.copy(model, tmp_path / "packed" / "any.gguf")
    assert model_file("packed", told.append) == str(tmp_path / "packed" / "any.gguf")
    assert entries(cache_dir) == set()
    shutil.copy(model, tmp_path / "packed" / "two.gguf")
    with pytest.raises(FileError, match=r"found no \.safetensors file"):
        model_file("packed", told.append)


def test_a_disk_that_is_too_small(
    directory: Path, cache_dir: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda directory: 1000)
    with pytest.raises(FileError, match=r"needs .* of disk \(the converted file .*\), found 1\.0 kB free in"):
        model_file(str(directory), told.append)
    assert entries(cache_dir) == set()


def test_files_are_taken_as_they_are(model: Path, cache_dir: Path, told: list[str]) -> None:
    for source in (str(model), "", "nothing.gguf", "/nothing", "a/b.gguf", "a/b.safetensors"):
        assert model_file(source, told.append) == source
    assert entries(cache_dir) == set()


def test_a_cache_that_can_only_be_read_is_used(
    directory: Path, cache_dir: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = model_file(str(directory), told.append)

    def refuse(entry: cache.Entry) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache.Entry, "write", refuse)  # root may write anywhere
    assert model_file(str(directory), told.append) == file
