"""-m owner/model: what is downloaded and converted, what is found again, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from converted import keys, raw_tensors
from hub_stub import HubStub, commit_of
from huggingface_hub import constants
from vptq_converter import convert

from vptq_runtime import FileError, OptionError, Runtime, VPTQError
from vptq_runtime.models import cache, conversion, disk
from vptq_runtime.models import hub as hub_client
from vptq_runtime.models.model import model_file

REFUSED = "owner/model: no such path here, and the hub did not give it: "


def contents(cache_dir: Path) -> set[str]:
    """What is in the cache, locks aside."""
    return {path.name for path in cache_dir.iterdir()} - {"locks"} if cache_dir.exists() else set()


def files_of(checkpoint: Path, **changes: bytes | None) -> dict[str, bytes]:
    """A checkpoint's files, some of them changed or left out (None); _ stands for the dot in a name."""
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    for name, content in changes.items():
        files.pop(name.replace("__", "."), None)
        if content is not None:
            files[name.replace("__", ".")] = content
    return files


def config(checkpoint: Path, **changes: Any) -> bytes:
    values = json.loads((checkpoint / "config.json").read_text())
    return json.dumps(
        {name: value for name, value in (values | changes).items() if value is not None}
    ).encode()


def test_the_first_time_downloads_and_converts_the_second_finds(
    hub: HubStub, checkpoint: Path, model: Path, cache_dir: Path, told: list[str]
) -> None:
    commit = hub.add("owner/model", checkpoint)
    file = Path(model_file("owner/model", told.append))
    assert raw_tensors(file) == raw_tensors(model)
    assert keys(file)["general.name"] == "model"
    assert contents(cache_dir) == {f"owner--model--{commit}"}
    assert hub.downloads() == ["model.safetensors"]
    assert [line.partition(":")[2].split()[0] for line in told] == ["downloading", "converting"]

    told.clear()
    assert model_file("owner/model", told.append) == str(file)
    assert model_file("owner/model@main", told.append) == str(file)
    assert hub.downloads() == ["model.safetensors"]
    assert told == []


def test_a_runtime_by_name(
    hub: HubStub, checkpoint: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add("owner/model", checkpoint)
    options: Any = {"max_tokens": 8, "temperature": 0}
    with Runtime("owner/model", device="cpu") as by_name, Runtime(model, device="cpu") as by_path:
        assert by_name.generate("the", **options).text == by_path.generate("the", **options).text
    assert "owner/model: downloading" in caplog.text


def test_another_commit_is_another_model(
    hub: HubStub, checkpoint: Path, cache_dir: Path, told: list[str]
) -> None:
    one = hub.add("owner/model", checkpoint, "one")
    first = model_file("owner/model", told.append)
    two = hub.add("owner/model", checkpoint, "two")
    second = model_file("owner/model", told.append)
    assert first != second
    assert contents(cache_dir) == {f"owner--model--{one}", f"owner--model--{two}"}
    hub.add("owner/model", checkpoint, "one", branch="v1")
    assert model_file("owner/model@v1", told.append) == first
    assert hub.downloads() == ["model.safetensors"] * 2

    n_requests = len(hub.requests)  # a commit never changes: nobody is asked
    assert model_file(f"owner/model@{one}", told.append) == first
    assert model_file(f"owner/model@{two[:12]}", told.append) == second
    assert len(hub.requests) == n_requests


def test_vptq_convert_takes_a_revision(
    hub: HubStub, checkpoint: Path, tmp_path: Path, cache_dir: Path
) -> None:
    hub.add("owner/model", {"README.md": b"x"})
    hub.add("owner/model", checkpoint, "two", branch="v1")
    convert("owner/model@v1", tmp_path / "out.gguf")
    assert keys(tmp_path / "out.gguf")["general.name"] == "model"
    with pytest.raises(FileError, match=r"owner/model@v2: .*: the repository has no such revision"):
        convert("owner/model@v2", tmp_path / "out.gguf")
    assert contents(cache_dir) == set()


def test_without_a_network_the_newest_is_taken_and_that_is_said(
    hub: HubStub, checkpoint: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("owner/model", checkpoint, "one", branch="v1")
    old = model_file("owner/model@v1", told.append)
    hub.add("owner/model", checkpoint, "two")
    monkeypatch.setattr(cache, "now", lambda: "2100-01-01T00:00:00+00:00")
    new = model_file("owner/model", told.append)
    told.clear()

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert model_file("owner/model", told.append) == new
    assert told[0].startswith("owner/model: the hub did not give it: ")
    assert (
        told[1]
        == f"owner/model: the model that was made on 2100-01-01 is taken, owner/model@{commit_of('two')[:12]}"
    )
    assert model_file("owner/model@v1", told.append) == old
    for source in ("owner/model@v2", "owner/other"):
        with pytest.raises(FileError, match=f"{source}: no such path here, and the hub did not give it"):
            model_file(source, told.append)


def test_of_two_commits_that_a_branch_meant_the_last_is_the_newest(
    hub: HubStub, checkpoint: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {}
    for n, commit in enumerate(("one", "two", "one")):  # the branch went back
        hub.add("owner/model", checkpoint, commit)
        monkeypatch.setattr(cache, "now", lambda n=n: f"2030-01-0{n + 1}T00:00:00+00:00")
        files[commit] = model_file("owner/model", told.append)
    hub.repos["owner/model"].status = 503
    assert model_file("owner/model", told.append) == files["one"]


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (401, "", "no such repository, or a private one (hf auth login)"),
        (404, "RepoNotFound", "no such repository, or a private one (hf auth login)"),
        (403, "GatedRepo", "it asks for a login (hf auth login) that has agreed to the model's terms"),
        (404, "RevisionNotFound", "the repository has no such revision"),
    ],
)
def test_what_the_hub_refuses(
    status: int, code: str, reason: str, hub: HubStub, checkpoint: Path, cache_dir: Path, told: list[str]
) -> None:
    hub.add("owner/model", checkpoint)
    hub.repos["owner/model"].status, hub.repos["owner/model"].error_code = status, code
    with pytest.raises(FileError) as raised:
        model_file("owner/model", told.append)
    assert str(raised.value) == REFUSED + reason
    assert contents(cache_dir) == set()


def test_a_download_that_is_refused_leaves_nothing(
    hub: HubStub, checkpoint: Path, cache_dir: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of gated repositories, of which anybody may see what files there are."""
    hub.add("owner/model", checkpoint)
    answer = hub.answer

    def refuse(request: Any) -> None:
        hub.repos["owner/model"].status = 403 if "/resolve/" in request.path else 200
        hub.repos["owner/model"].error_code = "GatedRepo"
        answer(request)

    monkeypatch.setattr(hub, "answer", refuse)
    with pytest.raises(FileError, match="asks for a login"):
        model_file("owner/model", told.append)
    assert contents(cache_dir) == set()


def test_models_that_cannot_be_run_are_refused_before_their_weights_are_downloaded(
    hub: HubStub, checkpoint: Path, cache_dir: Path, told: list[str]
) -> None:
    pickles = {"config.json": config(checkpoint), "pytorch_model.bin": b"x", "tokenizer.json": b"{}"}
    vptq_quantize = "vptq-quantize owner/model OUT_DIR --calibration TEXT"
    expected = "expected .safetensors files with a config.json, or one GGUF file"
    gptq = {"quant_method": "gptq", "bits": 4}
    for files, message in (
        (
            files_of(checkpoint, config__json=config(checkpoint, quantization_config=None)),
            f"found a dense model, expected a VPTQ one: make it with {vptq_quantize}",
        ),
        (
            files_of(checkpoint, config__json=config(checkpoint, quantization_config=gptq)),
            "found a model quantised by 'gptq', expected a VPTQ one",
        ),
        (
            files_of(checkpoint, config__json=config(checkpoint, architectures=["GPT2"])),
            "'GPT2' is not supported",
        ),
        (files_of(checkpoint, config__json=b"[]"), "expected an object"),
        (files_of(checkpoint, config__json=None), "found no config.json"),
        (
            pickles,
            "found its weights in pickle files only (pytorch_model.bin), which can run code when read; "
            + expected,
        ),
        ({"a.gguf": b"x", "b.gguf": b"x"}, "found 2 GGUF files and no checkpoint: download the one"),
        ({"README.md": b"x"}, f"found no weights at the top of the repository; {expected}"),
        (
            {"fp16/model.safetensors": b"x", "config.json": b"{}"},
            "found no weights at the top of the repository",
        ),
    ):
        hub.add("owner/model", files)
        with pytest.raises(VPTQError) as raised:
            model_file("owner/model", told.append)
        assert message in str(raised.value)
        assert contents(cache_dir) == set()
    assert hub.downloads() == hub.downloads(".bin") == hub.downloads(".gguf") == told == []


def test_a_gguf_file_of_ours_is_taken_as_it_is(
    hub: HubStub, model: Path, cache_dir: Path, told: list[str]
) -> None:
    commit = hub.add("owner/model", {"llama-v8.gguf": model.read_bytes(), "README.md": b"x"})
    file = Path(model_file("owner/model", told.append))
    assert file.read_bytes() == model.read_bytes()
    assert file.name == "model.gguf"
    assert contents(cache_dir) == {f"owner--model--{commit}"}
    assert len(told) == 1
    assert model_file("owner/model", told.append) == str(file)
    assert len(hub.downloads(".gguf")) == 1


def test_another_gguf_file_is_refused_and_goes(
    hub: HubStub, checkpoint: Path, tmp_path: Path, cache_dir: Path, told: list[str]
) -> None:
    convert(checkpoint, tmp_path / "plain.gguf", dequantize="f16")
    for content in ((tmp_path / "plain.gguf").read_bytes(), b"GGUF" * 100):
        hub.add("owner/model", {"plain.gguf": content}, commit=str(len(content)))
        with pytest.raises(VPTQError, match=r"^owner/model: plain\.gguf: "):
            model_file("owner/model", told.append)
        assert contents(cache_dir) == set()


def test_what_hugging_faces_cache_has_is_not_downloaded_again(
    hub: HubStub, checkpoint: Path, model: Path, cache_dir: Path, told: list[str]
) -> None:
    commit = hub.add("owner/model", checkpoint)
    directory = Path(huggingface_hub.snapshot_download("owner/model"))
    hub.requests.clear()
    file = Path(model_file("owner/model", told.append))
    assert raw_tensors(file) == raw_tensors(model)
    assert keys(file)["general.name"] == "model"
    assert not [path for _, path in hub.requests if "/resolve/" in path]
    assert (directory / "model.safetensors").exists()
    assert contents(cache_dir) == {f"owner--model--{commit}"}

    hub.add("owner/gguf", {"a.gguf": model.read_bytes()})
    huggingface_hub.snapshot_download("owner/gguf")
    hub.requests.clear()
    assert Path(model_file("owner/gguf", told.append)).read_bytes() == model.read_bytes()
    assert hub.downloads(".gguf") == []


@pytest.mark.parametrize("free", ["download", "conversion"])
def test_a_disk_that_is_too_small(
    free: str,
    hub: HubStub,
    checkpoint: Path,
    cache_dir: Path,
    told: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.add("owner/model", checkpoint)
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
    download = sum(sizes.values()) - sizes["config.json"]
    needed = download + conversion.file_bytes(sizes)
    # The second time it is filled by somebody else while the download goes on.
    answers = iter([10**9, needed - 1] if free == "download" else [10**9, needed, 1000])
    monkeypatch.setattr(disk, "free_bytes", lambda directory: next(answers))
    with pytest.raises(FileError) as raised:
        model_file("owner/model", told.append)
    if free == "download":
        parts = f"{disk.size(needed)} of disk (the download {disk.size(download)}, the converted file"
        assert f"owner/model: needs {parts}" in str(raised.value)
        assert f"found {disk.size(needed - 1)} free in {cache_dir}" in str(raised.value)
        assert hub.downloads() == []
        assert contents(cache_dir) == set()
        return
    assert "found 1.0 kB free in" in str(raised.value)
    monkeypatch.setattr(disk, "free_bytes", lambda directory: needed)
    assert model_file("owner/model", told.append)
    assert hub.downloads() == ["model.safetensors"]  # the first download was kept


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "model.gguf").unlink(),
        lambda entry: (entry / "model.gguf").write_bytes(b"GGUF"),
        lambda entry: (entry / "entry.json").unlink(),
        lambda entry: (entry / "entry.json").write_text("{"),
        lambda entry: (entry / "entry.json").write_text("[]"),
        lambda entry: (entry / "entry.json").write_text('{"version": 1, "refs": {"main": 3}}'),
        lambda entry: (entry / "entry.json").write_text(
            (entry / "entry.json").read_text().replace('"version": 1', '"version": 0')
        ),
    ],
)
def test_a_damaged_entry_is_made_anew(
    damage: Callable[[Path], object], hub: HubStub, checkpoint: Path, model: Path, told: list[str]
) -> None:
    hub.add("owner/model", checkpoint)
    file = Path(model_file("owner/model", told.append))
    damage(file.parent)
    told.clear()
    assert Path(model_file("owner/model", told.append)) == file
    assert raw_tensors(file) == raw_tensors(model)
    assert told[0] == "owner/model: what the cache has of it is damaged, and made anew"


def test_damage_that_shows_when_it_is_opened_says_what_to_do(hub: HubStub, checkpoint: Path) -> None:
    commit = hub.add("owner/model", checkpoint)
    with Runtime("owner/model", device="cpu") as runtime:
        assert runtime.n_ctx
    file = Path(model_file("owner/model", lambda line: None))
    content = bytearray(file.read_bytes())
    content[4:8] = b"\xff" * 4
    file.write_bytes(content)
    with pytest.raises(FileError, match=rf"\(it is made anew after vptq-models rm owner--model--{commit}\)$"):
        Runtime("owner/model", device="cpu")


def test_a_checkpoint_that_is_damaged_is_not_downloaded_again(
    hub: HubStub, checkpoint: Path, cache_dir: Path, told: list[str]
) -> None:
    half = (checkpoint / "model.safetensors").read_bytes()[:1000]
    commit = hub.add("owner/model", files_of(checkpoint, model__safetensors=half))
    for _ in range(2):
        with pytest.raises(FileError, match=rf"vptq-models rm owner--model--{commit}\.part\)$"):
            model_file("owner/model", told.append)
    assert hub.downloads() == ["model.safetensors"]
    assert contents(cache_dir) == {f"owner--model--{commit}.part"}


@pytest.mark.parametrize(
    "source",
    ["../model", "owner/../model", "owner/..", "./model", "/model", "owner//model", "owner/mo del",
     "owner/a--b", "owner/model\n", "öwner/model", "owner/model.gguf", "owner/a..b", "-owner/model",
     "owner/" + "x" * 97],
)  # fmt: skip
def test_names_that_no_repository_has_never_reach_the_hub(
    source: str, hub: HubStub, cache_dir: Path, told: list[str]
) -> None:
    assert model_file(source, told.append) == source  # for the loader, which finds no such file
    assert hub.requests == []
    assert contents(cache_dir) == set()


@pytest.mark.parametrize(
    "revision", ["", "..", "../x", "a/../b", "/a", "a b", "a\n", "-a", "a//b", "refs/pr/1?x"]
)
def test_revisions_that_cannot_be(revision: str, hub: HubStub, told: list[str]) -> None:
    with pytest.raises(OptionError, match="owner/model: found revision"):
        model_file(f"owner/model@{revision}", told.append)
    assert hub.requests == []


def test_file_names_lead_nowhere_else(
    hub: HubStub, checkpoint: Path, tmp_path: Path, cache_dir: Path, told: list[str]
) -> None:
    hostile = (
        "../evil.json",
        "/evil.json",
        "..\\evil.json",
        ".evil.json",
        "a/../../evil.json",
        "e\nvil.json",
    )
    hub.add("owner/model", files_of(checkpoint) | dict.fromkeys(hostile, b"{}"))
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    assert model_file("owner/model", told.append)
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before
    assert not [path for _, path in hub.requests if "evil" in path]
    assert not list(cache_dir.rglob("*evil*"))


@pytest.mark.parametrize("commit", ["../../../etc", "abc", "", "A" * 40])
def test_a_commit_that_is_none_is_refused(
    commit: str,
    hub: HubStub,
    checkpoint: Path,
    cache_dir: Path,
    told: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.add("owner/model", checkpoint)
    repo = hub.repos["owner/model"]
    repo.commits[commit] = repo.commits.pop(repo.revisions["main"])
    repo.revisions["main"] = commit
    with pytest.raises(FileError, match="for its commit, expected 40 hex digits"):
        model_file("owner/model", told.append)
    assert contents(cache_dir) == set()


def test_a_cache_that_cannot_be_made(
    hub: HubStub, checkpoint: Path, cache_dir: Path, told: list[str]
) -> None:
    hub.add("owner/model", checkpoint)
    cache_dir.write_text("a file")
    with pytest.raises(FileError, match="VPTQ_CACHE names another place"):
        model_file("owner/model", told.append)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("VPTQ_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.root() == tmp_path / ".cache" / "vptq-runtime"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, by its specification
    assert cache.root() == tmp_path / ".cache" / "vptq-runtime"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.root() == Path("/x/vptq-runtime")
    monkeypatch.setenv("VPTQ_CACHE", "~/y")
    assert cache.root() == tmp_path / "y"


def test_progress_as_lines_where_no_terminal_is(
    hub: HubStub, checkpoint: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_client, "LINE_S", 0.01)
    hub.add("owner/model", checkpoint)
    hub.hold.clear()

    def tell(line: str) -> None:
        told.append(line)
        if "downloaded" in line:
            hub.hold.set()

    model_file("owner/model", tell)
    total = sum(path.stat().st_size for path in checkpoint.iterdir() if path.name != "config.json")
    assert any(line.endswith(f"of {disk.size(total)} downloaded") for line in told)
