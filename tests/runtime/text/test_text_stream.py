"""Streamed text: every UTF-8 split, bytes that are no UTF-8, stop strings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vptq_runtime.text.text_stream import TextStream
from vptq_runtime.text.tokenizer import Tokenizer

MANY_SCRIPTS = "aé ß ᚠ 漢字 한 🙂 👩🏽‍🚀 é ש the end"
REPLACEMENT = "\ufffd"


@pytest.fixture(scope="session")
def bytes_tokenizer(byte_level: str) -> Tokenizer:
    return Tokenizer(byte_level, 1000, "test.gguf")


@pytest.fixture(scope="session")
def fallback_tokenizer(byte_fallback: str) -> Tokenizer:
    return Tokenizer(byte_fallback, 1000, "test.gguf")


def pieces_of(tokenizer: Tokenizer, tokens: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.flush()]


# GPT-2 spells bytes as letters: printable Latin-1 stands for itself, the rest counts on from U+0100.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
SPELLING = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(OTHERS)}


def byte_tokens(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One token for each byte."""
    ids = {tokenizer.token(token): token for token in range(2, 258)}
    return [ids[SPELLING[byte]] for byte in data]


def fallback_tokens(data: bytes) -> list[int]:
    return [3 + byte for byte in data]


def test_many_scripts_arrive_whole(bytes_tokenizer: Tokenizer) -> None:
    pieces = pieces_of(bytes_tokenizer, byte_tokens(bytes_tokenizer, MANY_SCRIPTS.encode()))
    assert "".join(pieces) == MANY_SCRIPTS
    # One token a byte: each character comes with its last byte, alone.
    assert [piece for piece in pieces if piece] == list(MANY_SCRIPTS)


def test_byte_fallback_arrives_whole(fallback_tokenizer: Tokenizer) -> None:
    pieces = pieces_of(fallback_tokenizer, fallback_tokenizer.encode(MANY_SCRIPTS, add_special=False))
    assert [piece for piece in pieces if piece] == list(" " + MANY_SCRIPTS)


@given(st.text())
def test_any_text_byte_level(bytes_tokenizer: Tokenizer, text: str) -> None:
    assert "".join(pieces_of(bytes_tokenizer, bytes_tokenizer.encode(text, add_special=False))) == text


@given(st.text().filter(lambda text: text and REPLACEMENT not in text))
def test_any_text_byte_fallback(fallback_tokenizer: Tokenizer, text: str) -> None:
    """The space that this tokenizer puts in front of a text is one when the text continues another."""
    assert (
        "".join(pieces_of(fallback_tokenizer, fallback_tokenizer.encode(text, add_special=False)))
        == " " + text
    )


@given(st.lists(st.one_of(st.binary(max_size=4), st.text(max_size=2).map(str.encode))).map(b"".join))
def test_any_bytes(bytes_tokenizer: Tokenizer, data: bytes) -> None:
    """What a model writes need not be UTF-8: the bad bytes become U+FFFD, and nothing else does."""
    text = "".join(pieces_of(bytes_tokenizer, byte_tokens(bytes_tokenizer, data)))
    assert text == data.decode(errors="replace")


@pytest.mark.parametrize("text", ["\ufffd🙂", "a\ufffdé\ufffd\ufffd🙂\ufffd", "\ufffd" * 9])
def test_a_true_replacement_character(bytes_tokenizer: Tokenizer, text: str) -> None:
    assert "".join(pieces_of(bytes_tokenizer, byte_tokens(bytes_tokenizer, text.encode()))) == text


def test_two_unfinished_characters(bytes_tokenizer: Tokenizer) -> None:
    data = "🙂".encode()[:3] + "é".encode()
    assert "".join(pieces_of(bytes_tokenizer, byte_tokens(bytes_tokenizer, data))) == REPLACEMENT + "é"


@pytest.mark.parametrize("junk", range(1, 8))
def test_character_after_junk(bytes_tokenizer: Tokenizer, fallback_tokenizer: Tokenizer, junk: int) -> None:
    data = b"\xff" * junk + "🙂 é".encode()
    expected = REPLACEMENT * junk + "🙂 é"
    assert "".join(pieces_of(bytes_tokenizer, byte_tokens(bytes_tokenizer, data))) == expected
    assert "".join(pieces_of(fallback_tokenizer, fallback_tokens(data))) == expected


def test_unfinished_character_is_flushed(bytes_tokenizer: Tokenizer) -> None:
    assert pieces_of(bytes_tokenizer, byte_tokens(bytes_tokenizer, "a🙂".encode()[:-1])) == [
        "a",
        "",
        "",
        "",
        REPLACEMENT,
    ]


def test_special_tokens_have_no_text(bytes_tokenizer: Tokenizer) -> None:
    a, e = byte_tokens(bytes_tokenizer, b"ae")
    assert pieces_of(bytes_tokenizer, [0, a, 1, e, 999]) == ["", "a", "", "e", "", ""]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "two"), "one "),
        ("one two three", ("four",), "one two three"),
        ("one tw", ("two",), "one tw"),  # held back, then released at the end
        ("aaab", ("aab",), "a"),  # a start that overlaps itself
        ("two", ("two",), ""),
        ("a🙂b", ("🙂",), "a"),
        ("a\n\nb", ("\n\n", "\n"), "a"),
        ("xabcabd", ("abcabd",), "x"),
        ("xabcabcabd", ("abcabd",), "xabc"),
    ],
)
def test_stop(bytes_tokenizer: Tokenizer, text: str, stop: tuple[str, ...], expected: str) -> None:
    tokens = byte_tokens(bytes_tokenizer, text.encode())
    stream = TextStream(bytes_tokenizer, stop)
    pushed = "".join(stream.push(token) for token in tokens)
    assert pushed + stream.flush() == expected
    assert stream.stopped == (expected != text)


@given(st.text("ab\u00e9", max_size=30), st.lists(st.text("ab\u00e9", min_size=1, max_size=4), max_size=3))
def test_stop_is_found_as_early_as_possible(bytes_tokenizer: Tokenizer, text: str, stop: list[str]) -> None:
    """As if the text were searched anew after every character."""
    expected, stopped = text, False
    for end in range(len(text) + 1):
        found = [position for string in stop if (position := text[:end].find(string)) >= 0]
        if found:
            expected, stopped = text[: min(found)], True
            break
    stream = TextStream(bytes_tokenizer, stop)
    pieces = [stream.push(token) for token in byte_tokens(bytes_tokenizer, text.encode())]
    assert "".join(pieces) + stream.flush() == expected
    assert stream.stopped == stopped


def test_only_a_possible_start_is_held_back(bytes_tokenizer: Tokenizer) -> None:
    tokens = byte_tokens(bytes_tokenizer, b"a stop st stop!")
    assert pieces_of(bytes_tokenizer, tokens[:9], ("stop!",)) == [
        "a",
        " ",
        "",
        "",
        "",
        "",
        "stop ",
        "",
        "",
        "st",
    ]
    assert "".join(pieces_of(bytes_tokenizer, tokens, ("stop!",))) == "a stop st "
