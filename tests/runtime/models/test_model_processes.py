"""The commands as processes: two at once, Ctrl-C in the middle, what a terminal and a pipe show."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hub_stub import HubStub

from vptq_runtime.models import cache

COMMAND = [str(Path(sys.executable).with_name("vptq-run"))]  # as installed, whatever the working directory
ARGUMENTS = ["-m", "owner/model", "-p", "the", "-n", "4", "--temp", "0"]


def start(*more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *ARGUMENTS, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def contents(cache_dir: Path) -> set[str]:
    return {path.name for path in cache_dir.iterdir()} - {"locks"}


def test_two_at_once_one_converts_and_both_run(hub: HubStub, checkpoint: Path, cache_dir: Path) -> None:
    commit = hub.add("owner/model", checkpoint)
    hub.hold.clear()
    first = start()
    assert hub.held.wait(60)
    second = start()
    assert second.stderr is not None
    assert second.stderr.readline() == "owner/model: another process makes it ready: waiting\n"
    hub.hold.set()
    texts = [process.communicate(timeout=60) for process in (first, second)]
    assert first.returncode == second.returncode == 0, texts
    assert texts[0][0] == texts[1][0] != ""
    assert hub.downloads() == ["model.safetensors"]
    assert "converting" not in texts[1][1]
    assert contents(cache_dir) == {f"owner--model--{commit}"}


def test_ctrl_c_in_a_download_ends_it_at_once_and_leaves_nothing(
    hub: HubStub, checkpoint: Path, cache_dir: Path
) -> None:
    hub.add("owner/model", checkpoint)
    hub.hold.clear()
    process = start()
    assert hub.held.wait(60)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)  # the hub still holds the other half back
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert contents(cache_dir) == set()
    hub.hold.set()
    assert start().communicate(timeout=60)[0] != ""


KILLED_IN_CONVERSION = """
import os, signal, sys
from vptq_converter import gguf_writer
from vptq_runtime.commands import run

write, how = gguf_writer.write_in_place, getattr(signal, sys.argv.pop(1))

def interrupted(path, *arguments):
    write(path, *arguments)
    os.kill(os.getpid(), how)

gguf_writer.write_in_place = interrupted
sys.exit(run.main())
"""


@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL"])
def test_the_end_in_the_middle_of_a_conversion(
    how: str, hub: HubStub, checkpoint: Path, cache_dir: Path
) -> None:
    commit = hub.add("owner/model", checkpoint)
    command = [sys.executable, "-c", KILLED_IN_CONVERSION, how, *ARGUMENTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == (130 if how == "SIGINT" else -signal.SIGKILL), done.stderr
    assert contents(cache_dir) == {f"owner--model--{commit}.part"}  # the download, whole
    if how == "SIGINT":
        assert "owner/model: what is downloaded and whole stays" in done.stderr
        assert not list(cache_dir.rglob("*.gguf*"))
    (part,) = cache.contents()
    assert isinstance(part, cache.Part)
    assert (part.state, part.source) == ("unfinished", "owner/model")
    assert start().communicate(timeout=60)[0] != ""
    assert hub.downloads() == ["model.safetensors"]
    assert contents(cache_dir) == {f"owner--model--{commit}"}


def test_wrong_options_are_wrong_before_anything_is_downloaded(hub: HubStub, checkpoint: Path) -> None:
    hub.add("owner/model", checkpoint)
    process = start("--kv-type", "f8")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert stderr.startswith("vptq-run: error: --kv-type: found 'f8'")
    assert hub.requests == []


def test_bench_and_perplexity_take_the_same_names(hub: HubStub, checkpoint: Path, tmp_path: Path) -> None:
    hub.add("owner/model", checkpoint)
    (tmp_path / "text").write_text("the quick brown fox " * 20)
    for module, *arguments in (
        ("bench", "-p", "8", "-n", "0", "-r", "1", "--device", "cpu"),
        ("evaluate", str(tmp_path / "text"), "-c", "32", "--device", "cpu"),
    ):
        command = [
            sys.executable,
            "-m",
            f"vptq_runtime.{module}.cli",
            "-m",
            "owner/model",
            "--json",
            *arguments,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        if module == "bench":
            assert report["model"]["name"] == "model"
    assert hub.downloads() == ["model.safetensors"]


def test_a_draft_by_name_that_is_not_there(hub: HubStub, checkpoint: Path) -> None:
    hub.add("owner/model", checkpoint)
    _, stderr = (process := start("--draft", "owner/small")).communicate(timeout=60)
    assert process.returncode == 1
    assert "--draft: owner/small: no such path here, and the hub did not give it: no such" in stderr
    assert "Traceback" not in stderr


def test_list_says_what_is_in_work(hub: HubStub, checkpoint: Path) -> None:
    hub.add("owner/model", checkpoint)
    hub.hold.clear()
    process = start()
    assert hub.held.wait(60)
    (part,) = cache.contents()
    assert isinstance(part, cache.Part)
    assert part.state == "in work"
    hub.hold.set()
    process.communicate(timeout=60)
