"""Linear layers to quantise: random weights, and inputs that depend on each other as real ones do."""

from dataclasses import replace

import torch
from torch import Tensor
from vptq_quantizer import QuantizeOptions
from vptq_quantizer.layers.finetune import finetune_linear
from vptq_quantizer.layers.layer_quantizer import Problem, quantize_linear
from vptq_quantizer.layers.quantized_linear import QuantizedLinear

PLAIN = QuantizeOptions(vector_len=4, centroids=32)
OPTIONS = {
    "plain": PLAIN,
    "residual": replace(PLAIN, res_centroids=16),
    "residual-larger-than-outliers": replace(PLAIN, res_centroids=32, outliers=5, outlier_centroids=8),
    "groups": replace(PLAIN, groups=3, res_centroids=4),
    "outliers": replace(PLAIN, outliers=4, outlier_vector_len=3, outlier_centroids=16, groups=2),
    "padded": replace(PLAIN, vector_len=7),
    "no-norm": replace(PLAIN, normalize=False),
}


def hessian(in_features: int, seed: int = 0) -> Tensor:
    """2 X X^T / n of inputs with a few strong common directions and channels of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(in_features, 8, generator=generator)
    x = mix @ torch.randn(8, 4 * in_features, generator=generator)
    x += torch.randn(in_features, 4 * in_features, generator=generator)
    x *= torch.exp(torch.randn(in_features, 1, generator=generator))
    return 2 * x @ x.T / x.shape[1]


def problem(out_features: int, in_features: int, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed + 1000)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.1 + 0.02
    return Problem.of(weight, hessian(in_features, seed), 0.01)


def quantise(
    problem: Problem, options: QuantizeOptions, dtype: torch.dtype = torch.float16
) -> tuple[QuantizedLinear, dict[str, float]]:
    """The layer, and the relative proxy error after each step."""
    errors: dict[str, float] = {}

    def step(name: str, layer: QuantizedLinear) -> None:
        errors[name] = problem.relative_error(layer.weight())

    config = options.layer_config("layer", *problem.weight.shape)
    generator = torch.Generator().manual_seed(options.seed)
    layer = quantize_linear(problem, config, options, dtype, generator, step)
    if options.finetune:
        layer = finetune_linear(problem, layer, dtype, step)
    return layer, errors
