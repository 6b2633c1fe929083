"""--dequantize and the type options: what llama.cpp expects to find."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import dequantise, mixed_layers, read_tensors, write_checkpoint
from configurations import ARCHITECTURES, CONFIGURATIONS, gguf_name
from converted import change_json, change_tensors, float_tensors, keys, raw_tensors
from numpy.typing import NDArray
from vptq_converter import convert

from vptq_runtime import FileError, OptionError, UnsupportedError

MIXED = [CONFIGURATIONS[name] for name in ("v8-k1024-512", "float16-outliers", "norm-dim-1-outliers", "bf16")]


def write(name: str, directory: Path, hidden_size: int | None = None) -> Path:
    architecture = ARCHITECTURES[name]
    if hidden_size is not None:
        architecture = replace(architecture, hidden_size=hidden_size, n_heads=4, n_kv_heads=2)
    return write_checkpoint(directory, architecture, mixed_layers(architecture, MIXED))


def weights(checkpoint: Path) -> dict[str, NDArray[np.float32]]:
    """Every dense weight and bias in float32 by its Hugging Face name, VPTQ layers dequantised."""
    dense = {
        name: tensor.float().numpy()
        for name, tensor in read_tensors(checkpoint).items()
        if name.endswith((".weight", ".bias")) and "centroids" not in name
    }
    return dense | {f"{path}.weight": weight for path, weight in dequantise(checkpoint).items()}


def rotate(x: NDArray[np.float64], angles: NDArray[np.float64], neighbours: bool) -> NDArray[np.float64]:
    """RoPE on a head (head_dim,): i with i + head_dim/2, or 2i with 2i + 1."""
    pairs = x.reshape(-1, 2) if neighbours else x.reshape(2, -1).T
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = pairs[:, 0] * cos - pairs[:, 1] * sin, pairs[:, 1] * cos + pairs[:, 0] * sin
    return np.stack([a, b], axis=1).reshape(-1) if neighbours else np.concatenate([a, b])


@pytest.mark.parametrize("name", ["llama3", "llama-biases", "mistral", "qwen2"])
def test_matrices_are_the_dequantised_weights(name: str, tmp_path: Path) -> None:
    checkpoint = write(name, tmp_path / "checkpoint")
    convert(checkpoint, tmp_path / "out.gguf", dequantize="f16")

    types = {n: (type_name, shape) for n, (type_name, shape, _) in raw_tensors(tmp_path / "out.gguf").items()}
    values, reference = float_tensors(tmp_path / "out.gguf"), weights(checkpoint)
    permuted = () if name == "qwen2" else ("q_proj", "k_proj")
    n_checked = 0
    for path in ARCHITECTURES[name].linear_shapes():
        for kind, expected_type in (("weight", "F16"), ("bias", "F32")):
            expected = reference.get(f"{path}.{kind}")
            if expected is None or path.endswith(permuted):
                continue
            tensor = f"{gguf_name(path)}.{kind}"
            assert types[tensor] == (expected_type, expected.shape)
            assert np.array_equal(
                values[tensor], expected.astype(np.float16) if kind == "weight" else expected
            )
            n_checked += 1
    assert n_checked >= 10
    norm = reference["model.layers.1.post_attention_layernorm.weight"]
    assert types["blk.1.ffn_norm.weight"] == ("F32", norm.shape)
    assert np.array_equal(values["blk.1.ffn_norm.weight"], norm)
    assert not [n for n in types if ".vptq_" in n]
    found = keys(tmp_path / "out.gguf")
    assert not [n for n in found if n.startswith("vptq.") or n == "tokenizer.huggingface.json"]
    assert found["general.file_type"] == 1
    assert found["general.alignment"] == 32  # llama-quantize damages files of another one


@pytest.mark.parametrize("name", ["llama", "llama-biases", "mistral"])
def test_rotating_neighbours_in_the_export_is_rotating_halves_in_the_checkpoint(
    name: str, tmp_path: Path
) -> None:
    """q . k after RoPE, head by head: the reason for the order of the rows."""
    architecture = ARCHITECTURES[name]
    checkpoint = write(name, tmp_path / "checkpoint")
    convert(checkpoint, tmp_path / "out.gguf", dequantize="bf16")
    exported, reference = float_tensors(tmp_path / "out.gguf"), weights(checkpoint)
    rng = np.random.default_rng(0)
    d = architecture.true_head_dim
    angles = rng.uniform(0, 6, d // 2)
    x = rng.standard_normal(architecture.hidden_size)

    def heads(weight: NDArray[np.float32], bias: NDArray[np.float32] | None) -> NDArray[np.float64]:
        y = weight.astype(np.float64) @ x + (0 if bias is None else bias.astype(np.float64))
        return y.reshape(-1, d)

    for hf, gguf in (("q_proj", "attn_q"), ("k_proj", "attn_k")):
        path = f"model.layers.0.self_attn.{hf}"
        weight = torch.from_numpy(reference[f"{path}.weight"]).bfloat16().float().numpy()
        ours = heads(weight, reference.get(f"{path}.bias"))
        theirs = heads(exported[f"blk.0.{gguf}.weight"], exported.get(f"blk.0.{gguf}.bias"))
        assert ours.shape == theirs.shape and not np.allclose(ours, theirs)
        for a, b in zip(ours, theirs, strict=True):
            halves, pairs = rotate(a, angles, neighbours=False), rotate(b, angles, neighbours=True)
            np.testing.assert_allclose(pairs.reshape(-1, 2).T.reshape(-1), halves, atol=1e-12)


def test_q8_0_is_within_half_a_step(tmp_path: Path) -> None:
    checkpoint = write("llama", tmp_path / "checkpoint", hidden_size=128)
    done = convert(checkpoint, tmp_path / "out.gguf", dequantize="q8_0")

    assert done.notes == (
        "2 matrices are f16, not q8_0, which needs rows of a multiple of 32 weights (blk.0.ffn_down: 198)",
    )
    types = {n: type_name for n, (type_name, _, _) in raw_tensors(tmp_path / "out.gguf").items()}
    assert types["blk.0.ffn_up.weight"] == types["token_embd.weight"] == types["output.weight"] == "Q8_0"
    assert types["blk.0.ffn_down.weight"] == "F16"  # 198 columns are not whole blocks of 32
    assert types["blk.0.attn_norm.weight"] == "F32"
    expected = weights(checkpoint)["model.layers.0.mlp.up_proj.weight"].astype(np.float64)
    error = np.abs(float_tensors(tmp_path / "out.gguf")["blk.0.ffn_up.weight"] - expected)
    step = np.abs(expected).reshape(-1, 4, 32).max(axis=2, keepdims=True) / 127
    # Half a step, and the float16 rounding of the step itself, up to 127 times.
    assert np.all(error.reshape(-1, 4, 32) <= step * (0.5 + 127 * 2**-11))
    assert keys(tmp_path / "out.gguf")["general.file_type"] == 7


@pytest.mark.parametrize("name", ["llama", "llama3"])  # stored as float16, as bfloat16
def test_dense_types_can_be_chosen(name: str, tmp_path: Path) -> None:
    checkpoint = write(name, tmp_path / "checkpoint", hidden_size=128)
    convert(checkpoint, tmp_path / "plain.gguf")
    convert(checkpoint, tmp_path / "out.gguf", embedding_type="f16", output_type="q8_0")

    before, after = raw_tensors(tmp_path / "plain.gguf"), raw_tensors(tmp_path / "out.gguf")
    changed = {n for n in before if before[n] != after[n]}
    expected = {"output.weight"} | ({"token_embd.weight"} if name == "llama3" else set())
    assert changed == expected and set(before) == set(after)
    assert after["token_embd.weight"][0] == "F16" and after["output.weight"][0] == "Q8_0"
    embedding = weights(checkpoint)["model.embed_tokens.weight"]
    assert np.array_equal(
        float_tensors(tmp_path / "out.gguf")["token_embd.weight"], embedding.astype(np.float16)
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("F16", None)),
        ({"output_type": "f16"}, ("F16", None)),  # what the embedding has: still tied
        ({"output_type": "q8_0"}, ("F16", "Q8_0")),
        ({"embedding_type": "q8_0"}, ("Q8_0", None)),
        ({"embedding_type": "q8_0", "output_type": "q8_0"}, ("Q8_0", None)),
        ({"embedding_type": "q8_0", "output_type": "f16"}, ("Q8_0", "F16")),
        ({"embedding_type": "q4_1", "output_type": "q5_1"}, ("Q4_1", "Q5_1")),
        ({"embedding_type": "q5_0"}, ("Q5_0", None)),
        ({"dequantize": "bf16"}, ("BF16", None)),
        ({"dequantize": "bf16", "output_type": "q8_0"}, ("BF16", "Q8_0")),
        ({"dequantize": "q8_0", "embedding_type": "q4_0"}, ("Q4_0", None)),
    ],
)
def test_a_tied_output_gets_its_own_tensor_only_for_another_type(
    options: dict[str, str], expected: tuple[str, str | None], tmp_path: Path
) -> None:
    architecture = replace(ARCHITECTURES["llama"], tied=True, hidden_size=128, n_heads=4, n_kv_heads=2)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", architecture, CONFIGURATIONS["bf16"])
    convert(checkpoint, tmp_path / "out.gguf", **options)
    types = {n: type_name for n, (type_name, _, _) in raw_tensors(tmp_path / "out.gguf").items()}
    assert (types["token_embd.weight"], types.get("output.weight")) == expected


@pytest.mark.parametrize(
    ("planned", "options", "expected"),
    [
        ({"embedding_type": "q5_0"}, {}, ("Q5_0", None)),
        ({"embedding_type": "q5_0"}, {"embedding_type": "q8_0"}, ("Q8_0", None)),
        ({"embedding_type": "q5_0"}, {"output_type": "q8_0"}, ("Q5_0", "Q8_0")),
        ({"embedding_type": "q4_0", "output_type": "q5_1"}, {}, ("Q4_0", "Q5_1")),
        ({"embedding_type": "auto"}, {}, ("F16", None)),
        ({"embedding_type": "q5_0"}, {"dequantize": "f16"}, ("F16", None)),
    ],
)
def test_the_checkpoint_can_name_dense_types(
    planned: dict[str, str], options: dict[str, str], expected: tuple[str, str | None], tmp_path: Path
) -> None:
    architecture = replace(ARCHITECTURES["llama"], tied=True, hidden_size=128, n_heads=4, n_kv_heads=2)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", architecture, CONFIGURATIONS["v8-k256-256"])
    change_json(checkpoint / "config.json", lambda config: config["quantization_config"].update(planned))
    convert(checkpoint, tmp_path / "out.gguf", **options)
    types = {n: type_name for n, (type_name, _, _) in raw_tensors(tmp_path / "out.gguf").items()}
    assert (types["token_embd.weight"], types.get("output.weight")) == expected


@pytest.mark.parametrize("type", ["q6_k", "", 8, None, ["q8_0"]])
def test_a_checkpoint_that_names_another_type(type: object, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", ARCHITECTURES["llama"], CONFIGURATIONS["bf16"])
    planned = {"output_type": type}
    change_json(checkpoint / "config.json", lambda config: config["quantization_config"].update(planned))
    with pytest.raises(FileError, match=r"quantization_config.output_type: found .*, expected one of auto, "):
        convert(checkpoint, tmp_path / "out.gguf")


def test_a_quantised_output_layer(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["llama"]
    quantised = {path: CONFIGURATIONS["v8-k256-256"] for path in [*architecture.linear_shapes(), "lm_head"]}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", architecture, quantised)
    done = convert(checkpoint, tmp_path / "out.gguf")
    assert (done.n_vptq, done.n_dense) == (15, 0)
    assert "output.vptq_indices" in raw_tensors(tmp_path / "out.gguf")
    done = convert(checkpoint, tmp_path / "decoded.gguf", output_type="f16")
    assert (done.n_vptq, done.n_dense) == (14, 1)
    decoded = float_tensors(tmp_path / "decoded.gguf")["output.weight"]
    assert np.array_equal(decoded, weights(checkpoint)["lm_head.weight"].astype(np.float16))
    convert(checkpoint, tmp_path / "plain.gguf", dequantize="f16")
    output = float_tensors(tmp_path / "plain.gguf")["output.weight"]
    assert np.array_equal(output, weights(checkpoint)["lm_head.weight"].astype(np.float16))


@pytest.mark.parametrize("type", ["q8_0", "q5_1", "q4_0"])
def test_quantised_matrices_need_whole_blocks(type: str, tmp_path: Path) -> None:
    checkpoint = write("llama", tmp_path / "checkpoint")
    expected = f"token_embd: {type} asked for, found rows of 100, expected a multiple of 32"
    with pytest.raises(OptionError, match=expected):
        convert(checkpoint, tmp_path / "out.gguf", embedding_type=type)
    done = convert(checkpoint, tmp_path / "out.gguf", dequantize="bf16", embedding_type=type)
    assert done.notes[0].startswith(f"1 matrix is f16, not {type}, which needs rows of a multiple of 32")


@pytest.mark.parametrize("type", ["q6_k", "q4_k"])
def test_types_that_the_library_cannot_write(type: str, tmp_path: Path) -> None:
    expected = f"embedding_type: found '{type}', which the gguf library cannot write, expected one of auto, "
    with pytest.raises(OptionError, match=expected):
        convert(tmp_path, tmp_path / "out.gguf", embedding_type=type)


def test_weights_too_large_for_f16_are_refused(tmp_path: Path) -> None:
    checkpoint = write("llama3", tmp_path / "checkpoint")
    name = "model.embed_tokens.weight"
    change_tensors(checkpoint, lambda tensors: tensors[name].view(-1)[:1].fill_(100000.0))
    with pytest.raises(OptionError, match=r"token_embd.*found a weight of size 99840.*65504"):
        convert(checkpoint, tmp_path / "out.gguf", dequantize="f16")
    with pytest.raises(OptionError, match=r"token_embd.*found a weight of size 99840.*65504 for f16"):
        convert(checkpoint, tmp_path / "out.gguf", embedding_type="f16")
    assert not (tmp_path / "out.gguf").exists()
    convert(checkpoint, tmp_path / "out.gguf", dequantize="bf16")


def test_llama3_scaling_is_exported_for_llama_only(tmp_path: Path) -> None:
    rope = dict(ARCHITECTURES["llama3"].rope)
    architecture = replace(ARCHITECTURES["qwen2"], rope=rope)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", architecture, CONFIGURATIONS["v8-k256-256"])
    with pytest.raises(UnsupportedError, match="llama3 RoPE scaling for the architecture qwen2"):
        convert(checkpoint, tmp_path / "out.gguf", dequantize="f16")
    convert(checkpoint, tmp_path / "out.gguf")
    assert "rope_freqs.weight" in raw_tensors(tmp_path / "out.gguf")


@pytest.mark.parametrize(
    "options", [{"dequantize": "q4_0"}, {"embedding_type": "bf16"}, {"output_type": ""}, {"dequantize": ""}]
)
def test_unknown_options(options: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="expected one of"):
        convert(tmp_path, tmp_path / "out.gguf", **options)
