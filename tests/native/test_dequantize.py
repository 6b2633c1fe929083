"""Weights of every configuration, bit for bit: the checkpoint's, the converter's, the native library's."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import dequantise, mixed_layers, read_tensors, write_checkpoint
from configurations import ARCHITECTURES, CONFIGURATIONS, gguf_name
from numpy.typing import NDArray
from vptq_converter.architectures import read_model
from vptq_converter.checkpoint import Checkpoint
from vptq_converter.convert import convert
from vptq_converter.layer import LayerTensors

from vptq_runtime import _native


def converter_weights(directory: Path) -> dict[str, NDArray[np.float32]]:
    """What the converter's readable reference makes of each quantised layer, by GGUF name."""
    weights = {weight.name: weight.weight for weight in read_model(Checkpoint(directory)).weights}
    return {
        name: layer.load().dequantize() for name, layer in weights.items() if isinstance(layer, LayerTensors)
    }


def native_weights(directory: Path, target: Path) -> dict[str, NDArray[np.float32]]:
    """Converts, and returns all linear layers' weights by GGUF name."""
    convert(directory, target)
    model = _native.Model(str(target))
    return {name: model.dequantize(name) for name in model.linear_names()}


def assert_same(
    found: Mapping[str, NDArray[np.float32]], expected: Mapping[str, NDArray[np.float32]]
) -> None:
    for name, weight in expected.items():
        np.testing.assert_array_equal(found[name], weight, strict=True, err_msg=name)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_configuration(name: str, tmp_path: Path) -> None:
    parts = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
    layers = {f"model.layers.0.{part}": CONFIGURATIONS[name] for part in parts}
    source = write_checkpoint(tmp_path / "source", replace(ARCHITECTURES["llama"], n_layers=1), layers)
    expected = {gguf_name(path): weight for path, weight in dequantise(source).items()}
    assert len(expected) == len(layers)
    assert_same(converter_weights(source), expected)
    assert_same(native_weights(source, tmp_path / "model.gguf"), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_mixed_configurations_and_dense_layers(name: str, tmp_path: Path) -> None:
    """Every layer another configuration, in three shards, one layer and the output dense."""
    architecture = ARCHITECTURES[name]
    in_turn = ["v8-k512-512", "f32-outliers", "bf16", "bare-int16", "no-perm", "norm-dim-1", "v4-k256-0"]
    layers = mixed_layers(architecture, [CONFIGURATIONS[name] for name in in_turn])
    source = write_checkpoint(tmp_path / "source", architecture, layers, shards=3)
    expected = dequantise(source)
    assert set(expected) == set(layers)
    tensors = read_tensors(source)
    dense = [path for path in (*architecture.linear_shapes(), "lm_head") if f"{path}.weight" in tensors]
    expected |= {path: tensors[f"{path}.weight"].float().numpy() for path in dense}
    found = native_weights(source, tmp_path / "model.gguf")
    assert_same(found, {gguf_name(path): weight for path, weight in expected.items()})


def test_shared_layer_config(tmp_path: Path) -> None:
    """Layer 0's q_proj stands in the shared table, layer 1's differs and stands in config_for_layers."""
    architecture = ARCHITECTURES["llama"]
    layers = dict.fromkeys(architecture.linear_shapes(), CONFIGURATIONS["v8-k256-256"])
    layers["model.layers.1.self_attn.q_proj"] = CONFIGURATIONS["v6-k4096-0"]
    shared = {path.rpartition(".")[2] for path in layers}
    source = write_checkpoint(tmp_path / "source", architecture, layers, shared=shared)
    tables = json.loads((source / "config.json").read_text())["quantization_config"]
    assert list(tables["config_for_layers"]) == ["model.layers.1.self_attn.q_proj"]
    expected = {gguf_name(path): weight for path, weight in dequantise(source).items()}
    assert len(expected) == len(layers)
    assert_same(native_weights(source, tmp_path / "model.gguf"), expected)


def test_quantised_output(tmp_path: Path) -> None:
    layers = {"lm_head": CONFIGURATIONS["v12-k65536-4096"]}
    source = write_checkpoint(tmp_path / "source", ARCHITECTURES["llama"], layers)
    expected = dequantise(source)["lm_head"]
    assert_same(native_weights(source, tmp_path / "model.gguf"), {"output": expected})
