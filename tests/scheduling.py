"""A scheduler over a context without a model, requests to it, and whether anything is left of them."""

from __future__ import annotations

from typing import Any

from fake_context import FakeClock, FakeContext, FakeSampler

from vptq_runtime.engine.request import Request
from vptq_runtime.engine.scheduler import Scheduler


def make(parallel: int = 4, cache: Any = "shared", **options: Any) -> tuple[Scheduler, FakeContext]:
    context = FakeContext(clock=FakeClock(), **options)
    return Scheduler(context, context.clock, parallel=parallel, cache=cache), context


def request(prompt: list[int], max_tokens: int = 8, seed: int = 0, **options: Any) -> Request:
    return Request(prompt, FakeSampler(seed), max_tokens, **options)


def add(scheduler: Scheduler, *requests: Request) -> None:
    for each in requests:
        each.number = add.number = getattr(add, "number", 0) + 1  # type: ignore[attr-defined]
        scheduler.add(each)


def run(scheduler: Scheduler, most: int = 10_000) -> None:
    for _ in range(most):
        if not scheduler.round():
            return
    raise AssertionError("it does not come to an end")


def nothing_left(scheduler: Scheduler, context: FakeContext) -> None:
    """No request has anything any more, and the cache holds each of its blocks once."""
    assert not scheduler.active and not scheduler.waiting and not context.sequences
    assert len(context.users) == scheduler.cache.n_unused
    scheduler.cache.evict(scheduler.cache.n_unused)
    assert not context.users and not context.contents
