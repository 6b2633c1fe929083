"""One linear layer: the tensors say what was meant, each step helps, what carries no weight costs nothing."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from linear_problems import problem
from torch import Tensor
from vptq_converter.layer import VPTQLinear
from vptq_quantizer import QuantizeOptions
from vptq_quantizer.finetune import finetune_linear
from vptq_quantizer.layer_quantizer import Problem, quantize_linear
from vptq_quantizer.quantized_linear import QuantizedLinear

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


def by_the_converter(layer: QuantizedLinear, dtype: torch.dtype = torch.float16) -> Tensor:
    """The weight that the checkpoint's tensors stand for, by the converter's reference."""
    c, t = layer.config, layer.tensors(dtype)

    def floats(name: str, *shape: int) -> Any:
        return t[name].float().numpy().reshape(shape) if name in t else None

    linear = VPTQLinear(
        in_features=c.in_features,
        out_features=c.out_features,
        indices=t["indices"].numpy(),
        centroids=floats("centroids.weight", c.g, c.k, c.v),
        res_centroids=floats("res_centroids.weight", c.g, c.r, c.v),
        outlier_indices=t["outlier_indices"][0].numpy().view(np.uint16) if c.n0 else None,
        outlier_centroids=floats("outlier_centroids.weight", c.k0, c.v0),
        perm=t["perm"].numpy().view(np.uint16) if "perm" in t else None,
        scale=floats("weight_scale", c.in_features),
        shift=floats("weight_bias", c.in_features),
    )
    return torch.from_numpy(linear.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_tensors_are_the_layer(name: str, dtype: torch.dtype) -> None:
    """All numbers of the layer are of the stored type already: what the sweep saw is what a reader gets."""
    p = problem(62, 96)
    layer, _ = quantise(p, replace(OPTIONS[name], finetune=True), dtype)
    torch.testing.assert_close(by_the_converter(layer, dtype), layer.weight(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", OPTIONS)
def test_from_tensors(name: str) -> None:
    layer, _ = quantise(problem(62, 96), OPTIONS[name])
    again = QuantizedLinear.from_tensors(layer.config, layer.tensors(torch.float16))
    torch.testing.assert_close(again.weight(), layer.weight(), rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIONS)
def test_each_step_helps(name: str) -> None:
    _, errors = quantise(problem(62, 96), replace(OPTIONS[name], finetune=True))
    assert list(errors) == ["k-means", "second order", "fine-tuning"]
    assert errors["second order"] < 0.8 * errors["k-means"]
    assert errors["fine-tuning"] < 0.97 * errors["second order"]


def test_the_proxy_error_is_the_outputs_error() -> None:
    """tr(D H D^T) / tr(W H W^T) is |D X|^2 / |W X|^2 of the inputs X that H is made of."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 500, generator=generator, dtype=torch.float64)
    weight = torch.randn(20, 48, generator=generator)
    p = Problem.of(weight, (2 * x @ x.T / 500).float(), 0.01)
    quantised = weight + 0.1 * torch.randn(20, 48, generator=generator)
    expected = ((weight - quantised).double() @ x).square().sum() / (weight.double() @ x).square().sum()
    assert p.relative_error(quantised) == pytest.approx(float(expected), rel=1e-4)


def test_hessian_weights_serve_the_hessian() -> None:
    """Without the second order, columns that weigh more come out closer than without the weights."""
    p = problem(64, 96)
    by = {
        weights: quantise(p, replace(PLAIN, hessian_weights=weights, second_order=False))[1]["k-means"]
        for weights in (True, False)
    }
    assert by[True] < 0.9 * by[False]


def test_outliers_are_the_columns_of_the_largest_h_ii() -> None:
    p = problem(64, 96)
    options = replace(PLAIN, outliers=4, outlier_vector_len=2, outlier_centroids=32, normalize=False)
    layer, _ = quantise(p, options)
    largest = p.damped.diagonal().argsort(descending=True)[:4]
    assert layer.config.n0 == 4
    assert layer.tensors(torch.float16)["perm"][:4].tolist() == largest.tolist()


def test_what_is_stored_without_permutation_stands_in_the_order_of_the_input() -> None:
    layer, _ = quantise(problem(64, 96), PLAIN)
    assert "perm" not in layer.tensors(torch.float16)
    assert not torch.equal(layer.perm, torch.arange(96))  # the sweep's order is by h_ii all the same


def test_a_dead_input_and_a_constant_column() -> None:
    p = problem(64, 96)
    hessian = p.damped.clone()
    hessian[5], hessian[:, 5] = 0, 0
    weight = p.weight.clone()
    weight[:, 7] = 0.25
    layer, errors = quantise(Problem.of(weight, hessian, 0.01), replace(PLAIN, finetune=True))
    assert layer.weight().isfinite().all()
    assert errors["fine-tuning"] < errors["k-means"]


def test_no_input_at_all() -> None:
    layer, errors = quantise(Problem.of(problem(64, 96).weight, torch.zeros(96, 96), 0.01), PLAIN)
    assert layer.weight().isfinite().all()
    assert set(errors.values()) == {0.0}


def test_same_seed_same_layer() -> None:
    p = problem(62, 96)
    first, second = (quantise(p, OPTIONS["residual"])[0].tensors(torch.float16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
