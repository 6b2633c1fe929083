"""A plan for a size: candidates for each matrix, what each would cost, the best of them together.

The loss of a candidate is the KL divergence that sensitivity.py predicts for it, with the relative error
that distortion.py measures: on one decoder layer, the middle one, for each kind of matrix. Without
calibration text there are no gradients; a matrix then counts by its number of weights, and no divergence
is predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from vptq_converter.layer import MAX_CENTROIDS, LayerConfig

from vptq_quantizer.calibration.text import Calibration
from vptq_quantizer.dense_model import DenseModel, linears
from vptq_quantizer.options import DEFAULT_BITS, QuantizeOptions
from vptq_quantizer.planning.allocation import Choice, allocate, least_size
from vptq_quantizer.planning.distortion import VECTORS_A_CENTROID, Distortion, measure_distortion
from vptq_quantizer.planning.file_size import FILE_NAMES, FileSizes, in_words
from vptq_quantizer.planning.matrices import matrix_losses
from vptq_quantizer.planning.plan import AUTO, VECTOR_LENS, Plan, stored_bits
from vptq_quantizer.planning.sensitivity import Columns, measure_sensitivity, tokens_needed
from vptq_runtime.errors import OptionError

LEAST_RATE, MOST_RATE = 0.5, 8.5  # bits of indices a weight, of candidates
MOST_INDEX_BITS = 32  # of a packed index, residual included


@dataclass(frozen=True)
class Candidate(Choice):
    """stored: how; of the embedding and the output matrix it is the name of a type. size: bits, or bytes of
    the file where that is to have a size."""

    stored: LayerConfig | str


@dataclass(frozen=True)
class Costs:
    """What the choice is made by.

    linears: candidates by module path; matrices: by name in the file, empty where they stay as they are;
    sizes: of a file, where that is to have a size; are_divergences: whether losses are KL divergences.
    """

    linears: dict[str, list[Candidate]]
    matrices: dict[str, list[Candidate]]
    sizes: FileSizes | None
    are_divergences: bool

    def plan(self, options: QuantizeOptions) -> tuple[Plan, float | None]:
        """The best plan for options.fit or target_bits, and the KL divergence to expect of it, in nats a
        token (None: not known). Raises OptionError where there is none that small."""
        choices = [*self.linears.values(), *self.matrices.values()]
        budget = self._budget(options, least_size(choices))
        chosen = allocate(choices, budget)
        stored = dict(zip((*self.linears, *self.matrices), (choice.stored for choice in chosen), strict=True))
        embedding_type, output_type = (str(stored.pop(name, AUTO)) for name in FILE_NAMES.values())
        configs = {module: config for module, config in stored.items() if isinstance(config, LayerConfig)}
        loss = sum(choice.loss for choice in chosen)
        return Plan(configs, embedding_type, output_type), loss if self.are_divergences else None

    def _budget(self, options: QuantizeOptions, smallest: int) -> int:
        if self.sizes is not None:
            assert options.fit is not None
            budget, least = options.fit - self.sizes.rest(), smallest + self.sizes.rest()
            if smallest > budget:
                found, expected = in_words(options.fit), in_words(least)
                raise OptionError(f"--fit: found {found}, expected at least {expected} for this model")
            return budget
        target_bits = options.target_bits or DEFAULT_BITS
        configs = (each[0].stored for each in self.linears.values())
        n_weights = sum(c.out_features * c.in_features for c in configs if isinstance(c, LayerConfig))
        if smallest > int(target_bits * n_weights):
            bits = np.ceil(smallest / n_weights * 1000) / 1000
            raise OptionError(
                f"--target-bits: found {target_bits:g}, expected at least {bits:g} for this model"
            )
        return int(target_bits * n_weights)


def measure_costs(
    dense: DenseModel,
    options: QuantizeOptions,
    text: Calibration | None,
    sizes: FileSizes | None = None,
    show: Callable[[str], object] = lambda what: None,
) -> Costs:
    """Measures what each candidate of each matrix would cost; with sizes, those of embedding and output, too.
    Raises OptionError where a matrix is too small for any."""
    columns: dict[str, Columns] = {}
    sensitivity = None
    if text is not None:
        needed = -(-tokens_needed(dense) // text.windows.shape[1])
        sensitivity = measure_sensitivity(
            dense, text.windows[:needed], options.damping, options.second_order, options.seed, show
        )
        columns = sensitivity.linears
    middle = dense.n_layers // 2
    curves = {}
    for name, linear in linears(dense.load_layer(middle)).items():
        at = columns.get(f"model.layers.{middle}.{name}") or _alike(linear.weight)
        weights = at.diagonal if options.hessian_weights else torch.ones_like(at.diagonal)
        generator = torch.Generator().manual_seed(options.seed)
        curves[name] = measure_distortion(
            linear.weight, at.cost, weights, generator,
            lambda at, name=name: show(f"{name}, {at}"),  # type: ignore[misc]
        )  # fmt: skip
    candidates: dict[str, list[Candidate]] = {}
    for n in range(dense.n_layers):
        show(f"candidates of layer {n}")
        for name, weight in _weights(dense, n, bool(columns)):
            module, shape = f"model.layers.{n}.{name}", dense.linear_shapes()[name]
            whole = float(shape[0] * shape[1])
            if weight is not None:
                whole = float((weight.square() * columns[module].cost).sum())
            candidates[module] = [
                Candidate(sizes.linear(module, config) if sizes else stored_bits(config), loss, config)
                for config, loss in _candidates(shape, curves[name], whole, options.normalize)
            ]
            if not candidates[module]:
                raise OptionError(
                    f"{module}: found {shape[0]} x {shape[1]} weights, too few for a plan, expected "
                    "--vector-len and --centroids"
                )
    matrices = {}
    if sizes is not None:
        matrices = {
            name: [Candidate(sizes.matrix(name, type), loss, type) for type, loss in losses.items()]
            for name, losses in matrix_losses(dense, sensitivity, sizes.types(), show).items()
        }
    return Costs(candidates, matrices, sizes, bool(columns))


def _alike(weight: Tensor) -> Columns:
    ones = torch.ones(weight.shape[1], device=weight.device)
    return Columns(ones, ones)


def _weights(dense: DenseModel, n: int, needed: bool) -> Iterator[tuple[str, Tensor | None]]:
    """The weights of decoder layer n's linear layers, by path in it."""
    if not needed:
        yield from dict.fromkeys(dense.linear_shapes()).items()
        return
    for name, linear in linears(dense.load_layer(n)).items():
        yield name, linear.weight


def _candidates(
    shape: tuple[int, int], distortion: Distortion, whole: float, normalize: bool
) -> Iterator[tuple[LayerConfig, float]]:
    """With what each loses; whole: what is lost with the matrix."""
    out_features, in_features = shape
    powers = [1 << n for n in range(2, MAX_CENTROIDS.bit_length())]
    for v in VECTOR_LENS:
        n_vectors = out_features // v * in_features
        for k in powers:
            for r in (0, *powers):
                bits = k.bit_length() - 1 + max(0, r.bit_length() - 1)
                rate = bits / v
                # Rates out of range, more centroids than vectors can place, indices that are too long.
                if r > k or not LEAST_RATE <= rate <= MOST_RATE or bits > MOST_INDEX_BITS:
                    continue
                if (k + r) * VECTORS_A_CENTROID > n_vectors:
                    continue
                plain = LayerConfig(in_features, out_features, v, k, r, 1, 0, 0, 0, True, False, None)
                for config in (plain, *([replace(plain, norm_dim=0)] if normalize else [])):
                    error = distortion.error(config)
                    if error is not None:
                        yield config, whole * error
