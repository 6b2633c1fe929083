"""How large the GGUF file is that vptq-convert makes of a plan: to the byte, before anything is quantised."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gguf import GGMLQuantizationType
from vptq_converter.architectures import EMBEDDING, LINEARS, OUTPUT, Model, Weight
from vptq_converter.checkpoint import Checkpoint
from vptq_converter.convert import file_keys, layer_infos
from vptq_converter.dense import OPTION_TYPES, block_size
from vptq_converter.gguf_writer import ALIGNMENT, TensorInfo, keys_bytes, padded
from vptq_converter.layer import LayerConfig
from vptq_converter.tokenizer import read_tokenizer

from vptq_quantizer.planning.plan import AUTO, Plan

SIXTEEN_BITS = GGMLQuantizationType.F16  # or bfloat16: of the same size
FILE_NAMES = {EMBEDDING: "token_embd", OUTPUT: "output"}  # of the matrices, by module path
MATRIX_TYPES = (AUTO, "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # AUTO: 16 bits, as the checkpoint has them


@dataclass(frozen=True)
class FileSizes:
    """What parts of the file take, in bytes.

    keys_bytes: the header and all metadata; matrices: the shapes of the embedding and of the output matrix
    by their names in the file, "output" only where it is not the embedding; others: all that is stored as
    the checkpoint has it, whatever the plan.
    """

    keys_bytes: int
    matrices: dict[str, tuple[int, ...]]
    others: list[TensorInfo]

    @classmethod
    def of(cls, checkpoint: Checkpoint, model: Model, name: str) -> FileSizes:
        """For a dense checkpoint and its model; name: what the new one is called (OUT_DIR's name)."""
        keys = file_keys(name, model, read_tokenizer(checkpoint, model.hyperparameters.n_vocab))
        others = [info for weight in model.weights for info in _others(weight)]
        freqs = model.hyperparameters.rope_freqs
        if freqs is not None:
            others.append(TensorInfo("rope_freqs.weight", GGMLQuantizationType.F32, freqs.shape))
        matrices = {w.name: w.weight.shape for w in model.weights if w.name in FILE_NAMES.values()}
        return cls(keys_bytes(model.architecture.gguf_name, keys), matrices, others)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the embedding and the output matrix, by module path."""
        return {module: self.matrices[name] for module, name in FILE_NAMES.items() if name in self.matrices}

    def linear(self, module: str, config: LayerConfig) -> int:
        """Of the linear layer at that module path, without its bias; at most, as with `matrix`."""
        return _most_bytes(_linear(module, config))

    def matrix(self, name: str, type: str) -> int:
        """Of the embedding or output matrix."""
        return _most_bytes([self._matrix(name, type)])

    def rest(self) -> int:
        """Of all but linear layers and matrices; with those, up to ALIGNMENT bytes more than the file."""
        return self.keys_bytes + _most_bytes(self.others) + ALIGNMENT - 1

    def types(self) -> list[str]:
        """The MATRIX_TYPES whose blocks fit the rows of the embedding and the output matrix."""
        n_embd = self.matrices["token_embd"][1]
        return [type for type in MATRIX_TYPES if n_embd % block_size(_stored(type)) == 0]

    def file(self, plan: Plan) -> int:
        """The whole file."""
        types = {"token_embd": plan.embedding_type, "output": plan.output_type}
        scalars = self.matrices.keys() - {FILE_NAMES[module] for module in plan.matrices}
        infos = [*self.others, *(self._matrix(name, types[name]) for name in scalars)]
        layers = {**plan.linears, **plan.matrices}
        infos += [info for item in layers.items() for info in _linear(*item)]
        directory = self.keys_bytes + sum(info.entry_bytes for info in infos)
        return padded(directory) + sum(padded(info.nbytes) for info in infos)

    def _matrix(self, name: str, type: str) -> TensorInfo:
        return TensorInfo(f"{name}.weight", _stored(type), self.matrices[name])


def in_words(n_bytes: int) -> str:
    """A size in kB, MB or GB, rounded up to two places."""
    unit, name = next(
        (u, n) for u, n in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")) if n_bytes >= u or u == 1000
    )
    return f"{-(-100 * n_bytes // unit) / 100:g} {name}"


def _stored(type: str) -> GGMLQuantizationType:
    return SIXTEEN_BITS if type == AUTO else OPTION_TYPES[type]


def _others(weight: Weight) -> list[TensorInfo]:
    """What is stored of a weight whatever the plan: a norm, a bias."""
    infos = []
    shape = weight.weight.shape
    if len(shape) == 1:
        infos.append(TensorInfo(f"{weight.name}.weight", SIXTEEN_BITS, shape))
    if weight.bias is not None:
        infos.append(TensorInfo(f"{weight.name}.bias", SIXTEEN_BITS, weight.bias.shape))
    return infos


def _linear(module: str, config: LayerConfig) -> Iterable[TensorInfo]:
    name = FILE_NAMES.get(module)
    if name is None:
        _, _, n, path = module.split(".", 3)
        name = f"blk.{n}.{LINEARS[path]}"
    return layer_infos(name, config, SIXTEEN_BITS).values()


def _most_bytes(infos: Iterable[TensorInfo]) -> int:
    return sum(info.entry_bytes + padded(info.nbytes) for info in infos)
