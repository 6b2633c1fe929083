"""Random schedules: whatever comes when, each request gets what it gets alone, and nothing leaks."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from fake_context import FakeClock, FakeContext, FakeSampler, alone
from hypothesis import given, settings
from hypothesis import strategies as st

from vptq_runtime.engine.drafters.ngram import NgramDrafter
from vptq_runtime.engine.request import Request
from vptq_runtime.engine.scheduler import Scheduler


@dataclass(frozen=True)
class Asked:
    """A request, the round in which it comes, and the one in which it is cancelled."""

    prompt: tuple[int, ...]
    max_tokens: int
    seed: int
    arrives: int
    leaves: int | None
    speculates: bool


def run(scheduler: Scheduler, asked: list[Asked]) -> list[Request]:
    requests = [
        Request(
            list(a.prompt),
            FakeSampler(a.seed),
            a.max_tokens,
            drafter=NgramDrafter() if a.speculates else None,
        )
        for a in asked
    ]
    order = sorted(range(len(asked)), key=lambda i: asked[i].arrives)
    for at in range(100_000):
        for i in order:
            if asked[i].arrives == at:
                requests[i].number = order.index(i)
                scheduler.add(requests[i])
            if asked[i].leaves == at:
                scheduler.cancel(requests[i])
        if not scheduler.round() and all(a.arrives <= at for a in asked):
            return requests
    raise AssertionError("it does not come to an end")


@st.composite
def schedules(draw: st.DrawFn) -> list[Asked]:
    """Prompts that begin alike in many ways."""
    system = draw(st.lists(st.integers(0, 3), min_size=0, max_size=20))
    asked = []
    for _ in range(draw(st.integers(1, 10))):
        n = draw(st.integers(0, len(system)))
        rest = draw(st.lists(st.integers(0, 3), min_size=1, max_size=12))
        arrives = draw(st.integers(0, 30))
        leaves = draw(st.none() | st.integers(arrives, arrives + 20))
        asked.append(
            Asked(
                (*system[:n], *rest),
                draw(st.integers(1, 24)),
                draw(st.integers(0, 2)),
                arrives,
                leaves,
                draw(st.booleans()),
            )
        )
    return asked


@settings(max_examples=300, deadline=None)
@given(
    schedules(),
    st.integers(1, 6),
    st.sampled_from([15, 20, 40, 200]),
    st.sampled_from([4, 16]),
    st.sampled_from(["exact", "off", "shared"]),
)
def test_any_schedule(asked: list[Asked], parallel: int, n_blocks: int, n_batch: int, cache: str) -> None:
    """In "shared" mode a token's number may depend on the cache: there the context makes no difference."""
    context = FakeContext(
        clock=FakeClock(), n_ctx=56, n_blocks=n_blocks, n_batch=n_batch, n_vocab=4, exact=cache == "shared"
    )
    scheduler = Scheduler(context, context.clock, parallel=parallel, cache=cache)  # type: ignore[arg-type]
    requests = run(scheduler, asked)
    for a, request in zip(asked, requests, strict=True):
        assert request.ended and request.error is None
        expected = alone(context, a.prompt, a.max_tokens, a.seed)
        if request.finish_reason:
            assert request.tokens == expected
        else:
            assert a.leaves is not None and request.tokens == expected[: len(request.tokens)]
    assert not context.sequences and len(context.users) == scheduler.cache.n_unused
    scheduler.cache.evict(scheduler.cache.n_unused)
    assert not context.users


@pytest.mark.parametrize("cache", ["shared", "exact"])
def test_ten_thousand_requests(cache: str) -> None:
    """Half of them cancelled somewhere: no block is lost, and none freed twice (the context would say so)."""
    rng = random.Random(0)
    context = FakeContext(clock=FakeClock(), n_ctx=40, n_blocks=22, n_batch=16, n_vocab=3)
    scheduler = Scheduler(context, context.clock, parallel=6, cache=cache)  # type: ignore[arg-type]
    systems = [[rng.randrange(3) for _ in range(12)] for _ in range(4)]
    alive: list[Request] = []
    for number in range(10_000):
        prompt = [
            *rng.choice(systems)[: rng.randrange(13)],
            *(rng.randrange(3) for _ in range(rng.randint(1, 8))),
        ]
        request = Request(prompt, FakeSampler(number), rng.randint(1, 16), number=number)
        scheduler.add(request)
        alive.append(request)
        while len(alive) > rng.randrange(1, 20):
            scheduler.round()
            if rng.random() < 0.1:
                scheduler.cancel(rng.choice(alive))
            alive = [each for each in alive if not each.ended]
        scheduler.take_changed()
    while scheduler.round():
        pass
    assert scheduler.counters.preemptions > 0 and scheduler.counters.prompt_tokens_cached > 0
    assert not context.sequences and len(context.users) == scheduler.cache.n_unused
    scheduler.cache.evict(scheduler.cache.n_unused)
    assert not context.users
