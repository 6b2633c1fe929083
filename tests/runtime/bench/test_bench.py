"""vptq-bench: what it says of models, real and synthetic, and what it refuses; nothing on their speed."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
from feeding import all_logits
from tiny_bench import HEADINGS, QUANT, SYNTHETIC, TINY, cells
from tiny_gguf import HEAD_DIM, KEYS, N_EMBD, N_FF, N_VOCAB, tensors, write
from vptq_converter.dense import DENSE_TYPES

from vptq_runtime import _native
from vptq_runtime.bench import cli as bench
from vptq_runtime.bench import speed, synthetic
from vptq_runtime.bench.shapes import SHAPES, find_shape
from vptq_runtime.bench.speed import GREEDY, LAST_FOR_ALL, Measured, ModelFacts, SpeedTest, extrapolated
from vptq_runtime.bench.synthetic import QUANTS, Quant, SyntheticModel
from vptq_runtime.errors import OptionError

pytestmark = pytest.mark.usefixtures("tiny_world")


def run(*arguments: str) -> int:
    return bench.main([*SYNTHETIC, "--device", "cpu", "-p", "200", "-n", "5", "-t", "1,2", *arguments])


def tiny_model(**changes: Any) -> SyntheticModel:
    return replace(SyntheticModel("tiny", TINY, Quant.parse(QUANT), "f16", "f16"), **changes)


@pytest.fixture
def greedy() -> _native.Sampler:
    return _native.Sampler(**GREEDY)


# Parameters as the models' pages state them (the sum of their safetensors files).
PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "nemotron-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "mistral-large-2407": 122_610_069_504,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
}


def test_every_shape_is_tested() -> None:
    assert SHAPES.keys() == PARAMETERS.keys() | {"tiny"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_the_shapes(name: str) -> None:
    s = find_shape(name)
    q, kv = s.n_head * s.head_dim, s.n_head_kv * s.head_dim
    layer = 2 * s.n_embd * q + 2 * s.n_embd * kv + 3 * s.n_embd * s.n_ff + 2 * s.n_embd
    if s.arch == "qwen2":
        layer += q + 2 * kv
    assert s.n_layer * layer + s.n_embd + 2 * s.n_vocab * s.n_embd == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_bytes_of_the_shapes(name: str) -> None:
    """3 bits a weight in the indices, and codebooks of 1 MiB and a bit for each linear layer."""
    facts = SyntheticModel(name, SHAPES[name], Quant.parse("v8-k65536-256"), "q8_0", "f16").facts(2, "f16")
    s = SHAPES[name]
    weights = 2 * s.n_embd * (s.n_head + s.n_head_kv) * s.head_dim + 3 * s.n_embd * s.n_ff
    codebooks = 7 * (65536 + 256) * 8 * 2
    assert 0 < facts.layers_bytes - 2 * (weights * 3 // 8 + codebooks) < 0.01 * facts.layers_bytes
    assert facts.output_bytes == s.n_vocab * s.n_embd * 2
    assert facts.embedding_row_bytes == s.n_embd * 34 // 32
    assert facts.kv_bytes == 2 * (2 * s.n_head_kv * 128) * 2


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("dense_type", [name for name in bench.DENSE_TYPES if name != "auto"])
@pytest.mark.parametrize("quant", [QUANT, "v8-k2048-0", "v16-k65536-2", "v1-k2-0"])
def test_synthetic_model_is_whole(quant: str, dense_type: str, arch: str, greedy: _native.Sampler) -> None:
    synthetic_model = tiny_model(
        shape=replace(TINY, arch=arch),
        quant=Quant.parse(quant),
        embedding_type=dense_type,
        output_type=dense_type,
    )
    with synthetic_model.file(n_layer=2) as path:
        model = _native.Model(path)
    facts = synthetic_model.facts(2, "f16")
    assert facts == replace(ModelFacts.of_model(model, "tiny", "f16"), model_bytes=facts.model_bytes)
    assert 0 <= model.file_bytes - facts.model_bytes < 16384  # the header, and gaps for alignment
    assert ("blk.1.attn_k.bias" in model.tensors) == (arch == "qwen2")
    assert "blk.1.attn_output.bias" not in model.tensors
    context = _native.Context(model, device="cpu", n_ctx=64, n_threads=1, kv_type="f16")
    logits = all_logits(context, context.new_sequence(), list(range(40)))
    assert np.isfinite(logits).all()
    assert 0.1 < logits.std() < 10
    assert len(np.unique(logits, axis=0)) == 40  # another token, other logits


def test_types_are_those_that_can_be_written() -> None:
    assert bench.DENSE_TYPES == DENSE_TYPES


def test_synthetic_weights_are_random() -> None:
    """Every centroid of a small codebook is used, about equally often; no two rows of blocks are alike."""
    synthetic_model = tiny_model(quant=Quant.parse("v1-k16-0"))
    with synthetic_model.file(n_layer=1) as path:
        model = _native.Model(path)
    weight = model.dequantize("blk.0.ffn_gate")  # (96, 64)
    scaled = weight * np.sqrt(64)
    assert ((abs(scaled) > 0.49) & (abs(scaled) < 1.01)).all()
    values, counts = np.unique(weight, return_counts=True)
    assert len(values) == 16
    assert counts.min() > 0.5 * weight.size / 16 and counts.max() < 2 * weight.size / 16
    assert len(np.unique(weight, axis=0)) == 96
    assert abs(model.dequantize("output")).min() > 0


@pytest.mark.parametrize("chunk", [64, 512])
def test_made_in_pieces(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "CHUNK", chunk)
    for tensor in tiny_model(embedding_type="q8_0").tensors(n_layer=1):
        pieces = list(tensor.chunks())
        assert sum(piece.nbytes for piece in pieces) == tensor.nbytes
        if "indices" in tensor.name or tensor.name in ("output.weight", "token_embd.weight"):
            assert len(pieces) > 1
            assert max(piece.nbytes for piece in pieces) <= chunk


def test_without_files_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with tiny_model().file(n_layer=1) as path:
        assert not path.startswith("/proc/")
        assert _native.Model(path).n_layer == 1
    assert not Path(path).exists()


def test_calls_of_a_test() -> None:
    assert list(SpeedTest("pp", 200, 1).calls(128)) == [(0, 128), (128, 200)]
    assert list(SpeedTest("tg", 3, 1).calls(128)) == [(0, 1), (1, 2), (2, 3)]


def test_bytes_per_token() -> None:
    facts = ModelFacts(
        *("m", "q", 3, 10**6),
        layers_bytes=1000,
        prompt_bytes=800,
        output_bytes=100,
        embedding_row_bytes=7,
        kv_bytes=6,
    )
    assert facts.bytes_per_token(SpeedTest("tg", 3, 1), 128) == 1000 + 100 + 7 + 6 * (1 + 2 + 3) / 3
    assert facts.bytes_per_token(SpeedTest("tg", 3, 1, 8), 128) == (1000 + 100) / 8 + 7 + 6 * (1 + 2 + 3) / 3
    assert facts.bytes_per_token(SpeedTest("pp", 200, 1), 128) == (2 * 800 + 4 * (128 + 200)) / 200 + 7


def test_bytes_of_a_prompt() -> None:
    """Of the last layer q, k, v and the norm before them."""
    model = tiny_model(shape=replace(TINY, arch="qwen2"))
    rest = ("blk.2.attn_output.", "blk.2.ffn_norm.", "blk.2.ffn_gate.", "blk.2.ffn_up.", "blk.2.ffn_down.")
    unread = [tensor.nbytes for tensor in model.tensors(3) if tensor.name.startswith(rest)]
    assert len(unread) == 1 + 4 * 6
    facts = model.facts(3, "f16")
    assert facts.prompt_bytes == facts.layers_bytes - sum(unread)


def test_share_of_a_layer() -> None:
    assert TINY.share(["attn_q", "attn_k", "attn_v"]) == 2 * 64 * 64 / (3 * 64 * 64 + 3 * 64 * 96)
    assert TINY.share(TINY.linears) == 1


def test_extrapolation() -> None:
    pp, tg, layers = (SpeedTest(kind, 3, 1) for kind in ("pp", "tg", "layers"))

    def measured(n_layer: int) -> Measured:
        """Layers of 2 and 4 s, in decoding 3 and 1 s more; without logits parts of the last one left out."""
        seconds = {
            pp: [2 * (n_layer - 0.5), 4 * (n_layer - 0.5)],
            tg: [2.0 * n_layer + 3, 4.0 * n_layer + 1],
            layers: [2 * (n_layer - 0.25), 4 * (n_layer - 0.25)],
        }
        return Measured("cpu", 128, 0.5, seconds)

    found = extrapolated(measured(2), 2, 5, {"pp": 0.5, "layers": 0.25}).seconds
    assert found.keys() == {pp, tg}
    for test, seconds in found.items():
        assert seconds == pytest.approx(measured(5).seconds[test], rel=1e-12)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--json", "-r", "3", "--output-type", "q8_0", "--kv-type", "f32") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    report = json.loads(captured.out)
    assert report.keys() == {"system", "model", "results", "load_s", "peak_memory_bytes"}
    system = report["system"]
    assert system["read_bandwidth"].keys() == {"1", "2"}
    assert system["cores"] == _native.physical_cores()
    assert system["cpu"] and "numpy.max" in system["read_bandwidth_method"]
    assert re.fullmatch(r"cpu \(.*, [12] threads?\)", system["device"])
    assert 0 < system["available_bytes"] < system["memory_bytes"]
    facts = tiny_model(output_type="q8_0").facts(3, "f32")
    model = report["model"]
    assert model.pop("memory_bytes") == facts.model_bytes + 200 * facts.kv_bytes + speed.REST_BYTES
    described = [model.pop(key) for key in ("synthetic", "kv_type", "precision", "layers_measured")]
    assert described == [True, "f32", "auto", None]
    assert model == vars(facts)
    assert report["load_s"] > 0 and report["peak_memory_bytes"] > 1 << 20
    results = report["results"]
    assert [(r["test"], r["threads"]) for r in results] == [
        ("pp200", 1),
        ("tg5", 1),
        ("pp200", 2),
        ("tg5", 2),
    ]
    for result in results:
        speeds = [result["n_tokens"] / seconds for seconds in result["seconds"]]
        assert len(speeds) == 3
        assert result["tok_s"] == pytest.approx(fmean(speeds))
        assert result["tok_s_std"] == pytest.approx(stdev(speeds))
        kind, n = result["test"][:2], int(result["test"][2:])
        assert n == result["n_tokens"]
        assert result["bytes_per_token"] == facts.bytes_per_token(SpeedTest(kind, n, 1), 128)
        rate = system["read_bandwidth"][str(result["threads"])]
        assert result["bandwidth_share"] == pytest.approx(result["bytes_per_token"] * result["tok_s"] / rate)
        assert result["extrapolated"] is False


def test_sequences_decoded_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-p", "9,4,9,0", "-b", "1,3", "-t", "1", "-r", "1", "--json") == 0
    results = json.loads(capsys.readouterr().out)["results"]
    found = [(r["test"], r["sequences"], r["n_tokens"]) for r in results]
    assert found == [("pp9", 1, 9), ("pp4", 1, 4), ("tg5", 1, 5), ("tg5x3", 3, 15)]
    alone, together = results[2:]
    assert together["tok_s"] == 15 / together["seconds"][0]
    assert together["bytes_per_token"] < alone["bytes_per_token"]


def test_through_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    """The same bytes as of the native calls; of guesses they are not known."""
    options = ["-p", "0", "-n", "12", "-b", "1,3", "-t", "1", "-r", "2", "--engine"]
    assert run(*options, "--json") == 0
    results = {r["test"]: r for r in json.loads(capsys.readouterr().out)["results"]}
    assert list(results) == ["tg12", "tg12x3", "eg12", "eg12x3", "ng12"]
    for name in ("12", "12x3"):
        assert results[f"eg{name}"]["bytes_per_token"] == results[f"tg{name}"]["bytes_per_token"]
        assert results[f"eg{name}"]["n_tokens"] == results[f"tg{name}"]["n_tokens"]
    assert results["ng12"]["bytes_per_token"] is results["ng12"]["bandwidth_share"] is None
    assert results["ng12"]["tok_s"] > 0
    assert run(*options, "--md") == 0
    assert re.search(
        r"^\| tiny \|.* ng12 \| [\d.]+ ± [\d.]+ \|  \|  \|$", capsys.readouterr().out, re.MULTILINE
    )


def test_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = tensors()
    path = write(tmp_path / "tiny|1.gguf", KEYS, arrays)
    cpu = ["-m", str(path), "--device", "cpu", "-t", "1", "-r", "1"]
    assert bench.main([*cpu, "-p", "0", "-n", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    model = report["model"]
    assert (model["name"], model["quant"], model["n_layer"]) == ("tiny|1.gguf", "v4-k16-0", 1)
    assert (model["synthetic"], model["layers_measured"]) == (False, None)
    assert model["model_bytes"] == path.stat().st_size
    assert model["layers_bytes"] == sum(a.nbytes for name, a in arrays.items() if name.startswith("blk."))
    first = ("blk.0.attn_norm.", "blk.0.attn_q.", "blk.0.attn_k.", "blk.0.attn_v.")
    assert model["prompt_bytes"] == sum(a.nbytes for name, a in arrays.items() if name.startswith(first))
    assert model["output_bytes"] == N_VOCAB * N_EMBD * 2  # tied to the embedding
    assert model["embedding_row_bytes"] == N_EMBD * 2
    assert model["kv_bytes"] == 2 * 2 * HEAD_DIM * 2
    [result] = report["results"]
    assert (result["test"], result["tok_s_std"]) == ("tg3", 0)
    assert bench.main([*cpu, "-p", "4", "-n", "0", "--md"]) == 0
    assert "| tiny\\|1.gguf | 0.0" in capsys.readouterr().out


def test_configurations_of_a_file(tmp_path: Path) -> None:
    arrays = tensors()
    path = write(tmp_path / "one.gguf", KEYS, arrays)
    del arrays["blk.0.ffn_up.weight"]
    arrays["blk.0.ffn_up.vptq_indices"] = np.zeros((1, N_FF // 4, N_EMBD * 4 // 32), np.int32)
    arrays["blk.0.ffn_up.vptq_centroids"] = np.ones((1, 4, 4), np.float16)
    arrays["blk.0.ffn_up.vptq_res_centroids"] = np.ones((1, 4, 4), np.float16)
    mixed = write(tmp_path / "mixed.gguf", KEYS, arrays)
    for file, expected in ((path, {"v4-k16-0"}), (mixed, {"v4-k16-0 and 1 more", "v4-k4-4 and 1 more"})):
        assert ModelFacts.of_model(_native.Model(str(file)), "name", "f16").quant in expected


@pytest.mark.parametrize(("option", "border"), [([], "│"), (["--md"], "|")], ids=["plain", "md"])
def test_table(option: list[str], border: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*option, "-r", "2") == 0
    out = capsys.readouterr().out
    header, *rows = cells(out, border)
    if option:
        assert rows.pop(0) == ["---", "--:", "---", "--:", "---", "--:", "--:", "--:"]
    size = f"{tiny_model().facts(3, 'f16').model_bytes / 2**20:.2f} MiB"
    lines = out.splitlines()
    if not option:  # of all rows the same
        assert lines[2] == f"tiny: {size}, {QUANT}"
        header, rows = HEADINGS[:3] + header, [["tiny", size, QUANT, *row] for row in rows]
    assert header == HEADINGS
    assert [row[:5] for row in rows] == [
        ["tiny", size, QUANT, threads, test] for threads in "12" for test in ("pp200", "tg5")
    ]
    for row in rows:
        assert re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d", row[5])
        assert re.fullmatch(r"\d+\.\d\d MiB", row[6])
        assert re.fullmatch(r"\d+\.\d%", row[7])
    assert re.fullmatch(
        r".+, cores: \d+, .+ memory, .+ available; runs on cpu \(.*\), precision auto", lines[0]
    )
    assert re.match(
        r"memory bandwidth: [\d.]+ GB/s with 1 thread, [\d.]+ GB/s with 2 threads \(numpy", lines[1]
    )
    assert re.fullmatch(r"load [\d.]+ s, peak memory [\d.]+ [MG]iB", lines[-1])
    assert "xtrapolated" not in out


def test_some_layers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    contexts: list[tuple[int, str]] = []
    left_out: list[dict[str, float]] = []
    tensors, context = SyntheticModel.tensors, _native.Context

    def spying(self: SyntheticModel, n_layer: int) -> Any:
        made.append(n_layer)
        return tensors(self, n_layer)

    def spying_context(model: _native.Model, **options: Any) -> _native.Context:
        contexts.append((options["n_threads"], options["precision"]))
        return context(model, **options)

    monkeypatch.setattr(SyntheticModel, "tensors", spying)

    def spying_extrapolated(*arguments: Any) -> Measured:
        left_out.append(arguments[-1])
        return extrapolated(*arguments)

    monkeypatch.setattr(_native, "Context", spying_context)
    monkeypatch.setattr(speed, "extrapolated", spying_extrapolated)
    assert run("--layers", "2", "-r", "2") == 0
    assert made == [2, 3, 2]  # two for their sizes, one to run
    # Layers without logits stand for generated tokens: never in 16-bit integers.
    assert contexts == [(1, "auto"), (1, "f32"), (2, "auto"), (2, "f32")]
    one = tiny_model().facts(1, "f16")
    by_weights, by_bytes = TINY.share(LAST_FOR_ALL), one.prompt_bytes / one.layers_bytes
    assert left_out == [{"pp": 1 - by_weights, "layers": pytest.approx(1 - by_bytes)}]
    out = capsys.readouterr().out
    assert "tok/s (extrapolated)" in out
    assert "Extrapolated: of 3 layers 2 ran, and the others are taken to be as fast." in out
    assert re.search(r"needs \d+\.\d\d MiB and fits into the .* available. What ran: load", out)
    assert "layers5" not in out
    assert run("--layers", "2", "-r", "2", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"]["layers_measured"] == 2
    assert report["model"]["n_layer"] == 3
    assert report["model"]["model_bytes"] == tiny_model().facts(3, "f16").model_bytes
    assert [result["test"] for result in report["results"]] == ["pp200", "tg5"] * 2
    assert all(result["extrapolated"] for result in report["results"])
    assert run("--layers", "3", "-r", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["model"]["layers_measured"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--synthetic", "gpt-5"], f"--synthetic: found 'gpt-5', expected one of {', '.join(PARAMETERS)}"),
        (["--synthetic", "x" * 9999], "--synthetic: found 'xxx"),
        (["--quant", "q4_k"], f"known are {', '.join(QUANTS)}"),
        (["--quant", "v8-k65535-0"], "--quant: found 'v8-k65535-0'"),
        (["--quant", "v65-k256-0"], "--quant: found 'v65-k256-0'"),
        (["--quant", "v8-k256-1"], "--quant: found 'v8-k256-1'"),
        (["--quant", "v٨-k256-0"], "--quant: found 'v٨-k256-0'"),
        (["--quant", ""], "--quant: found ''"),
        (["--layers", "1"], "--layers: found 1, expected a whole number, at least 2 and at most 3"),
        (["--layers", "2", "--engine"], "--engine: found --layers beside it, expected a whole model"),
        (["--layers", "4"], "--layers: found 4"),
        (["--layers", "-1"], "--layers: found -1"),
        (["-p", "0", "-n", "0"], "found 0 for both"),
        (["-p", "-1"], "--n-prompt: found -1"),
        (["-n", str(2**40)], "--n-gen: found 1099511627776"),
        (["-p", "1,-1"], "--n-prompt: found -1"),
        (["-b", "0"], "--batch: found 0"),
        (["-b", "1,129"], "--batch: found 129"),
        (["-r", "0"], "--repetitions: found 0"),
        (["-t", "1,0"], "--threads: found 0"),
        (["--device", "tpu"], "--device: found 'tpu'"),
        (["--kv-type", "q4"], "--kv-type: found 'q4'"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"vptq-bench: error: [^\n]*\n", captured.err)
    assert message in captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-m", "a.gguf", "--synthetic", "tiny"],
        ["-m", "a.gguf", "--quant", QUANT],
        ["-m", "a.gguf", "--layers", "2"],
        ["-m", "a.gguf", "--output-type", "f16"],
        ["--synthetic", "tiny", "--output-type", "bf16"],
        ["--synthetic", "tiny", "--json", "--md"],
        ["--synthetic", "tiny", "-t", "1,,2"],
        ["--synthetic", "tiny", "-p", "many"],
    ],
    ids=" ".join,
)
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        bench.main(arguments)
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("usage: vptq-bench")


@pytest.mark.parametrize("name", ["missing.gguf", "a\udcff", ""])
def test_no_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["-m", name and str(tmp_path / name)]) == 1
    assert re.fullmatch(r"vptq-bench: error: [^\n]*cannot be opened[^\n]*\n", capsys.readouterr().err)


def test_configurations_known() -> None:
    assert [Quant.parse(name).name for name in QUANTS] == list(QUANTS)
    assert Quant.parse("v8-k65536-256-woft") == Quant(8, 65536, 256)
    with pytest.raises(OptionError):
        find_shape("")


def test_too_large_for_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused with both figures before a byte of it is made, or, of a file, before a context is."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("made all the same")

    monkeypatch.setattr(_native, "available_memory", lambda: 3 << 29)
    monkeypatch.setattr(synthetic, "_empty_file", never)
    monkeypatch.setattr(_native, "Context", never)
    large = ["--synthetic", "llama-3.1-405b", "--quant", "v16-k65536-65536", "--device", "cpu"]
    assert bench.main(large) == 1
    error = capsys.readouterr().err
    assert re.match(
        r"vptq-bench: error: llama-3.1-405b, 126 layers: needs 105\.\d\d GiB of memory \(model", error
    )
    assert error.endswith("1.50 GiB are available: --layers N measures N of them\n")
    assert run("-n", str(2**31 - 1)) == 1
    assert "KV cache of 2147483647 tokens" in capsys.readouterr().err
    assert bench.main([*large, "--layers", "2"]) == 1
    assert "llama-3.1-405b, 2 layers: needs" in capsys.readouterr().err
    path = write(tmp_path / "model.gguf", KEYS, tensors())
    assert bench.main(["-m", str(path), "--device", "cpu", "-n", str(10**9)]) == 1
    assert re.match(r"vptq-bench: error: model.gguf, 1 layers: needs .* GiB", capsys.readouterr().err)


def test_no_room_for_the_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(synthetic, "_empty_file", lambda: nullcontext("/dev/full"))
    assert run() == 1
    assert capsys.readouterr().err == (
        "vptq-bench: error: tiny: /dev/full cannot be written: No space left on device\n"
    )


def open_files() -> Iterator[str]:
    return (str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink())


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(speed, "_run", interrupted)
    assert run() == 130
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert not any("vptq-synthetic" in target for target in open_files())


def test_installed() -> None:
    command = Path(sys.executable).with_name("vptq-bench")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60)
    assert re.fullmatch(r"vptq-bench \d+\.\d+.*\n", done.stdout)
    help_text = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=60).stdout
    assert "mistral-large-2407" in re.sub(r"\s+", "", help_text)
