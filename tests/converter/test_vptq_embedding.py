"""Checkpoints whose embedding or output matrix is a VPTQ layer: converted, decoded, refused, inspected."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import EMBEDDING, dequantise, write_checkpoint
from configurations import ARCHITECTURES, CONFIGURATIONS, VOCAB_SIZE, Architecture
from converted import change_tensors, float_tensors, layers, raw_tensors
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray
from vptq_converter import convert
from vptq_converter.facts import read_facts
from vptq_converter.inspect import main as inspect

from vptq_runtime import _native
from vptq_runtime.errors import FileError, OptionError


def checkpoint(
    directory: Path, tied: bool, embedding: str = "v8-k256-256", output: str | None = None
) -> tuple[Path, NDArray[np.float32]]:
    """And what its embedding stands for. Other layers are dense."""
    configs = {EMBEDDING: CONFIGURATIONS[embedding]} | ({"lm_head": CONFIGURATIONS[output]} if output else {})
    architecture: Architecture = replace(
        ARCHITECTURES["llama"], tied=tied, n_layers=1, hidden_size=128, n_heads=4, n_kv_heads=2
    )
    write_checkpoint(directory, architecture, configs)
    return directory, dequantise(directory)[EMBEDDING]


@pytest.mark.parametrize("embedding", ["v8-k256-256", "f32-outliers", "norm-dim-1", "bare", "v12-k4096-4096"])
@pytest.mark.parametrize("type", ["auto", "vq"])
def test_bit_identical(embedding: str, type: str, tmp_path: Path) -> None:
    source, weight = checkpoint(tmp_path / "checkpoint", tied=True, embedding=embedding)
    done = convert(source, tmp_path / "out.gguf", embedding_type=type, output_type=type)
    assert (done.n_vptq, done.n_dense) == (0, 7)
    found = raw_tensors(tmp_path / "out.gguf")
    assert not {"token_embd.weight", "output.weight", "output.vptq_indices"} & set(found)
    read = layers(tmp_path / "out.gguf", {"token_embd": weight.shape})["token_embd"].dequantize()
    assert read.tobytes() == weight.tobytes()
    model = _native.Model(str(tmp_path / "out.gguf"))
    for name in ("token_embd", "output"):
        assert model.dequantize(name).tobytes() == weight.tobytes()


@pytest.mark.parametrize(
    ("tied", "options", "expected"),
    [
        (True, {}, ("VQ", None)),
        (True, {"embedding_type": "f16"}, ("F16", None)),
        (True, {"embedding_type": "q8_0"}, ("Q8_0", None)),
        (True, {"output_type": "q8_0"}, ("VQ", "Q8_0")),
        (True, {"embedding_type": "q4_0", "output_type": "vq"}, ("Q4_0", "VQ")),
        (True, {"embedding_type": "q5_1", "output_type": "q8_0"}, ("Q5_1", "Q8_0")),
        (False, {}, ("VQ", "VQ")),
        (False, {"output_type": "f16"}, ("VQ", "F16")),
        (False, {"embedding_type": "q8_0"}, ("Q8_0", "VQ")),
        (True, {"dequantize": "f16"}, ("F16", None)),
        (True, {"dequantize": "q8_0", "output_type": "f16"}, ("Q8_0", "F16")),
        (False, {"dequantize": "q8_0", "embedding_type": "q4_0"}, ("Q4_0", "Q8_0")),
    ],
)
def test_another_type_is_decoded(
    tied: bool, options: dict[str, str], expected: tuple[str, str | None], tmp_path: Path
) -> None:
    source, _ = checkpoint(tmp_path / "checkpoint", tied, output=None if tied else "v6-k4096-0")
    convert(source, tmp_path / "out.gguf", **options)
    found = raw_tensors(tmp_path / "out.gguf")
    decoded = float_tensors(tmp_path / "out.gguf")
    weights = dequantise(source)
    for name, type in zip(("token_embd", "output"), expected, strict=True):
        assert (f"{name}.vptq_indices" in found) == (type == "VQ")
        assert (f"{name}.weight" in found) == (type not in ("VQ", None))
        if f"{name}.weight" in found:
            weight = weights["lm_head" if name == "output" and not tied else EMBEDDING]
            ggml_type = GGMLQuantizationType[type or ""]
            rounded = quants.dequantize(quants.quantize(weight, ggml_type), ggml_type)
            assert found[f"{name}.weight"][0] == type
            assert np.array_equal(decoded[f"{name}.weight"], rounded)


@pytest.mark.parametrize("option", ["embedding_type", "output_type"])
def test_vq_of_a_dense_matrix(option: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "dense", ARCHITECTURES["llama"], CONFIGURATIONS["v8-k256-256"])
    name = f"--{option.replace('_', '-')}"
    with pytest.raises(OptionError, match=f"^{name} vq: found a dense matrix in the checkpoint, expected a "):
        convert(source, tmp_path / "out.gguf", **{option: "vq"})
    with pytest.raises(OptionError, match=f"^{name} vq: found --dequantize f16 beside it"):
        convert(source, tmp_path / "out.gguf", dequantize="f16", **{option: "vq"})
    assert not (tmp_path / "out.gguf").exists()


def test_blocks_need_whole_rows(tmp_path: Path) -> None:
    architecture = replace(ARCHITECTURES["llama"], tied=True, n_layers=1)
    source = write_checkpoint(tmp_path / "source", architecture, {EMBEDDING: CONFIGURATIONS["v8-k256-256"]})
    with pytest.raises(OptionError, match="token_embd: q8_0 asked for, found rows of 100, expected a mult"):
        convert(source, tmp_path / "out.gguf", embedding_type="q8_0")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("out_features", VOCAB_SIZE + 1, "found .*, expected .*as the model's hyperparameters say"),
        ("bias", True, "bias: found True, expected False"),
        ("num_centroids", [-1, 512], "centroids.weight: found shape"),
        ("is_indice_packed", False, "indices: found"),
    ],
)
def test_contradictions(key: str, value: object, expected: str, tmp_path: Path) -> None:
    source, _ = checkpoint(tmp_path / "checkpoint", tied=True)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["config_for_layers"][EMBEDDING][key] = value
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileError, match=expected):
        convert(source, tmp_path / "out.gguf")


def test_an_embedding_of_both_kinds(tmp_path: Path) -> None:
    source, weight = checkpoint(tmp_path / "checkpoint", tied=True)

    def add_dense(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{EMBEDDING}.weight"] = torch.from_numpy(weight)

    change_tensors(source, add_dense)
    with pytest.raises(FileError, match=r"tensor model.embed_tokens.weight: found F32 .*no such tensor"):
        convert(source, tmp_path / "out.gguf")


def test_a_dense_output_that_would_be_tied_to_it(tmp_path: Path) -> None:
    source, weight = checkpoint(tmp_path / "checkpoint", tied=True)

    def add_output(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = torch.from_numpy(weight)

    change_tensors(source, add_output)
    with pytest.raises(FileError, match=r"tensor lm_head.weight: found a matrix beside an embedding .*none"):
        convert(source, tmp_path / "out.gguf")


def test_a_checkpoint_names_no_vq(tmp_path: Path) -> None:
    """What kind of layer it is, config_for_layers says."""
    source, _ = checkpoint(tmp_path / "checkpoint", tied=True)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["embedding_type"] = "vq"
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileError, match=r"embedding_type: found 'vq', expected one of auto, f16, "):
        convert(source, tmp_path / "out.gguf")


def test_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, weight = checkpoint(tmp_path / "checkpoint", tied=True)
    dense, vptq = tmp_path / "dense.gguf", tmp_path / "vptq.gguf"
    convert(source, dense, embedding_type="f16")
    convert(source, vptq)
    before, after = read_facts(dense), read_facts(vptq)
    assert (before.embedding_type, after.embedding_type) == ("F16", "VPTQ")
    assert after.n_parameters == before.n_parameters
    assert after.n_embedding_parameters == before.n_embedding_parameters == weight.size
    [linear] = [linear for linear in after.linears if linear.name == "token_embd"]
    assert linear.vptq is not None and (linear.vptq.v, linear.vptq.k, linear.vptq.r) == (8, 256, 256)
    assert after.embedding_bytes == linear.nbytes
    assert after.bits_per_weight["without_embeddings"] == before.bits_per_weight["without_embeddings"]
    assert inspect([str(vptq)]) == 0
    [row] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("token_embd")]
    assert row.split()[1:5] == [str(VOCAB_SIZE), "x", "128", "v8-k256-256"]
