"""Dense GGUF files as checkpoints: tensors, hyperparameters, tokenizers, and what is refused."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf_models
import numpy as np
import pytest
from checkpoints import write_checkpoint
from configurations import ARCHITECTURES, CONFIGURATIONS, EOS_IDS
from converted import change_json
from dense_models import write_dense
from gguf import GGMLQuantizationType, GGUFValueType, quants
from gguf_models import Keys, Tensors, changed, export, requantise
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from vptq_converter import convert
from vptq_converter.architectures import read_model
from vptq_converter.checkpoint import Checkpoint
from vptq_converter.dense_gguf.checkpoint import GgufCheckpoint, dequantised_types, open_checkpoint

from vptq_runtime import FileError, UnsupportedError, VPTQError

T = GGMLQuantizationType
STRING, ARRAY, UINT32 = GGUFValueType.STRING, GGUFValueType.ARRAY, GGUFValueType.UINT32
FLOAT32, BOOL = GGUFValueType.FLOAT32, GGUFValueType.BOOL
TEXTS = [
    "the quick brown fox  jumps\n\n\tover 12 345   678 lazy dogs",
    "def f(x):\n    return {'a': x ** 2, \"b\": [1, 2]}  # it's\r\n",
    "Привет, мир! 你好世界 नमस्ते שלום مرحبا こんにちは 🎉👩‍👩‍👧 café naïve e\u0301",
    "<|bos|>user\nHi<|end_of_turn|>\n<|end_of_text|>",
    "",
    " ",
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense") / "llama", "llama")


@pytest.fixture(scope="module")
def file(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(dense, tmp_path_factory.mktemp("file") / "model.gguf")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_export_is_the_checkpoint_again(name: str, tmp_path: Path) -> None:
    """The numbers that were exported, in Hugging Face's order; the same hyperparameters, to the bit."""
    dense = write_dense(tmp_path / "dense", name)
    convert(dense, tmp_path / "model.gguf", dequantize="bf16")
    found, expected = GgufCheckpoint(tmp_path / "model.gguf"), Checkpoint(dense)
    ours, theirs = read_model(found), read_model(expected)

    for key, value in vars(theirs.hyperparameters).items():
        assert np.array_equal(getattr(ours.hyperparameters, key), value), key
    assert ours.architecture.gguf_name == theirs.architecture.gguf_name
    assert set(found.tensors) == set(expected.tensors)
    for tensor in expected.tensors.values():
        values = tensor.finite()
        if values.ndim == 2:  # norms and biases are exported in F32
            bits = quants.quantize(values, T.BF16)
            values = quants.dequantize(bits, T.BF16)
        assert np.array_equal(found.tensor(tensor.name).finite(), values), tensor.name
    assert found.config.values["eos_token_id"] == EOS_IDS[0]


@pytest.mark.parametrize("type", dequantised_types(), ids=lambda type: type.name)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_every_type_is_what_the_library_makes_of_it(
    name: str, type: GGMLQuantizationType, tmp_path: Path
) -> None:
    architecture = replace(
        ARCHITECTURES[name], hidden_size=256, intermediate_size=256, n_heads=4, n_kv_heads=2, n_layers=1
    )
    dense = write_checkpoint(tmp_path / "dense", architecture, {})
    change_json(dense / "config.json", lambda config: config.pop("quantization_config"))
    plain = export(dense, tmp_path / "plain.gguf")
    path = changed(plain, tmp_path / "model.gguf", requantise(type))
    checkpoint = GgufCheckpoint(path)
    read_model(checkpoint)

    tensors = gguf_models.read(path)[1]
    for gguf_name, hf_name in (
        ("blk.0.attn_q", "model.layers.0.self_attn.q_proj"),
        ("blk.0.attn_k", "model.layers.0.self_attn.k_proj"),
        ("blk.0.attn_v", "model.layers.0.self_attn.v_proj"),
        ("blk.0.ffn_down", "model.layers.0.mlp.down_proj"),
        ("token_embd", "model.embed_tokens"),
    ):
        stored, shape, data = tensors[f"{gguf_name}.weight"]
        expected = quants.dequantize(np.frombuffer(data, np.uint8).reshape(shape[0], -1), stored)
        if name == "llama" and gguf_name in ("blk.0.attn_q", "blk.0.attn_k"):
            # Head by head: rows 0, 2, 4, ... and then 1, 3, 5, ...
            heads = expected.reshape(-1, 64, shape[1])
            expected = np.concatenate([heads[:, 0::2], heads[:, 1::2]], axis=1).reshape(shape)
        tensor = checkpoint.tensor(f"{hf_name}.weight")
        assert tensor.stored_type == type.name
        assert np.array_equal(tensor.finite(), expected)
        assert np.array_equal(tensor.finite(slice(3, 17)), expected[3:17])
        assert np.array_equal(tensor.finite(np.array([5, 1, 5])), expected[[5, 1, 5]])
        assert b"".join(chunk.tobytes() for chunk in tensor.chunks()) == tensor.array().tobytes()
        tensor.release()


def test_the_library_dequantises_what_people_have() -> None:
    names = {type.name for type in dequantised_types()}
    assert names >= {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}
    assert names >= {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}


def split(source: Path, directory: Path, count: int = 3) -> Path:
    """As llama-gguf-split: all keys in the first file, the tensors in turn."""
    keys, tensors = gguf_models.read(source)
    for n in range(count):
        own: Keys = dict(keys) if n == 0 else {"general.architecture": keys["general.architecture"]}
        own |= {
            "split.no": (n, GGUFValueType.UINT16, None),
            "split.count": (count, GGUFValueType.UINT16, None),
        }
        part = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % count == n}
        gguf_models.write(directory / f"m-{n + 1:05}-of-{count:05}.gguf", own, part)
    return directory / f"m-00001-of-{count:05}.gguf"


def test_a_split_file(file: Path, tmp_path: Path) -> None:
    found, whole = GgufCheckpoint(split(file, tmp_path)), GgufCheckpoint(file)
    assert set(found.tensors) == set(whole.tensors)
    assert len(found.files()) == 3
    for name, tensor in whole.tensors.items():
        assert np.array_equal(found.tensor(name).finite(), tensor.finite())


def test_a_split_file_with_parts_that_are_wrong(file: Path, tmp_path: Path) -> None:
    first = split(file, tmp_path)
    second = tmp_path / "m-00002-of-00003.gguf"
    with pytest.raises(FileError, match=r"general\.architecture|found one of 3 files, expected the first"):
        GgufCheckpoint(tmp_path / "m-00003-of-00003.gguf")
    saved = second.read_bytes()
    second.write_bytes((tmp_path / "m-00003-of-00003.gguf").read_bytes())
    with pytest.raises(FileError, match=r"m-00002-of-00003\.gguf: split\.no: found 2, expected 1 of 3"):
        GgufCheckpoint(first)
    second.write_bytes(saved[:200])
    with pytest.raises(FileError, match=r"m-00002-of-00003\.gguf: not a whole GGUF file"):
        GgufCheckpoint(first)
    second.unlink()
    with pytest.raises(FileError, match=r"m-00002-of-00003\.gguf: found nothing, expected a GGUF file"):
        GgufCheckpoint(first)
    first.rename(tmp_path / "other.gguf")
    with pytest.raises(
        FileError, match=r"found one of 3 files, expected the first, with a name that ends in"
    ):
        GgufCheckpoint(tmp_path / "other.gguf")


# --- tokenizers


def encodes_as(checkpoint: Checkpoint, expected: Tokenizer, texts: list[str] = TEXTS) -> None:
    found = Tokenizer.from_str(checkpoint.text("tokenizer.json"))
    rng = random.Random(0)
    alphabet = "".join(texts)
    texts = texts + ["".join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(300)]
    for text in texts:
        ids = expected.encode(text).ids
        assert found.encode(text).ids == ids, text
        assert found.decode(ids) == expected.decode(ids)
        assert found.decode(ids, skip_special_tokens=False) == expected.decode(ids, skip_special_tokens=False)


def test_the_tokenizer_is_the_checkpoints(dense: Path, file: Path) -> None:
    checkpoint = GgufCheckpoint(file)
    encodes_as(checkpoint, Tokenizer.from_file(str(dense / "tokenizer.json")))
    before = json.loads((dense / "tokenizer_config.json").read_text())
    after = json.loads(checkpoint.text("tokenizer_config.json"))
    for key in ("bos_token", "eos_token", "chat_template", "tokenizer_class"):
        assert after[key] == before[key]
    assert json.loads(checkpoint.text("generation_config.json")) == {"bos_token_id": 0, "eos_token_id": 1}


def with_tokenizer(dense: Path, tokenizer: Tokenizer, directory: Path) -> Path:
    """A dense model with that tokenizer, exported."""
    copy = shutil.copytree(dense, directory / "dense")
    tokenizer.save(str(copy / "tokenizer.json"))
    return export(copy, directory / "model.gguf")


SPLITS: dict[str, Callable[[], Any]] = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
}


def trained(pre: Any, special: str = "<|bos|>") -> Tokenizer:
    """A byte-level tokenizer with digits that merge, where its pre-tokenizer lets them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[special, "<|end_of_text|>", "<|end_of_turn|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["12 12 12 345 345  678 the the the fox   12"] * 9, trainer)
    tokenizer.add_tokens([AddedToken("<think é>", special=False, normalized=False)])
    return tokenizer


@pytest.mark.parametrize("pre", SPLITS)
def test_how_text_is_cut(pre: str, dense: Path, tmp_path: Path) -> None:
    tokenizer = trained(SPLITS[pre]())
    path = with_tokenizer(dense, tokenizer, tmp_path)
    assert gguf_models.read(path)[0]["tokenizer.ggml.pre"][0] == pre
    texts = [*TEXTS, "12 345   678 1 2", "a<think é>b <think é>", "x  12"]
    encodes_as(GgufCheckpoint(path), tokenizer, texts)


def test_special_tokens_of_letters_that_bytes_do_not_have(dense: Path, tmp_path: Path) -> None:
    tokenizer = trained(SPLITS["gpt-2"](), special="<\uff5cbegin\u2581of\uff5c>")
    path = with_tokenizer(dense, tokenizer, tmp_path)
    encodes_as(GgufCheckpoint(path), tokenizer, ["<\uff5cbegin\u2581of\uff5c>the fox", *TEXTS])


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken"])
def test_how_text_is_cut_by_name(pre: str, dense: Path, tmp_path: Path) -> None:
    """As transformers' own tables have it, for those that it has."""
    gguf_conversion = pytest.importorskip("transformers.integrations.gguf")

    def named(keys: Keys, _: Tensors) -> None:
        keys["tokenizer.ggml.pre"] = pre, STRING, None
        keys["tokenizer.ggml.add_bos_token"] = False, BOOL, None

    source = with_tokenizer(dense, trained(SPLITS["gpt-2"]()), tmp_path)
    path = changed(source, tmp_path / "named.gguf", named)
    architecture, tokens, _ = gguf_conversion.get_gguf_tokenizer(str(path))
    theirs, _ = gguf_conversion.convert_gguf_tokenizer(architecture, tokens)
    found = Tokenizer.from_str(GgufCheckpoint(path).text("tokenizer.json"))
    splitter = json.loads(found.to_str())["pre_tokenizer"]["pretokenizers"][0]
    assert splitter["pattern"] == json.loads(theirs.to_str())["pre_tokenizer"]["pretokenizers"][0]["pattern"]


def sentencepiece_tokenizer() -> Tokenizer:
    """As Llama 2's: marks for spaces, bytes for what has no token; every way to make a token is a merge."""
    base = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    pieces = [
        "\u2581",
        *"thequickbrown",
        "th",
        "the",
        "\u2581the",
        "qu",
        "ck",
        "\u2581\u2581",
        "\u2581q",
        "ow",
    ]
    tokens = list(dict.fromkeys(base + pieces))
    vocab = {token: n for n, token in enumerate(tokens)}
    merges = [
        (token[:i], token[i:])
        for token in tokens[259:]
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in base[:3]])
    return tokenizer


def test_sentencepiece(dense: Path, tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer()
    source = tmp_path / "sentencepiece"
    shutil.copytree(dense, source)
    change_json(source / "tokenizer_config.json", lambda c: c.update(bos_token="<s>", eos_token="</s>"))
    path = with_tokenizer(source, tokenizer, tmp_path)
    assert "tokenizer.ggml.merges" not in gguf_models.read(path)[0]  # they follow from the scores
    encodes_as(GgufCheckpoint(path), tokenizer, [*TEXTS, "the quick  brown</s> the", "<s>the", "<unk>"])


def test_a_whole_tokenizer_in_the_file_is_that(dense: Path, file: Path, tmp_path: Path) -> None:
    text = (dense / "tokenizer.json").read_text()
    path = changed(
        file,
        tmp_path / "model.gguf",
        lambda keys, _: keys.update({"tokenizer.huggingface.json": (text, STRING, None)}),
    )
    assert GgufCheckpoint(path).text("tokenizer.json") == text


def test_several_tokens_end_a_text(file: Path, tmp_path: Path) -> None:
    def ends(keys: Keys, _: Tensors) -> None:
        keys["tokenizer.ggml.eot_token_id"] = 2, UINT32, None
        keys["tokenizer.ggml.eom_token_id"] = 1, UINT32, None

    checkpoint = GgufCheckpoint(changed(file, tmp_path / "model.gguf", ends))
    assert checkpoint.config.values["eos_token_id"] == [1, 2]
    assert json.loads(checkpoint.text("generation_config.json"))["eos_token_id"] == [1, 2]


# --- what is refused


def key(name: str, value: Any, type: GGUFValueType, element: GGUFValueType | None = None) -> Any:
    return lambda keys, _: keys.update({name: (value, type, element)})


def retype(name: str, type: GGMLQuantizationType, shape: tuple[int, ...], n_bytes: int) -> Any:
    return lambda _, tensors: tensors.update({name: (type, shape, b"\1" * n_bytes)})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            key("general.architecture", "gemma3", STRING),
            UnsupportedError,
            "general.architecture: 'gemma3' is not supported, only llama, qwen2",
        ),
        (key("vptq.version", 1, UINT32), UnsupportedError, "found a VPTQ file, which is quantised already"),
        (
            key("general.type", "adapter", STRING),
            FileError,
            "general.type: found 'adapter', expected a model",
        ),
        (
            key("tokenizer.ggml.model", "rwkv", STRING),
            UnsupportedError,
            "tokenizer.ggml.model: 'rwkv' is not supported, only 'gpt2', 'llama'",
        ),
        (
            key("tokenizer.ggml.pre", "default", STRING),
            UnsupportedError,
            "tokenizer.ggml.pre: 'default' is not supported, only llama-bpe",
        ),
        (lambda k, t: k.pop("tokenizer.ggml.tokens"), FileError, "tokenizer.ggml.tokens: found None"),
        (key("llama.expert_count", 8, UINT32), UnsupportedError, "llama.expert_count: 8 is not supported"),
        (key("llama.block_count", 1 << 30, UINT32), FileError, "num_hidden_layers: found 1073741824"),
        (
            key("llama.block_count", "a", STRING),
            FileError,
            "llama.block_count: found 'a', expected an integer",
        ),
        (key("llama.attention.head_count", 0, UINT32), FileError, "head_count: found 0, expected an integer"),
        (key("llama.attention.head_count_kv", 3, UINT32), FileError, "k_proj.weight: found 20 rows"),
        (key("llama.rope.dimension_count", 10, UINT32), UnsupportedError, "rope.dimension_count: 10 is not"),
        (
            key("llama.rope.scaling.type", "yarn", STRING),
            UnsupportedError,
            "llama.rope.scaling.type: 'yarn' is not supported, only none, linear",
        ),
        (key("tokenizer.ggml.eos_token_id", 1 << 31, UINT32), FileError, "eos_token_id: found 2147483648"),
        (
            key("tokenizer.ggml.merges", ["a b c"], ARRAY, STRING),
            FileError,
            "merges: found 'a b c', expected two",
        ),
        (key("tokenizer.ggml.merges", ["zz yy"], ARRAY, STRING), FileError, "not a tokenizer"),
        (key("tokenizer.ggml.tokens", ["a", "a"], ARRAY, STRING), FileError, "token_type: found"),
        (
            key("tokenizer.ggml.tokens", ["a"] * 328, ARRAY, STRING),
            FileError,
            "found a 305 times, expected each",
        ),
        (
            key("tokenizer.ggml.tokens", ["a"] * 400, ARRAY, STRING),
            FileError,
            "found 400 tokens, expected 1 to 328",
        ),
        (key("tokenizer.ggml.tokens", ["a" * 9999], ARRAY, STRING), FileError, "found 9999 characters"),
        (
            key("tokenizer.chat_template", 1, UINT32),
            FileError,
            "tokenizer.chat_template: found 1, expected a",
        ),
        (lambda k, t: t.pop("token_embd.weight"), FileError, "found no matrix token_embd.weight"),
        (lambda k, t: t.pop("blk.1.attn_q.weight"), FileError, "self_attn.q_proj.weight is missing"),
        (retype("blk.0.extra.weight", T.F32, (4,), 16), FileError, "blk.0.extra.weight: found F32 (4,)"),
        (
            retype("blk.0.ffn_up.weight", T.I8, (198, 100), 19800),
            UnsupportedError,
            "type I8 is not supported",
        ),
        (
            retype("blk.0.ffn_up.weight", T.F16, (99, 100), 19800),
            FileError,
            "up_proj.weight: found shape (99",
        ),
        (retype("rope_freqs.weight", T.F32, (3,), 12), FileError, "rope_freqs.weight: found shape (3,)"),
        (
            lambda k, t: t.update(
                {"rope_freqs.weight": (T.F32, (10,), np.arange(1, 11, dtype="f4").tobytes())}
            ),
            UnsupportedError,
            "rope_freqs.weight: found divisors that are not those of llama3 scaling",
        ),
    ],
)
def test_refused(change: Any, error: type[Exception], message: str, file: Path, tmp_path: Path) -> None:
    path = changed(file, tmp_path / "model.gguf", change)
    with pytest.raises(error) as raised:
        read_model(GgufCheckpoint(path))
    assert message in str(raised.value)
    assert str(raised.value).startswith(str(path))


def test_a_nan(file: Path, tmp_path: Path) -> None:
    def nan(_: Keys, tensors: Tensors) -> None:
        type, shape, data = tensors["blk.0.ffn_up.weight"]
        tensors["blk.0.ffn_up.weight"] = type, shape, b"\xff\xff" + data[2:]

    checkpoint = GgufCheckpoint(changed(file, tmp_path / "model.gguf", nan))
    with pytest.raises(FileError, match=r"up_proj\.weight: found a NaN or infinity"):
        checkpoint.tensor("model.layers.0.mlp.up_proj.weight").finite()


def test_damaged_anywhere(file: Path, tmp_path: Path) -> None:
    """Cut, or with bytes changed: an error of ours or a model, never another exception."""
    data = file.read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "model.gguf"
    n_refused = 0
    for n in range(150):
        damaged = bytearray(data)
        if n % 3 == 0:
            del damaged[int(rng.integers(len(data))) :]
        else:
            limit = 2000 if n % 3 == 1 else 40_000  # the header, and what is behind the vocabulary
            for at in rng.integers(0, limit, 4):
                damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            read_model(GgufCheckpoint(path))
        except VPTQError as error:
            n_refused += 1
            assert "\n" not in str(error)
    assert n_refused > 75


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GGUF",
        b"GGUF\3\0\0\0" + b"\xff" * 16,
        b"GGUF\3\0\0\0" + (1 << 60).to_bytes(8, "little") + bytes(8),
        b"GGUF\3\0\0\0" + bytes(8) + (1 << 60).to_bytes(8, "little") + bytes(1 << 12),
    ],
)
def test_no_gguf_file(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(FileError):
        open_checkpoint(path)


def test_a_vptq_file(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "vptq", ARCHITECTURES["llama"], CONFIGURATIONS["v8-k256-256"])
    convert(source, tmp_path / "model.gguf")
    with pytest.raises(UnsupportedError, match="found a VPTQ file, which is quantised already"):
        open_checkpoint(tmp_path / "model.gguf")


def test_a_file_that_changes(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(file.read_bytes())
    tensor = GgufCheckpoint(path).tensor("model.norm.weight")
    assert len(tensor.finite()) == 100
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(
        FileError, match=r"found \d+ bytes, expected the \d+ bytes from before: it was changed"
    ):
        tensor.finite()
    path.unlink()
    with pytest.raises(FileError, match="found no file, expected the"):
        tensor.finite()
