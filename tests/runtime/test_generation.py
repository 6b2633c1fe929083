"""The options of generate, and the results' dataclasses."""

import dataclasses
import math
from typing import Any

import pytest

from vptq_runtime import OptionError
from vptq_runtime.checks import shown
from vptq_runtime.generation import Options, Timings

DEFAULTS: dict[str, Any] = {
    "max_tokens": 128,
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.05,
    "repeat_penalty": 1.0,
    "seed": 5,
    "stop": (),
}


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
    ],
    ids=lambda value: shown(value)[:20],
)
def test_refused(option: str, value: Any) -> None:
    with pytest.raises(OptionError, match=rf"^{option}: found .*, expected ") as error:
        Options.checked(**DEFAULTS | {option: value})
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
    ],
)
def test_accepted(option: str, value: Any) -> None:
    assert getattr(Options.checked(**DEFAULTS | {option: value}), option) == value


def test_stop_is_a_string_or_several() -> None:
    assert Options.checked(**DEFAULTS | {"stop": "ab"}).stop == ("ab",)
    assert Options.checked(**DEFAULTS | {"stop": ["a", "b"]}).stop == ("a", "b")


def test_a_seed_is_drawn() -> None:
    assert len({Options.checked(**DEFAULTS | {"seed": None}).seed for _ in range(5)}) == 5


def test_rates() -> None:
    timings = Timings(load_s=1, prompt_tokens=10, prompt_s=2, decode_tokens=30, decode_s=10)
    assert (timings.prompt_tokens_per_s, timings.decode_tokens_per_s) == (5, 3)
    assert dataclasses.replace(timings, decode_tokens=0, decode_s=0).decode_tokens_per_s == 0
