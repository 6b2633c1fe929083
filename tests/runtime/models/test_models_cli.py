"""vptq-models: what it lists, removes and suggests."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hub_stub import HubStub, commit_of

from vptq_runtime import _native
from vptq_runtime.bench.shapes import SHAPES
from vptq_runtime.models import cli
from vptq_runtime.models.community import TABLE, community_models
from vptq_runtime.models.model import model_file

ONE, TWO = commit_of("one"), commit_of("two")


@pytest.fixture
def filled(hub: HubStub, checkpoint: Path, cache_dir: Path) -> Path:
    """A cache with two commits of a repository, another repository, a directory, and what is no model."""
    hub.add("owner/other", checkpoint, "one")
    hub.add("owner/model", checkpoint, "one", branch="v1")
    hub.add("owner/model", checkpoint, "two")
    for source in ("owner/model", "owner/model@v1", "owner/other", str(checkpoint)):
        model_file(source, lambda line: None)
    (cache_dir / f"owner--damaged--{ONE}").mkdir()
    (cache_dir / f"owner--unfinished--{ONE}.part" / "checkpoint").mkdir(parents=True)
    return cache_dir


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(arguments)
    output = capsys.readouterr()
    return status, output.out, output.err


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(run(capsys, "list", "--json")[1])
    return {model["name"]: model for model in report["models"]}


def test_an_empty_cache(cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys)
    assert status == 0
    assert re.fullmatch(rf"{cache_dir}: 0 models, 0 bytes; \S+ GB free\n", out)
    assert listed(capsys) == {}
    assert not cache_dir.exists()  # looking leaves nothing


def test_list(filled: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (filled / "something else").mkdir()  # is not ours, and left alone
    models = listed(capsys)
    damaged, unfinished = f"owner--damaged--{ONE}", f"owner--unfinished--{ONE}.part"
    assert set(models) == {
        f"owner/model@{ONE[:12]}", f"owner/model@{TWO[:12]}", f"owner/other@{ONE[:12]}", str(checkpoint),
        damaged, unfinished,
    }  # fmt: skip
    one = models[f"owner/model@{ONE[:12]}"]
    assert (one["source"], one["commit"], one["revisions"]) == ("owner/model", ONE, ["v1"])
    assert (one["state"], one["bytes"] > Path(one["file"]).stat().st_size) == ("ready", True)
    assert models[str(checkpoint)]["commit"] is None
    assert models[damaged]["state"].startswith("damaged: ")
    assert (models[unfinished]["state"], models[unfinished]["source"]) == ("unfinished", "owner/unfinished")
    status, out, _ = run(capsys)
    assert status == 0
    assert re.search(rf"\d kB  20\d\d-\d\d-\d\d  owner/model@{TWO[:12]} \(main\)\n", out)
    assert re.search(rf" bytes +-  {unfinished} \(unfinished\)\n", out)
    assert f"\n{filled}: 4 models, " in out


def test_when_it_was_used_last(
    filled: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vptq_runtime.models.cache.now", lambda: "2100-01-01T00:00:00+00:00")
    model_file(f"owner/model@{ONE}", lambda line: None)
    models = listed(capsys)
    assert models[f"owner/model@{ONE[:12]}"]["last_used"] == "2100-01-01T00:00:00+00:00"
    assert models[f"owner/model@{ONE[:12]}"]["revisions"] == ["v1"]
    assert models[f"owner/model@{TWO[:12]}"]["last_used"] < "2100"


@pytest.mark.parametrize(
    ("name", "goes"),
    [
        ("owner/model", {f"owner/model@{ONE[:12]}", f"owner/model@{TWO[:12]}"}),
        ("owner/model@v1", {f"owner/model@{ONE[:12]}"}),
        (f"owner/model@{TWO[:7]}", {f"owner/model@{TWO[:12]}"}),
        (f"owner/model@{TWO}", {f"owner/model@{TWO[:12]}"}),
        (f"owner--model--{ONE}", {f"owner/model@{ONE[:12]}"}),
        ("owner/damaged", {f"owner--damaged--{ONE}"}),
        ("owner/unfinished", {f"owner--unfinished--{ONE}.part"}),
    ],
)
def test_rm(name: str, goes: set[str], filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = listed(capsys)
    status, out, _ = run(capsys, "rm", name)
    assert status == 0
    assert {line.partition(":")[0] for line in out.splitlines()} == goes
    assert set(before) - set(listed(capsys)) == goes


def test_rm_of_a_directory_and_of_several(
    filled: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    status, out, _ = run(capsys, "rm", "--json", checkpoint.name, "owner/other")
    assert status == 0
    names = {str(checkpoint), f"owner/other@{ONE[:12]}"}
    assert {item["name"] for item in json.loads(out)["removed"]} == names
    assert not names & set(listed(capsys))
    assert checkpoint.is_dir()


@pytest.mark.parametrize(
    "name", ["nothing", "owner/mode", "owner/model@", f"owner/model@{TWO[:6]}", "..", "locks", ""]
)
def test_rm_of_what_is_not_there(name: str, filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = listed(capsys)
    status, out, err = run(capsys, "rm", "owner/other", name)
    assert (status, out) == (1, "")
    assert err.startswith(f"vptq-models: error: {name}: found no such model in {filled}")
    assert listed(capsys) == before


def test_what_another_process_makes_is_not_removed(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FileLock(filled / "locks" / f"owner--unfinished--{ONE}.lock"):
        status, _, err = run(capsys, "rm", "owner/unfinished")
    assert status == 1
    assert (
        err
        == f"vptq-models: error: owner--unfinished--{ONE}: another process makes it ready, expected none\n"
    )


def test_a_model_that_runs_can_be_removed(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vptq_runtime import Runtime

    with Runtime(f"owner/model@{ONE}", device="cpu") as runtime:
        text = runtime.generate("the", max_tokens=4, temperature=0).text
        assert run(capsys, "rm", "owner/model")[0] == 0
        assert runtime.generate("the", max_tokens=4, temperature=0).text == text


def test_suggest(
    cache_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "available_memory", lambda: 8 << 30)
    report = json.loads(run(capsys, "suggest", "--json")[1])
    models = {model["repo"]: model for model in report["models"]}
    assert all(model["fits"] == (model["memory_bytes"] <= 8 << 30) for model in models.values())
    three_bits = models["VPTQ-community/Meta-Llama-3.1-8B-Instruct-v8-k65536-256-woft"]
    assert three_bits["fits"]
    assert three_bits["kv_bytes"] == 4096 * 2 * 32 * 8 * 128 * 2
    assert not models["VPTQ-community/Meta-Llama-3.1-405B-Instruct-v8-k4096-0-woft"]["fits"]
    assert [model["fits"] for model in report["models"]] == sorted(
        (m["fits"] for m in models.values()), reverse=True
    )
    _, out, _ = run(capsys, "suggest")
    rows = re.findall(r"^ *(yes|no) +([\d.]+) .* (\S+)$", out, re.MULTILINE)
    assert {repo: fits == "yes" for fits, _, repo in rows} == {
        repo: model["fits"] for repo, model in models.items()
    }
    assert "8.59 GB are available" in out
    assert "computed" in out


def test_the_table_of_the_community_is_right_by_another_sum() -> None:
    """A byte for 8 / bits weights, codebooks in f16, the embedding and output matrices in f16."""
    shapes = dict(line.split() for line in TABLE.read_text().splitlines() if not line.startswith("#"))
    models = community_models()
    assert [model.repo for model in models] == list(shapes)
    assert len(models) > 60
    for model in models:
        shape, (v, k, r) = (
            SHAPES[shapes[model.repo]],
            map(int, re.findall(r"-[vk]?(\d+)(?=-)", model.repo)[-3:]),
        )
        linears = list(shape.linears.values()) * shape.n_layer
        weights = sum(rows * columns for rows, columns in linears)
        codebooks = len(linears) * (k + r) * v * 2
        about = weights * model.bits / 8 + codebooks + 4 * shape.n_vocab * shape.n_embd
        assert model.file_bytes == pytest.approx(about, rel=0.01)
        size = re.search(r"-(\d+)B-", model.repo)  # what its name says, embeddings and all
        if size:
            assert weights + 2 * shape.n_vocab * shape.n_embd == pytest.approx(int(size[1]) * 1e9, rel=0.09)


@pytest.mark.parametrize(
    "arguments",
    [["nothing"], ["rm"], ["list", "x"], ["suggest", "x"], ["--nothing"], ["rm", "--nothing", "x"]],
)
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    assert raised.value.code == 2


def test_the_command_is_installed() -> None:
    command = [str(Path(sys.executable).with_name("vptq-models")), "--version"]
    assert subprocess.run(command, capture_output=True, text=True).stdout.startswith("vptq-models 0.")


def test_a_cache_that_is_no_directory(cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache_dir.write_text("")
    status, _, err = run(capsys)
    assert status == 1
    assert err == f"vptq-models: error: {cache_dir}: cannot be read: Not a directory\n"
