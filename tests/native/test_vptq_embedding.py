"""A model whose embedding is a VPTQ layer, and its output another one or the same, against the same model
with those matrices dense."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feeding import all_logits, prefill, step
from gpu import need_gpu
from layer_tensors import Raw, raw, vptq_layer
from relative_error import relative_l2
from tiny_gguf import KEYS, N_EMBD, tensors, write

from vptq_runtime import _native

N_VOCAB = 301
LAYERS: dict[str, dict[str, Any]] = {
    "residual": dict(v=8, k=256, r=16, group_size=N_EMBD, norm_dim=0),
    "outliers": dict(v=3, k=11, r=5, g=2, group_size=14, n0=4, v0=7, k0=9, dtype="bf16"),
    "per token": dict(v=2, k=512, group_size=N_EMBD, norm_dim=1, perm=False),
}
OUTPUT = dict(v=4, k=64, group_size=N_EMBD, bias=True)
PLACES = [
    {"device": "cpu"},
    pytest.param({"device": "cuda"}, marks=pytest.mark.gpu),
    pytest.param({"device": "cuda", "gpu_layers": 1}, marks=pytest.mark.gpu),
]


def models(directory: Path, layer: str, tied: bool) -> tuple[_native.Model, _native.Model]:
    """Of two layers: with VPTQ matrices, and with what these stand for in float32."""
    rng = np.random.default_rng(3)
    arrays: dict[str, np.ndarray | Raw] = {**tensors(n_layer=2, n_vocab=N_VOCAB)}
    del arrays["token_embd.weight"]
    dense = dict(arrays)
    layers = {"token_embd": LAYERS[layer]} | ({} if tied else {"output": OUTPUT})
    for name, options in layers.items():
        made, _ = vptq_layer(rng, out=N_VOCAB, **options)
        weight = _native.Operations.dequantize(made, N_EMBD, N_VOCAB)
        arrays |= {f"{name}.{suffix}": tensor for suffix, tensor in made.items()}
        dense[f"{name}.weight"] = raw(weight, "f32")
        if "bias" in made:
            dense[f"{name}.bias"] = made["bias"]
    keys = KEYS | {"llama.block_count": 2, "llama.vocab_size": N_VOCAB}
    paths = write(directory / "vptq.gguf", keys, arrays), write(directory / "dense.gguf", keys, dense)
    vptq, same = (_native.Model(str(path)) for path in paths)
    for name in ("token_embd", "output"):
        assert np.array_equal(vptq.dequantize(name), same.dequantize(name))
    return vptq, same


def logits(model: _native.Model, place: dict[str, Any]) -> list[np.ndarray]:
    """Of a prompt at all of its positions, of one in pieces beside another one, and of generated tokens."""
    if place["device"] == "cuda":
        need_gpu()
    context = _native.Context(model, n_ctx=64, n_threads=2, kv_type="f32", **place)
    tokens = [*np.random.default_rng(5).integers(N_VOCAB, size=40).tolist(), 0, N_VOCAB - 1]
    sequence, beside = context.new_sequence(), context.new_sequence()
    found = [all_logits(context, sequence, tokens)]
    prefill(context, [beside], [tokens[:5]])
    context.forward([sequence, beside], [tokens[:1], tokens[5:]], [False, True], ["last", "all"])
    found += [context.logits(0), context.logits(1)]
    return found


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_as_with_dense_matrices(tmp_path: Path, layer: str, tied: bool, place: dict[str, Any]) -> None:
    vptq, dense = models(tmp_path, layer, tied)
    for found, expected in zip(*(logits(model, place) for model in (vptq, dense)), strict=True):
        assert relative_l2(found, expected.astype(np.float64)) < 1e-5


@pytest.mark.parametrize("isa", _native.cpu_isas())
def test_on_every_instruction_set(tmp_path: Path, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VPTQ_CPU_ISA", isa)
    vptq, dense = models(tmp_path, "outliers", tied=True)
    for found, expected in zip(*(logits(model, {"device": "cpu"}) for model in (vptq, dense)), strict=True):
        assert relative_l2(found, expected.astype(np.float64)) < 1e-5


def test_a_token_gives_the_same_alone_and_in_company(tmp_path: Path, device: str) -> None:
    model, _ = models(tmp_path, "residual", tied=True)
    context = _native.Context(model, device=device, n_ctx=64, n_threads=2, kv_type="f16")
    greedy = dict(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0, seed=0)

    def generated(n_sequences: int) -> list[int]:
        sequences = [context.new_sequence() for _ in range(n_sequences)]
        samplers = [_native.Sampler(**greedy) for _ in sequences]
        feeds = [[7 + i, 9] for i in range(n_sequences)]
        first = []
        for _ in range(6):
            feeds = [[token] for token in step(context, sequences, feeds, samplers)]
            first += feeds[0]
        return first

    assert generated(1) == generated(5)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_self_check_knows_it(tmp_path: Path, layer: str, rounded: bool) -> None:
    for model in models(tmp_path, layer, tied=False):
        isa = _native.cpu_isas()[0]
        assert _native.self_check(model, isa=isa, kv_type="f16", rounded=rounded, n_threads=2) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("layer", LAYERS)
def test_a_gpu_passes_the_self_check(tmp_path: Path, layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need_gpu()
    monkeypatch.delenv("VPTQ_SELF_CHECK", raising=False)
    model, _ = models(tmp_path, layer, tied=True)
    context = _native.Context(model, device="cuda", n_ctx=64, n_threads=2, kv_type="f16")
    assert context.device.startswith("cuda")
