"""Small random VPTQ checkpoints in the Hugging Face layout, and the float32 weights that they stand for.

The models are tiny but their codebooks are real: k = 65536 is 65536 here as well. Nothing in this file is
shared with the converter; `dequantise` is the formula of docs/file-format.md, one input column at a time.
"""

import json
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from configurations import BOS, EOS_IDS, SPECIAL_TOKENS, VOCAB_SIZE, Architecture, LayerConfig
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] }}: {{ message['content'] }}<|end_of_turn|>\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)

EMBEDDING = "model.embed_tokens"
# Packs index rows: (main indices (g, B, group_size), residual ones or None, config) -> int32 words.
Packer = Callable[[NDArray[np.int64], NDArray[np.int64] | None, LayerConfig], NDArray[np.int32]]


def pack_rows(
    indices: NDArray[np.int64], res_indices: NDArray[np.int64] | None, config: LayerConfig
) -> NDArray[np.int32]:
    """Each row as one long number, least significant column first: (g, B, ceil(group_size * bits / 32))."""
    values = indices if res_indices is None else res_indices << config.index_bits | indices
    n_words = -(-indices.shape[-1] * config.bits // 32)
    words = np.empty((*indices.shape[:-1], n_words), np.int32)
    for row in np.ndindex(indices.shape[:-1]):
        number = sum(int(value) << j * config.bits for j, value in enumerate(values[row]))
        words[row] = np.frombuffer(number.to_bytes(4 * n_words, "little"), "<i4")
    return words


def unpack_row(words: NDArray[np.int32], n: int, bits: int) -> NDArray[np.int64]:
    """The first n values of `bits` bits of one row."""
    number = int.from_bytes(words.astype("<i4").tobytes(), "little")
    return np.array([number >> j * bits & (1 << bits) - 1 for j in range(n)], np.int64)


def write_checkpoint(
    directory: Path,
    architecture: Architecture,
    layers: LayerConfig | Mapping[str, LayerConfig],
    *,
    seed: int = 0,
    shards: int = 1,
    shared: Collection[str] = (),
    pack: Packer = pack_rows,
) -> Path:
    """Writes a whole checkpoint into `directory` (made if it is not there) and returns that.

    `layers` is one configuration for every linear layer but lm_head, or one each by module path (no entry:
    dense), that of the embedding among them. Layers whose last path part is in `shared` are described in
    shared_layer_config, and in config_for_layers where they differ from the first of that name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    shapes = architecture.linear_shapes()
    if isinstance(layers, LayerConfig):
        layers = dict.fromkeys(shapes, layers)
    tensors: dict[str, torch.Tensor] = {}
    tables: dict[str, dict[str, Any]] = {"config_for_layers": {}, "shared_layer_config": {}}

    def dense(name: str, *shape: int, std: float, mean: float = 0.0) -> None:
        tensors[name] = _normal(rng, shape, std, architecture.dtype) + mean

    d = architecture.hidden_size
    # Tied to the output, larger ones would have every token repeat itself.
    of_embedding = 0.25 if architecture.tied else 0.5
    if EMBEDDING in layers:
        shapes |= {EMBEDDING: (VOCAB_SIZE, d)}
    else:
        dense(f"{EMBEDDING}.weight", VOCAB_SIZE, d, std=of_embedding)
    dense("model.norm.weight", d, std=0.2, mean=1.0)
    if not architecture.tied:
        shapes |= {"lm_head": (VOCAB_SIZE, d)}
    for n in range(architecture.n_layers):
        dense(f"model.layers.{n}.input_layernorm.weight", d, std=0.2, mean=1.0)
        dense(f"model.layers.{n}.post_attention_layernorm.weight", d, std=0.2, mean=1.0)
    for path, (out_features, in_features) in shapes.items():
        last = path.rpartition(".")[2]
        # Queries and keys large enough for attention that looks at some tokens more than at others.
        std = {"q_proj": 2.0, "k_proj": 2.0, "lm_head": 4.0}.get(last, 1.0) / in_features**0.5
        std = of_embedding if path == EMBEDDING else std
        bias = last in architecture.biases
        if bias:
            dense(f"{path}.bias", out_features, std=0.3)
        config = layers.get(path)
        if config is None:
            dense(f"{path}.weight", out_features, in_features, std=std)
            continue
        tensors |= {
            f"{path}.{name}": tensor
            for name, tensor in _layer_tensors(rng, config, out_features, in_features, std, pack).items()
        }
        entry = _layer_entry(config, out_features, in_features, bias)
        if last in shared and tables["shared_layer_config"].setdefault(last, entry) == entry:
            continue
        tables["config_for_layers"][path] = entry

    quantisation = {"quant_method": "vptq"} | {name: table for name, table in tables.items() if table}
    _write_json(directory / "config.json", architecture.config() | {"quantization_config": quantisation})
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": BOS, "eos_token_id": list(EOS_IDS), "do_sample": True},
    )
    _write_tokenizer(directory)
    _write_shards(directory, tensors, shards)
    return directory


def mixed_layers(architecture: Architecture, configs: Collection[LayerConfig]) -> dict[str, LayerConfig]:
    """Every linear layer another configuration in turn, and the last one dense."""
    in_turn = list(configs)
    paths = list(architecture.linear_shapes())[:-1]
    return {path: in_turn[n % len(in_turn)] for n, path in enumerate(paths)}


def dequantise(directory: Path) -> dict[str, NDArray[np.float32]]:
    """Module path of every quantised layer -> its weight (out_features, in_features) in float32."""
    quantisation = json.loads((directory / "config.json").read_text())["quantization_config"]
    tensors = read_tensors(directory)
    weights = {}
    for path in sorted(name.removesuffix(".indices") for name in tensors if name.endswith(".indices")):
        entry = quantisation.get("config_for_layers", {}).get(path)
        entry = entry or quantisation["shared_layer_config"][path.rpartition(".")[2]]
        prefix = f"{path}."
        fields = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        weights[path] = _dequantise_layer(entry, fields)
    return weights


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of all shards."""
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            tensors |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (no mapping)
    return tensors


def _dequantise_layer(entry: Mapping[str, Any], fields: Mapping[str, torch.Tensor]) -> NDArray[np.float32]:
    out_features, in_features = entry["out_features"], entry["in_features"]
    (v0, v), (k0, k), r = entry["vector_lens"], entry["num_centroids"], entry["num_res_centroids"][1]
    g, group_size, n0 = entry["group_num"], entry["group_size"], entry["outlier_size"]
    k_bits = (k - 1).bit_length()
    r_bits = (r - 1).bit_length() if r > 0 else 0

    def codebook(name: str, *shape: int) -> NDArray[np.float32]:
        return fields[name].float().numpy().reshape(shape)

    def unsigned(name: str) -> NDArray[np.int64]:
        t = fields[name]
        return (t if t.dtype == torch.int64 else t.view(torch.int16).to(torch.int64) & 0xFFFF).numpy()

    centroids = codebook("centroids.weight", g, k, v)
    residuals = codebook("res_centroids.weight", g, r, v) if r > 0 else None
    if entry["is_indice_packed"]:
        words = fields["indices"].numpy()
        packed = np.array([[unpack_row(row, group_size, k_bits + r_bits) for row in book] for book in words])
        indices, res_indices = packed & (1 << k_bits) - 1, packed >> k_bits
    else:
        indices = unsigned("indices")
        res_indices = unsigned("res_indices") if r > 0 else indices
    perm = unsigned("perm") if entry["enable_perm"] else np.arange(in_features)

    weight = np.empty((out_features, in_features), np.float32)
    for c in range(in_features):
        if c < n0:
            column = codebook("outlier_centroids.weight", k0, v0)[unsigned("outlier_indices")[0, :, c]]
        else:
            q, j = divmod(c - n0, group_size)
            column = centroids[q][indices[q, :, j]]
            if residuals is not None:
                column = column + residuals[q][res_indices[q, :, j]]
        weight[:, perm[c]] = column.reshape(-1)[:out_features]  # the rest is padding
    if not entry["enable_norm"]:
        return weight
    scale, shift = codebook("weight_scale", -1), codebook("weight_bias", -1)
    if entry.get("norm_dim", 0) == 1:
        scale, shift = scale[:, None], shift[:, None]
    return weight * scale + shift


def _layer_tensors(
    rng: np.random.Generator,
    config: LayerConfig,
    out_features: int,
    in_features: int,
    std: float,
    pack: Packer,
) -> dict[str, torch.Tensor]:
    """The tensors of one quantised layer; its weights have about the standard deviation std."""
    g, n0 = config.g, config.n0(in_features)
    group_size, left = divmod(in_features - n0, g)
    if left:
        raise ValueError(f"{in_features} input features are not {n0} outliers and {g} equal groups")
    n_blocks = -(-out_features // config.v)
    unpacked_dtype = np.float16 if config.indices == "float16" else np.int16

    def codebooks(n: int, size: int, v: int, std: float) -> torch.Tensor:
        return _normal(rng, (n, size * v), std, config.dtype)

    def index_rows(size: int, *shape: int) -> NDArray[np.int64]:
        rows = rng.integers(0, size, shape)
        rows.flat[0], rows.flat[-1] = size - 1, 0  # the ends of the codebook are in use
        return rows

    def uint16_bits(values: NDArray[np.int64], dtype: Any) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.uint16).view(dtype))

    tensors = {"centroids.weight": codebooks(g, config.k, config.v, std)}
    indices = index_rows(config.k, g, n_blocks, group_size)
    res_indices = None
    if config.r:
        tensors["res_centroids.weight"] = codebooks(g, config.r, config.v, 0.3 * std)
        res_indices = index_rows(config.r, g, n_blocks, group_size)
    if config.indices == "packed":
        tensors["indices"] = torch.from_numpy(pack(indices, res_indices, config))
    else:
        tensors["indices"] = uint16_bits(indices, unpacked_dtype)
        if res_indices is not None:
            tensors["res_indices"] = uint16_bits(res_indices, unpacked_dtype)
    if n0:
        tensors["outlier_centroids.weight"] = codebooks(1, config.k0, config.v0, 3 * std)
        outlier_indices = index_rows(config.k0, 1, -(-out_features // config.v0), n0)
        tensors["outlier_indices"] = uint16_bits(outlier_indices, unpacked_dtype)
    if config.perm:
        perm = rng.permutation(in_features)
        packed = config.indices == "packed"
        tensors["perm"] = uint16_bits(perm, np.int16) if packed else torch.from_numpy(perm)
    if config.norm_dim is not None:
        n = (in_features, out_features)[config.norm_dim]
        tensors["weight_scale"] = _normal(rng, (n,), 0.2, config.dtype) + 1
        tensors["weight_bias"] = _normal(rng, (n,), 0.2 * std, config.dtype)
    return tensors


def _layer_entry(config: LayerConfig, out_features: int, in_features: int, bias: bool) -> dict[str, Any]:
    """What config.json says of one quantised layer."""
    n0 = config.n0(in_features)
    entry: dict[str, Any] = {
        "in_features": in_features,
        "out_features": out_features,
        "vector_lens": [config.v0 if n0 else -1, config.v],
        "num_centroids": [config.k0 if n0 else -1, config.k],
        "num_res_centroids": [-1, config.r or -1],
        "group_num": config.g,
        "group_size": (in_features - n0) // config.g,
        "outlier_size": n0,
        "enable_norm": config.norm_dim is not None,
        "enable_perm": config.perm,
        "is_indice_packed": config.indices == "packed",
        "indices_as_float": config.indices == "float16",
        "bias": bias,
        "vector_quant_dim": "out",  # an unknown key
    }
    return entry | ({"norm_dim": 1} if config.norm_dim == 1 else {})


def _normal(rng: np.random.Generator, shape: tuple[int, ...], std: float, dtype: str) -> torch.Tensor:
    values = rng.standard_normal(shape, dtype=np.float32) * np.float32(std)
    return torch.from_numpy(values).to(getattr(torch, dtype))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def _write_shards(directory: Path, tensors: Mapping[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for n in range(shards):
        file = f"model-{n + 1:05}-of-{shards:05}.safetensors"
        part = {name: t for i, (name, t) in enumerate(tensors.items()) if i % shards == n}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)


@lru_cache
def _tokenizer_json() -> str:
    """A byte-level BPE tokenizer that puts <|bos|> in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 8,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    sentences = (
        "the quick brown fox jumps over the lazy dog",
        "a model is a file and the file is a model",
    ) * 4
    tokenizer.train_from_iterator(sentences, trainer)
    bos = SPECIAL_TOKENS[BOS]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, BOS)])
    return tokenizer.to_str()


def _write_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text(_tokenizer_json(), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[BOS],
        "eos_token": SPECIAL_TOKENS[EOS_IDS[0]],
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(directory / "tokenizer_config.json", config)
