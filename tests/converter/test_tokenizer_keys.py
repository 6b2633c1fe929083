"""tokenizer.json and its companions -> the keys of the file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CHAT_TEMPLATE, write_checkpoint
from configurations import ARCHITECTURES, CONFIGURATIONS, SPECIAL_TOKENS, VOCAB_SIZE
from converted import change_json, keys
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from vptq_converter import convert

from vptq_runtime import FileError, UnsupportedError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", ARCHITECTURES["llama"], CONFIGURATIONS["v8-k256-256"])


def converted(checkpoint: Path) -> dict[str, Any]:
    convert(checkpoint, checkpoint.parent / "out.gguf")
    return keys(checkpoint.parent / "out.gguf")


def byte_level(split: str | None) -> str:
    """A byte-level tokenizer with a few words, cut as `split` says."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate(["<s>", "</s>", *alphabet, "th", "the"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e")]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.decoder = decoders.ByteLevel()
    if split is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    return str(tokenizer.to_str())


def byte_fallback(prefix: bool) -> str:
    """As of Llama 2: letters and words after ▁, `<0x..>` for other bytes."""
    words = {"▁t": ("▁", "t"), "he": ("h", "e"), "▁the": ("▁t", "he")}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *words, "▁", *"the"]
    model = models.BPE(
        vocab={token: n for n, token in enumerate(tokens)},
        merges=list(words.values()),
        unk_token="<unk>",
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens(["hehe"])
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return str(tokenizer.to_str())


def test_the_whole_tokenizer_is_in_the_file(checkpoint: Path) -> None:
    path = checkpoint / "tokenizer.json"
    text = json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=2, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    found = converted(checkpoint)
    whole = found["tokenizer.huggingface.json"]
    assert json.loads(whole) == json.loads(text)
    assert len(whole) < len(text)  # the space between its parts is left out

    tokenizer = Tokenizer.from_str(text)
    tokens = found["tokenizer.ggml.tokens"]
    n = tokenizer.get_vocab_size()
    assert len(tokens) == VOCAB_SIZE > n
    assert tokens[:n] == [tokenizer.id_to_token(i) for i in range(n)]
    assert tokens[n:] == [f"[PAD{i}]" for i in range(n, VOCAB_SIZE)]
    special = len(SPECIAL_TOKENS)
    assert found["tokenizer.ggml.token_type"] == (
        [CONTROL] * special + [NORMAL] * (n - special) + [UNUSED] * (VOCAB_SIZE - n)
    )
    merges = json.loads(text)["model"]["merges"]
    assert found["tokenizer.ggml.merges"] == [f"{a} {b}" for a, b in merges]
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_eos_token"] is False
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert found["tokenizer.chat_template"] == CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("split", "pre"),
    [(LLAMA3_SPLIT, "llama-bpe"), (QWEN2_SPLIT, "qwen2"), (r"\w+", "default"), (None, "default")],
)
def test_how_text_is_cut(split: str | None, pre: str, checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text(byte_level(split), encoding="utf-8")
    found = converted(checkpoint)
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", pre)
    assert found["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize("prefix", [True, False])
def test_byte_fallback(prefix: bool, checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text(byte_fallback(prefix), encoding="utf-8")
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<unk>"}
    change_json(checkpoint / "tokenizer_config.json", lambda config: config.update(names))
    found = converted(checkpoint)

    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.add_space_prefix"] is prefix
    assert "tokenizer.ggml.merges" not in found
    ids = {name: found[f"tokenizer.ggml.{name}_token_id"] for name in ("unknown", "bos", "eos", "padding")}
    assert ids == {"unknown": 0, "bos": 1, "eos": 2, "padding": 0}
    assert found["tokenizer.ggml.add_bos_token"] is found["tokenizer.ggml.add_eos_token"] is True
    types = found["tokenizer.ggml.token_type"]
    assert types[:3] == [UNKNOWN, CONTROL, CONTROL]
    assert types[3:259] == [BYTE] * 256
    assert types[259:266] == [NORMAL] * 7
    tokens = found["tokenizer.ggml.tokens"]
    assert types[tokens.index("hehe")] == USER_DEFINED
    scores = dict(zip(tokens, found["tokenizer.ggml.scores"], strict=True))
    assert scores["▁t"] > scores["he"] > scores["▁the"] > scores["t"]  # as the merges are ordered


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (1, [1, 2, 3], [1, 2, 3]),
        (3, 2, [2, 3]),
        ([5, 4], None, [4, 5]),
        (None, [327], [327]),
        (None, None, [1]),  # tokenizer_config.json's
    ],
)
def test_every_token_that_ends_a_text(
    config: Any, generation: Any, expected: list[int], checkpoint: Path
) -> None:
    change_json(checkpoint / "config.json", lambda c: c.update(eos_token_id=config))
    change_json(checkpoint / "generation_config.json", lambda c: c.update(eos_token_id=generation))
    assert converted(checkpoint)["vptq.eos_token_ids"] == expected


def test_no_token_ends_a_text(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").unlink()
    (checkpoint / "tokenizer_config.json").unlink()
    change_json(checkpoint / "config.json", lambda config: config.pop("eos_token_id"))
    found = converted(checkpoint)
    assert "vptq.eos_token_ids" not in found and "tokenizer.ggml.eos_token_id" not in found
    assert found["tokenizer.ggml.bos_token_id"] == 0  # config.json's
    assert "tokenizer.chat_template" not in found


@pytest.mark.parametrize("value", [328, -1, "1", 1.0, True, [1, None], {}, 2**40])
def test_end_tokens_that_are_none(value: Any, checkpoint: Path) -> None:
    change_json(checkpoint / "generation_config.json", lambda config: config.update(eos_token_id=value))
    with pytest.raises(FileError, match=r"generation_config\.json: eos_token_id: found .* from 0 to 327"):
        converted(checkpoint)


def test_chat_templates(checkpoint: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    change_json(checkpoint / "tokenizer_config.json", lambda config: config.update(chat_template=named))
    assert converted(checkpoint)["tokenizer.chat_template"] == "yes"
    (checkpoint / "chat_template.jinja").write_text("from the file: {{ messages }} ünï", encoding="utf-8")
    assert converted(checkpoint)["tokenizer.chat_template"] == "from the file: {{ messages }} ünï"


@pytest.mark.parametrize("template", [3, {"default": "x"}, "\ud800"])
def test_chat_templates_that_are_none(template: Any, checkpoint: Path) -> None:
    change_json(checkpoint / "tokenizer_config.json", lambda config: config.update(chat_template=template))
    with pytest.raises(FileError, match=r"tokenizer_config\.json: chat_template"):
        converted(checkpoint)


def test_a_vocabulary_larger_than_the_embedding(checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.add_tokens([f"extra{n}" for n in range(VOCAB_SIZE - tokenizer.get_vocab_size())])
    (checkpoint / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    assert UNUSED not in converted(checkpoint)["tokenizer.ggml.token_type"]  # just as many
    before = (checkpoint.parent / "out.gguf").read_bytes()

    tokenizer.add_tokens(["one too many"])
    (checkpoint / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    with pytest.raises(
        FileError, match=r"tokenizer\.json: found a vocabulary of 329 tokens, expected 1 to 328"
    ):
        converted(checkpoint)
    assert (checkpoint.parent / "out.gguf").read_bytes() == before


def without_bytes(root: dict[str, Any]) -> None:
    root["decoder"] = None


def out_of_vocabulary(root: dict[str, Any]) -> None:
    root["model"]["merges"].append(["nowhere", "to be found"])


@pytest.mark.parametrize(
    ("change", "error", "part"),
    [
        (lambda root: root.update(model={"type": "Unknown"}), FileError, "not a tokenizer"),
        (lambda root: root.pop("model"), FileError, "not a tokenizer"),
        (out_of_vocabulary, FileError, "not a tokenizer"),
        (lambda root: root["model"]["vocab"].update(x=-1), FileError, "not a tokenizer"),
        (lambda root: root["model"]["vocab"].update(x=2**31), FileError, "vocabulary of 2147483649"),
        (
            lambda root: root.update(
                model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, added_tokens=[]
            ),
            UnsupportedError,
            "'WordLevel'",
        ),
        (without_bytes, UnsupportedError, "neither ByteLevel nor byte_fallback"),
    ],
)
def test_tokenizers_that_are_none(
    change: Callable[[dict[str, Any]], Any], error: type[Exception], part: str, checkpoint: Path
) -> None:
    change_json(checkpoint / "tokenizer.json", change)
    if part == "'WordLevel'":
        change_json(checkpoint / "tokenizer.json", lambda root: root.update(post_processor=None))
    with pytest.raises(error, match=part) as raised:
        converted(checkpoint)
    assert "tokenizer.json" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"\xff\xfe", b"[" * 100_000])
def test_a_tokenizer_file_that_is_no_json(content: bytes, checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_bytes(content)
    with pytest.raises(FileError, match=r"tokenizer\.json: "):
        converted(checkpoint)


def test_a_post_processor_with_a_token_beyond_the_embedding(checkpoint: Path) -> None:
    def change(tokenizer: dict[str, Any]) -> None:
        tokenizer["post_processor"]["special_tokens"][SPECIAL_TOKENS[0]]["ids"] = [VOCAB_SIZE]

    change_json(checkpoint / "tokenizer.json", change)
    with pytest.raises(FileError, match=f"post_processor: found token id {VOCAB_SIZE}, expected ids below"):
        converted(checkpoint)
