"""Who gets a place, who keeps it, and what becomes of the pass that a cancelled request shares."""

from __future__ import annotations

from fake_context import alone
from scheduling import add, make, nothing_left, request, run

from vptq_runtime.engine.places import MOST_PASSED_OVER
from vptq_runtime.engine.scheduler import MOST_TRIED


def test_one_that_lacks_blocks_holds_up_no_prompt_that_has_a_place() -> None:
    scheduler, context = make(2, n_blocks=12, n_batch=4, n_ctx=48)
    large = request([1] * 40, 1)
    shorts = [request([2 + i, 3], 1) for i in range(MOST_PASSED_OVER)]
    middle = request([5] * 28, 1)
    add(scheduler, large, *shorts, middle)
    run(scheduler)
    assert all(each.finish_reason == "length" for each in (large, *shorts, middle))
    nothing_left(scheduler, context)


def test_a_preempted_request_that_the_cache_has_wholly_goes_on_by_itself() -> None:
    """Nobody else is at work: the round in which it gets its place again computes nothing."""
    for ids in range(20, 36):
        scheduler, context = make(2, n_blocks=15)
        first, second = request([1], 40), request([2], 40)
        add(scheduler, first, second)
        while len(second.ids) < ids and not first.ended:
            scheduler.round()
        scheduler.cancel(first)
        run(scheduler)
        assert second.tokens == alone(context, [2], 40)
        nothing_left(scheduler, context)


def test_many_short_prompts_do_not_hide_a_long_one() -> None:
    """More than are tried for a pass wait all the time."""
    scheduler, _ = make(1, n_batch=8)
    long = request([1] * 20, 1)
    add(scheduler, long)
    n_rounds = 0
    while not long.ended:
        add(
            scheduler,
            *(request([n_rounds % 7 + 2], 1) for _ in range(MOST_TRIED + 6 - len(scheduler.waiting))),
        )
        scheduler.round()
        n_rounds += 1
        assert n_rounds < 100


def test_cancelled_prompts_do_not_hold_up_the_others_of_their_pass() -> None:
    scheduler, context = make(4, n_ctx=300, n_blocks=200, n_batch=64, n_layer=16)
    stream, long = request([1], 250), request([2] * 200, 1)
    add(scheduler, stream)
    while len(stream.tokens) < 5:
        scheduler.round()
    add(scheduler, long)
    n_rounds = 0
    while not long.ended:
        short = request([3, n_rounds % 7], 1)
        add(scheduler, short)
        for _ in range(3):
            scheduler.round()
        scheduler.cancel(short)
        n_rounds += 3
        assert n_rounds < 200
    assert long.tokens == alone(context, [2] * 200, 1)
    scheduler.cancel_all()
    nothing_left(scheduler, context)


def test_cancelled_in_a_pass_all_of_them() -> None:
    scheduler, context = make(4, n_ctx=300, n_blocks=200, n_batch=64, n_layer=16)
    stream = request([1], 250)
    add(scheduler, stream)
    while len(stream.tokens) < 5:
        scheduler.round()
    others = [request([2 + i] * 20, 1) for i in range(3)]
    add(scheduler, *others)
    scheduler.round()
    for each in others:
        scheduler.cancel(each)
    assert scheduler.active == [stream]
    scheduler.cancel_all()
    nothing_left(scheduler, context)
