"""One linear layer: the tensors say what was meant, each step helps, what carries no weight costs nothing."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from linear_problems import OPTIONS, PLAIN, hessian, problem, quantise
from torch import Tensor
from vptq_converter.layer import VPTQLinear
from vptq_quantizer.layers.finetune import finetune_linear
from vptq_quantizer.layers.layer_quantizer import Problem, quantize_linear
from vptq_quantizer.layers.quantized_linear import QuantizedLinear

from vptq_runtime import FileError, OptionError


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fine_tuning_where_most_columns_are_constant(dtype: torch.dtype) -> None:
    """The best scale for them is 0, which no column can be divided by."""
    weight = problem(64, 96).weight
    weight[:, :95] = 0.25
    layer, errors = quantise(Problem.of(weight, hessian(96), 0.01), replace(PLAIN, finetune=True), dtype)
    assert layer.scale is not None and bool((layer.scale.abs() > 0).all())
    assert errors["fine-tuning"] <= errors["second order"]


def test_no_input_at_all() -> None:
    """All weights count alike then, and are kept as well as by a Hessian of ones."""
    weight = problem(64, 96).weight
    layers = [quantise(Problem.of(weight, h, 0.01), PLAIN)[0] for h in (torch.zeros(96, 96), torch.eye(96))]
    without, alike = (float((weight - layer.weight()).norm() / weight.norm()) for layer in layers)
    assert without == pytest.approx(alike, rel=0.02)
    assert without < 0.6


def test_what_is_being_done_is_said() -> None:
    """A matrix of a large model takes minutes."""
    p, options, told = problem(62, 200), OPTIONS["residual"], list[str]()
    config, generator = options.layer_config("layer", 62, 200), torch.Generator().manual_seed(0)
    layer = quantize_linear(p, config, options, torch.float16, generator, lambda *_: None, told.append)
    finetune_linear(p, layer, torch.float16, lambda *_: None, told.append)
    n_iterations, n_residual = (
        sum(what.startswith(name) for what in told) for name in ("k-means ", "residual k-means ")
    )
    assert 1 < n_iterations <= 25 and 1 < n_residual <= 25  # it ends where nothing changes any more
    rounds = [f"fine-tuning {n}/3, {what}" for n in (1, 2, 3) for what in ("centroids", "indices")]
    assert told == [
        *(f"k-means {n + 1}/25" for n in range(n_iterations)),
        *(f"residual k-means {n + 1}/25" for n in range(n_residual)),
        *(f"k-means, both codebooks {n}/3" for n in (1, 2, 3)),
        "k-means, nearest centroids",
        "second order",
        "second order 0/200",
        "second order 128/200",
        *rounds,
    ]


@pytest.mark.parametrize("power", [-30, -20, 20, 30])
def test_fine_tuning_does_not_depend_on_the_hessians_scale(power: int) -> None:
    """By a power of two, so that all roundings are the same."""
    p = problem(62, 96)
    layer, _ = quantise(p, OPTIONS["residual"])
    scaled = Problem(p.weight, p.damped * 2.0**power, p.damping * 2.0**power)
    expected, found = (
        finetune_linear(each, layer.with_own_indices(), torch.float16, lambda *_: None).tensors(torch.float16)
        for each in (p, scaled)
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_outliers_are_at_least_so_many() -> None:
    for percent, expected in ((1.4, 2), (0.1, 1), (7.0, 7), (2.0, 2), (2.5, 3)):
        options = replace(PLAIN, outliers=percent, outlier_centroids=16)
        assert options.layer_config("layer", 2048, 100).n0 == expected


def test_a_permutation_numbers_at_most_65536_columns() -> None:
    for options in (replace(PLAIN, groups=2), replace(PLAIN, outliers=1, outlier_centroids=4)):
        assert options.layer_config("layer", 64, 65536).perm
        with pytest.raises(OptionError, match=r"^layer: 65538 input columns: .* at most 65536 columns"):
            options.layer_config("layer", 64, 65538)
    assert not PLAIN.layer_config("layer", 64, 65538).perm


@pytest.mark.parametrize(
    ("normalize", "weight", "match"),
    [
        (True, 1e6, "deviations of its columns: found inf"),
        (True, 1e20, "deviations of its columns: found inf"),
        (False, 1e5, "centroids: found inf"),
        (False, float("nan"), "weights: found nan"),
    ],
)
def test_numbers_that_float16_does_not_hold(normalize: bool, weight: float, match: str) -> None:
    p = problem(64, 96)
    p.weight[3, 5] = weight
    p.name = "tensor of this name"
    with pytest.raises(FileError, match=f"^tensor of this name: {match}, expected numbers up to"):
        quantise(p, replace(PLAIN, normalize=normalize))


def test_a_large_mean() -> None:
    p = problem(64, 96)
    p.weight[:, 5] = 1e5
    with pytest.raises(FileError, match=r"means of its columns: found inf, expected numbers up to 65504"):
        quantise(p, PLAIN)
    layer, _ = quantise(p, PLAIN, torch.bfloat16)
    assert float(layer.weight()[:, 5].mean()) == pytest.approx(1e5, rel=2**-8)


def test_a_hessian_that_is_not_finite() -> None:
    p = problem(64, 96)
    p.damped[3, 4] = torch.nan
    with pytest.raises(FileError, match="layer: Hessian: found nan"):
        quantise(p, PLAIN)


def test_same_seed_same_layer() -> None:
    p = problem(62, 96)
    first, second = (quantise(p, OPTIONS["residual"])[0].tensors(torch.float16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
