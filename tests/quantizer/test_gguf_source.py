"""Dense GGUF files as what is quantised: the same model as the directory, and what is said of few bits."""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from checkpoints import read_tensors, write_checkpoint
from configurations import ARCHITECTURES
from converted import change_json
from dense_models import SMALL
from gguf import GGMLQuantizationType
from gguf_models import changed, export, requantise
from vptq_converter import convert
from vptq_converter.checkpoint import Checkpoint
from vptq_converter.dense_gguf.checkpoint import GgufCheckpoint
from vptq_quantizer import quantize
from vptq_quantizer.cli import main
from vptq_quantizer.dense_model import DenseModel

from vptq_runtime import FileError
from vptq_runtime.evaluate import DenseModel as Reference

TOKENS = list(range(5, 45))


def q8_0(directory: Path) -> Path:
    """A model whose rows are whole blocks, as a file of q8_0."""
    architecture = replace(
        ARCHITECTURES["llama"], hidden_size=96, intermediate_size=192, n_heads=4, n_kv_heads=2
    )
    dense = write_checkpoint(directory / "dense", architecture, {})
    change_json(dense / "config.json", lambda config: config.pop("quantization_config"))
    return export(dense, directory / "model.gguf", "q8_0")


@pytest.mark.parametrize("name", ["llama", "llama3", "llama-biases", "llama-linear", "mistral", "qwen2"])
def test_logits_are_those_of_the_checkpoint(
    name: str, dense_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """transformers, from the directory and from the file: rows of q and k are where RoPE wants them."""
    directory = dense_model(name)
    path = tmp_path / "model.gguf"
    convert(directory, path, dequantize="f16" if ARCHITECTURES[name].dtype == "float16" else "bf16")
    expected = np.concatenate(list(Reference(directory).logits_in_pieces(TOKENS)))
    found = np.concatenate(list(Reference(path).logits_in_pieces(TOKENS)))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_transformers_reads_the_same_model(
    name: str, dense_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its own reader of GGUF files, which knows nothing of ours."""
    type = "f16" if ARCHITECTURES[name].dtype == "float16" else "bf16"
    path = export(dense_model(name), tmp_path / "model.gguf", type)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0].double().numpy()
    found = np.concatenate(list(Reference(path).logits_in_pieces(TOKENS))).astype(np.float64)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def test_layers_are_those_of_the_checkpoint(model: Path, tmp_path: Path) -> None:
    path = export(model, tmp_path / "model.gguf")
    results = []
    for checkpoint in (Checkpoint(model), GgufCheckpoint(path)):
        dense = DenseModel(checkpoint, torch.device("cpu"))
        hidden = dense.embed(np.array([TOKENS]))
        for n in range(dense.n_layers):
            dense.advance(n, dense.load_layer(n), hidden)
        results.append(hidden)
    assert torch.equal(*results)


def test_the_checkpoint_is_whole(model: Path, text: Path, tmp_path: Path) -> None:
    """The same tensors as those of the directory, and every file that a reader wants."""
    path = export(model, tmp_path / "model.gguf")
    from_file = quantize(path, tmp_path / "a", SMALL, calibration=[text])
    from_directory = quantize(model, tmp_path / "b", SMALL, calibration=[text])
    assert from_file["source"] == {"bits_per_weight": 16.0, "types": {"F16": 14}}
    assert from_directory["source"] == from_file["source"]
    ours, theirs = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    convert(tmp_path / "a", tmp_path / "out.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    expected = transformers.AutoTokenizer.from_pretrained(model)
    for line in ("the quick <|end_of_turn|> 12 \n é", ""):
        assert tokenizer(line)["input_ids"] == expected(line)["input_ids"]
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected.apply_chat_template(
        messages, tokenize=False
    )
    assert tokenizer.eos_token == expected.eos_token
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "a")
    assert (generation.bos_token_id, generation.eos_token_id) == (0, 1)


def test_few_bits_are_said(text: Path, tmp_path: Path) -> None:
    source = changed(q8_0(tmp_path), tmp_path / "q4.gguf", requantise(GGMLQuantizationType.Q4_1))
    warnings: list[str] = []
    report = quantize(
        source, tmp_path / "out", SMALL, calibration=[text], layers=(0, 0), warn=warnings.append
    )
    assert warnings[0].startswith("q4: found weights of 5 bits (Q4_1) as the source: ")
    assert report["source"] == {"bits_per_weight": 5.0, "types": {"Q4_1": 14}}


def test_the_command(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = q8_0(tmp_path)
    options = ["--vector-len", "4", "--centroids", "16", "--samples", "8", "--seq-len", "48", "--layers", "0"]
    assert main([str(source), str(tmp_path / "out"), *options, "--calibration", str(text)]) == 0
    assert "warning: model: found weights of 8.5 bits (Q8_0) as the source" in capsys.readouterr().err
    source.write_bytes(b"GGUF")
    assert main([str(source), str(tmp_path / "new"), *options, "--calibration", str(text)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_a_source_that_changes(kind: str, model: Path, text: Path, tmp_path: Path) -> None:
    """What is finished stays, and with the file as it was the run goes on and ends with the same bits."""
    directory = shutil.copytree(model, tmp_path / "model")
    source = export(directory, tmp_path / "model.gguf") if kind == "gguf" else directory
    file = source if kind == "gguf" else directory / "model.safetensors"
    out = tmp_path / "out"
    quantize(source, out, SMALL, calibration=[text], layers=(0, 0))
    data = file.read_bytes()

    class Changing:
        """Changes the file once a matrix of layer 1 is done."""

        def __call__(self, line: str) -> None:
            if "layer 1" in line:
                file.write_bytes(data[:-100])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vptq_runtime.commands.progress.LINE_S", 0.0)
        with pytest.raises(FileError, match=f"{file.name}: found .* bytes, expected .* it was changed while"):
            quantize(source, out, SMALL, calibration=[text], tell=Changing())
    assert (out / ".parts/layer-00000.safetensors").exists()
    assert not (out / "config.json").exists()
    file.write_bytes(data)
    quantize(source, out, SMALL, calibration=[text])
    quantize(source, tmp_path / "whole", SMALL, calibration=[text])
    ours, theirs = read_tensors(out), read_tensors(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_tokenizer_that_changes(model: Path, text: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(model, tmp_path / "model")
    file = directory / "tokenizer_config.json"

    def touch(line: str) -> None:
        os.utime(file, ns=(time.time_ns(), time.time_ns()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vptq_runtime.commands.progress.LINE_S", 0.0)
        with pytest.raises(FileError, match=r"tokenizer_config\.json: found another time of its last change"):
            quantize(directory, tmp_path / "out", SMALL, calibration=[text], tell=touch)
    assert not (tmp_path / "out/config.json").exists()
    assert json.loads((tmp_path / "out/.parts/run.json").read_text())  # with which it goes on
    assert quantize(directory, tmp_path / "out", SMALL, calibration=[text])["finished"]
