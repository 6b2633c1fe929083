"""vptq-bench --fits: what models need, and README.md's table of it."""

import json
import re
from pathlib import Path

import pytest

from vptq_runtime.bench import cli as bench
from vptq_runtime.bench.fits import DEVICES, N_CTX, QUANTS, Fit
from vptq_runtime.bench.shapes import SHAPES, Shape
from vptq_runtime.bench.synthetic import Quant, SyntheticModel
from vptq_runtime.runtime import DEFAULT_N_CTX

README = Path(__file__).parents[3] / "README.md"
GIB = 1 << 30


def test_readme(capsys: pytest.CaptureFixture[str]) -> None:
    """The table and the note below it are what the command that stands above it prints."""
    text = README.read_text(encoding="utf-8")
    command = re.search(r"^vptq-bench --fits .*--md$", text, re.MULTILINE)
    assert command is not None
    assert bench.main(command[0].split()[1:]) == 0
    assert capsys.readouterr().out in text


def test_needs_of_llama(capsys: pytest.CaptureFixture[str]) -> None:
    """8B at 2 bits, by hand: 7 codebooks of 1 MiB a layer, scale, shift and permutation in 2 bytes each."""
    assert bench.main(["--fits", "--quant", "v8-k65536-0", "--output-type", "q8_0", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["n_ctx"] == N_CTX == DEFAULT_N_CTX
    fits = {fit["model"]: fit for fit in report["fits"]}
    assert fits.keys() == SHAPES.keys()
    fit = fits["llama-3.1-8b"]
    matrices = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096  # weights
    vectors = 3 * 2 * (6 * 4096 + 14336) + 2 * 4 * 4096  # bytes; the last: norms
    layers = 32 * (matrices // 4 + 7 * (1 << 20) + vectors)
    assert fit["file_bytes"] == layers + 128256 * 4096 * 2 + 128256 * 4096 * 34 // 32 + 4 * 4096
    assert fit["kv_bytes"] == 32 * 2 * 1024 * 2 * 4096
    assert fit["memory_bytes"] == fit["file_bytes"] + fit["kv_bytes"] + (150 << 20)
    assert fit["device_gib"] == 8


def test_every_configuration() -> None:
    fits = {
        quant: Fit.of(SyntheticModel("m", SHAPES["llama-3.1-70b"], Quant.parse(quant), "f16", "f16"), "f16")
        for quant in QUANTS
    }
    assert [fits[quant].device_gib for quant in QUANTS] == [24, 32, 64, 64]
    assert [Quant.parse(quant).bits / Quant.parse(quant).v for quant in QUANTS] == [1.5, 2, 3, 4]


@pytest.mark.parametrize("n_vocab", [2**20, 2**21, 2**22, 2**24, 2**25])
def test_a_tenth_of_a_device_is_left(n_vocab: int) -> None:
    """The smallest that has the room; none that has not."""
    shape = Shape(1, 2048, 2048, 16, 16, n_vocab, 8192, 1e4)
    fit = Fit.of(SyntheticModel("m", shape, Quant.parse("v8-k256-0"), "f16", "f16"), "f32")
    assert fit.kv_bytes == 2 * 2048 * 4 * N_CTX
    large_enough = [gib for gib in DEVICES if fit.memory_bytes <= 0.9 * gib * GIB]
    assert fit.device_gib == (large_enough[0] if large_enough else None)
    assert (fit.device_gib is None) == (n_vocab == 2**25)


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--fits", "--kv-type", "f32"]) == 0
    out = capsys.readouterr().out
    assert "KV cache in f32" in out
    assert re.search(r"Available here: \d+\.\d\d GiB\n$", out)
    assert all(re.search(rf"│ {re.escape(name)} +│", out) for name in SHAPES)


@pytest.mark.parametrize(
    "option",
    [["--layers", "2"], ["--synthetic", "llama-3.1-8b"], ["--quant", "q4_k"], ["--kv-type", "q3"]],
    ids=" ".join,
)
def test_wrong_usage(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = bench.main(["--fits", *option])
    except SystemExit as left:
        status = left.code
    assert status == 2
    captured = capsys.readouterr()
    assert captured.out == "" and option[0] in captured.err
