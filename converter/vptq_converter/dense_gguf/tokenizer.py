"""`tokenizer.ggml.*` of a dense GGUF file -> tokenizer.json and the files beside it.

Built with the `tokenizers` library, by what llama.cpp does with these keys. transformers' own converter is of
no use here: it cuts the text of several models as GPT-2's, and loses special tokens that have other letters
than the byte-level alphabet's.
"""

from __future__ import annotations

import json
from collections import Counter
from math import isfinite
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from vptq_converter.config import Section
from vptq_converter.tokenizer import SPLITTERS
from vptq_runtime.errors import FileError, UnsupportedError, VPTQError, printable

MAX_TOKEN = 1024  # characters
PREFIX = "tokenizer.ggml."
_REGEX = {name: regex for regex, name in SPLITTERS.items()}
# How text is cut before merging, by llama.cpp's name: a regular expression, or GPT-2's with digits one by one
# or together.
ALONE, TOGETHER = "digits one by one", "digits together"
PRE_TOKENIZERS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe"), _REGEX["llama-bpe"]),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _REGEX["qwen2"]),
    "tekken": _REGEX["tekken"],
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b"), ALONE),
    **dict.fromkeys(("gpt-2", "phi-2"), TOGETHER),
}
# A piece of text that is a token as a whole is that one, whatever its merges give; and BOS stands in front
# unless a key says otherwise.
WHOLE_FIRST = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # Hugging Face's name: GGUF's
END_IDS = ("eos", "eot", "eom")  # every one of them ends a text
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # where the file leaves them out


def tokenizer_files(keys: Section, n_vocab: int) -> dict[str, str]:
    """Text of tokenizer.json, tokenizer_config.json and generation_config.json, by their names.

    n_vocab: rows of the embedding. Raises FileError for what is missing, damaged or contradicts itself,
    UnsupportedError for a tokenizer of another kind.
    """
    kind = keys.values.get(f"{PREFIX}model")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedError(f"{keys.path}: {PREFIX}model: {kind!r} is not supported, only 'gpt2', 'llama'")
    tokens = _strings(keys, "tokens")
    if not 1 <= len(tokens) <= n_vocab:
        expected = f"1 to {n_vocab}, the rows of token_embd.weight"
        raise FileError(f"{keys.path}: {PREFIX}tokens: found {len(tokens)} tokens, expected {expected}")
    ids = _special_ids(keys, len(tokens), kind == "llama")
    whole = keys.values.get("tokenizer.huggingface.json")
    text = whole if isinstance(whole, str) else _build(keys, kind, tokens, ids)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    config |= {f"{name}_token": tokens[ids[key]] for name, key in SPECIAL.items() if key in ids}
    template = keys.values.get("tokenizer.chat_template")
    if template is not None:
        if not isinstance(template, str):
            raise keys.error("tokenizer.chat_template", template, "a string")
        config["chat_template"] = template
    return {
        "tokenizer.json": text,
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        "generation_config.json": json.dumps(token_ids(keys, len(tokens)), indent=2) + "\n",
    }


def token_ids(keys: Section, n_tokens: int) -> dict[str, int | list[int]]:
    """`bos_token_id`, `eos_token_id` (a list where several tokens end a text) and `pad_token_id`, as
    config.json has them; raises FileError."""
    ids = _special_ids(keys, n_tokens, keys.values.get(f"{PREFIX}model") == "llama")
    result: dict[str, int | list[int]] = {}
    ends = list(dict.fromkeys(ids[name] for name in END_IDS if name in ids))
    if "bos" in ids:
        result["bos_token_id"] = ids["bos"]
    if ends:
        result["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if "padding" in ids:
        result["pad_token_id"] = ids["padding"]
    return result


def _special_ids(keys: Section, n_tokens: int, sentencepiece: bool) -> dict[str, int]:
    """Token ids by GGUF's name."""
    ids = {}
    for name in dict.fromkeys((*SPECIAL.values(), *END_IDS)):
        key = f"{PREFIX}{name}_token_id"
        value = keys.values.get(key, SENTENCEPIECE_IDS.get(name) if sentencepiece else None)
        if value is None:
            continue
        if type(value) is not int or not 0 <= value < n_tokens:
            raise keys.error(key, value, f"a token id from 0 to {n_tokens - 1}")
        ids[name] = value
    return ids


def _strings(keys: Section, name: str) -> list[str]:
    values = keys.values.get(f"{PREFIX}{name}")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise keys.error(f"{PREFIX}{name}", values, "an array of strings")
    longest, most = max(map(len, values), default=0), 2 * MAX_TOKEN + 1  # a merge is two tokens and a space
    if longest > most:  # merges are sought in each of a token's places
        raise FileError(f"{keys.path}: {PREFIX}{name}: found {longest} characters, expected at most {most}")
    return values


def _types(keys: Section, n_tokens: int) -> list[int]:
    types = keys.values.get(f"{PREFIX}token_type", [TokenType.NORMAL] * n_tokens)
    if not isinstance(types, list) or len(types) != n_tokens or any(type(t) is not int for t in types):
        raise keys.error(f"{PREFIX}token_type", types, f"{n_tokens} integers, one a token")
    return types


def _build(keys: Section, kind: str, tokens: list[str], ids: dict[str, int]) -> str:
    """tokenizer.json of the keys."""
    types = _types(keys, len(tokens))
    n_tokens = len(tokens)
    while n_tokens > 1 and types[n_tokens - 1] == TokenType.UNUSED:  # rows that only fill the embedding up
        n_tokens -= 1
    vocab = {token: id for id, token in enumerate(tokens[:n_tokens])}
    if len(vocab) < n_tokens:
        token, count = Counter(tokens[:n_tokens]).most_common(1)[0]
        raise FileError(
            f"{keys.path}: {PREFIX}tokens: found {printable(token)} {count} times, expected each once"
        )
    try:
        if kind == "gpt2":
            tokenizer = _byte_level(keys, vocab)
        else:
            unknown = tokens[ids["unknown"]] if "unknown" in ids else None
            tokenizer = _sentencepiece(keys, vocab, tokens, unknown)
        _add_tokens(tokenizer, tokens[:n_tokens], types)
        _add_ends(keys, tokenizer, tokens, ids, kind)
        if tokenizer.get_vocab(with_added_tokens=True) != vocab:
            raise FileError(
                f"{keys.path}: {PREFIX}tokens: found tokens that get other ids, expected their own"
            )
        text: str = tokenizer.to_str(pretty=True)
    except (KeyboardInterrupt, SystemExit, VPTQError):
        raise
    except BaseException as error:  # plain Exception, and the library's panics, which are no Exception at all
        raise FileError(f"{keys.path}: not a tokenizer: {' '.join(str(error).split())}") from error
    return text


def _byte_level(keys: Section, vocab: dict[str, int]) -> Tokenizer:
    """BPE over bytes, spelled as letters."""
    pre = keys.values.get(f"{PREFIX}pre")
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise UnsupportedError(f"{keys.path}: {PREFIX}pre: {pre!r} is not supported, only {known}")
    merges = (
        [tuple(merge.split(" ")) for merge in _strings(keys, "merges")]
        if f"{PREFIX}merges" in keys.values
        else []
    )
    model = models.BPE(vocab=vocab, merges=_pairs(keys, merges), ignore_merges=pre in WHOLE_FIRST)
    tokenizer = Tokenizer(model)
    prefix = keys.boolean(f"{PREFIX}add_space_prefix", default=False)
    split = PRE_TOKENIZERS[pre]
    by_itself = split in (ALONE, TOGETHER)
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=by_itself)]
    if split == ALONE:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif not by_itself:
        steps.insert(0, pre_tokenizers.Split(Regex(split), behavior="isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pairs(keys: Section, merges: list[tuple[str, ...]]) -> list[tuple[str, str]]:
    for merge in merges:
        if len(merge) != 2:
            raise keys.error(f"{PREFIX}merges", " ".join(merge), "two tokens with a space between them")
    return [(left, right) for left, right in merges]


def _sentencepiece(keys: Section, vocab: dict[str, int], tokens: list[str], unknown: str | None) -> Tokenizer:
    """SentencePiece's BPE: the tokens' scores say what is merged first; bytes have tokens of their own."""
    if f"{PREFIX}merges" in keys.values:
        merges = _pairs(keys, [tuple(merge.split(" ")) for merge in _strings(keys, "merges")])
    else:
        from transformers.tokenization_utils_base import generate_merges  # slow to load

        merges = generate_merges(vocab, dict(zip(tokens, _scores(keys, len(tokens)), strict=True)))
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = keys.boolean(f"{PREFIX}add_space_prefix", default=True)
    to_marks: list[Any] = [normalizers.Replace(" ", "\u2581")]
    to_text: list[Any] = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        to_marks.insert(0, normalizers.Prepend("\u2581"))
        to_text.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer.normalizer = normalizers.Sequence(to_marks)
    tokenizer.decoder = decoders.Sequence(to_text)
    return tokenizer


def _scores(keys: Section, n_tokens: int) -> list[float]:
    scores = keys.values.get(f"{PREFIX}scores")
    if not isinstance(scores, list) or len(scores) != n_tokens:
        raise keys.error(f"{PREFIX}scores", scores, f"{n_tokens} numbers, one a token")
    if not all(isinstance(score, float) and isfinite(score) for score in scores):
        raise FileError(f"{keys.path}: {PREFIX}scores: found a NaN or infinity, expected finite numbers")
    return scores


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Tokens that are found in a text as they are, before it is cut."""
    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=type in special, normalized=False)
            for token, type in zip(tokens, types, strict=False)
            if type in (*special, TokenType.USER_DEFINED)
        ]
    )


def _add_ends(keys: Section, tokenizer: Tokenizer, tokens: list[str], ids: dict[str, int], kind: str) -> None:
    """BOS before a text and EOS behind it, where the file wants them."""
    bos_default = kind == "llama" or keys.values.get(f"{PREFIX}pre") in WHOLE_FIRST
    first, last = [], []
    if "bos" in ids and keys.boolean(f"{PREFIX}add_bos_token", default=bos_default):
        first = [(tokens[ids["bos"]], ids["bos"])]
    if "eos" in ids and keys.boolean(f"{PREFIX}add_eos_token", default=False):
        last = [(tokens[ids["eos"]], ids["eos"])]
    if first or last:
        template = ["$A", *(token for token, _ in last)]
        template[:0] = [token for token, _ in first]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=list(dict.fromkeys(first + last))
        )
