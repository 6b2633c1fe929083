"""What a model is quantised to and how: the options of `vptq-quantize`, and what they mean for one layer."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from math import ceil

from vptq_converter.architectures import EMBEDDING, OUTPUT
from vptq_converter.dense import OPTION_TYPES
from vptq_converter.layer import MAX_CENTROIDS, MAX_VECTOR_LENGTH, LayerConfig

from vptq_runtime.errors import OptionError

DEFAULT_BITS = 2.0  # per weight, where neither v and k nor a size are given
DEFAULT_SEQ_LEN = 2048
MATRICES = {"embedding_type": EMBEDDING, "output_type": OUTPUT}  # modules outside of decoder layers
CONFIGURATION = re.compile(r"v(\d{1,9})-k(\d{1,9})-(\d{1,9})", re.ASCII)  # of a VPTQ layer: v, k and r
SCALAR_TYPES = tuple(type for type in OPTION_TYPES if type != "bf16")


@dataclass(frozen=True)
class QuantizeOptions:
    """Raises OptionError, which names the option as the command has it, for a value out of range."""

    vector_len: int | None = None  # v: outputs of one input column that share an index
    centroids: int | None = None  # k; without v and k each matrix gets its own, by target_bits
    res_centroids: int = 0  # r, 0: no residual
    groups: int = 1  # g: codebooks of a layer
    outliers: float = 0.0  # percent of the input columns, at least; so many that the rest makes equal groups
    outlier_vector_len: int = 4  # v0
    outlier_centroids: int = 4096  # k0
    target_bits: float | None = None  # per weight of all linear layers, all that is stored counted; None:
    # DEFAULT_BITS, without v and k
    fit: int | None = None  # bytes of the GGUF file, at most: embedding and output matrix are chosen, too
    # How these matrices are stored: a type of vptq-convert's, or "v4-k256-0", as a VPTQ layer of that v, k
    # and r; None: in 16 bits, or as `fit` has chosen.
    embedding_type: str | None = None
    output_type: str | None = None  # None, too, where the embedding is the output matrix
    damping: float = 0.01  # times the Hessian's mean diagonal, added to its diagonal
    normalize: bool = True  # input columns to mean 0 and variance 1
    hessian_weights: bool = True  # k-means weighs each column by h_ii; False: all alike
    second_order: bool = True  # a column's error moves into the columns after it; False: nearest centroids
    sequential: bool = False  # Hessians of what the quantised layers before give; False: of the dense model's
    finetune: bool = False  # layer by layer: codebooks and norms, and indices again
    end_to_end: int = 0  # training steps of the whole model's codebooks, norms and indices; 0: none
    samples: int = 128  # windows of calibration text
    seq_len: int | None = None  # tokens of a window; None: DEFAULT_SEQ_LEN, or the model's context
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("vector_len", 1, MAX_VECTOR_LENGTH),
            ("outlier_vector_len", 1, MAX_VECTOR_LENGTH),
            ("groups", 1, MAX_CENTROIDS),
            ("samples", 1, 2**20),
            ("seq_len", 2, 2**20),
            ("end_to_end", 0, 2**31 - 1),
            ("seed", 0, 2**31 - 1),
        ):
            value = getattr(self, name)
            if value is None and name in ("vector_len", "seq_len"):
                continue
            if type(value) is not int or not low <= value <= high:
                raise option_error(name, value, f"an integer from {low} to {high}")
        for name, least in (("centroids", 2), ("res_centroids", 0), ("outlier_centroids", 2)):
            value = getattr(self, name)
            if value is None and name == "centroids":
                continue
            power = type(value) is int and 2 <= value <= MAX_CENTROIDS and value & (value - 1) == 0
            if not power and not (value == least == 0):
                none = "0 (none) or " if least == 0 else ""
                raise option_error(name, value, f"{none}a power of two from 2 to {MAX_CENTROIDS}")
        if (
            self.centroids is not None and self.res_centroids > self.centroids
        ):  # its packed indices are masked with the main index's width
            raise option_error(
                "res_centroids",
                self.res_centroids,
                f"at most --centroids ({self.centroids}): the published vptq package reads no larger ones",
            )
        if type(self.outliers) not in (int, float) or not 0 <= self.outliers <= 50:
            raise option_error("outliers", self.outliers, "a percentage from 0 to 50")
        if type(self.damping) not in (int, float) or not 0 < self.damping <= 10:
            raise option_error("damping", self.damping, "a number above 0, at most 10")
        self._check_target()
        for name in MATRICES:
            self._check_matrix(name)

    def _check_target(self) -> None:
        """Either v and k, or a size for which they are chosen."""
        if self.target_bits is not None and (
            type(self.target_bits) not in (int, float) or not 0 < self.target_bits <= 16
        ):
            raise option_error("target_bits", self.target_bits, "bits per weight, above 0 and at most 16")
        if self.fit is not None and (type(self.fit) is not int or not 0 < self.fit < 2**63):
            raise option_error("fit", self.fit, "bytes of a file, above 0")
        if self.fit is not None and self.target_bits is not None:
            raise OptionError("--fit: found --target-bits beside it, expected either")
        if (self.vector_len is None) != (self.centroids is None):
            given, missing = ("vector_len", "centroids")[:: 1 if self.centroids is None else -1]
            raise option_error(missing, "none", f"one beside {_spelled(given)}, or neither of them")
        if self.by_hand:
            for name in ("target_bits", "fit"):
                if getattr(self, name) is not None:
                    raise OptionError(
                        f"{_spelled(name)}: found --vector-len and --centroids beside it, expected either"
                    )
            return
        for name, none in (("res_centroids", 0), ("groups", 1), ("outliers", 0)):
            if getattr(self, name) != none:
                raise option_error(
                    name,
                    getattr(self, name),
                    "--vector-len and --centroids with it: a plan chooses for itself",
                )

    def _check_matrix(self, name: str) -> None:
        """The type of the embedding or the output matrix."""
        value = getattr(self, name)
        if value is None:
            return
        if self.fit is not None:
            raise OptionError(f"--fit: found {_spelled(name)} beside it, expected either")
        if not isinstance(value, str) or (value not in SCALAR_TYPES and self._of_matrix(name, value) is None):
            raise option_error(name, value, f"{', '.join(SCALAR_TYPES)}, or vV-kK-R, as v4-k256-0")

    def _of_matrix(self, name: str, value: str) -> QuantizeOptions | None:
        """The options for a matrix that is to be a VPTQ layer, as `value` says; None for any other type."""
        match = CONFIGURATION.fullmatch(value)
        if match is None:
            return None
        v, k, r = map(int, match.groups())
        try:
            return replace(
                self, vector_len=v, centroids=k, res_centroids=r, groups=1, outliers=0.0,
                target_bits=None, fit=None, embedding_type=None, output_type=None,
            )  # fmt: skip
        except OptionError as error:
            raise OptionError(f"{_spelled(name)} {value}: {error}") from error

    def matrix_config(self, name: str, n_vocab: int, n_embd: int) -> LayerConfig | None:
        """How a matrix is quantised, by its name in MATRICES; None where it is to be no VPTQ layer. Raises
        OptionError where it is too small."""
        value = getattr(self, name)
        options = self._of_matrix(name, value) if value is not None else None
        if options is None:
            return None
        try:
            return options.layer_config(MATRICES[name], n_vocab, n_embd)
        except OptionError as error:
            raise OptionError(f"{_spelled(name)} {value}: {error}") from error

    @property
    def by_hand(self) -> bool:
        """Whether v and k are given; otherwise a plan chooses them for each matrix."""
        return self.vector_len is not None and self.centroids is not None

    def for_model(self, n_ctx_train: int) -> QuantizeOptions:
        """Itself with the window that a model of this context gets where none is given."""
        if self.seq_len is not None:
            return self
        return replace(self, seq_len=max(2, min(DEFAULT_SEQ_LEN, n_ctx_train)))

    def layer_config(self, module: str, out_features: int, in_features: int) -> LayerConfig:
        """How one linear layer of that size is quantised; raises OptionError where it is too small for it."""
        g, n0 = self.groups, 0
        if self.outliers:
            n0 = ceil(Fraction(str(self.outliers)) * in_features / 100)  # exact: 7 % of 100 are 7
            n0 += (in_features - n0) % g
        if n0 >= in_features or (in_features - n0) % g:
            raise OptionError(
                f"{module}: {in_features} input columns, {n0} of them outliers: found --groups {g}, "
                "expected a divisor of the rest"
            )
        if self.vector_len is None or self.centroids is None:
            raise option_error("centroids", "none", "--vector-len and --centroids")
        perm = g > 1 or n0 > 0  # else the order of the columns is nobody's business but the sweep's
        if perm and in_features > MAX_CENTROIDS:
            raise OptionError(
                f"{module}: {in_features} input columns: found --groups {g} and {n0} outliers, expected "
                f"--groups 1 and none: the format numbers at most {MAX_CENTROIDS} columns"
            )
        config = LayerConfig(
            in_features=in_features, out_features=out_features,
            v=self.vector_len, k=self.centroids, r=self.res_centroids, g=g,
            n0=n0, v0=self.outlier_vector_len if n0 else 0, k0=self.outlier_centroids if n0 else 0,
            packed=True,
            perm=perm,
            norm_dim=0 if self.normalize else None,
        )  # fmt: skip
        self._check_counts(module, config)
        return config

    def _check_counts(self, module: str, c: LayerConfig) -> None:
        """Refuses more centroids than there are vectors, not counting those that reach past the last row."""
        parts: list[tuple[str, int, int, tuple[str, ...]]] = [
            ("vector_len", c.v, c.group_size, ("centroids", "res_centroids"))
        ]
        if c.n0:
            parts.append(("outlier_vector_len", c.v0, c.n0, ("outlier_centroids",)))
        for length, v, columns, counts in parts:
            n_vectors = c.out_features // v * columns
            if n_vectors < 2:
                raise option_error(length, v, f"at most {c.out_features}, the output rows of {module}")
            for name in counts:
                if getattr(self, name) > n_vectors:
                    largest = 1 << (n_vectors.bit_length() - 1)
                    raise option_error(
                        name,
                        getattr(self, name),
                        f"at most {largest}: a codebook of {module} stands for {n_vectors} vectors",
                    )


def option_error(name: str, found: object, expected: str) -> OptionError:
    """An error about the option that the command spells --name."""
    return OptionError(f"{_spelled(name)}: found {found}, expected {expected}")


def _spelled(name: str) -> str:
    return f"--{name.replace('_', '-')}"


OPTION_NAMES = tuple(field.name for field in fields(QuantizeOptions))
