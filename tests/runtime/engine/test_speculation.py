"""What is drafted, and how much of it: as long as a step brings more tokens for its time."""

from __future__ import annotations

from typing import Any

import pytest
from fake_context import FakeSampler
from hypothesis import given
from hypothesis import strategies as st

from vptq_runtime.engine.drafters.ngram import NgramText
from vptq_runtime.engine.request import Request
from vptq_runtime.engine.speculation import MOST_DRAFTS, Drafts, Speculator
from vptq_runtime.engine.step_costs import StepCosts


class Sure:
    """Drafts a fixed text, with a fixed probability for each token."""

    def __init__(self, tokens: list[int], probability: float) -> None:
        self.tokens, self.probability = tokens, probability

    def draft(self, requests: Any, most: list[int], costs: Any) -> list[Drafts]:
        return [Drafts(self.tokens[:n], [self.probability] * len(self.tokens[:n])) for n in most]

    def end(self, request: Any) -> None: ...


def costs(**seconds: float) -> StepCosts:
    """seconds: n1=..., n2=..., of a step of so many tokens."""
    known = StepCosts(4)
    for name, value in seconds.items():
        known.saw_step(int(name[1:]), value)
    return known


def request(drafter: Any, max_tokens: int = 100, n_prompt: int = 3) -> Request:
    each = Request([*range(n_prompt)], FakeSampler(), max_tokens, drafter=drafter)
    each.n_fed = n_prompt - 1
    return each


def lengths(speculator: Speculator, *requests: Request, n_ctx: int = 1000) -> list[int]:
    return [len(drafts) for drafts in speculator.drafts(requests, n_ctx)]


FLAT = {f"n{n}": 1.0 for n in range(1, 65)}
STEEP = {f"n{n}": float(n) for n in range(1, 65)}


def test_as_many_as_cost_nothing() -> None:
    speculator = Speculator(costs(**FLAT), 64)
    assert lengths(speculator, request(Sure([7] * 50, 0.9))) == [MOST_DRAFTS]
    assert lengths(speculator, request(Sure([7] * 5, 0.9)), request(None)) == [5, 0]


def test_none_where_each_token_costs_as_much() -> None:
    assert lengths(Speculator(costs(**STEEP), 64), request(Sure([7] * 50, 0.99))) == [0]


def test_to_the_best_step() -> None:
    """Four tokens cost half as much again as one, five twice as much."""
    seconds = {"n1": 1.0, "n2": 1.3, "n3": 1.4, "n4": 1.5, "n5": 3.0, "n6": 3.1, "n7": 3.2, "n8": 3.3}
    speculator = Speculator(costs(**seconds), 8)
    assert lengths(speculator, request(Sure([7] * 50, 0.95))) == [3]
    assert lengths(speculator, request(Sure([7] * 50, 0.5))) == [2]  # 1.75 / 1.4; of one 1.5 / 1.3
    assert lengths(speculator, request(Sure([7] * 50, 0.2))) == [0]
    # Of two requests the likelier drafts.
    assert lengths(speculator, request(Sure([7] * 50, 0.3)), request(Sure([7] * 50, 0.95))) == [0, 2]


def test_no_more_than_may_come() -> None:
    speculator = Speculator(costs(**FLAT), 64)
    drafter = Sure([7] * 50, 0.9)
    assert lengths(speculator, request(drafter, max_tokens=4)) == [
        3  # and the token that is drawn in any case
    ]
    assert lengths(speculator, request(drafter, max_tokens=1)) == [0]
    assert lengths(speculator, request(drafter, n_prompt=10), n_ctx=15) == [5]
    assert lengths(Speculator(costs(**FLAT), 4), request(drafter), request(drafter)) == [1, 1]


def drafts_of(drafter: NgramText, ids: list[int], most: int = 5) -> list[int]:
    return drafter.draft(ids, most).tokens


def test_what_followed_the_last_time() -> None:
    assert drafts_of(NgramText(), [1, 2, 3, 4, 5, 6, 1, 2]) == [3, 4, 5, 6, 1]
    assert drafts_of(NgramText(), [1, 2, 3, 9, 1, 2, 4, 8, 1, 2]) == [4, 8, 1, 2, 4]
    # The longest match, not the latest.
    assert drafts_of(NgramText(), [5, 1, 2, 3, 9, 6, 1, 2, 4, 9, 5, 1, 2], 2) == [3, 9]


def test_nothing_to_go_by() -> None:
    for ids in ([], [1], [1, 2], [1, 2, 3, 4], [1, 2, 3, 1, 3]):
        assert drafts_of(NgramText(), ids) == []


def test_what_repeats_goes_on() -> None:
    assert drafts_of(NgramText(), [1, 2, 3] * 3, 7) == [1, 2, 3, 1, 2, 3, 1]
    assert drafts_of(NgramText(), [4] * 5, 3) == [4, 4, 4]


def test_token_by_token_as_at_once() -> None:
    ids = [1, 2, 3, 1, 2, 4, 1, 2, 3, 3, 1, 2, 4, 1, 2, 3]
    drafter = NgramText()
    for n in range(len(ids) + 1):
        assert drafts_of(drafter, ids[:n]) == drafts_of(NgramText(), ids[:n])


def test_a_copy_goes_on_behind_a_change() -> None:
    source = [*range(1, 21)]
    for change, rest in (([99], 9), ([99, 98], 10), ([99, 9], 10), ([99, 98, 97, 9], 10), ([10], 11)):
        drafter, ids = NgramText(), [*source, 1, 2, 3, 4, 5, 6, 7]
        assert drafts_of(drafter, ids) == [8, 9, 10, 11, 12]
        for token in change:
            ids.append(token)
            drafts = drafts_of(drafter, ids)
        assert drafts == list(range(rest, rest + 5))
    for _ in range(9):  # what is no copy any more
        ids.append(ids[-1] + 50)
        drafts = drafts_of(drafter, ids)
    assert drafts == []


@given(st.lists(st.integers(0, 3), max_size=80), st.data())
def test_drafts_are_tokens_of_the_text(ids: list[int], data: st.DataObject) -> None:
    drafter, n = NgramText(), 0
    while n < len(ids):
        n = min(len(ids), n + data.draw(st.integers(1, 9)))
        drafts = drafter.draft(ids[:n], 7)
        assert len(drafts.tokens) == len(drafts.probabilities) in (0, 7)
        assert set(drafts.tokens) <= set(ids[:n]) and all(0 < p < 1 for p in drafts.probabilities)


def test_it_learns_how_often_it_is_right() -> None:
    """Of two drafters one is always right and one never; nothing of it was fed."""

    def last_probability(text: list[int]) -> float:
        drafter, found = NgramText(), 0.0
        for n in range(2, len(text)):
            drafts = drafter.draft(text[:n], 1)
            found = drafts.probabilities[0] if drafts.tokens else found
        return found

    assert last_probability([1, 2, 3] * 60) > 0.9
    changing = [token for i in range(60) for token in (1, 2, 10 + i)]
    assert last_probability(changing) < 0.1


@pytest.mark.parametrize("n", range(1, 70))
def test_costs_that_were_never_measured(n: int) -> None:
    """Between those that were; more tokens never cost less."""
    known = costs(n1=2.0, n4=3.0, n16=8.2)
    assert known.step(n) <= known.step(n + 1) * (1 + 1e-9)
    assert costs().step(n) >= 1


def test_costs_are_running_means() -> None:
    known = StepCosts(4)
    for _ in range(100):
        known.saw_step(3, 1.0)
        known.saw_layers(8, 2, 1.0)
    assert known.step(3) == pytest.approx(1.0) and known.layer(8) == pytest.approx(0.5)
    known.saw_step(3, 2.0)
    assert 1.0 < known.step(3) < 1.5
    assert known.knows_layer(8) and not known.knows_layer(16)
    assert known.layer(16) > known.layer(8) > known.layer(4) > 0
