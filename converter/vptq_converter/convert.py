"""A checkpoint in, a GGUF file out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFValueType

from vptq_converter.architectures import Key, Model, Weight, read_model
from vptq_converter.checkpoint import Checkpoint
from vptq_converter.dense import (
    DENSE_TYPES,
    OPTION_TYPES,
    STORED_TYPES,
    VQ,
    block_size,
    check_dense_type,
    copied,
    decoded,
    made,
    matrix,
)
from vptq_converter.dequantize import FILE_TYPES, plain_tensors
from vptq_converter.gguf_writer import (
    ALIGNMENT,
    PLAIN_ALIGNMENT,
    OutputTensor,
    TensorInfo,
    check_target,
    write_gguf,
)
from vptq_converter.layer import LayerConfig, LayerTensors
from vptq_converter.tokenizer import TokenizerKeys, read_tokenizer
from vptq_runtime.errors import FileError, OptionError

FORMAT_VERSION = 1  # vptq.version, see docs/file-format.md


@dataclass(frozen=True)
class Conversion:
    """What convert() did."""

    target: Path
    arch: str
    n_bytes: int  # of the file
    n_vptq: int  # linear layers left in VPTQ's form
    n_dense: int  # linear layers written as a plain matrix
    seconds: float
    notes: tuple[str, ...] = ()  # what the user of the file should know


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dequantize: str | None = None,
    embedding_type: str = "auto",
    output_type: str = "auto",
    name: str | None = None,
) -> Conversion:
    """Converts a VPTQ checkpoint to a GGUF file.

    source: a .safetensors file, an index.json, a directory, or a Hugging Face repo id
        (owner/model, or owner/model@revision).
    target: the file to write; replaced once the new one is whole, left alone if anything goes wrong.
    dequantize: None for a VPTQ file (docs/file-format.md), or f16, bf16, q8_0 for a plain one for llama.cpp.
    embedding_type, output_type: auto (as dequantize says; without it, as quantization_config's
        embedding_type and output_type say; else as in the checkpoint), f16, q8_0, q5_1, q5_0, q4_1, q4_0;
        vq: as in a checkpoint that has the matrix as a VPTQ layer.
    name: what the model is called in the file; None: as the checkpoint's directory or repository is.

    Raises FileError, UnsupportedError, OptionError (vptq_runtime.errors).
    """
    begin = time.monotonic()
    if dequantize is not None and dequantize not in FILE_TYPES:
        raise OptionError(f"dequantize: found {dequantize!r}, expected one of {', '.join(FILE_TYPES)}")
    for option, value in (("embedding_type", embedding_type), ("output_type", output_type)):
        try:
            check_dense_type(value)
        except OptionError as error:
            raise OptionError(f"{option}: {error}") from error
    try:
        checkpoint = Checkpoint(source)
        resolved = check_target(Path(target), checkpoint.files())
    except (
        OSError,
        RuntimeError,
    ) as error:  # a directory that may not be read, a name too long, links in a circle
        raise FileError(f"{source} or {target} cannot be opened: {error}") from error
    model = read_model(checkpoint)
    tokenizer = read_tokenizer(checkpoint, model.hyperparameters.n_vocab)
    arch = model.architecture.gguf_name
    # A plain file's types are --dequantize's affair.
    planned = _planned_types(checkpoint) if dequantize is None else {}
    asked = {"token_embd": embedding_type, "output": output_type}
    types = {
        weight: planned.get(weight, "auto") if type == "auto" else type for weight, type in asked.items()
    }
    types = {weight: type for weight, type in types.items() if type != "auto"}
    notes: list[str] = []
    _check_vq(model, types, dequantize)
    if dequantize is None:
        keys = file_keys(name or checkpoint.name, model, tokenizer)
        model = _untie(model, types, _stored_type(model.weights[0]))
        tensors = [
            tensor for weight in model.weights for tensor in _weight_tensors(weight, types.get(weight.name))
        ]
    else:
        keys = _plain_keys(name or checkpoint.name, model, tokenizer)
        keys.append(("general.file_type", FILE_TYPES[dequantize], GGUFValueType.UINT32, None))
        keys.append(("general.quantization_version", GGML_QUANT_VERSION, GGUFValueType.UINT32, None))
        model = _untie(model, types, dequantize)
        tensors, notes = plain_tensors(model, types | {"": dequantize})
    if model.hyperparameters.rope_freqs is not None:
        tensors.append(made("rope_freqs.weight", GGMLQuantizationType.F32, model.hyperparameters.rope_freqs))
    window = model.hyperparameters.sliding_window
    if dequantize is not None and window is not None and window < model.hyperparameters.n_ctx_train:
        notes.append(
            f"llama.cpp ignores the model's sliding window: beyond {window} tokens it computes another model"
        )
    alignment = ALIGNMENT if dequantize is None else PLAIN_ALIGNMENT
    n_bytes = write_gguf(resolved, arch, keys, tensors, alignment)
    linears = [weight for weight in model.weights[1:] if "_norm" not in weight.name]
    kept = {weight.name for weight in linears if isinstance(weight.weight, LayerTensors)}
    n_vptq = len(kept - {name for name, type in types.items() if type != VQ}) if dequantize is None else 0
    return Conversion(
        Path(target), arch, n_bytes, n_vptq, len(linears) - n_vptq, time.monotonic() - begin, tuple(notes)
    )


def _planned_types(checkpoint: Checkpoint) -> dict[str, str]:
    """What the checkpoint's maker wants of the embedding and the output matrix; raises FileError."""
    quantization = checkpoint.config.section("quantization_config")
    known = [type for type in DENSE_TYPES if type != VQ]  # that is a matter of the layers' own entries
    found = {}
    for name, key in (("token_embd", "embedding_type"), ("output", "output_type")):
        found[name] = quantization.values.get(key, "auto")
        if found[name] not in known:
            raise quantization.error(key, found[name], f"one of {', '.join(known)}")
    return found


def _plain_keys(name: str, model: Model, tokenizer: TokenizerKeys) -> list[Key]:
    """What files of both kinds have."""
    return [
        ("general.type", "model", GGUFValueType.STRING, None),
        ("general.name", name, GGUFValueType.STRING, None),
        *model.hyperparameters.keys(model.architecture.gguf_name),
        *tokenizer.keys,
    ]


def file_keys(name: str, model: Model, tokenizer: TokenizerKeys) -> list[Key]:
    """The keys of a VPTQ file; name: of the model."""
    return [
        *_plain_keys(name, model, tokenizer),
        *vptq_keys(tokenizer.eos_token_ids),
        ("tokenizer.huggingface.json", tokenizer.json, GGUFValueType.STRING, None),
    ]


def vptq_keys(eos_token_ids: list[int]) -> list[Key]:
    """The keys of docs/file-format.md that begin with `vptq.`."""
    keys: list[Key] = [
        ("vptq.version", FORMAT_VERSION, GGUFValueType.UINT32, None),
        ("vptq.qk_row_order", "huggingface", GGUFValueType.STRING, None),
    ]
    if eos_token_ids:  # GGUF has no empty arrays
        keys.append(("vptq.eos_token_ids", eos_token_ids, GGUFValueType.ARRAY, GGUFValueType.UINT32))
    return keys


def _check_vq(model: Model, types: dict[str, str], dequantize: str | None) -> None:
    """Refuses `vq` for a matrix that the checkpoint does not have as a VPTQ layer, and in a plain file."""
    found = {weight.name: weight.weight for weight in (model.weights[0], model.weights[-1])}
    for name, option in (("token_embd", "--embedding-type"), ("output", "--output-type")):
        if types.get(name) != VQ:
            continue
        if dequantize is not None:
            raise OptionError(f"{option} {VQ}: found --dequantize {dequantize} beside it, expected either")
        if not isinstance(found.get(name, found["token_embd"]), LayerTensors):
            raise OptionError(
                f"{option} {VQ}: found a dense matrix in the checkpoint, expected a VPTQ layer in "
                "quantization_config.config_for_layers"
            )


def _stored_type(weight: Weight) -> str:
    """Of a matrix, in the words of the options; f32, which these lack, for one that has it."""
    return VQ if isinstance(weight.weight, LayerTensors) else STORED_TYPES[weight.weight.dtype].name.lower()


def _untie(model: Model, types: dict[str, str], auto: str) -> Model:
    """Where a tied output is asked for in another type than the embedding's, gives it a weight of its own.

    auto: the type that the embedding has if no option names one.
    """
    embedding = model.weights[0]
    same = types.get("output") in (None, types.get("token_embd", auto))
    if model.weights[-1].name == "output" or same:
        return model
    return Model(
        model.architecture, model.hyperparameters, [*model.weights, Weight("output", embedding.weight)]
    )


def _weight_tensors(weight: Weight, type: str | None) -> list[OutputTensor]:
    """The tensors of a VPTQ file that hold one weight; type: if not the checkpoint's."""
    source, name = weight.weight, f"{weight.name}.weight"
    if type is None or type == VQ:
        if isinstance(source, LayerTensors):
            tensors = _layer_tensors(weight.name, source)
        else:
            tensors = [matrix(name, source, STORED_TYPES[source.dtype])]
    else:
        ggml_type, columns = OPTION_TYPES[type], source.shape[-1]
        if columns % block_size(ggml_type):
            raise OptionError(
                f"{weight.name}: {type} asked for, found rows of {columns}, expected a multiple of "
                f"{block_size(ggml_type)}"
            )
        if isinstance(source, LayerTensors):
            tensors = [decoded(name, source, ggml_type)]
        else:
            tensors = [matrix(name, source, ggml_type)]
    if weight.bias is not None:
        tensors.append(copied(f"{weight.name}.bias", weight.bias))
    return tensors


def _layer_tensors(name: str, layer: LayerTensors) -> list[OutputTensor]:
    """The tensors of one VPTQ linear layer."""
    tensors = []
    for field, info in layer_infos(name, layer.config, STORED_TYPES[layer.centroids.dtype]).items():
        if field == "indices":
            tensors.append(OutputTensor(info.name, info.type, info.shape, layer.packed_chunks))
        elif field == "perm":
            perm = layer.permutation()
            if perm is not None:
                tensors.append(made(info.name, info.type, perm.view("int16")))
        else:
            type = info.type if field == "outlier_indices" else None  # a norm has one of its own
            tensors.append(copied(info.name, getattr(layer, field), type, info.shape))
    return tensors


def layer_infos(name: str, config: LayerConfig, floats: GGMLQuantizationType) -> dict[str, TensorInfo]:
    """The tensors of one VPTQ linear layer, as docs/file-format.md lists them, by LayerTensors' names.

    floats: type of codebooks and norms. A permutation that turns out to be the identity is left out.
    """
    c = config
    i16, i32 = GGMLQuantizationType.I16, GGMLQuantizationType.I32
    parts: list[tuple[str, str, GGMLQuantizationType, tuple[int, ...]]] = [
        ("indices", "indices", i32, c.indices_shape),
        ("centroids", "centroids", floats, (c.g, c.k, c.v)),
    ]
    if c.r:
        parts.append(("res_centroids", "res_centroids", floats, (c.g, c.r, c.v)))
    if c.n0:
        parts.append(("outlier_indices", "outlier_indices", i16, (c.n_outlier_blocks, c.n0)))
        parts.append(("outlier_centroids", "outlier_centroids", floats, (c.k0, c.v0)))
    if c.perm:
        parts.append(("perm", "perm", i16, (c.in_features,)))
    if c.norm_dim is not None:
        out, size = ("out_", c.out_features) if c.norm_dim == 1 else ("", c.in_features)
        parts.append(("scale", f"{out}scale", floats, (size,)))
        parts.append(("shift", f"{out}shift", floats, (size,)))
    return {field: TensorInfo(f"{name}.vptq_{part}", type, shape) for field, part, type, shape in parts}
