"""A tiny model as a GGUF file, to be changed and damaged at will."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from layer_tensors import Raw

N_EMBD, N_FF, N_VOCAB, HEAD_DIM = 32, 48, 40, 8
KEYS: dict[str, Any] = {
    "vptq.version": 1,
    "vptq.qk_row_order": "huggingface",
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": N_EMBD,
    "llama.feed_forward_length": N_FF,
    "llama.vocab_size": N_VOCAB,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.key_length": HEAD_DIM,
    "llama.attention.value_length": HEAD_DIM,
    "llama.rope.dimension_count": HEAD_DIM,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e4,
}
LINEAR = {
    "attn_q": (32, N_EMBD),
    "attn_k": (16, N_EMBD),
    "attn_v": (16, N_EMBD),
    "attn_output": (N_EMBD, 32),
    "ffn_gate": (N_FF, N_EMBD),
    "ffn_up": (N_FF, N_EMBD),
    "ffn_down": (N_EMBD, N_FF),
}


def tensors(n_layer: int = 1, n_vocab: int = N_VOCAB) -> dict[str, np.ndarray]:
    """A model whose ffn_down is VPTQ (v = 4, k = 16), the rest is dense."""
    rng = np.random.default_rng(0)
    out = {"token_embd.weight": rng.normal(size=(n_vocab, N_EMBD)).astype(np.float16)}
    out["output_norm.weight"] = np.ones(N_EMBD, np.float32)
    for layer in range(n_layer):
        blk = f"blk.{layer}"
        out |= {f"{blk}.{name}.weight": np.ones(N_EMBD, np.float32) for name in ("attn_norm", "ffn_norm")}
        for name, shape in LINEAR.items():
            out[f"{blk}.{name}.weight"] = rng.normal(size=shape).astype(np.float16)
        del out[f"{blk}.ffn_down.weight"]
        out[f"{blk}.ffn_down.vptq_indices"] = rng.integers(-(2**31), 2**31, size=(1, 8, 6), dtype=np.int32)
        out[f"{blk}.ffn_down.vptq_centroids"] = rng.normal(size=(1, 16, 4)).astype(np.float16)
    return out


def write_tiny(path: Path, n_layer: int = 1, n_vocab: int = N_VOCAB) -> Path:
    keys = KEYS | {"llama.block_count": n_layer, "llama.vocab_size": n_vocab}
    return write(path, keys, tensors(n_layer, n_vocab))


def write(
    path: Path, keys: dict[str, Any], arrays: Mapping[str, np.ndarray | Raw], arch: str = "llama"
) -> Path:
    writer = GGUFWriter(path, arch)
    writer.add_custom_alignment(64)
    for key, value in keys.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)
    for name, array in arrays.items():
        if isinstance(array, np.ndarray):
            writer.add_tensor(name, array)
        else:
            number, shape, data = array
            rows = np.frombuffer(data, np.uint8).reshape(*shape[:-1], -1)
            writer.add_tensor(name, rows, raw_dtype=GGMLQuantizationType(number))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
