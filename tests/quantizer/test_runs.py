"""A run that is interrupted, done in parts, or fed with Hessians from disk gives what a whole one gives."""

import errno
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import read_tensors
from dense_models import SMALL, write_text
from vptq_quantizer import quantize
from vptq_quantizer.run import checkpoint_writer, model_quantizer, safe_files

from vptq_runtime import FileError, OptionError

OPTIONS = replace(SMALL, finetune=True)
N_LAYERS = 2  # of the dense models


@pytest.fixture(scope="module")
def whole(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run gives."""
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize(model, out, OPTIONS, calibration=[text])
    return out


def assert_same(out: Path, whole: Path) -> None:
    """The same tensors, bit for bit, and the same config."""
    found, expected = read_tensors(out), read_tensors(whole)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert (out / "config.json").read_text() == (whole / "config.json").read_text()
    assert not (out / ".parts").exists()


def no_more_work(*_: Any) -> Any:
    raise AssertionError("a layer is quantised that is there already")


def test_the_files(whole: Path, model: Path) -> None:
    shards = [f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)]
    others = ["config.json", "model.safetensors.index.json", "report.json"]
    copied = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    assert sorted(path.name for path in whole.iterdir()) == sorted(shards + others + copied)
    for name in copied:
        assert (whole / name).read_bytes() == (model / name).read_bytes()
    index = json.loads((whole / "model.safetensors.index.json").read_text())
    tensors = read_tensors(whole)
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    mask = os.umask(0)
    os.umask(mask)
    assert {stat.S_IMODE((whole / name).stat().st_mode) for name in shards + others} == {0o666 & ~mask}


def test_the_report(whole: Path) -> None:
    report = json.loads((whole / "report.json").read_text())
    assert report["finished"] and len(report["layers"]) == N_LAYERS
    tensors = read_tensors(whole)
    linear = report["layers"][1]["linears"]["mlp.down_proj"]
    prefix = "model.layers.1.mlp.down_proj."
    assert linear["bits"] == 8 * sum(t.nbytes for name, t in tensors.items() if name.startswith(prefix))
    assert linear["index_bits"] == 8 * tensors[prefix + "indices"].nbytes
    for layer in report["layers"]:
        for linear in layer["linears"].values():
            errors = linear["proxy_error"]
            assert 0 < errors["fine-tuning"] < errors["second order"] < errors["k-means"] < 1
            assert list(linear["seconds"]) == list(errors)


def test_a_killed_run_goes_on(model: Path, text: Path, whole: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of the second layer."""
    out = tmp_path / "out"
    program = textwrap.dedent(
        f"""
        import time
        from vptq_quantizer import QuantizeOptions, quantize
        from vptq_quantizer.run import model_quantizer
        real = model_quantizer.quantize_linear
        calls = 0
        def stopping(*arguments):
            global calls
            calls += 1
            if calls == 10:
                print("in the second layer", flush=True)
                time.sleep(600)
            return real(*arguments)
        model_quantizer.quantize_linear = stopping
        quantize({str(model)!r}, {str(out)!r}, {OPTIONS!r}, calibration=[{str(text)!r}])
        """
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=out.parent, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert [path.name for path in (out / ".parts").glob("layer*")] == ["layer-00000.safetensors"]
    assert not (out / "config.json").exists()

    before = (out / ".parts" / "layer-00000.safetensors").stat().st_mtime_ns
    report = quantize(model, out, OPTIONS, calibration=[text])
    assert report["finished"]
    assert_same(out, whole)
    assert (out / "model-00002-of-00003.safetensors").stat().st_mtime_ns == before


def test_layers_by_several_machines(model: Path, text: Path, whole: Path, tmp_path: Path) -> None:
    for n in (1, 0):
        report = quantize(model, tmp_path / f"{n}", OPTIONS, calibration=[text], layers=(n, n))
        assert not report["finished"] and [layer["layer"] for layer in report["layers"]] == [n]
        assert not (tmp_path / f"{n}" / "config.json").exists()
    shutil.copy(tmp_path / "1/.parts/layer-00001.safetensors", tmp_path / "0/.parts")
    report = quantize(model, tmp_path / "0", OPTIONS, calibration=[text])
    assert report["finished"]
    assert_same(tmp_path / "0", whole)


def test_hessians_are_kept_and_used_again(
    model: Path, text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(model, tmp_path / "a", OPTIONS, calibration=[text], hessians=tmp_path / "hessians")
    assert_same(tmp_path / "a", whole)
    monkeypatch.setattr(model_quantizer, "collect", no_more_work)
    quantize(model, tmp_path / "b", OPTIONS, calibration=[text], hessians=tmp_path / "hessians")
    assert_same(tmp_path / "b", whole)
    quantize(model, tmp_path / "c", OPTIONS, hessians=tmp_path / "hessians")  # no text, no forward pass
    assert_same(tmp_path / "c", whole)
    # Whatever else changes, they are the model's and the text's.
    quantize(model, tmp_path / "d", replace(SMALL, centroids=8), hessians=tmp_path / "hessians")


def test_hessians_of_another_model_or_text(
    model: Path, text: Path, dense_model: Callable[[str], Path], tmp_path: Path
) -> None:
    quantize(model, tmp_path / "a", SMALL, calibration=[text], hessians=tmp_path / "h", layers=(0, 0))
    other = write_text(tmp_path / "other.txt", 2000)
    with pytest.raises(
        OptionError, match=r"--hessians: .*hessian-00000.*the Hessians of another calibration"
    ):
        quantize(model, tmp_path / "b", SMALL, calibration=[other], hessians=tmp_path / "h")
    with pytest.raises(OptionError, match=r"--hessians: .*hessian-00000.*the Hessians of another model"):
        quantize(
            dense_model("llama-linear"), tmp_path / "c", SMALL, calibration=[text], hessians=tmp_path / "h"
        )
    with pytest.raises(OptionError, match=r"--calibration: found no text, and no Hessians of layer 1"):
        quantize(model, tmp_path / "d", SMALL, hessians=tmp_path / "h")


def test_damaged_hessians(model: Path, text: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "a", SMALL, calibration=[text], hessians=tmp_path / "h", layers=(0, 0))
    file = tmp_path / "h" / "hessian-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        FileError, match=r"hessian-00000\.safetensors: not a whole safetensors file: .*; delete it"
    ):
        quantize(model, tmp_path / "b", SMALL, calibration=[text], hessians=tmp_path / "h")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("x" * 300, "File name too long"), ("a\0b", "null byte"), ("file", "Not a directory")],
)
def test_hessians_where_no_directory_can_be(
    name: str, reason: str, model: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=f"--hessians: .*: cannot be used: .*{reason}"):
        quantize(model, tmp_path / "out", SMALL, calibration=[text], hessians=tmp_path / name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_hessians_that_are_no_files(
    make: Callable[[Path], Any], model: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "h").mkdir()
    make(tmp_path / "h" / "hessian-00000.safetensors")
    for calibration in ([], [text]):
        with pytest.raises(FileError, match=r"hessian-00000\.safetensors: found something that is not a reg"):
            quantize(model, tmp_path / "out", SMALL, calibration=calibration, hessians=tmp_path / "h")


@pytest.mark.parametrize("change", [{"centroids": 8}, {"seed": 1}, {"finetune": False}, {"damping": 0.1}])
def test_other_options_are_refused(change: dict[str, Any], model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(model, out, OPTIONS, calibration=[text], layers=(0, 0))
    name, value = next(iter(change.items()))
    before = getattr(OPTIONS, name)
    with pytest.raises(
        OptionError, match=re.escape(f"found layers of a run with {name} {before}, expected {value}")
    ):
        quantize(model, out, replace(OPTIONS, **change), calibration=[text])
    with pytest.raises(OptionError, match="found layers of a run with calibration"):
        quantize(model, out, OPTIONS, calibration=[text, text])


def test_options_can_be_changed_while_nothing_is_done(model: Path, text: Path, tmp_path: Path) -> None:
    """So a first try that failed does not tie the directory to what was wrong with it."""
    with pytest.raises(OptionError, match="--calibration: found no text"):
        quantize(model, tmp_path / "out", OPTIONS)
    report = quantize(model, tmp_path / "out", replace(OPTIONS, seed=1), calibration=[text])
    assert report["finished"] and report["options"]["seed"] == 1


def test_a_finished_run_and_a_foreign_directory_are_left_alone(
    model: Path, text: Path, whole: Path, tmp_path: Path
) -> None:
    for out in (whole, model):
        with pytest.raises(OptionError, match=r"found a finished model"):
            quantize(model, out, OPTIONS, calibration=[text])
    (tmp_path / "letter.txt").touch()
    with pytest.raises(OptionError, match="found other files, expected a new directory"):
        quantize(model, tmp_path, OPTIONS, calibration=[text])
    with pytest.raises(OptionError, match="found other files"):
        quantize(model, tmp_path / "letter.txt", OPTIONS, calibration=[text])


@pytest.mark.parametrize("when", ["a part", "the checkpoint"])
def test_a_full_disk(
    when: str, model: Path, text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    full_from = {"a part": 2, "the checkpoint": 3}[when]  # two parts, then the shard of the rest
    real, calls = safe_files.save_file, 0

    def save_file(tensors: Any, path: Path, metadata: Any) -> None:
        nonlocal calls
        calls += 1
        if calls >= full_from:
            path.write_bytes(b"the beginning")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(tensors, path, metadata)

    monkeypatch.setattr(safe_files, "save_file", save_file)
    with pytest.raises(FileError, match=r"cannot be written: No space left on device"):
        quantize(model, out, OPTIONS, calibration=[text])
    monkeypatch.undo()
    assert len(list((out / ".parts").glob("layer-*"))) == full_from - 1
    assert not list(out.rglob("*.tmp")) and not (out / "config.json").exists()
    quantize(model, out, OPTIONS, calibration=[text])
    assert_same(out, whole)


def test_where_files_have_one_name_each(
    model: Path, text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(safe_files.os, "link", no_links)
    quantize(model, tmp_path / "out", OPTIONS, calibration=[text])
    assert_same(tmp_path / "out", whole)


def test_end_to_end_training_brings_the_logits_closer(model: Path, text: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, end_to_end=12)
    report = quantize(model, tmp_path / "out", options, calibration=[text])
    before, after = report["end_to_end"]["kl_divergence"]
    assert after < 0.9 * before and report["end_to_end"]["kept"]
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["end_to_end"] == report["end_to_end"]


def test_a_run_that_was_stopped_while_training_end_to_end(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers are there; the training begins again and gives the same."""
    options = replace(OPTIONS, end_to_end=3)
    quantize(model, tmp_path / "whole", options, calibration=[text])

    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model_quantizer, "tune", stopped)
        with pytest.raises(KeyboardInterrupt):
            quantize(model, tmp_path / "out", options, calibration=[text])
    monkeypatch.setattr(model_quantizer, "quantize_linear", no_more_work)
    quantize(model, tmp_path / "out", options, calibration=[text])
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_hessians_of_two_texts_are_not_mixed(model: Path, text: Path, tmp_path: Path) -> None:
    """Without text, all have to be from the same one."""
    other = write_text(tmp_path / "other.txt", 2000)
    quantize(model, tmp_path / "a", SMALL, calibration=[text], hessians=tmp_path / "h", layers=(0, 0))
    quantize(model, tmp_path / "b", SMALL, calibration=[other], hessians=tmp_path / "g", layers=(1, 1))
    shutil.copy(tmp_path / "g/hessian-00001.safetensors", tmp_path / "h")
    with pytest.raises(OptionError, match=r"hessian-00001.*: found the Hessians of another calibration"):
        quantize(model, tmp_path / "c", SMALL, hessians=tmp_path / "h")
    assert not list((tmp_path / "c").rglob("layer-*"))  # is found before the work


def test_training_that_is_there_is_not_done_again(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the checkpoint is put together: its training is on disk by then."""
    options = replace(OPTIONS, end_to_end=3)
    report = quantize(model, tmp_path / "whole", options, calibration=[text])

    def full(*_: Any) -> Any:
        raise FileError("out: cannot be written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "link", full)
        with pytest.raises(FileError, match="No space left"):
            quantize(model, tmp_path / "out", options, calibration=[text])
    monkeypatch.setattr(model_quantizer, "tune", no_more_work)
    again = quantize(model, tmp_path / "out", options, calibration=[text])
    assert again["end_to_end"] == report["end_to_end"]
    assert_same(tmp_path / "out", tmp_path / "whole")
