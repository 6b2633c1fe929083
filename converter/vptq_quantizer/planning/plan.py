"""A plan: the configuration of every linear layer of a model, and how embedding and output are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import log2, prod
from typing import Any

from vptq_converter.config import Section
from vptq_converter.dense import OPTION_TYPES, block_size
from vptq_converter.layer import LayerConfig

from vptq_quantizer.options import MATRICES, QuantizeOptions, option_error
from vptq_runtime.errors import OptionError

VECTOR_LENS = (16, 12, 8, 6, 4, 2)  # of the runtime's kernels, the longest first
AUTO = "auto"  # type of a dense matrix: as the checkpoint has it


@dataclass(frozen=True)
class Plan:
    """linears: by module path ("model.layers.0.self_attn.q_proj"), in the file's order.

    embedding_type, output_type: what vptq-convert makes of these matrices, in its words. matrices: those that
    are VPTQ layers instead, by module path ("model.embed_tokens", "lm_head").
    """

    linears: Mapping[str, LayerConfig]
    embedding_type: str = AUTO
    output_type: str = AUTO
    matrices: Mapping[str, LayerConfig] = field(default_factory=dict)

    def layer(self, n: int) -> dict[str, LayerConfig]:
        """Decoder layer n's linear layers by their path in it."""
        prefix = f"model.layers.{n}."
        return {
            module.removeprefix(prefix): config
            for module, config in self.linears.items()
            if module.startswith(prefix)
        }

    @property
    def n_weights(self) -> int:
        return sum(config.out_features * config.in_features for config in self.linears.values())

    @property
    def bits_per_weight(self) -> float:
        """Of all linear layers, all of their tensors but biases."""
        return sum(map(stored_bits, self.linears.values())) / self.n_weights

    @property
    def vector_lens(self) -> set[int]:
        """Of all VPTQ layers, outliers' too."""
        configs = [*self.linears.values(), *self.matrices.values()]
        return {c.v for c in configs} | {c.v0 for c in configs if c.n0}

    def quantization_config(self, biases: set[str]) -> dict[str, Any]:
        """What config.json says of it, and a run's file; biases: the modules that have one."""
        types = {name: getattr(self, name) for name in MATRICES}
        return {
            "config_for_layers": {
                module: config_entry(config, module in biases)
                for module, config in {**self.linears, **self.matrices}.items()
            },
            **{name: type for name, type in types.items() if type != AUTO},
        }

    def with_matrices(self, options: QuantizeOptions, shapes: Mapping[str, tuple[int, ...]]) -> Plan:
        """The plan with embedding and output matrix as the options name them.

        shapes: (n_vocab, n_embd) of each by module path, "lm_head" only where it is not the embedding. Raises
        OptionError for what does not suit the model.
        """
        types = {name: getattr(self, name) for name in MATRICES}
        matrices: dict[str, LayerConfig] = {}
        for name, module in MATRICES.items():
            asked = getattr(options, name)
            if asked is None:
                continue
            if module not in shapes:
                raise option_error(name, asked, "none: the model's embedding is its output matrix, too")
            n_vocab, n_embd = shapes[module]
            config = options.matrix_config(name, n_vocab, n_embd)
            if config is not None:
                matrices[module] = config
            elif n_embd % (block := block_size(OPTION_TYPES[asked])):
                raise option_error(name, asked, f"rows of a multiple of {block} weights, not of {n_embd}")
            else:
                types[name] = asked
        return replace(self, **types, matrices=matrices)

    @classmethod
    def parse(cls, entry: Section, linears: Mapping[str, tuple[int, int]], biases: set[str]) -> Plan:
        """What quantization_config has written of a plan without matrices, for linear layers (out_features,
        in_features) by module path. Raises FileError for a plan of other layers, or one that is none."""
        layers = entry.section("config_for_layers")
        if layers.values.keys() != linears.keys():
            raise entry.error("config_for_layers", f"{len(layers.values)} layers", "those of the model")
        configs = {
            module: LayerConfig.parse(layers.section(module), *shape, module in biases)
            for module, shape in linears.items()
        }
        types = {name: entry.values.get(name, AUTO) for name in MATRICES}
        for name, type in types.items():
            if not isinstance(type, str):
                raise entry.error(name, type, "the name of a type")
        return cls(configs, **types)


def config_entry(config: LayerConfig, bias: bool) -> dict[str, Any]:
    """The layer's entry in `quantization_config`; -1 means none."""
    c = config
    return {
        "in_features": c.in_features,
        "out_features": c.out_features,
        "vector_lens": [c.v0 or -1, c.v],
        "num_centroids": [c.k0 or -1, c.k],
        "num_res_centroids": [-1, c.r or -1],
        "group_num": c.g,
        "group_size": c.group_size,
        "outlier_size": c.n0,
        "indices_as_float": False,
        "enable_norm": c.norm_dim is not None,
        "enable_perm": c.perm,
        "is_indice_packed": True,
        "bias": bias,
        "vector_quant_dim": "out",
    }


def stored_bits(config: LayerConfig) -> int:
    """Bits of all tensors of a quantised layer but its bias; numbers that are no indices have 16."""
    c = config
    numbers = c.g * (c.k + c.r) * c.v + c.n0 * c.n_outlier_blocks + c.k0 * c.v0
    numbers += c.in_features * c.perm
    if c.norm_dim is not None:
        numbers += 2 * (c.in_features, c.out_features)[c.norm_dim]
    return 32 * prod(c.indices_shape) + 16 * numbers


def uniform_plan(options: QuantizeOptions, n_layers: int, shapes: Mapping[str, tuple[int, int]]) -> Plan:
    """The same options for every linear layer; shapes: (out_features, in_features) by path in a layer.

    Raises OptionError where a layer is too small for them; it says what to type instead.
    """
    try:
        # The smallest first: an error about a size names one that suits all.
        smallest_first = sorted(shapes, key=lambda name: prod(shapes[name]))
        configs = {name: options.layer_config(name, *shapes[name]) for name in smallest_first}
    except OptionError as error:
        raise OptionError(f"{error}{advice(options, shapes)}") from error
    return Plan({f"model.layers.{n}.{name}": configs[name] for n in range(n_layers) for name in shapes})


def advice(options: QuantizeOptions, shapes: Mapping[str, tuple[int, int]]) -> str:
    """Options of about as many bits that do fit the model, as they are typed; nothing where none do."""
    assert options.vector_len is not None and options.centroids is not None
    index_bits = log2(options.centroids) + (log2(options.res_centroids) if options.res_centroids else 0)
    bits = index_bits / options.vector_len
    n_weights = sum(map(prod, shapes.values()))
    for v in VECTOR_LENS:
        k = 1 << max(1, min(16, round(bits * v)))
        codebooks = 16 * k * v * len(shapes)
        fits = all(out // v * width >= k for out, width in shapes.values())
        if fits and codebooks <= n_weights * bits / 8:
            return f"; for this model: --vector-len {v} --centroids {k}, or --target-bits {bits:g}"
    return ""
