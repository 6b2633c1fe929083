"""What ends one sequence, and what of its text is still to come then."""

import pytest

from vptq_runtime import _native
from vptq_runtime.sequence import DecodingSequence
from vptq_runtime.text.text_stream import TextStream
from vptq_runtime.text.tokenizer import Tokenizer

EOS = 1
E_ACUTE = "é".encode()


@pytest.fixture
def tokenizer(byte_fallback: str) -> Tokenizer:
    return Tokenizer(byte_fallback, 1000, "test.gguf")


def sequence_of(tokenizer: Tokenizer, max_tokens: int, stop: tuple[str, ...] = ()) -> DecodingSequence:
    sampler = _native.Sampler(temperature=0, top_k=0, top_p=1, min_p=0, repeat_penalty=1, seed=0)
    return DecodingSequence([0], max_tokens, sampler, frozenset([EOS]), TextStream(tokenizer, stop))


def token(byte: int) -> int:
    return 3 + byte


def test_end_token_releases_what_was_held(tokenizer: Tokenizer) -> None:
    sequence = sequence_of(tokenizer, 10, ("xyz",))
    assert [sequence.accept(token(byte)) for byte in (*b"a", *b"x", E_ACUTE[0])] == ["a", "", ""]
    assert sequence.finish_reason is None
    assert sequence.accept(EOS) == "x\ufffd"
    assert (sequence.finish_reason, sequence.n_decoded) == ("stop", 3)
    assert sequence.tokens == [token(byte) for byte in (*b"ax", E_ACUTE[0])]


def test_last_token_releases_what_was_held(tokenizer: Tokenizer) -> None:
    sequence = sequence_of(tokenizer, 2, ("xyz",))
    assert [sequence.accept(token(byte)) for byte in b"ax"] == ["a", "x"]
    assert sequence.finish_reason == "length"


def test_stop_string_in_what_was_held(tokenizer: Tokenizer) -> None:
    sequence = sequence_of(tokenizer, 2, ("\ufffd",))
    assert [sequence.accept(token(byte)) for byte in (*b"a", E_ACUTE[0])] == ["a", ""]
    assert sequence.finish_reason == "stop"


def test_stop_string_by_the_last_token(tokenizer: Tokenizer) -> None:
    sequence = sequence_of(tokenizer, 3, ("bc",))
    assert [sequence.accept(token(byte)) for byte in b"abc"] == ["a", "", ""]
    assert sequence.finish_reason == "stop"
