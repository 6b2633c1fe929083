"""tokenizer.json and the chat template -> the keys of docs/file-format.md.

The runtime uses the whole tokenizer.json; the `tokenizer.ggml.*` keys are for llama.cpp and for viewers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, TokenType
from tokenizers import Tokenizer

from vptq_converter.architectures import Key
from vptq_converter.checkpoint import Checkpoint
from vptq_converter.config import Section
from vptq_runtime.errors import FileError, UnsupportedError
from vptq_runtime.text_file import parse_json

# How text is cut before merging: llama.cpp has splitters built in, and tokenizer.ggml.pre names one.
# Llama 3 and Qwen2 differ in one place: how many digits go together.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITTERS = {
    _SPLIT.format(digits=r"\p{N}{1,3}"): "llama-bpe",
    _SPLIT.format(digits=r"\p{N}"): "qwen2",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}


@dataclass(frozen=True)
class TokenizerKeys:
    keys: list[Key]  # tokenizer.ggml.* and the chat template
    json: str  # the whole tokenizer.json, without the space between its parts
    eos_token_ids: list[int]  # every token that ends a text, sorted


def read_tokenizer(checkpoint: Checkpoint, n_vocab: int) -> TokenizerKeys:
    """Reads the tokenizer files beside the weights; n_vocab: rows of the embedding.

    Raises FileError for what is missing, damaged or larger than the embedding, UnsupportedError for one
    that is not BPE.
    """
    path = checkpoint.path("tokenizer.json")
    root = Section(path, parse_json(checkpoint.text("tokenizer.json"), path))
    tokenizer, whole = _load(path, root.values)
    vocabulary = {id: token for token, id in tokenizer.get_vocab(with_added_tokens=True).items()}
    if not vocabulary or max(vocabulary) >= n_vocab:
        found = f"a vocabulary of {max(vocabulary, default=-1) + 1} tokens"
        raise FileError(f"{path}: found {found}, expected 1 to {n_vocab}, the rows of the embedding")
    model = root.section("model")
    if model.values.get("type", "BPE") != "BPE":
        raise UnsupportedError(f"{path}: model.type: {model.values['type']!r} is not supported, only 'BPE'")
    byte_level = any(part.get("type") == "ByteLevel" for part in _parts(root, "decoder", "decoders"))
    if not byte_level and not model.boolean("byte_fallback", default=False):
        raise UnsupportedError(
            f"{path}: decoder: found neither ByteLevel nor byte_fallback: not every text has tokens"
        )

    config = checkpoint.section("tokenizer_config.json") or Section(path, {})
    special = _special_ids(checkpoint, config, tokenizer, n_vocab)
    eos = _eos_ids(checkpoint, n_vocab)
    if not eos and "eos" in special:
        eos = [special["eos"]]
    if eos:
        special.setdefault("eos", eos[0])
    token = model.values.get("unk_token")
    unknown = tokenizer.token_to_id(token) if isinstance(token, str) else None
    if unknown is not None:
        special["unknown"] = unknown

    added = {id: token.special for id, token in tokenizer.get_added_tokens_decoder().items()}
    tokens = [vocabulary.get(id, f"[PAD{id}]") for id in range(n_vocab)]
    types = [_token_type(id, vocabulary.get(id), added.get(id), unknown, byte_level) for id in range(n_vocab)]
    prefix = "tokenizer.ggml."
    string, array, boolean = GGUFValueType.STRING, GGUFValueType.ARRAY, GGUFValueType.BOOL
    keys: list[Key] = [
        (f"{prefix}model", "gpt2" if byte_level else "llama", string, None),
        (f"{prefix}pre", _splitter(root) if byte_level else "default", string, None),
        (f"{prefix}tokens", tokens, array, string),
        (f"{prefix}token_type", types, array, GGUFValueType.INT32),
    ]
    merges = _merges(model)
    if byte_level:
        if merges:
            keys.append((f"{prefix}merges", [f"{left} {right}" for left, right in merges], array, string))
    else:
        keys.append((f"{prefix}scores", _scores(tokens, merges), array, GGUFValueType.FLOAT32))
        keys.append((f"{prefix}add_space_prefix", _adds_space_prefix(root), boolean, None))
    keys += [(f"{prefix}{name}_token_id", id, GGUFValueType.UINT32, None) for name, id in special.items()]
    first, last = _ends(path, tokenizer, n_vocab)
    keys.append((f"{prefix}add_bos_token", first is not None and first == special.get("bos"), boolean, None))
    keys.append((f"{prefix}add_eos_token", last is not None and last == special.get("eos"), boolean, None))
    template = _chat_template(checkpoint, config)
    if template:
        keys.append(("tokenizer.chat_template", template, string, None))
    return TokenizerKeys(keys, whole, eos)


def _load(path: Any, values: dict[str, Any]) -> tuple[Tokenizer, str]:
    """The tokenizer and its JSON, without the space between its parts."""
    try:
        text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
        tokenizer: Tokenizer = Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except (
        BaseException
    ) as error:  # the library raises plain Exception, and its panics are no Exception at all
        raise FileError(f"{path}: not a tokenizer: {' '.join(str(error).split())}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, text


def _parts(root: Section, key: str, sequence: str) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, alone or in a Sequence."""
    step = root.section(key).values
    steps = step.get(sequence) if step.get("type") == "Sequence" else [step]
    yield from (part for part in steps or [] if isinstance(part, dict))


def _splitter(root: Section) -> str:
    single_digits = False
    for part in _parts(root, "pre_tokenizer", "pretokenizers"):
        pattern = part.get("pattern")
        if part.get("type") == "Split" and isinstance(pattern, dict) and pattern.get("Regex") in SPLITTERS:
            return SPLITTERS[pattern["Regex"]]
        single_digits |= part.get("type") == "Digits" and part.get("individual_digits") is True
        if part.get("type") == "ByteLevel" and part.get("use_regex", True):
            return "smollm" if single_digits else "gpt-2"
    return "default"


def _adds_space_prefix(root: Section) -> bool:
    if any(part.get("type") == "Prepend" for part in _parts(root, "normalizer", "normalizers")):
        return True
    return any(
        part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never"
        for part in _parts(root, "pre_tokenizer", "pretokenizers")
    )


def _merges(model: Section) -> list[tuple[str, str]]:
    """Best first. The library has read them already, so they are well formed: "a b" or ["a", "b"]."""
    merges = model.values.get("merges") or []
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in pairs]


def _scores(tokens: list[str], merges: list[tuple[str, str]]) -> list[float]:
    """A token scores the higher, the earlier a merge makes it; tokens that no merge makes come last."""
    rank: dict[str, int] = {}
    for n, (left, right) in enumerate(merges):
        rank.setdefault(left + right, n)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _token_type(
    id: int, token: str | None, special: bool | None, unknown: int | None, byte_level: bool
) -> TokenType:
    if token is None:
        return TokenType.UNUSED
    if id == unknown:
        return TokenType.UNKNOWN
    if special is not None:
        return TokenType.CONTROL if special else TokenType.USER_DEFINED
    if not byte_level and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
        return TokenType.BYTE
    return TokenType.NORMAL


def _special_ids(
    checkpoint: Checkpoint, config: Section, tokenizer: Tokenizer, n_vocab: int
) -> dict[str, int]:
    """Token ids by their GGUF name: as tokenizer_config.json has them, else config.json."""
    ids = {}
    for name, gguf_name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = config.values.get(f"{name}_token")
        if isinstance(token, dict):
            token = token.get("content")
        id = tokenizer.token_to_id(token) if isinstance(token, str) else None
        if id is None and name == "bos":
            listed = _ids(checkpoint.config, "bos_token_id", n_vocab)
            id = listed[0] if listed else None
        if id is not None:
            ids[gguf_name] = id
    return ids


def _ids(section: Section, key: str, n_vocab: int) -> list[int]:
    """A token id or a list of them, or none."""
    value = section.values.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(id) is not int or not 0 <= id < n_vocab for id in ids):
        raise section.error(key, value, f"token ids from 0 to {n_vocab - 1}")
    return ids


def _eos_ids(checkpoint: Checkpoint, n_vocab: int) -> list[int]:
    generation = checkpoint.section("generation_config.json")
    ids = set(_ids(checkpoint.config, "eos_token_id", n_vocab))
    if generation is not None:
        ids |= set(_ids(generation, "eos_token_id", n_vocab))
    return sorted(ids)


def _ends(path: Path, tokenizer: Tokenizer, n_vocab: int) -> tuple[int | None, int | None]:
    """The special tokens that encoding puts before and after a text."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    ids = tokenizer.encode("a").ids
    if max(ids, default=0) >= n_vocab:  # the post-processor has ids of its own, beside the vocabulary's
        raise FileError(f"{path}: post_processor: found token id {max(ids)}, expected ids below {n_vocab}")
    begin = next((n for n in range(len(ids)) if ids[n : n + len(bare)] == bare), 0)
    return ids[0] if begin > 0 else None, ids[-1] if begin + len(bare) < len(ids) else None


def _chat_template(checkpoint: Checkpoint, config: Section) -> str | None:
    """The model's chat template, the one named `default` where it has several."""
    template: Any = config.values.get("chat_template")
    if checkpoint.has("chat_template.jinja"):
        template = checkpoint.text("chat_template.jinja")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is None:
        return None
    if not isinstance(template, str):
        raise config.error("chat_template", template, "a string, or a list of named templates")
    try:
        template.encode()
    except UnicodeEncodeError as error:
        raise FileError(
            f"{config.path}: chat_template: character {error.start} is half a surrogate pair"
        ) from error
    return template
