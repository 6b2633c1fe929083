"""vptq-inspect: what it says about a file, and what it does with a damaged one."""

import json
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import gguf
import numpy as np
import pytest
from checkpoints import mixed_layers, write_checkpoint
from configurations import ARCHITECTURES, CONFIGURATIONS, EOS_IDS, VOCAB_SIZE, gguf_name
from vptq_converter.convert import convert
from vptq_converter.facts import read_facts
from vptq_converter.inspect import main
from vptq_converter.plot import PARTS, entropy, sorted_usage, usage

from vptq_runtime import demo_path
from vptq_runtime.errors import FileError

MIXED = ("v8-k256-256", "v12-k4096-4096-g4-outliers4-k0-4096", "norm-dim-1", "bare", "odd-sizes")
LLAMA = ARCHITECTURES["llama"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with five configurations and one dense layer."""
    directory = tmp_path_factory.mktemp("mixed")
    layers = mixed_layers(LLAMA, [CONFIGURATIONS[name] for name in MIXED])
    convert(write_checkpoint(directory / "checkpoint", LLAMA, layers), directory / "mixed.gguf")
    return directory / "mixed.gguf"


@pytest.fixture(scope="module")
def uniform(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers all have one configuration, tied embedding, biases."""
    directory = tmp_path_factory.mktemp("uniform")
    checkpoint = write_checkpoint(
        directory / "checkpoint", ARCHITECTURES["qwen2"], CONFIGURATIONS["v8-k256-256"]
    )
    convert(checkpoint, directory / "uniform.gguf")
    return directory / "uniform.gguf"


def test_configurations_are_read_off_the_shapes(mixed: Path) -> None:
    linears = {linear.name: linear for linear in read_facts(mixed).linears}
    expected = mixed_layers(LLAMA, [CONFIGURATIONS[name] for name in MIXED])
    for path, (out_features, in_features) in LLAMA.linear_shapes().items():
        linear = linears[gguf_name(path)]
        assert (linear.out_features, linear.in_features) == (out_features, in_features)
        config = expected.get(path)
        if config is None:
            assert (linear.type, linear.vptq) == ("F16", None)
            continue
        found = linear.vptq
        assert found is not None
        assert (found.v, found.k, found.r, found.g) == (config.v, config.k, config.r, config.g)
        n0 = config.n0(in_features)
        outliers = (n0, config.v0, config.k0) if n0 else (0, 0, 0)
        assert (found.n0, found.v0, found.k0) == outliers
        assert found.has_perm == config.perm
        assert found.norm == {0: "input", 1: "output", None: "none"}[config.norm_dim]
        assert found.index_bits == config.bits


def test_sizes_are_those_of_the_file(uniform: Path) -> None:
    facts = read_facts(uniform)
    qwen2 = ARCHITECTURES["qwen2"]
    weights = sum(rows * columns for rows, columns in qwen2.linear_shapes().values())
    biases = qwen2.n_layers * (qwen2.n_heads + 2 * qwen2.n_kv_heads) * qwen2.true_head_dim
    norms = (2 * qwen2.n_layers + 1) * qwen2.hidden_size
    embedding = VOCAB_SIZE * qwen2.hidden_size
    assert facts.n_parameters == weights + biases + norms + embedding
    assert facts.n_embedding_parameters == embedding  # tied: counted once

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(uniform).tensors}
    vptq = {name: tensor.n_bytes for name, tensor in tensors.items() if ".vptq_" in name}
    bias_bytes = sum(tensor.n_bytes for name, tensor in tensors.items() if name.endswith(".bias"))
    centroids = sum(n for name, n in vptq.items() if name.endswith("centroids"))
    all_bytes = sum(tensor.n_bytes for tensor in tensors.values())
    ways = facts.bits_per_weight
    assert facts.file_bytes == uniform.stat().st_size
    assert ways["whole_file"] == pytest.approx(8 * uniform.stat().st_size / facts.n_parameters)
    assert ways["quantised_layers"] == pytest.approx(8 * (sum(vptq.values()) + bias_bytes) / weights)
    assert ways["quantised_layers_without_codebooks"] == pytest.approx(
        8 * (sum(vptq.values()) + bias_bytes - centroids) / weights
    )
    assert ways["without_embeddings"] == pytest.approx(
        8 * (all_bytes - tensors["token_embd.weight"].n_bytes) / (facts.n_parameters - embedding)
    )


def test_metadata_is_what_the_gguf_library_reads(uniform: Path) -> None:
    fields = gguf.GGUFReader(uniform).fields
    metadata = read_facts(uniform).metadata
    assert metadata == {key: field.contents() for key, field in fields.items() if "GGUF." not in key}
    assert metadata["vptq.eos_token_ids"] == list(EOS_IDS)
    assert len(metadata["tokenizer.ggml.tokens"]) == VOCAB_SIZE


def test_alike_layers_share_a_row(uniform: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(uniform)]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if "ffn_down" in line]
    assert len(rows) == 1
    linear = next(linear for linear in read_facts(uniform).linears if linear.kind == "ffn_down")
    bits = f"{linear.bits_per_weight:.3f}"
    assert cells(rows[0]) == ["ffn_down", "0-1", "112 x 180", "v8-k256-256", "-", bits]
    assert "in every VPTQ layer: g 1, perm yes, norm input\n" in out
    assert "outliers" not in out  # no layer has any
    assert "qwen2" in out
    assert "bits per weight" in out
    assert main([str(uniform), "--layers"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "ffn_down" in line]
    assert [cells(row)[1] for row in rows] == ["0", "1"]


def cells(row: str) -> list[str]:
    """Of one line of the table: two spaces or more stand between them."""
    return re.split(r" {2,}", row.strip())


def test_a_narrow_terminal_cuts_no_number(
    uniform: Path, mixed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([str(uniform)]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    # Every layer another configuration: more columns than a terminal of 80 has room for.
    assert main([str(mixed)]) == 0
    out = capsys.readouterr().out
    assert "…" not in out
    rows = [row for row in map(cells, out.splitlines()) if row[0] == "ffn_down"]
    n0 = CONFIGURATIONS[MIXED[1]].n0(LLAMA.intermediate_size)
    assert rows[0][1:6] == ["0", "100 x 198", "v12-k4096-4096", "4", f"{n0} v4-k4096"]
    assert rows[1] == ["ffn_down", "1", "100 x 198", "F16", *["-"] * 4, "16.000"]


def test_without_a_file_it_is_the_demo_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["file"] == str(demo_path())
    assert facts["metadata"]["vptq.version"] == 1


def test_json(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(mixed), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["architecture"] == "llama"
    assert facts["file_bytes"] == mixed.stat().st_size
    assert facts["metadata"]["vptq.version"] == 1
    assert facts["bits_per_weight"].keys() == read_facts(mixed).bits_per_weight.keys()
    layers = {layer["name"]: layer for layer in facts["layers"]}
    assert len(layers) == 7 * LLAMA.n_layers + 1
    assert layers["blk.0.attn_k"]["vptq"]["n0"] > 0
    assert layers["output"]["vptq"] is None
    assert not any("huggingface" in key for key in facts["metadata"])


def test_plain_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", LLAMA, CONFIGURATIONS["v8-k256-256"])
    convert(checkpoint, tmp_path / "plain.gguf", dequantize="f16")
    facts = read_facts(tmp_path / "plain.gguf")
    assert {linear.type for linear in facts.linears} == {"F16"}
    assert facts.bits_per_weight.keys() == {"whole_file", "without_embeddings"}
    assert main([str(tmp_path / "plain.gguf"), "--plot", str(tmp_path / "plain.png")]) == 0
    assert "F16" in capsys.readouterr().out


def test_text_of_the_file_does_not_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "f.gguf", "llama")
    writer.add_name("\x1b[31mred[bold]")
    writer.add_tensor("blk.0.attn\x1b_q.weight", np.ones((4, 4), np.float32))
    writer.add_tensor(f"blk.{'9' * 5000}.ffn_up.weight", np.ones((4, 4), np.float32))  # no layer's number
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert main([str(tmp_path / "f.gguf")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[31mred[bold]" in out


# Pictures


def texts_of_plot(path: Path, target: Path) -> set[str]:
    """Draws an SVG whose text is text."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        assert main([str(path), "--plot", str(target)]) == 0
    return {
        element.text or "" for element in ElementTree.parse(target).iter("{http://www.w3.org/2000/svg}text")
    }


def test_plot(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    found = texts_of_plot(mixed, tmp_path / "picture.svg")
    assert capsys.readouterr().err == f"vptq-inspect: {tmp_path / 'picture.svg'} written\n"
    facts = read_facts(mixed)
    for kind in {linear.kind for linear in facts.linears}:
        bits = [linear.bits_per_weight for linear in facts.linears if linear.kind == kind]
        assert f"{kind}  {np.mean(bits):.3f}" in found
    titles = {
        f"{part}: {what}" for part in PARTS for what in ("evenness of use (1: all alike)", "sorted use")
    }
    assert titles <= {text.partition(",")[0] for text in found}


def test_plot_of_a_file_without_vptq_layers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    writer = gguf.GGUFWriter(tmp_path / "plain.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.ones((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = texts_of_plot(tmp_path / "plain.gguf", tmp_path / "picture.svg")
    assert any("no VPTQ layers" in text for text in found)
    assert "attn_q  32.000" in found
    assert not any(part in text for part in PARTS for text in found)


def test_plot_without_linear_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "f.gguf").write_bytes(header(0, 0))
    assert main([str(tmp_path / "f.gguf"), "--plot", str(tmp_path / "picture.png")]) == 1
    assert "found 0 kinds of linear layers" in capsys.readouterr().err


def test_plot_without_matplotlib(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([str(mixed), "--plot", str(tmp_path / "picture.png")]) == 1
    assert 'pip install "vptq-runtime[plot]"' in capsys.readouterr().err


@pytest.mark.parametrize("target", ["no/such/directory/p.png", "p.nonsense"])
def test_plot_that_cannot_be_written(
    mixed: Path, tmp_path: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(mixed), "--plot", str(tmp_path / target)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--plot" in error


def test_usage_counts_every_index(mixed: Path) -> None:
    for linear in read_facts(mixed).linears:
        if linear.vptq is None or linear.indices is None:
            continue
        config = linear.vptq
        books, res_books = usage(linear)
        group_size = (linear.in_features - config.n0) // config.g
        k_bits = (config.k - 1).bit_length()
        counts = np.zeros((config.g, config.k), int)
        for q, book in enumerate(linear.indices):
            for words in book:
                number = int.from_bytes(words.tobytes(), "little")
                for j in range(group_size):
                    counts[q, number >> j * config.index_bits & (1 << k_bits) - 1] += 1
        np.testing.assert_array_equal(np.stack(books), counts)
        assert [len(book) for book in res_books] == [config.r] * (config.g if config.r else 0)
        assert all(book.sum() == group_size * linear.indices.shape[1] for book in res_books)


def test_entropy_and_sorted_usage() -> None:
    assert entropy(np.array([5, 5, 5, 5])) == pytest.approx(1)
    assert entropy(np.array([20, 0, 0, 0])) == 0
    assert entropy(np.array([1, 1, 2, 0])) == pytest.approx(1.5 / 2)
    assert entropy(np.array([1, 1] + [0] * 1000)) == pytest.approx(1)  # two indices cannot be more even
    even, one = sorted_usage(np.full(64, 3)), sorted_usage(np.array([7] + [0] * 63))
    np.testing.assert_allclose(even, np.linspace(0, 1, len(even)), atol=1e-12)
    assert one[0] == 0
    assert one[len(one) // 64 :].min() == 1


# Damaged files


def fails(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Runs the command, which must fail properly, and returns its message."""
    assert main([str(path)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert str(path) in output.err
    return output.err


def test_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "found nothing" in fails(tmp_path / "nothing.gguf", capsys)


def test_a_checkpoint_in_place_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert fails(path, capsys).endswith(": vptq-convert makes one of a checkpoint\n")


def header(n_tensors: int, n_keys: int, *parts: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_keys) + b"".join(parts)


def array(item_type: int, length: int) -> bytes:
    return struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, item_type, length)


def damaged() -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "wrong magic", b"GGML" + header(0, 0)[4:]
    yield "wrong version", b"GGUF" + struct.pack("<IQQ", 99, 0, 0)
    yield "other byte order", b"GGUF" + struct.pack(">IQQ", 3, 0, 1)
    yield "more keys than bytes", header(0, 2**63)
    yield "more tensors than bytes", header(2**63, 0)
    yield "endless key", header(0, 1, struct.pack("<Q", 2**64 - 1))
    yield "endless array of bytes", header(0, 1, array(0, 2**60), bytes(100))
    yield "endless array of strings", header(0, 1, array(8, 2**60), bytes(100))
    yield "arrays in arrays", header(0, 1, array(9, 1), struct.pack("<IQ", 9, 1) * 5000)
    yield "unknown value type", header(0, 1, struct.pack("<Q", 1) + b"a" + struct.pack("<I", 77))
    yield (
        "name that is not UTF-8",
        header(0, 1, struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<IB", 0, 1)),
    )
    tensor = struct.pack("<Q", 1) + b"t"
    yield "tensor past the end", header(1, 0, tensor, struct.pack("<IQIQ", 1, 1000, 0, 0), bytes(64))
    yield "tensor of 2^64 elements", header(1, 0, tensor, struct.pack("<IQQIQ", 2, 2**63, 2, 0, 0), bytes(64))
    yield "tensor at 2^63", header(1, 0, tensor, struct.pack("<IQIQ", 1, 1, 0, 2**63), bytes(64))
    yield "unknown tensor type", header(1, 0, tensor, struct.pack("<IQIQ", 1, 1, 999, 0), bytes(64))
    yield "two tensors of one name", header(2, 0, *[tensor + struct.pack("<IQIQ", 1, 1, 0, 0)] * 2, bytes(64))


@pytest.mark.parametrize(("name", "content"), list(damaged()), ids=[name for name, _ in damaged()])
def test_damaged_header(
    name: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "f.gguf").write_bytes(content)
    fails(tmp_path / "f.gguf", capsys)


def test_truncated_anywhere(uniform: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = uniform.read_bytes()
    # The last tensor may be followed by less than one alignment of padding.
    for length in range(0, len(content) - 64, len(content) // 40):
        (tmp_path / "f.gguf").write_bytes(content[:length])
        fails(tmp_path / "f.gguf", capsys)


def test_flipped_bytes_give_facts_or_a_file_error(uniform: Path, tmp_path: Path) -> None:
    content = np.frombuffer(uniform.read_bytes(), np.uint8)
    reader = gguf.GGUFReader(uniform)
    infos = [tensor.field.offset for tensor in reader.tensors]  # the densest part of the header
    rng = np.random.default_rng(0)
    failed = 0
    for trial in range(150):
        damaged_content = content.copy()
        start, end = (infos[0], reader.data_offset) if trial % 2 else (0, 600)
        positions = rng.integers(start, end, size=1 + trial % 3)
        damaged_content[positions] = rng.integers(256, size=len(positions))
        (tmp_path / "f.gguf").write_bytes(damaged_content.tobytes())
        try:
            read_facts(tmp_path / "f.gguf")
        except FileError as error:
            failed += 1
            assert "\n" not in str(error)
    assert failed > 50


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("llama.embedding_length", 101, "blk.0.attn_q.vptq_indices"),
        ("llama.attention.head_count", 6, "blk.0.attn_q.vptq_indices"),
        ("llama.feed_forward_length", 0, "expected a positive integer"),
    ],
)
def test_hyperparameters_that_contradict_the_tensors(
    mixed: Path, tmp_path: Path, key: str, value: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray(mixed.read_bytes())
    field = gguf.GGUFReader(mixed).fields[key]
    at = content.index(key.encode()) + len(key) + 4
    assert struct.unpack_from("<I", content, at)[0] == field.contents()
    struct.pack_into("<I", content, at, value)
    (tmp_path / "f.gguf").write_bytes(content)
    assert expected in fails(tmp_path / "f.gguf", capsys)


def test_output_that_nobody_takes(uniform: Path) -> None:
    """A closed standard output is none; a full disk is an error of one line; a reader may leave."""
    command = f"{Path(sys.executable).with_name('vptq-inspect')} {uniform}"
    cases = [(f"{command} >&-", 0, ""), (f"{command} 2>&-", 0, "")]
    if Path("/dev/full").exists():
        full = "vptq-inspect: error: standard output: No space left on device\n"
        cases.append((f"{command} --json >/dev/full", 1, full))
    for line, status, said in cases:
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (status, said), line
    done = subprocess.run(["sh", "-c", f"{command} --json | true"], capture_output=True, timeout=60)
    assert done.stderr == b""
