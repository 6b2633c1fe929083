"""Embedding and output matrix as the options have them: VPTQ layers, or types that vptq-convert makes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import dequantise, read_tensors
from converted import raw_tensors
from dense_models import SEQ_LEN, SMALL, write_wide
from plain_verdict import expected_verdict
from reference import Reference, mean_kl
from vptq_converter import convert
from vptq_converter.checkpoint import Checkpoint
from vptq_converter.layer import LayerConfig
from vptq_quantizer import QuantizeOptions, cli, quantize
from vptq_quantizer.calibration.text import read_calibration
from vptq_quantizer.dense_model import DenseModel
from vptq_quantizer.layers.layer_quantizer import Problem, quantize_linear
from vptq_quantizer.planning.plan import AUTO
from vptq_quantizer.run import matrices
from vptq_quantizer.run.matrices import LEAST_ROW, measure_uses

from vptq_runtime import FileError, OptionError, Runtime

EMBEDDING, OUTPUT = "model.embed_tokens", "lm_head"


@pytest.mark.parametrize("tied", [True, False])
def test_from_the_dense_model_to_logits(tied: bool, text: Path, tmp_path: Path) -> None:
    """The file has the size that was planned; what runs is what the checkpoint holds."""
    model, out = write_wide(tmp_path / "model", tied), tmp_path / "out"
    options = replace(SMALL, embedding_type="v4-k64-0", output_type=None if tied else "v6-k128-16")
    report = quantize(model, out, options, calibration=[text])
    done = convert(out, tmp_path / "out.gguf")
    assert done.n_bytes == report["plan"]["file_bytes"]
    expected = {EMBEDDING: (4, 64, 0)} | ({} if tied else {OUTPUT: (6, 128, 16)})
    assert list(report["matrices"]) == list(expected)
    names = {name.partition(".")[0] for name in raw_tensors(tmp_path / "out.gguf") if ".vptq_" in name}
    assert names - {"blk"} == ({"token_embd"} if tied else {"token_embd", "output"})
    assert not {f"{module}.weight" for module in expected} & read_tensors(out).keys()
    weights = dequantise(out)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    for module, (v, k, r) in expected.items():
        entry = config["config_for_layers"][module]
        assert (entry["vector_lens"][1], entry["num_centroids"][1]) == (v, k)
        assert max(0, entry["num_res_centroids"][1]) == r
        matrix = report["matrices"][module]
        index_bits = (k.bit_length() - 1 + max(0, r.bit_length() - 1)) / v
        assert index_bits < matrix["bits"] / (matrix["out_features"] * matrix["in_features"])
        assert list(matrix["proxy_error"]) == ["k-means", "second order"]
        dense = read_tensors(model)[f"{module}.weight"].float().numpy()
        error = np.square(weights[module] - dense).sum() / np.square(dense).sum()
        assert 0 < error < 0.5  # rows of unlikely tokens weigh little
    reference, tokens = Reference(out), list(range(5, 45))
    with Runtime(tmp_path / "out.gguf", device="cpu", kv_type="f32", precision="f32") as runtime:
        assert mean_kl(reference.logits(tokens), runtime.logits(tokens)) < 1e-6


@pytest.mark.parametrize("end_to_end", [0, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_the_verdict_sees_them(tied: bool, end_to_end: int, text: Path, tmp_path: Path) -> None:
    model, out = write_wide(tmp_path / "model", tied), tmp_path / "out"
    options = replace(
        SMALL, end_to_end=end_to_end, embedding_type="v4-k64-0", output_type=None if tied else "v2-k16-0"
    )
    report = quantize(model, out, options, calibration=[text])
    assert report["verdict"] == pytest.approx(expected_verdict(model, out, text), rel=1e-3)
    plain = quantize(model, tmp_path / "plain", replace(SMALL, end_to_end=end_to_end), calibration=[text])
    assert report["verdict"]["kl_divergence"] > 1.05 * plain["verdict"]["kl_divergence"]


def test_a_type_of_the_converter(text: Path, tmp_path: Path) -> None:
    model, out = write_wide(tmp_path / "model", tied=True), tmp_path / "out"
    report = quantize(model, out, replace(SMALL, embedding_type="q4_0"), calibration=[text])
    assert report["plan"]["embedding_type"] == "q4_0" and "matrices" not in report
    assert report["verdict"] == pytest.approx(expected_verdict(model, out, text, "q4_0"), rel=1e-3)
    done = convert(out, tmp_path / "out.gguf")
    assert done.n_bytes == report["plan"]["file_bytes"]
    assert raw_tensors(tmp_path / "out.gguf")["token_embd.weight"][0] == "Q4_0"


def test_beside_a_plan(text: Path, tmp_path: Path) -> None:
    """A run that was stopped goes on with its plan, and comes to the same bits as one that was not."""
    model = write_wide(tmp_path / "model", tied=True)
    options = QuantizeOptions(target_bits=3.5, embedding_type="v4-k64-0", samples=8, seq_len=SEQ_LEN)
    for layers in ((0, 0), None):
        quantize(model, tmp_path / "twice", options, calibration=[text], layers=layers)
    report = quantize(model, tmp_path / "once", options, calibration=[text])
    assert report["plan"]["bits_per_weight"] <= 3.5
    once, twice = (read_tensors(tmp_path / name) for name in ("once", "twice"))
    assert once.keys() == twice.keys() and f"{EMBEDDING}.indices" in once
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert not (tmp_path / "twice" / ".parts").exists()


def test_what_is_finished_is_not_done_again(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = write_wide(tmp_path / "model", tied=True), tmp_path / "out"
    options = replace(SMALL, embedding_type="v4-k64-0")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("vptq_quantizer.run.model_quantizer.measure_verdict", _interrupt)
        quantize(model, out, options, calibration=[text])
    monkeypatch.setattr(matrices, "measure_uses", _interrupt)
    assert quantize(model, out, options, calibration=[text])["matrices"][EMBEDDING]["seconds"] > 0


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("tied", [True, False])
def test_what_rows_and_columns_count(tied: bool, text: Path, tmp_path: Path) -> None:
    """As the whole model's logits and last hidden states have it, in float64."""
    dense = DenseModel(Checkpoint(write_wide(tmp_path / "model", tied)), torch.device("cpu"))
    windows = read_calibration(dense.checkpoint, dense.n_vocab, [text], 4, SEQ_LEN, 0).windows
    with torch.no_grad():
        found = dense.whole()(torch.from_numpy(windows), output_hidden_states=True)
    x = found.hidden_states[-1].double().flatten(0, 1)  # after the final norm
    p = found.logits.double().softmax(-1).flatten(0, 1)
    uses = measure_uses(dense, windows)
    assert list(uses) == ([EMBEDDING] if tied else [EMBEDDING, OUTPUT])
    output = uses[EMBEDDING if tied else OUTPUT]
    hessian = 2 * x.T @ x / len(x)
    assert float((output.hessian - hessian).norm() / hessian.norm()) < 1e-5
    expected = {EMBEDDING: p.mean(0), (EMBEDDING if tied else OUTPUT): (p * (1 - p)).mean(0)}
    for module, use in uses.items():
        rows = (expected[module] / expected[module].mean()).clamp_min(LEAST_ROW)
        assert float((use.rows - rows / rows.mean()).norm() / rows.norm()) < 1e-5
    if not tied:
        assert torch.equal(uses[EMBEDDING].hessian, torch.eye(x.shape[1]))


def test_rows_that_count_more_come_out_better() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(401, 24, generator=generator)
    weight[:40] += 3  # they want centroids of their own
    rows = torch.ones(401)
    rows[:40] = 100
    config = LayerConfig(24, 401, 4, 32, 0, 1, 0, 0, 0, True, False, None)
    errors = {}
    for name, weights in (("alike", None), ("weighted", rows)):
        problem = Problem.of(weight, torch.eye(24), 0.01, rows=weights)
        told: dict[str, float] = {}
        layer = quantize_linear(
            problem, config, SMALL, torch.float16, torch.Generator().manual_seed(1),
            lambda done, layer, told=told, problem=problem: told.update(
                {done: problem.relative_error(layer.weight())}
            ),
        )  # fmt: skip
        squares = (weight - layer.weight()).square().sum(1).double()
        counts = torch.ones(401) if weights is None else weights
        own = float(counts.double() @ squares / (counts.double() @ weight.square().sum(1).double()))
        assert told["second order"] == pytest.approx(own, rel=1e-3)
        errors[name] = float(rows.double() @ squares)
    assert errors["weighted"] < 0.7 * errors["alike"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"embedding_type": "q3_k"}, "--embedding-type: found q3_k, expected f16, q8_0, .*v4-k256-0$"),
        ({"output_type": 8}, "--output-type: found 8, expected f16"),
        ({"embedding_type": "auto"}, "--embedding-type: found auto, expected"),
        ({"embedding_type": "v2-k256-0", "fit": 10**6}, "--fit: found --embedding-type beside it, expected"),
        ({"embedding_type": "v2-k100-0"}, "--embedding-type v2-k100-0: --centroids: found 100, expected a"),
        ({"embedding_type": "v0-k16-0"}, "--embedding-type v0-k16-0: --vector-len: found 0, expected an"),
        ({"output_type": "v2-k16-64"}, "--output-type v2-k16-64: --res-centroids: found 64, expected at"),
    ],
)
def test_wrong_types(options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        QuantizeOptions(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"output_type": "v2-k16-0"},
            "--output-type: found v2-k16-0, expected none: the model's",
        ),
        ({"embedding_type": "v8-k65536-0"}, "^--embedding-type v8-k65536-0: --centroids: found 65536, expec"),
    ],
)
def test_what_does_not_suit_the_model(
    options: dict[str, str], match: str, text: Path, tmp_path: Path
) -> None:
    model = write_wide(tmp_path / "model", tied=True)
    with pytest.raises(OptionError, match=match):
        quantize(model, tmp_path / "out", replace(SMALL, **options), calibration=[text])  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_blocks_need_whole_rows(dense_model: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    options = replace(SMALL, embedding_type="q4_0")
    with pytest.raises(OptionError, match=r"--embedding-type: found q4_0, .* of 32 .*not of 100"):
        quantize(dense_model("llama"), tmp_path / "out", options, calibration=[text])


def test_without_text(text: Path, tmp_path: Path) -> None:
    model, hessians = write_wide(tmp_path / "model", tied=True), tmp_path / "hessians"
    quantize(model, tmp_path / "first", SMALL, calibration=[text], hessians=hessians)
    with pytest.raises(OptionError, match=r"--calibration: found no text, expected some: model\.embed"):
        quantize(model, tmp_path / "out", replace(SMALL, embedding_type="v4-k64-0"), hessians=hessians)


def test_a_damaged_part(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = write_wide(tmp_path / "model", tied=True), tmp_path / "out"
    options = replace(SMALL, embedding_type="v4-k64-0")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("vptq_quantizer.run.model_quantizer.measure_verdict", _interrupt)
        quantize(model, out, options, calibration=[text])
    part = out / ".parts" / "layer-00002.safetensors"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(FileError, match=r"layer-00002\.safetensors: not a whole safetensors file"):
        quantize(model, out, options, calibration=[text])


def test_the_command(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = write_wide(tmp_path / "model", tied=True), tmp_path / "out"
    command = [str(model), str(out), "--vector-len", "4", "--centroids", "16", "--samples", "8"]
    command += ["--seq-len", str(SEQ_LEN), "--calibration", str(text), "--embedding-type", "v4-k64-0"]
    assert cli.main([*command, "--dry-run"]) == 0
    assert "embedding in v4-k64-0; a file of" in " ".join(capsys.readouterr().out.split())
    assert cli.main(command) == 0
    assert "model.embed_tokens: " in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert report["matrices"][EMBEDDING]["proxy_error"]["second order"] > 0
    assert report["options"]["embedding_type"] == "v4-k64-0" and "embedding_type" not in report["plan"]
    assert report["options"]["output_type"] is None and AUTO not in report["plan"].values()
