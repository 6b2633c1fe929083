"""The tokenizer that a model file carries, good and hostile."""

import json
from typing import Any

import pytest

from vptq_runtime import FileError, OptionError
from vptq_runtime.text.tokenizer import Tokenizer


def changed(tokenizer_json: str, **changes: Any) -> str:
    return json.dumps(json.loads(tokenizer_json) | changes)


def test_round_trip(byte_level: str) -> None:
    tokenizer = Tokenizer(byte_level, 1000, "m.gguf")
    with_bos, without = tokenizer.encode("the é", True), tokenizer.encode("the é", False)
    assert with_bos == [0, *without]
    assert tokenizer.decode(with_bos) == "the é"
    assert tokenizer.token(1) == "</s>"
    for unknown in (999, -1, 2**64):
        assert tokenizer.token(unknown) is None


def test_limits_of_training_do_not_apply(byte_level: str) -> None:
    truncation = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    padding = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<s>",
    }
    padding["pad_to_multiple_of"] = None
    tokenizer = Tokenizer(changed(byte_level, truncation=truncation, padding=padding), 1000, "m.gguf")
    assert len(tokenizer.encode("abcdef", True)) == 7


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"model": 1}', "[" * 100_000, "\x00", '"' + "a" * 100]
)
def test_damaged_json(text: str) -> None:
    with pytest.raises(FileError, match=r"^m\.gguf: tokenizer\.huggingface\.json: .") as error:
        Tokenizer(text, 1000, "m.gguf")
    assert "\n" not in str(error.value)


def test_not_a_string() -> None:
    with pytest.raises(FileError, match="found int, expected a string"):
        Tokenizer(5, 1000, "m.gguf")


def test_vocabulary_larger_than_the_embedding(byte_level: str) -> None:
    largest = max(json.loads(byte_level)["model"]["vocab"].values())
    Tokenizer(byte_level, largest + 1, "m.gguf")
    with pytest.raises(FileError, match=f"found token id {largest}, expected ids below {largest}"):
        Tokenizer(byte_level, largest, "m.gguf")


def test_empty_vocabulary(byte_level: str) -> None:
    model = {"type": "BPE", "vocab": {}, "merges": []}
    with pytest.raises(FileError, match="expected"):
        Tokenizer(changed(byte_level, model=model, added_tokens=[], post_processor=None), 1000, "m.gguf")


def test_post_processor_with_an_id_of_its_own(byte_level: str) -> None:
    processor = json.loads(byte_level)["post_processor"]
    processor["special_tokens"]["<s>"]["ids"] = [4_000_000_000]
    tokenizer = Tokenizer(changed(byte_level, post_processor=processor), 1000, "m.gguf")
    assert tokenizer.encode("a", False)
    with pytest.raises(FileError, match="post-processor adds token id 4000000000, expected ids below 1000"):
        tokenizer.encode("a", True)


def test_lone_surrogate(byte_level: str) -> None:
    with pytest.raises(OptionError, match="invalid UTF-8 at character 2"):
        Tokenizer(byte_level, 1000, "m.gguf").encode("ab\udc80", True)


DOUBLING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BETWEEN = {"type": "Replace", "pattern": {"Regex": ""}, "content": "b" * 1000}


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Sequence", "normalizers": [DOUBLING] * 40}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [BETWEEN]}]}},
        {"decoder": {"type": "Sequence", "decoders": [DOUBLING] * 40}},
    ],
)
def test_replacements_that_would_take_all_memory(byte_level: str, changes: dict[str, Any]) -> None:
    with pytest.raises(FileError, match="lengthen a text more than 1000 times"):
        Tokenizer(changed(byte_level, **changes), 1000, "m.gguf")


def test_harmless_replacements(byte_level: str) -> None:
    changes = {"normalizer": {"type": "Sequence", "normalizers": [DOUBLING] * 3}}
    assert len(Tokenizer(changed(byte_level, **changes), 1000, "m.gguf").encode("a", False)) == 8
