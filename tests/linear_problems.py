"""Linear layers to quantise: random weights, and inputs that depend on each other as real ones do."""

import torch
from torch import Tensor
from vptq_quantizer.layers.layer_quantizer import Problem


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
