"""Sequential calibration: inputs of both models, the least-squares target, runs that go on."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import read_tensors
from dense_models import SMALL
from torch import Tensor, nn
from vptq_converter.checkpoint import Checkpoint
from vptq_quantizer import quantize
from vptq_quantizer.calibration.hessians import collect
from vptq_quantizer.calibration.sequential import GROUPS, Streams, target
from vptq_quantizer.calibration.text import read_calibration
from vptq_quantizer.dense_model import DenseModel, linears
from vptq_quantizer.layers.quantized_linear import QuantizedLinear
from vptq_quantizer.run import model_quantizer

from vptq_runtime import OptionError

OPTIONS = replace(SMALL, finetune=True, sequential=True)


def streams(directory: Path) -> Streams:
    dense = DenseModel(Checkpoint(directory), torch.device("cpu"))
    hidden = dense.embed(np.arange(120).reshape(3, 40) % dense.n_vocab)
    layer = dense.load_layer(0)
    return Streams(dense, hidden, hidden.clone(), 0, layer, copy.deepcopy(layer))


def damaged(both: Streams) -> dict[str, Tensor]:
    """Weights that are a little off."""
    generator = torch.Generator().manual_seed(3)
    modules = linears(both.dense_layer)
    return {
        name: m.weight + 0.1 * m.weight.std() * torch.randn(m.weight.shape, generator=generator)
        for name, m in modules.items()
    }


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).double().norm() / expected.double().norm())


def test_where_nothing_is_quantised_the_hessians_are_the_dense_models(model: Path) -> None:
    both = streams(model)
    found = {of: both.statistics(of) for of in GROUPS}
    expected = collect(both.model, 0, both.dense_layer, both.dense)
    for of, (hessian, cross) in found.items():
        assert relative(hessian, expected[of]) < 1e-5
        assert relative(cross, expected[of]) < 1e-5


def test_the_statistics_are_those_of_the_two_models_inputs(model: Path) -> None:
    both = streams(model)
    both.replace(damaged(both))
    inputs: list[dict[str, Tensor]] = [{}, {}]
    for layer, kept in zip((both.dense_layer, both.quantised_layer), inputs, strict=True):
        for name, module in linears(layer).items():
            module.register_forward_pre_hook(
                lambda _, args, name=name, kept=kept: kept.update({name: args[0].flatten(0, 1).double()})
            )
    found = {of: both.statistics(of) for of in GROUPS}
    both.advance()
    for of, (hessian, cross) in found.items():
        x, y = (kept[of] for kept in inputs)
        assert relative(hessian.double(), 2 * y.T @ y / len(y)) < 1e-5
        assert relative(cross.double(), 2 * x.T @ y / len(y)) < 1e-5
    assert relative(both.quantised, both.dense) > 1e-3


def test_the_target_is_the_best_weight_for_the_quantised_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 400, generator=generator)
    y = (
        x
        + 0.3 * torch.randn(24, 24, generator=generator) @ x
        + 0.1 * torch.randn(24, 400, generator=generator)
    )
    weight = torch.randn(8, 24, generator=generator)
    found = target(weight, 2 * y @ y.T / 400, 2 * x @ y.T / 400, 1e-6)
    best = torch.linalg.lstsq(y.T.double(), (weight @ x).T.double()).solution.T
    assert relative(found.double(), best) < 1e-3
    # Much damping: the weight itself.
    assert relative(target(weight, 2 * y @ y.T / 400, 2 * x @ y.T / 400, 1e6), weight) < 1e-3


def test_the_target_without_any_input_is_the_weight() -> None:
    weight = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(24, 24)
    assert torch.equal(target(weight, nothing, nothing, 0.01), weight)


def last_hidden(directory: Path, text: Path, quantised: Path | None = None) -> Tensor:
    """What comes out of the last decoder layer on the calibration text, dense or quantised."""
    dense = DenseModel(Checkpoint(directory), torch.device("cpu"))
    o = OPTIONS
    windows = read_calibration(dense.checkpoint, dense.n_vocab, [text], o.samples, o.seq_len, o.seed).windows
    hidden = dense.embed(windows)
    tensors = read_tensors(quantised) if quantised else {}
    for n in range(dense.n_layers):
        layer = dense.load_layer(n)
        for name, module in linears(layer).items() if quantised else ():
            prefix = f"model.layers.{n}.{name}."
            fields = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            config = o.layer_config(name, module.out_features, module.in_features)
            weight = QuantizedLinear.from_tensors(config, fields).weight()
            module.weight = nn.Parameter(weight, requires_grad=False)
        dense.advance(n, layer, hidden)
    return hidden


@pytest.fixture(scope="module")
def whole(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize(model, out, OPTIONS, calibration=[text])
    return out


def test_it_brings_the_model_nearer_to_the_dense_one(
    model: Path, text: Path, whole: Path, tmp_path: Path
) -> None:
    quantize(model, tmp_path / "out", replace(OPTIONS, sequential=False), calibration=[text])
    dense = last_hidden(model, text)
    errors = [relative(last_hidden(model, text, out), dense) for out in (whole, tmp_path / "out")]
    assert errors[0] < 0.97 * errors[1]


def test_layers_by_several_machines_in_turn(model: Path, text: Path, whole: Path, tmp_path: Path) -> None:
    """What is finished is read, and those after it come out as in a whole run, bit for bit."""
    quantize(model, tmp_path / "0", OPTIONS, calibration=[text], layers=(0, 0))
    (tmp_path / "1/.parts").mkdir(parents=True)
    for name in ("run.json", "layer-00000.safetensors"):
        shutil.copy(tmp_path / "0/.parts" / name, tmp_path / "1/.parts")
    report = quantize(model, tmp_path / "1", OPTIONS, calibration=[text], layers=(1, 1))
    assert report["finished"]
    found, expected = read_tensors(tmp_path / "1"), read_tensors(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_finished_layers_are_not_done_again(
    model: Path, text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(model, tmp_path / "out", OPTIONS, calibration=[text], layers=(0, 0))
    done: list[int] = []
    real: Callable[..., Any] = model_quantizer.Streams.statistics

    def watched(self: Streams, name: str) -> tuple[Tensor, Tensor]:
        done.append(self.n)
        return real(self, name)

    monkeypatch.setattr(model_quantizer.Streams, "statistics", watched)
    quantize(model, tmp_path / "out", OPTIONS, calibration=[text])
    assert done == [1] * len(GROUPS)
    found, expected = read_tensors(tmp_path / "out"), read_tensors(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_layer_before_those_before_it(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"^--layers: found layer 0 not finished, expected all before"):
        quantize(model, tmp_path / "out", OPTIONS, calibration=[text], layers=(1, 1))


def test_with_kept_hessians_or_without_text(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"^--hessians: found --sequential, too"):
        quantize(model, tmp_path / "out", OPTIONS, calibration=[text], hessians=tmp_path / "h")
    with pytest.raises(OptionError, match=r"^--sequential: found no --calibration"):
        quantize(model, tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()
