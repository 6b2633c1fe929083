"""Constrained output: what random tokens make of it, and what cannot be asked for."""

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer, models

from vptq_runtime import OptionError, Runtime, UnsupportedError, demo_path
from vptq_runtime.engine.constraints import MAX_BYTES, Constraint, Constraints, Masks
from vptq_runtime.engine.grammar import trial as grammar_trial


class Model:
    """A tokenizer and what may be asked for of it; tokens past its vocabulary, as padded models have them."""

    def __init__(self, tokenizer_json: str, end_tokens: Sequence[int]) -> None:
        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.n_tokens = self.tokenizer.get_vocab_size()
        self.special = {entry["id"] for entry in json.loads(tokenizer_json)["added_tokens"]}
        self.end_tokens = end_tokens
        self.n_vocab = self.n_tokens + 37
        self.constraints = Constraints(tokenizer_json, self.n_vocab, end_tokens)

    def text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False))

    def tokens(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        if tokens and spelling(self, tokens[0]) == b" " != text[:1].encode():  # some put one before a text
            del tokens[0]
        return tokens

    def allowed(self, constraint: Constraint, drafts: Sequence[int] = ()) -> list[set[int]]:
        """The tokens of each row of the mask."""
        [mask] = Masks([(constraint, drafts)]).result()
        return self.sets(mask)

    def sets(self, mask: NDArray[np.int32]) -> list[set[int]]:
        assert mask.dtype == np.int32
        assert mask.shape[1] == -(-self.n_vocab // 32)
        bits = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little")
        return [{*np.flatnonzero(row).tolist()} for row in bits]


@pytest.fixture(scope="module")
def bytes_model(byte_level: str) -> Model:
    return Model(byte_level, [1])


@pytest.fixture(scope="module")
def demo() -> Model:
    with Runtime(demo_path(), device="cpu") as runtime:
        tokenizer_json = runtime.metadata["tokenizer.huggingface.json"]
        return Model(tokenizer_json, [runtime.metadata["tokenizer.ggml.eos_token_id"]])


@pytest.fixture(scope="module", params=["byte level", "byte fallback", "demo"])
def model(request: pytest.FixtureRequest, byte_level: str, byte_fallback: str) -> Model:
    if request.param == "demo":
        model: Model = request.getfixturevalue("demo")
        return model
    return Model(byte_level, [1]) if request.param == "byte level" else Model(byte_fallback, [2, 0])


def fork(constraint: Constraint) -> Constraint:
    """Another sequence, at the same place."""
    return Constraint(constraint.constraints, constraint._option, constraint.matcher.deep_copy())


def random_text(model: Model, constraint: Constraint, seed: int, most: int = 2000) -> str:
    """What comes of random tokens of those that are allowed. Drafts, good and bad, change nothing."""
    rng = np.random.default_rng(seed)
    tokens: list[int] = []
    while len(tokens) < most:
        drafts = constraint.forced(int(rng.integers(4))) or rng.integers(model.n_vocab, size=2).tolist()
        allowed, *_ = model.allowed(constraint, drafts)
        assert allowed, "an empty mask"
        assert max(allowed) < model.n_tokens, "a token that the tokenizer has not"
        assert not constraint.ended or allowed <= {*model.end_tokens}
        ends = sorted(allowed & {*model.end_tokens})
        token = int(rng.choice(ends if ends and rng.random() < 0.2 else sorted(allowed)))
        constraint.accept([token])
        if token in model.end_tokens:
            assert constraint.ended
            return model.text(tokens)
        tokens.append(token)
    raise AssertionError(f"no end: {model.text(tokens)!r}")


REGEXES = (
    r"[a-z]{2,5}(-[0-9]{1,3})?",
    r"(yes|no|maybe)( (yes|no|maybe)){0,3}",
    r"^\d{4}-[01]\d$",
    r"a/b\\c(\n|\t)[^\n]",
    r"(?i)the the",
    r"[\u00e9\u2603\U0001F600]{1,3}",
    r"(ab|a)(bc|c)?",
    r"(a{1,20}){1,20}",
    r"a+?b|",
)


@pytest.mark.parametrize("regex", REGEXES)
def test_regex(regex: str, model: Model) -> None:
    constraint = model.constraints.compile(regex=regex)
    for seed in range(4):
        text = random_text(model, fork(constraint), seed)
        assert re.fullmatch(regex, text), text


PERSON = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Person",
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 5, "description": "anything"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "colour": {"enum": ["red", "green", 3, None, {"a": [1]}]},
        "friends": {"type": "array", "items": {"$ref": "#/$defs/friend"}, "minItems": 1, "maxItems": 3},
        "odd": {"type": "string", "pattern": "^[ab]{2,4}$"},
    },
    "required": ["name", "age", "friends"],
    "additionalProperties": False,
    "$defs": {
        "friend": {"anyOf": [{"type": "boolean"}, {"type": "number", "multipleOf": 0.5, "maximum": 9}]}
    },
}


def check_person(value: Any) -> None:
    assert {"name", "age", "friends"} <= {*value} <= {*PERSON["properties"]}  # type: ignore[misc]
    assert isinstance(value["name"], str) and 1 <= len(value["name"]) <= 5
    assert type(value["age"]) is int and 0 <= value["age"] <= 150
    assert value.get("colour", "red") in ("red", "green", 3, None, {"a": [1]})
    assert 1 <= len(value["friends"]) <= 3
    for friend in value["friends"]:
        assert isinstance(friend, bool) or (friend <= 9 and friend % 0.5 == 0)
    assert re.fullmatch("[ab]{2,4}", value.get("odd", "ab"))


def check_tree(value: Any, depth: int = 0) -> None:
    assert {*value} <= {"left", "right"}
    for branch in value.values():
        check_tree(branch, depth + 1)


TREE = {
    "type": "object",
    "properties": {"left": {"$ref": "#"}, "right": {"$ref": "#"}},
    "additionalProperties": False,
}
LENGTHS = {"type": "object", "additionalProperties": {"const": 1}, "minProperties": 1, "maxProperties": 2}


def check_lengths(value: Any) -> None:
    assert isinstance(value, dict) and 1 <= len(value) <= 2
    assert {*value.values()} == {1}


@pytest.mark.parametrize(
    ("schema", "check"),
    [
        (PERSON, check_person),
        (json.dumps(PERSON), check_person),
        (TREE, check_tree),
        (LENGTHS, check_lengths),
        ({"type": ["null", "boolean"]}, lambda value: value is None or value in (True, False)),
        ({"enum": ["a", "b\n\u2603"]}, lambda value: value in ("a", "b\n\u2603")),
    ],
    ids=["person", "text", "tree", "lengths", "types", "enum"],
)
def test_json_schema(schema: Any, check: Callable[[Any], object], model: Model) -> None:
    constraint = model.constraints.compile(json_schema=schema)
    for seed in range(4):
        text = random_text(model, fork(constraint), seed)
        assert re.search(r"\s{41}", re.sub(r'"[^"]*"', "string", text)) is None
        assert check(json.loads(text)) is not False


def test_any_json(demo: Model) -> None:
    for schema in (True, "true", {}):
        constraint = demo.constraints.compile(json_schema=schema)
        for text in ('{"a": [1, null, "x"]}', "[]", "-1.5e3", '"\\n\u2603"'):
            follow(demo, fork(constraint), text)


GRAMMAR = r"""
start: sum
sum: product | sum "+" product
product: atom | product "*" atom
atom: NUMBER | "(" sum ")"
NUMBER: /[1-9][0-9]?/
"""


def follow(model: Model, constraint: Constraint, text: str) -> None:
    """The text is allowed, all of it, and may end there."""
    tokens = model.tokens(text)
    assert constraint.allowed([*tokens, model.end_tokens[0]]) == tokens
    constraint.accept(tokens)
    [allowed] = model.allowed(constraint)
    assert {*model.end_tokens} <= allowed
    constraint.accept([model.end_tokens[0]])
    assert constraint.ended


def test_grammar(demo: Model) -> None:
    constraint = demo.constraints.compile(grammar=GRAMMAR)
    for text in ("7", "1+2*3", "(1+2)*(3)*99", "((((5))))"):
        follow(demo, fork(constraint), text)
    for text in ("0", "1+", "(1", "1)", "", "1 + 2"):
        tokens = demo.tokens(text)
        other = fork(constraint)
        if other.allowed(tokens) == tokens:
            other.accept(tokens)
            assert not demo.allowed(other)[0] & {*demo.end_tokens}


def test_a_grammar_with_everything(demo: Model) -> None:
    """A schema inside, a comment, terminals that are lazy and of limited length."""
    grammar = """
    // {"not": "a schema"} [x] #
    start: word " is " %json {"type": "integer", "description": "no %json here"} end
    word[max_tokens=3]: /[a-z]+/
    end[lazy]: /[^.]*\\./
    """
    constraint = demo.constraints.compile(grammar=grammar)
    for seed in range(4):
        text = random_text(demo, fork(constraint), seed)
        assert re.fullmatch(r"[a-z]+ is -?\d+[^.]*\.", text)


LANGUAGE = {"".join(parts) for parts in product(("ab", "the ", "\u2603"), ("", "c", "th"), ("", "e!"))}


def test_masks_are_those_of_the_language(model: Model) -> None:
    """Against all that the texts of a language can begin with."""
    constraint = model.constraints.compile(regex="(ab|the |\u2603)(c|th)?(e!)?")
    texts = {text.encode() for text in LANGUAGE}
    beginnings = {text[:end] for text in texts for end in range(len(text) + 1)}
    spelled = {token: spelling(model, token) for token in range(model.n_tokens)}
    pending = [(b"", constraint)]
    while pending:
        text, constraint = pending.pop()
        [found] = model.allowed(constraint)
        expected = {token for token, more in spelled.items() if more and text + more in beginnings}
        if text in texts:
            expected |= {*model.end_tokens}
        assert found <= expected
        assert {spelled[token] for token in found} == {
            spelled[token] for token in expected
        }  # two may be alike
        assert constraint.ended == (expected <= {*model.end_tokens})
        for token in sorted(found - {*model.end_tokens})[::3]:
            following = fork(constraint)
            following.accept([token])
            pending.append((text + spelled[token], following))


def spelling(model: Model, token: int) -> bytes:
    """A token's bytes; none of special ones."""
    name: str = model.tokenizer.id_to_token(token)
    if token in model.special:
        return b""
    if "\u2581" not in model.tokenizer.get_vocab():
        return bytes(map(byte_of, name))
    byte = re.fullmatch("<0x(..)>", name)
    return bytes([int(byte[1], 16)]) if byte else name.replace("\u2581", " ").encode()


def byte_of(letter: str) -> int:
    """GPT-2's bytes as letters: those that print stand for themselves, the others count on from U+0100."""
    others = [*range(0x21), *range(0x7F, 0xA1), 0xAD]
    return ord(letter) if ord(letter) < 0x100 else others[ord(letter) - 0x100]


def test_drafts(model: Model) -> None:
    """Each row is what the mask would be after the drafts before it; the sequence stays where it is."""
    constraint = model.constraints.compile(json_schema=PERSON)
    constraint.accept(model.tokens('{"name": "a", "age'))
    before = model.allowed(constraint)
    drafts = model.tokens('": 12, "friends": [')
    rows = model.allowed(constraint, drafts)
    assert len(rows) == 1 + len(drafts)
    other = fork(constraint)
    for row, draft in zip(rows, [*drafts, None], strict=True):
        assert [row] == model.allowed(other)
        if draft is not None:
            assert constraint.allowed(drafts) == drafts
            other.accept([draft])
    assert model.allowed(constraint) == before
    # Behind one that is not allowed, nothing follows but the end.
    wrong = [*drafts[:2], model.tokens("}")[-1], *drafts[2:]]
    assert constraint.allowed(wrong) == drafts[:2]
    found = model.allowed(constraint, wrong)
    assert found[:3] == rows[:3]
    assert found[3:] == [{*model.end_tokens}] * (len(wrong) - 2)


def test_drafts_that_end_the_text(demo: Model) -> None:
    constraint = demo.constraints.compile(regex="(ab)*")
    a, end = demo.tokens("ab")[0], demo.end_tokens[0]
    assert constraint.allowed([a, end, a]) == [a]
    assert demo.allowed(constraint, [a, end, a])[2:] == [{end}, {end}]
    for strange in (-1, demo.n_vocab - 1, demo.n_vocab, 2**40):
        assert constraint.allowed([strange, a]) == []
        assert len(demo.allowed(constraint, [strange, a])) == 3


def test_forced(demo: Model) -> None:
    constraint = demo.constraints.compile(
        json_schema=PERSON | {"required": ["name"], "properties": {"name": {}}}
    )
    constraint.accept(demo.tokens("{"))
    text = demo.text(constraint.forced(100))
    assert text == ""  # whitespace may come
    constraint = demo.constraints.compile(regex="(import os, sys|import os, re)!{3}")
    before = demo.allowed(constraint)
    assert demo.text(constraint.forced(100)).startswith("import os, "[:8])
    assert len(constraint.forced(1)) == 1 and constraint.forced(0) == []
    assert demo.allowed(constraint) == before
    while not constraint.ended:
        tokens = constraint.forced(2) or [min(demo.allowed(constraint)[0])]
        assert constraint.allowed(tokens) == tokens
        constraint.accept(tokens)
    assert constraint.forced(5) == []


def test_rules_over_rules(demo: Model) -> None:
    """The library recurses over them: deeper than the stack of a thread is by default."""
    rules = "".join(f"r{n}:r{n + 1}\n" for n in range(15000))
    follow(demo, demo.constraints.compile(grammar=f'start: r0\n{rules}r15000: "c"'), "c")


def test_many_sequences_at_once(demo: Model) -> None:
    """Masks of a step are those of each sequence alone, also where threads ask at the same time."""
    regexes = ("[a-z]+", "(yes|no)", "x{3}", "[0-9]+")
    constraints = [demo.constraints.compile(regex=regex) for regex in regexes for _ in range(3)]
    alone = [demo.allowed(constraint, [5, 6]) for constraint in constraints]
    wrong: list[object] = []

    def ask(own: list[Constraint]) -> None:
        for _ in range(20):
            masks = Masks([(constraint, [5, 6]) for constraint in own])
            if [demo.sets(mask) for mask in masks.result()] != alone:
                wrong.append(masks)

    threads = [threading.Thread(target=ask, args=([fork(c) for c in constraints],)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert Masks([]).result() == []


def test_masks_of_the_parent_are_not_waited_for(byte_level: str) -> None:
    """In a child by fork; here their thread is busy for as long as this takes."""
    model = Model(byte_level, [1])
    constraint = model.constraints.compile(regex="[a-z]+")
    gate = threading.Event()
    model.constraints.thread.submit(gate.wait)
    masks = Masks([(constraint, [])])
    waiting = threading.Thread(target=masks.wait, daemon=True)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    model.constraints.renew()
    masks.wait()
    assert len(model.allowed(constraint)) == 1  # by the new thread
    gate.set()
    waiting.join()


def test_stuck(demo: Model) -> None:
    """Where a grammar gets stuck in one of the library's limits, only its sequence has an error."""
    rules = "".join(f'p{n}: p{n + 1} "b"?\n' for n in range(10))  # each "a" leaves them all open
    stuck = demo.constraints.compile(grammar=f'start: r\nr: "a" p0 | "a"\n{rules}p10: r')
    fine = demo.constraints.compile(regex="[a-z]*")
    a = demo.tokens("a")[0]
    with pytest.raises(OptionError, match=r"^grammar: found no way on at token \d+: "):
        for _ in range(1000):
            first, second = Masks([(stuck, []), (fine, [])]).result()
            assert a in demo.sets(second)[0]
            fine.accept([a])
            stuck.accept([a if a in demo.sets(first)[0] else demo.end_tokens[0]])
    assert not stuck.ended
    with pytest.raises(OptionError, match=f"found no way on at token {demo.end_tokens[0]}: "):
        stuck.accept(demo.end_tokens)
    assert stuck.forced(3) == stuck.allowed([a]) == []
    assert demo.allowed(stuck, [a]) == [{*demo.end_tokens}] * 2
    fine.accept(demo.end_tokens)


def test_a_token_that_is_not_allowed(demo: Model) -> None:
    for token in (demo.tokens("b")[0], demo.end_tokens[0], demo.n_vocab - 1, demo.n_vocab):
        constraint = demo.constraints.compile(regex="ab")
        with pytest.raises(OptionError, match=f"regex: found no way on at token {token}: "):
            constraint.accept([token])
        [rest] = demo.allowed(constraint)
        assert rest == {*demo.end_tokens}
        assert constraint.forced(3) == constraint.allowed([demo.tokens("a")[0]]) == []


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def cyclic() -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "array"}
    schema["items"] = schema
    return schema


UNSUPPORTED = (
    *("not", "if", "then", "contains", "uniqueItems", "propertyNames", "dependencies", "dependentRequired"),
    *("unevaluatedProperties", "$dynamicRef", "nullable", "minlength", "x-guidance", "divisibleBy", "\n\x1b"),
)
BAD_SCHEMAS: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "expected JSON"),
    "empty": ("", "expected JSON"),
    "a list": ([], "expected a JSON schema"),
    "a list as text": ("[]", "expected an object, or true"),
    "a number": (3, "expected a JSON schema"),
    "bytes": (b"{}", "expected a JSON schema"),
    "false": (False, "expected an object, or true"),
    "no JSON inside": ({"const": {1, 2}}, "expected what JSON can hold"),
    "not a number": ({"const": float("nan")}, "expected JSON"),
    "cyclic": (cyclic(), "expected what JSON can hold"),
    "a type that is none": ({"type": "text"}, "Invalid type: text"),
    "a wrong value": ({"type": "string", "minLength": "3"}, "minLength"),
    "a keyword within": ({"properties": {"a": {"items": {"not": {}}}}}, "'not' in /properties/a/items/0"),
    "an older draft": ({"$schema": "http://json-schema.org/draft-04/schema#", "if": {}}, "keyword 'if'"),
    "names that repeat": ({"type": "object", "minProperties": 2}, "names could repeat"),
    "a format that is unknown": ({"type": "string", "format": "isbn"}, "Unknown format: isbn"),
    "oneOf that is not anyOf": ({"oneOf": [{"type": "string"}, {"minLength": 2}]}, "oneOf"),
    "elsewhere": ({"$ref": "https://example.com/schema"}, "https://example.com/schema"),
    "nowhere": ({"$ref": "#/$defs/a"}, "does not exist"),
    "itself": ({"$ref": "#"}, "no text fulfils it"),
    "nothing": ({"type": "string", "minLength": 3, "maxLength": 2}, "Unsatisfiable"),
    "nested": (nested(200), "recursion limit"),
    "nested deeply": (nested(5000), "expected what JSON can hold"),
    "nested deeply, as text": ('{"items":' * 20000 + "{}" + "}" * 20000, "expected JSON"),
    "10 MB": ({"description": "x" * 10**7}, f"expected at most {MAX_BYTES}"),
    "more properties than it can follow": (
        {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(3000)}},
        "items",
    ),
    "exponential": (
        {"allOf": [{"anyOf": [{"required": [f"a{n}"]}, {"required": [f"b{n}"]}]} for n in range(20)]},
        "schema too large",
    ),
    "hours": ({"type": "integer", "multipleOf": 99999989}, "too complex"),
    "hours in few bytes": (
        {
            "allOf": [
                {"type": "string", "pattern": f"(.*{letter}){{20}}"} for letter in map(chr, range(97, 123))
            ]
        },
        "too complex",
    ),
    "half a character": ({"const": "\ud800"}, "hex escape"),
}
BAD_REGEXES: dict[str, tuple[Any, str]] = {
    "lookahead": ("(?=a)b", "look-around"),
    "lookbehind": ("(?<!a)b", "look-around"),
    "backreference": (r"(a)\1", "backreferences are not supported"),
    "no end of a group": ("(a", "unclosed group"),
    "word boundary": (r"\ba", "lookarounds not supported"),
    "nothing": (r"[^\s\S]", "no text fulfils it"),
    "nested": ("(" * 50000 + "a" + ")" * 50000, "nested"),
    "quadratic": ("[a-z]*" * 40000, "too complex"),
    "large": ("a" * 10**7, f"expected at most {MAX_BYTES}"),
    "bytes": (b"a", "expected a string"),
    "a list": (["a"], "expected a string"),
    "true": (True, "expected a string"),
    "half a character": ("a\ud800", "invalid Unicode at character 1"),
}
BAD_GRAMMARS: dict[str, tuple[Any, str]] = {
    "syntax": ("start: (", "Expected"),
    "no start": ('x: "a"', "no start rule"),
    "no rule of that name": ("start: x", 'unknown name: "x"'),
    "a terminal in itself": ("start: A\nA: B\nB: A", "circular"),
    "only itself": ("start: start", "no text fulfils it"),
    "no end": ('start: "a" start', "Too many items"),
    "too many": ('start: "a"{1000000}', "Too many items"),
    "nested": ("start: " + "(" * 50000 + '"a"' + ")" * 50000, "too deeply nested"),
    "brackets": ("start: " + "[" * 200_000, "too deeply nested"),
    "hours": (
        "start: S\nS: " + " & ".join(f"/(.|\\n)*(.*{chr(97 + n)}){{20}}(.|\\n)*/" for n in range(26)),
        "too complex",
    ),
    "a keyword within": ('start: %json {"type": "array", "uniqueItems": true}', "keyword 'uniqueItems'"),
    "lenient": ('start: %json {"x-guidance": {"lenient": true}, "not": {}}', "keyword 'x-guidance'"),
    "no schema": ("start: %json", "no JSON behind the %json"),
    "temperature": ("start: a\na[temperature=2]: /a*/", "found a temperature"),
    "the library's own format": ('{"grammars": [{"json_schema": {}}]}', "expecting rule"),
    "a special token that is none": ("start: <|nothing|>", "unknown special token"),
    "a token that is none": ("start: <[99999999]>", "too large"),
    "large": ("// " + "x" * 10**7, f"expected at most {MAX_BYTES}"),
    "bytes": (b'start: "a"', "expected a string"),
    "half a character": ('start: "\ud800"', "invalid Unicode at character 8"),
}
BAD = [
    pytest.param(option, source, message, id=f"{option}: {name}")
    for option, cases in (("json_schema", BAD_SCHEMAS), ("regex", BAD_REGEXES), ("grammar", BAD_GRAMMARS))
    for name, (source, message) in cases.items()
]


@pytest.mark.parametrize(("option", "source", "message"), BAD)
def test_what_cannot_be_asked_for(option: str, source: Any, message: str, demo: Model) -> None:
    with pytest.raises(OptionError) as error:
        demo.constraints.compile(**{option: source})
    text = str(error.value)
    assert text.startswith(f"{option}: found ")
    assert re.search(re.escape(message), text), text
    assert text.isprintable() and len(text) <= 1000


@pytest.mark.parametrize("keyword", UNSUPPORTED)
def test_keywords_that_would_be_ignored(keyword: str, demo: Model) -> None:
    for schema in ({keyword: {}}, {"type": "string", keyword: 1}, {"$defs": {"a": {keyword: []}}}):
        with pytest.raises(
            OptionError, match=r"^json_schema: found the keyword '.*'.*, expected one that"
        ) as error:
            demo.constraints.compile(json_schema=schema)
        assert str(error.value).isprintable()


def test_exactly_one(demo: Model) -> None:
    for given, found in (
        ({}, "none of them"),
        ({"regex": "a", "grammar": "start: /a/"}, "regex and grammar"),
        ({"json_schema": False, "regex": "a"}, "json_schema and regex"),
    ):
        with pytest.raises(
            OptionError, match=f"json_schema, regex, grammar: found {found}, expected exactly one"
        ):
            demo.constraints.compile(**given)  # type: ignore[arg-type]


def test_the_empty_text(demo: Model) -> None:
    constraint = demo.constraints.compile(regex="")
    assert constraint.ended
    assert demo.allowed(constraint, demo.tokens("a")) == [{*demo.end_tokens}] * 2
    constraint.accept(demo.end_tokens)
    assert constraint.ended
    for either in ("(a)?", "a*"):
        constraint = demo.constraints.compile(regex=either)
        assert not constraint.ended
        assert demo.allowed(constraint)[0] > {*demo.end_tokens}


def test_special_tokens(bytes_model: Model) -> None:
    """A grammar may ask for one; where it does not, none comes."""
    constraint = bytes_model.constraints.compile(grammar='start: "a" <s> "b"')
    constraint.accept(bytes_model.tokens("a"))
    assert bytes_model.allowed(constraint) == [{0}]
    constraint.accept([0, *bytes_model.tokens("b")])
    assert constraint.ended
    anything = bytes_model.constraints.compile(regex=r"(.|\n)*")
    assert bytes_model.allowed(anything) == [{*range(1, bytes_model.n_tokens)} - invalid_alone(bytes_model)]


def invalid_alone(model: Model) -> set[int]:
    """Tokens that no UTF-8 begins with."""
    never = {*range(0x80, 0xC2), *range(0xF5, 0x100)}
    return {token for token in range(2, model.n_tokens) if {*spelling(model, token)[:1]} & never}


def test_the_trial_is_made_once(demo: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    demo.constraints.compile(regex="once only")
    monkeypatch.setattr(sys, "executable", "/nowhere")
    demo.constraints.compile(regex="once only")
    with pytest.raises(UnsupportedError, match=r"^constrained output: cannot start /nowhere: No such file"):
        demo.constraints.compile(regex="another")


def test_a_trial_that_takes_too_long(demo: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_trial, "WALL_S", 0.01)
    with pytest.raises(OptionError, match=r"^regex: found 'slow': takes more than 0.01 s"):
        demo.constraints.compile(regex="slow")


def test_refusals_are_known_too(demo: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        with pytest.raises(OptionError, match=r"^regex: found '\(': "):
            demo.constraints.compile(regex="(")
        monkeypatch.setattr(sys, "executable", "/nowhere")


def test_so_many_outcomes_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(grammar_trial, "_try", lambda grammar, tokens: tried.append(grammar) or "")
    monkeypatch.setattr(grammar_trial, "MOST_KNOWN", 2)
    trials = grammar_trial.Trials()
    tokens = grammar_trial.VisibleTokens(300, (), (1,))
    for grammar in "aabbccbab":
        trials.reason(grammar, tokens)
    assert tried == ["a", "b", "c", "a", "b"]


def test_so_many_trials_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a grammar that another thread has tried meanwhile is not tried again."""
    running, most, tried = 0, 0, []
    gate, lock = threading.Event(), threading.Lock()

    def slow(grammar: str, tokens: grammar_trial.VisibleTokens) -> str:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            tried.append(grammar)
        assert gate.wait(30)
        with lock:
            running -= 1
        return ""

    monkeypatch.setattr(grammar_trial, "_try", slow)
    trials = grammar_trial.Trials()
    tokens = grammar_trial.VisibleTokens(300, (), (1,))
    threads = [threading.Thread(target=trials.reason, args=(g, tokens)) for g in "abcdefaaaa"]
    for n, thread in enumerate(threads):
        thread.start()
        while len(tried) < min(n + 1, grammar_trial.MOST_TRIALS):
            time.sleep(0.001)
    time.sleep(0.1)  # for those that would run, too
    gate.set()
    for thread in threads:
        thread.join()
    assert most == grammar_trial.MOST_TRIALS
    assert sorted(tried) == [*"abcdef"]


def test_a_trial_that_cannot_begin(demo: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its process lacks is not the grammar's fault, and not known for ever."""
    with monkeypatch.context() as patch:
        patch.setattr(grammar_trial, "CHILD", "raise ImportError('no module of that name')")
        message = "cannot try a grammar in another process: ImportError: no module of that name"
        with pytest.raises(UnsupportedError, match=f"^constrained output: {message}$"):
            demo.constraints.compile(regex="begin")
        patch.setattr(grammar_trial, "CHILD", "raise SystemExit(5)")
        with pytest.raises(UnsupportedError, match=r"in another process: status 5$"):
            demo.constraints.compile(regex="begin")
    follow(demo, demo.constraints.compile(regex="begin"), "begin")


@pytest.fixture
def word_level() -> str:
    return str(Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).to_str())


def wrong_tokenizers(byte_level: str, word_level: str, tmp_path: Path) -> Iterator[object]:
    (tmp_path / "tokenizer.json").write_text(byte_level)
    yield from (str(tmp_path / "tokenizer.json"), f" {tmp_path}/tokenizer.json", '"byte"', "byte")
    yield from ("", "[]", "{}", "{", None, word_level)


def test_tokenizers_that_it_cannot_use(byte_level: str, word_level: str, tmp_path: Path) -> None:
    for wrong in wrong_tokenizers(byte_level, word_level, tmp_path):
        with pytest.raises(
            UnsupportedError, match=r"^constrained output: cannot use the model's tokenizer: ."
        ) as e:
            Constraints(wrong, 4096, [1])  # type: ignore[arg-type]
        assert str(e.value).isprintable()
    for n_vocab, ends, message in ((10, [1], "261 tokens, the model 10"), (300, [299], "out of range")):
        with pytest.raises(UnsupportedError, match=message):
            Constraints(byte_level, n_vocab, ends)
    with pytest.raises(UnsupportedError, match="found no end token of the model, expected one"):
        Constraints(byte_level, 300, [])


def test_without_the_library(byte_level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    expected = re.escape('pip install "vptq-runtime[serve]"')
    with pytest.raises(UnsupportedError, match=f"found no llguidance .*{expected}"):
        Constraints(byte_level, 300, [1])


def test_nothing_comes_from_the_working_directory(
    demo: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial's process imports what this one would."""
    monkeypatch.chdir(tmp_path)
    for name in ("llguidance", "json", "vptq_runtime"):
        (tmp_path / f"{name}.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    follow(demo, demo.constraints.compile(regex="somewhere else"), "somewhere else")
    assert not (tmp_path / "ran").exists()
