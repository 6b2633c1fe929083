"""What a model file says of tokens: its tokenizer, its special tokens, its chat template."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vptq_runtime import _native
from vptq_runtime.checks import check_int, shown
from vptq_runtime.errors import FileError, OptionError, UnsupportedError
from vptq_runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from vptq_runtime.text.chat_template import ChatTemplate

TOKENIZER_KEY = "tokenizer.huggingface.json"
LONG_TOKEN = 64  # characters; some more than tokens have, for what normalizers drop


class Vocabulary:
    """The tokens 0 ... n_vocab - 1 of the model in the file `path`, and texts in them.

    A file without a tokenizer is fine until somebody needs one. Raises FileError for what is damaged.
    """

    def __init__(self, metadata: Mapping[str, Any], n_vocab: int, path: str) -> None:
        self.n_vocab = n_vocab
        self.path = path
        self._metadata = metadata
        self._tokenizer: Tokenizer | None = None
        if (tokenizer_json := metadata.get(TOKENIZER_KEY)) is not None:
            self._tokenizer = Tokenizer(tokenizer_json, n_vocab, path)
            del tokenizer_json  # it and its parts were tens of MB
            _native.return_freed_memory()
        self.end_tokens = frozenset(self._file_tokens("vptq.eos_token_ids"))

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises UnsupportedError where the file has none."""
        if self._tokenizer is None:
            found = f"the model has no tokenizer ({TOKENIZER_KEY})"
            raise UnsupportedError(f"{self.path}: {found}, expected one: use token ids, not text")
        return self._tokenizer

    @property
    def bos_token(self) -> int | None:
        """The token that the tokenizer puts in front of a text; None where it puts none."""
        if self._metadata.get("tokenizer.ggml.add_bos_token") is not True:
            return None
        return next(iter(self._file_tokens("tokenizer.ggml.bos_token_id")), None)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """Raises UnsupportedError where the file has none, FileError where it is damaged."""
        from vptq_runtime.text.chat_template import ChatTemplate  # jinja2 is only loaded for a chat

        return ChatTemplate.of_file(self._metadata, self.tokenizer, self.path)

    def encode(self, text: str, add_special: bool) -> list[int]:
        if not isinstance(text, str):
            raise OptionError(f"text: found {shown(text)}, expected a string")
        return self.tokenizer.encode(text, add_special)

    def checked(self, option: str, tokens: object) -> list[int]:
        """A list of token ids; OptionError for anything else."""
        if not isinstance(tokens, list | tuple):
            raise OptionError(f"{option}: found {shown(tokens)}, expected a list of token ids")
        for index, token in enumerate(tokens):
            if type(token) is not int or not 0 <= token < self.n_vocab:
                check_int(f"{option}[{index}]", token, 0, self.n_vocab - 1)
        return list(tokens)

    def shown(self, token: int) -> str:
        """A token by itself: its text within others, or, of a special one, how the vocabulary spells it."""
        check_int("token", token, 0, self.n_vocab - 1)
        if self._tokenizer is None:
            return f"[{token}]"
        anchor = self._tokenizer.encode("a", add_special=False)
        text = self._tokenizer.decode([*anchor, token]).removeprefix(self._tokenizer.decode(anchor))
        return text or self._tokenizer.token(token) or ""

    def prompt(self, prompt: object, n_ctx: int) -> list[int]:
        """The tokens of a prompt, a text or a list of token ids: at least one, and less than n_ctx."""
        if isinstance(prompt, str):
            # A text that cannot fit is refused before the tokenizer spends minutes on it.
            most = n_ctx * max(self.tokenizer.longest, LONG_TOKEN)
            if len(prompt) > most:
                expected = f"expected at most {most}: n_ctx is {n_ctx}"
                raise OptionError(f"prompt: found {len(prompt)} characters, {expected}")
            tokens = self.encode(prompt, add_special=True)
        elif isinstance(prompt, list | tuple):
            tokens = self.checked("prompt", prompt)
        else:
            raise OptionError(f"prompt: found {shown(prompt)}, expected a string or a list of token ids")
        tokens = tokens or self._file_tokens("tokenizer.ggml.bos_token_id")
        if not tokens:
            raise OptionError(
                "prompt: found no tokens, expected some: the model has no BOS token to start from"
            )
        if len(tokens) >= n_ctx:
            expected = f"expected at most {n_ctx - 1}: n_ctx is {n_ctx}, and one has to be free"
            raise OptionError(f"prompt: found {len(tokens)} tokens, {expected}")
        return tokens

    def same_tokens(self, other: Vocabulary) -> bool:
        """Whether a token id of one stands for the same as in the other."""
        if self._tokenizer is None or other._tokenizer is None:
            return self._tokenizer is other._tokenizer and self.n_vocab == other.n_vocab
        return self._tokenizer.spellings() == other._tokenizer.spellings()

    def _file_tokens(self, key: str) -> list[int]:
        """Token ids that the file has under a key: one, several or none."""
        tokens, checked = self._metadata.get(key, []), list[int]()
        for token in tokens if isinstance(tokens, list) else [tokens]:
            if not isinstance(token, int) or not 0 <= token < self.n_vocab:
                expected = f"expected token ids below {self.n_vocab}"
                raise FileError(f"{self.path}: {key}: found {shown(token)}, {expected}")
            checked.append(token)
        return checked
