"""A dense GGUF file's keys -> what config.json would say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vptq_converter.architectures import MAX_HEAD_DIM, inverse_frequencies, llama3_divisors
from vptq_converter.config import Section
from vptq_runtime.errors import FileError, UnsupportedError

ARCHITECTURES = ("llama", "qwen2")  # as GGUF names them; a Mistral is a llama there
# What would change the forward pass, under the architecture's name; 0 or 1 as the format's default is none.
FOREIGN_KEYS = {
    "expert_count": 0,
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "logit_scale": 0.0,
    "embedding_scale": 0.0,
    "residual_scale": 0.0,
}
# Of every model with llama3 scaling so far. Multiplied by one number, they and the original context mean the
# same divisors: a file that has only those cannot say more.
LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR = 1.0, 4.0


def architecture(keys: Section) -> str:
    """`general.architecture`; raises FileError, UnsupportedError for other than a dense model of these."""
    name = keys.values.get("general.architecture")
    if "vptq.version" in keys.values:
        raise UnsupportedError(
            f"{keys.path}: found a VPTQ file, which is quantised already, expected a dense model"
        )
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{keys.path}: general.architecture: {name!r} is not supported, only {', '.join(ARCHITECTURES)}"
        )
    if keys.values.get("general.type", "model") != "model":
        raise keys.error("general.type", keys.values["general.type"], "a model")
    for key, neutral in FOREIGN_KEYS.items():
        found = keys.values.get(f"{name}.{key}", neutral)
        if found != neutral:
            raise UnsupportedError(f"{keys.path}: {name}.{key}: {found!r} is not supported, only none")
    return str(name)


def config_values(
    keys: Section, shapes: Mapping[str, tuple[int, ...]], rope_freqs: NDArray[np.float32] | None
) -> dict[str, Any]:
    """config.json of the model; the token ids of the tokenizer are not in it.

    shapes: row-major, of every tensor by its GGUF name. rope_freqs: (head_dim / 2,), or None. Raises
    FileError for keys that are missing or out of range, UnsupportedError for a RoPE that is not known.
    """
    arch = architecture(keys)
    embedding = shapes.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise FileError(f"{keys.path}: found no matrix token_embd.weight, expected one")
    n_embd = keys.integer(f"{arch}.embedding_length")
    n_head = keys.integer(f"{arch}.attention.head_count")
    config: dict[str, Any] = {
        "hidden_size": n_embd,
        "intermediate_size": keys.integer(f"{arch}.feed_forward_length"),
        "num_hidden_layers": keys.integer(f"{arch}.block_count"),
        "num_attention_heads": n_head,
        "num_key_value_heads": keys.integer(f"{arch}.attention.head_count_kv", default=n_head),
        "vocab_size": embedding[0],
        "max_position_embeddings": keys.integer(f"{arch}.context_length"),
        "rms_norm_eps": _decimal(keys.number(f"{arch}.attention.layer_norm_rms_epsilon")),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in shapes,
        "torch_dtype": "float32",
    }
    head_dim = _head_dim(keys, arch, n_embd, n_head)
    if head_dim * n_head != n_embd:
        config["head_dim"] = head_dim
    config["rope_theta"] = theta = _decimal(keys.number(f"{arch}.rope.freq_base", default=10000.0))
    config["rope_scaling"] = _rope_scaling(keys, arch, head_dim, theta, rope_freqs)
    window = _window(keys, arch, config["num_hidden_layers"], len(shapes))
    if arch == "qwen2":
        name = "Qwen2ForCausalLM"
        config["use_sliding_window"] = bool(window)
    elif window:
        name = "MistralForCausalLM"
    else:
        name = "LlamaForCausalLM"
        config["attention_bias"] = "blk.0.attn_output.bias" in shapes
        config["mlp_bias"] = "blk.0.ffn_down.bias" in shapes
    kind = name.removesuffix("ForCausalLM").lower()
    return {"architectures": [name], "model_type": kind, **config, **window}


def _decimal(value: float) -> float:
    """The shortest decimal number that is this float32: 1e-05 where the file can only have 9.99999975e-06."""
    return float(str(np.float32(value)))


def _head_dim(keys: Section, arch: str, n_embd: int, n_head: int) -> int:
    default = keys.integer(f"{arch}.rope.dimension_count", default=max(1, n_embd // n_head))
    head_dim = keys.integer(f"{arch}.attention.key_length", default=default)
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        raise keys.error(f"{arch}.attention.key_length", head_dim, f"an even number, at most {MAX_HEAD_DIM}")
    for key in ("rope.dimension_count", "attention.value_length"):
        found = keys.integer(f"{arch}.{key}", default=head_dim)
        if found != head_dim:
            raise UnsupportedError(
                f"{keys.path}: {arch}.{key}: {found} is not supported, only the length of a head, {head_dim}"
            )
    return head_dim


def _rope_scaling(
    keys: Section, arch: str, head_dim: int, theta: float, rope_freqs: NDArray[np.float32] | None
) -> dict[str, Any] | None:
    """`rope_scaling` of config.json."""
    kind = keys.values.get(f"{arch}.rope.scaling.type", "linear")  # llama.cpp's default, by a factor of 1
    if kind not in ("none", "linear"):
        raise UnsupportedError(
            f"{keys.path}: {arch}.rope.scaling.type: {kind!r} is not supported, only none, linear"
        )
    factor = 1.0
    if kind == "linear":
        for key in ("rope.scale_linear", "rope.scaling.factor"):  # the first is the old name
            factor = keys.number(f"{arch}.{key}", default=factor)
    if rope_freqs is None or np.all(rope_freqs == 1):
        return {"rope_type": "linear", "factor": _decimal(factor)} if factor != 1 else None
    if factor != 1:
        raise UnsupportedError(f"{keys.path}: found rope_freqs.weight and linear scaling, expected either")
    return _llama3_scaling(keys.path, head_dim, theta, rope_freqs)


def _llama3_scaling(path: Path, head_dim: int, theta: float, divisors: NDArray[np.float32]) -> dict[str, Any]:
    """The parameters that give these divisors; raises UnsupportedError where none do."""
    where = f"{path}: tensor rope_freqs.weight"
    if divisors.shape != (head_dim // 2,) or not (np.isfinite(divisors).all() and (divisors > 0).all()):
        expected = f"{head_dim // 2} positive numbers, half a head"
        raise FileError(f"{where}: found shape {divisors.shape} or others, expected {expected}")
    factor = float(divisors.max())
    between = (divisors > 1 + 1e-4) & (divisors < factor * (1 - 1e-4))
    if between.any():
        # Between the wavelengths that stay and those that are divided by the factor, 1 / divisor is
        # (1 - smooth) / factor + smooth, and smooth says how often the original context turns.
        smooth = (1 / divisors[between].astype(np.float64) - 1 / factor) / (1 - 1 / factor)
        turns = LOW_FREQ_FACTOR + smooth * (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR)
        original = round(float(np.median(turns * 2 * np.pi / inverse_frequencies(head_dim, theta)[between])))
        if 1 <= original < 2**31:
            again = llama3_divisors(head_dim, theta, factor, LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR, original)
            if np.allclose(again, divisors, rtol=1e-4, atol=0):
                return {
                    "rope_type": "llama3",
                    "factor": _decimal(factor),
                    "low_freq_factor": LOW_FREQ_FACTOR,
                    "high_freq_factor": HIGH_FREQ_FACTOR,
                    "original_max_position_embeddings": original,
                }
    raise UnsupportedError(f"{where}: found divisors that are not those of llama3 scaling, expected such")


def _window(keys: Section, arch: str, n_layer: int, n_tensors: int) -> dict[str, Any]:
    """The sliding window's keys of config.json, none without one."""
    if keys.values.get(f"{arch}.attention.sliding_window") in (None, 0):
        return {}
    window = keys.integer(f"{arch}.attention.sliding_window")
    pattern = keys.values.get(f"{arch}.attention.sliding_window_pattern")
    if n_layer > n_tensors:  # before anything is sized by it
        raise keys.error(f"{arch}.block_count", n_layer, f"fewer than the file's {n_tensors} tensors")
    if pattern is None:
        pattern = [True] * n_layer
    if not isinstance(pattern, list) or len(pattern) != n_layer:
        raise keys.error(
            f"{arch}.attention.sliding_window_pattern", pattern, f"{n_layer} times true or false"
        )
    types = ["sliding_attention" if windowed else "full_attention" for windowed in pattern]
    values: dict[str, Any] = {"sliding_window": window}
    if arch == "qwen2":
        values |= {"max_window_layers": 0, "layer_types": types}
    elif "full_attention" in types:
        raise UnsupportedError(
            f"{keys.path}: {arch}.attention.sliding_window_pattern: windows in some layers are not "
            "supported, only in all or none"
        )
    return values
