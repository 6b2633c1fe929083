"""The ways to name a checkpoint: file, index, directory, repo id; and what is wrong with each."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from checkpoints import write_checkpoint
from configurations import ARCHITECTURES, CONFIGURATIONS
from converted import keys, raw_tensors
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from vptq_converter import convert

from vptq_runtime import FileError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sources") / "whole"
    return write_checkpoint(directory, ARCHITECTURES["llama"], CONFIGURATIONS["v8-k256-256"])


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    layers = CONFIGURATIONS["v8-k256-256"]
    return write_checkpoint(
        tmp_path / "sharded", ARCHITECTURES["llama"], layers, shards=3, shared=("q_proj",)
    )


def test_every_way_to_name_it_gives_the_same_tensors(whole: Path, sharded: Path, tmp_path: Path) -> None:
    sources = (
        whole,
        whole / "model.safetensors",
        sharded,
        sharded / "model.safetensors.index.json",
    )
    results = []
    for n, source in enumerate(sources):
        convert(source, tmp_path / f"{n}.gguf")
        results.append(raw_tensors(tmp_path / f"{n}.gguf"))
    assert len(results[0]) > 50
    assert all(result == results[0] for result in results)


def test_the_model_is_named_after_what_has_a_name(whole: Path, sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "my-model-v8.safetensors").symlink_to(whole / "model.safetensors")
    for file in ("config.json", "tokenizer.json"):
        shutil.copy(whole / file, tmp_path)
    for source, name in (
        (whole, "whole"),
        (whole / "model.safetensors", "whole"),
        (sharded / ".." / "sharded" / "model.safetensors.index.json", "sharded"),
        (tmp_path / "my-model-v8.safetensors", "my-model-v8"),
    ):
        convert(source, tmp_path / "out.gguf")
        assert keys(tmp_path / "out.gguf")["general.name"] == name


def test_a_single_file_of_another_name_in_a_directory(whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    (copy / "model.safetensors").rename(copy / "weights.safetensors")
    convert(copy, tmp_path / "out.gguf")
    convert(whole, tmp_path / "whole.gguf")
    assert raw_tensors(tmp_path / "out.gguf") == raw_tensors(tmp_path / "whole.gguf")


def test_a_repo_id_is_downloaded(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        calls.append((repo_id, options))
        return str(whole)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    convert("owner/some.model-v8", tmp_path / "out.gguf")

    assert [repo_id for repo_id, _ in calls] == ["owner/some.model-v8"]
    kept = huggingface_hub.utils.filter_repo_objects(
        [
            "model-00001-of-00002.safetensors",
            "config.json",
            "chat_template.jinja",
            "pytorch_model.bin",
            "consolidated.safetensors",
            "original/model.safetensors",
            "README.md",
        ],
        allow_patterns=calls[0][1]["allow_patterns"],
        ignore_patterns=calls[0][1]["ignore_patterns"],
    )
    assert list(kept) == ["model-00001-of-00002.safetensors", "config.json", "chat_template.jinja"]
    assert (tmp_path / "out.gguf").exists()


def hub_error(kind: type[HfHubHTTPError]) -> Exception:
    """As the client makes it of the hub's answer."""
    error = kind.__new__(kind)
    Exception.__init__(error, "404 Client Error. (Request ID: x)\n\nRepository Not Found for url: y.")
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError("Got: no network\nPlease check your connection."), "no network"),
        (Exception("its own"), "its own"),
        (ValueError(), "ValueError"),
        (hub_error(RepositoryNotFoundError), "no such repository, or a private one (hf auth login)"),
        (
            hub_error(GatedRepoError),
            "it asks for a login (hf auth login) that has agreed to the model's terms",
        ),
    ],
)
def test_what_the_hub_says_is_passed_on_in_one_sentence(
    error: Exception, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot_download(repo_id: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(FileError) as raised:
        convert("owner/model", tmp_path / "out.gguf")
    expected = f"owner/model: no such path here, and the hub did not give it: {reason}"
    assert str(raised.value) == expected
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "source", ["nothing", "nothing.safetensors", "a/b/c", "some/model.safetensors", "", "x" * 300]
)
def test_a_path_that_is_not_there(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError):
        convert(source, "out.gguf")


def test_files_that_are_no_checkpoint(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    (tmp_path / "model.bin").touch()
    (tmp_path / "m-00001-of-00003.safetensors").touch()
    (tmp_path / "run" / ".parts").mkdir(parents=True)
    shutil.copy(whole / "config.json", tmp_path / "run")
    for source, expected in (
        (tmp_path / "model.gguf", "found a GGUF file, which is converted already, expected a checkpoint"),
        (tmp_path / "model.bin", "expected a .safetensors file, an index.json or a directory"),
        (whole / "config.json", f"found a JSON file that is no index, expected its directory, {whole}"),
        (
            tmp_path / "m-00001-of-00003.safetensors",
            f"found one of 3 files, expected their directory, {tmp_path}",
        ),
        (
            tmp_path / "run",
            "found a run of vptq-quantize that is not finished, expected a checkpoint: the same command goes "
            "on with it",
        ),
        ("../model", "no such file or directory, and not a hub repo id (owner/name)"),
    ):
        with pytest.raises(FileError) as raised:
            convert(source, tmp_path / "out.gguf")
        assert str(raised.value) == f"{source}: {expected}"


def test_a_missing_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileError, match=r"model-00002-of-00003\.safetensors.*No such file"):
        convert(sharded, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_tensor_missing_from_its_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["lm_head.weight"] = next(
        file for file in values["weight_map"].values() if file != values["weight_map"]["lm_head.weight"]
    )
    index.write_text(json.dumps(values))
    with pytest.raises(FileError, match=r"of-00003\.safetensors: tensor lm_head\.weight is missing"):
        convert(sharded, tmp_path / "out.gguf")


@pytest.mark.parametrize("shard", ["../whole.safetensors", "/etc/passwd", "", 3, None, "a\0b"])
def test_an_index_reaches_only_files_beside_it(shard: object, sharded: Path, tmp_path: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    with pytest.raises(FileError, match=r"weight_map\.lm_head\.weight"):
        convert(sharded, tmp_path / "out.gguf")


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"weight_map": []}', "[" * 100_000, "\ud800"])
def test_an_index_that_is_none(text: str, sharded: Path, tmp_path: Path) -> None:
    (sharded / "model.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(FileError, match=r"index\.json"):
        convert(sharded, tmp_path / "out.gguf")


def test_a_directory_without_weights_or_with_a_choice(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"found no \.safetensors file"):
        convert(tmp_path, tmp_path / "out.gguf")
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(whole / "model.safetensors", tmp_path / name)
    with pytest.raises(FileError, match="found 2 files"):
        convert(tmp_path, tmp_path / "out.gguf")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_file_beside_the_weights_is_named(name: str, whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    (copy / name).unlink()
    with pytest.raises(FileError, match=f"{name}: cannot be read: No such file"):
        convert(copy, tmp_path / "out.gguf")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_pipe_in_place_of_a_file_does_not_hang(name: str, whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(FileError, match=f"{name}: found something that is not a regular file"):
        convert(copy, tmp_path / "out.gguf")
