"""The options of generate, and the results' dataclasses."""

import dataclasses
import math
from typing import Any

import pytest

from vptq_runtime import OptionError
from vptq_runtime.checks import shown
from vptq_runtime.generation import Timings
from vptq_runtime.options import Options


class HasGenerate:
    """No Runtime, though it looks like one."""

    def generate(self) -> None:
        pass


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("max_tokens", value) for value in (0, -1, 1.5, "5", True, math.nan)),
        *(
            ("temperature", value)
            for value in (-0.1, math.nan, math.inf, -math.inf, "1", None, 10**400, True)
        ),
        *(("top_k", value) for value in (-1, 1.0, None, math.nan)),
        *(
            (option, value)
            for option in ("top_p", "min_p")
            for value in (-0.01, 1.01, math.nan, math.inf, "", None)
        ),
        ("top_p", 0),
        *(("repeat_penalty", value) for value in (0, -1, math.nan, math.inf, "1")),
        *(("seed", value) for value in (-1, 2**64, 0.5, "1", -(10**5000))),
        *(("stop", value) for value in ("", ["a", ""], [b"a"], 5, b"a", None)),
        *(
            (option, value)
            for option in ("presence_penalty", "frequency_penalty")
            for value in (-2.1, 2.1, math.nan, "1", None)
        ),
        *(("logit_bias", value) for value in (5, [1], {"a": 1}, {-1: 1}, {1: 101}, {1: math.nan}, {1: None})),
        *(("min_tokens", value) for value in (-1, 129, 1.0, None)),
        *(("logprobs", value) for value in (-1, 21, True, None)),
        *(("prompt_logprobs", value) for value in (-1, 21, 1.0)),
        *(("speculate", value) for value in ("on", "", None, 1, object())),
        *(("cache_salt", value) for value in (None, 1, b"a", "a" * 257)),
        *(("stop", value) for value in (["a"] * 65, range(10**12), "a" * 257, ["a", "b" * 10**6])),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
        ("speculate", HasGenerate()),
    ],
    ids=lambda value: shown(value)[:20],
)
def test_refused(option: str, value: Any) -> None:
    with pytest.raises(OptionError, match=rf"^{option}(\[1\])?: found .*, expected ") as error:
        Options(**{option: value})
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_tokens", 1),
        ("max_tokens", None),
        ("temperature", 0),
        ("temperature", 100.0),
        ("top_k", 0),
        ("top_k", 10**100),
        ("top_p", 0.01),
        ("top_p", 1),
        ("min_p", 0),
        ("min_p", 1.0),
        ("repeat_penalty", 0.5),
        ("seed", 0),
        ("seed", 2**64 - 1),
        ("presence_penalty", -2),
        ("frequency_penalty", 2.0),
        ("logit_bias", {1: -100, 5: 0.5}),
        ("min_tokens", 128),
        ("logprobs", 20),
        ("prompt_logprobs", 0),
        ("speculate", "off"),
        ("stop", ["a" * 256] * 64),
        ("logit_bias", dict.fromkeys(range(1024), 1.0)),
        ("cache_salt", "a" * 256),
    ],
    ids=lambda value: shown(value)[:20],
)
def test_accepted(option: str, value: Any) -> None:
    assert getattr(Options(**{option: value}), option) == value


@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {10**5000: 1.0}},
        {"min_tokens": 10**5000 + 1, "max_tokens": 10**5000},
        {"stop": [[10**5000]]},
        {"speculate": [10**5000]},
        {"seed": [10**5000]},
    ],
)
def test_values_that_cannot_be_printed(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=rf"^{next(iter(options))}") as caught:
        Options.of(options).sampler(0, [], 100)
    assert len(str(caught.value)) < 200


def test_no_such_option() -> None:
    with pytest.raises(OptionError, match=r"^max_token: found no such option, expected one of max_tokens, "):
        Options.of({"max_token": 1})


def test_stop_is_a_string_or_several() -> None:
    assert Options(stop="ab").stops == ("ab",)
    assert Options(stop=["a", "b"]).stops == ("a", "b")


def test_a_seed_is_drawn() -> None:
    assert len({Options().seed for _ in range(5)}) == 5


def test_rates() -> None:
    timings = Timings(load_s=1, queue_s=0.5, prompt_tokens=10, prompt_s=2, decode_tokens=30, decode_s=10)
    assert (timings.prompt_tokens_per_s, timings.decode_tokens_per_s) == (5, 3)
    assert dataclasses.replace(timings, decode_tokens=0, decode_s=0).decode_tokens_per_s == 0
    assert timings.queue_s == 0.5


def test_max_tokens_of_nothing_but_a_score() -> None:
    assert Options(max_tokens=0, prompt_logprobs=0).max_tokens == 0
    with pytest.raises(OptionError, match="max_tokens: found 0, expected a whole number, at least 1"):
        Options(max_tokens=0)


def test_one_constraint_at_most() -> None:
    assert Options(regex="a").constraints == {"regex": "a"}
    with pytest.raises(OptionError, match=r"^json_schema and regex: found 2 of them, expected one at most$"):
        Options(regex="a", json_schema={})
