"""Text to token ids and back: Hugging Face's `tokenizers`, fed from the model file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from tokenizers import Tokenizer as HuggingFaceTokenizer

from vptq_runtime.errors import FileError, OptionError

T = TypeVar("T")
MAX_GROWTH = 1000.0  # times that normalising or decoding may lengthen a text; real tokenizers: 3, of a space


class Tokenizer:
    """The tokenizer of one model file, checked against the model's vocabulary.

    `file` names the model in error messages; `n_vocab` is the number of rows of its embedding.
    """

    def __init__(self, tokenizer_json: object, n_vocab: int, file: str) -> None:
        self._file = file
        self._n_vocab = n_vocab
        if not isinstance(tokenizer_json, str):
            found = type(tokenizer_json).__name__
            raise FileError(f"{file}: tokenizer.huggingface.json: found {found}, expected a string")
        self._tokenizer = self._guarded(lambda: HuggingFaceTokenizer.from_str(tokenizer_json))
        # A tokenizer.json may ask for cut or padded results, which suits training and never a prompt.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        for step in (self._tokenizer.normalizer, self._tokenizer.decoder):
            if step is not None and _growth(json.loads(step.__getstate__())) > MAX_GROWTH:
                raise FileError(
                    f"{file}: tokenizer.huggingface.json: found replacements that lengthen a text more than "
                    f"{MAX_GROWTH:.0f} times, expected a tokenizer's"
                )
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise FileError(f"{file}: tokenizer.huggingface.json: found an empty vocabulary, expected tokens")
        self.longest = max(map(len, vocabulary))  # characters of a token, as the vocabulary spells it
        largest = max(vocabulary.values())
        if largest >= n_vocab:
            raise FileError(
                f"{file}: tokenizer.huggingface.json: found token id {largest}, "
                f"expected ids below {n_vocab}, the rows of token_embd.weight"
            )

    def encode(self, text: str, add_special: bool) -> list[int]:
        """Token ids of `text`; `add_special` puts the model's BOS (or whatever it has) around it."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise OptionError(
                f"prompt: found invalid UTF-8 at character {error.start}, expected valid Unicode text"
            ) from None
        ids = self._guarded(lambda: self._tokenizer.encode(text, add_special_tokens=add_special).ids)
        # A post-processor carries ids of its own, which the vocabulary's check has not seen.
        if ids and max(ids) >= self._n_vocab:
            raise FileError(
                f"{self._file}: tokenizer.huggingface.json: the post-processor adds token id {max(ids)}, "
                f"expected ids below {self._n_vocab}"
            )
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`, special tokens left out; bytes that are not UTF-8 become U+FFFD."""
        return self._guarded(lambda: self._tokenizer.decode(tokens, skip_special_tokens=True))

    @property
    def json(self) -> str:
        """As a tokenizer.json has it; made anew."""
        return self._tokenizer.to_str()

    def spellings(self) -> dict[str, int]:
        """Every token's id, by how the vocabulary spells it; made anew."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def token(self, token_id: int) -> str | None:
        """How the vocabulary spells a token (`<s>`), None where it has none of that id."""
        return self._tokenizer.id_to_token(token_id) if 0 <= token_id < self._n_vocab else None

    def _guarded(self, call: Callable[[], T]) -> T:
        # The library reports a bad tokenizer.json as a bare Exception, or as a Rust panic: a BaseException.
        try:
            return call()
        except BaseException as error:
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                reason = " ".join(str(error).split())[:200]
                raise FileError(f"{self._file}: tokenizer.huggingface.json: {reason}") from None
            raise


def _growth(step: Any) -> float:
    """How many times longer a step, or a sequence of them, can make a text: a chain of replacements can
    take all memory, in a library that then ends the process."""
    if not isinstance(step, dict):
        return 1.0
    growth = 1.0
    for inner in [*step.get("normalizers", []), *step.get("decoders", [])]:
        growth = min(growth * _growth(inner), 2 * MAX_GROWTH)
    if step.get("type") == "Replace":
        pattern = step["pattern"].get("String", "")  # a Regex may match between any two characters
        growth *= max(1.0, len(step["content"]) / len(pattern) if pattern else 1 + len(step["content"]))
    return growth
