"""The scheduler over a context without a model and a clock that it moves itself."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from fake_context import FakeContext, FakeSampler, alone, logits_alone, pass_seconds
from scheduling import add, make, nothing_left, request, run

from vptq_runtime.engine.drafters.draft_model import DraftModel
from vptq_runtime.engine.drafters.ngram import NgramDrafter
from vptq_runtime.engine.places import MOST_PASSED_OVER
from vptq_runtime.engine.request import LogitsRequest, Request
from vptq_runtime.engine.speculation import Drafts
from vptq_runtime.errors import DeviceError, FileError, OptionError, OutOfMemoryError

PROMPTS = [[1, 2, 3], [4], [*range(5, 30)], [1, 2, 3, 4, 5], [9] * 17]


@pytest.mark.parametrize("parallel", [1, 2, 8])
@pytest.mark.parametrize("speculate", [False, True])
def test_each_gets_what_it_gets_alone(parallel: int, speculate: bool) -> None:
    scheduler, context = make(parallel)
    requests = [
        request(prompt, seed=i, drafter=NgramDrafter() if speculate else None)
        for i, prompt in enumerate(PROMPTS)
    ]
    add(scheduler, *requests)
    run(scheduler)
    for i, each in enumerate(requests):
        assert each.tokens == alone(context, PROMPTS[i], 8, i)
        assert each.finish_reason == "length" and each.ended and each.error is None
    nothing_left(scheduler, context)


def test_a_step_is_for_all_that_generate() -> None:
    scheduler, context = make(4)
    add(scheduler, *(request([i, i + 1]) for i in range(4)))
    run(scheduler)
    # One pass for all four prompts, then seven steps of all.
    assert context.passes == [[(2, True)] * 4] + [[(1, False)] * 4] * 7


def test_more_than_a_batch() -> None:
    scheduler, context = make(12, n_batch=8)
    add(scheduler, *(request([i], 3) for i in range(12)))
    run(scheduler)
    assert max(len(feeds) for feeds in context.passes) == 8
    assert sum(len(feeds) for feeds in context.passes) == 36


def test_the_end_token_frees_the_place() -> None:
    scheduler, context = make()
    tokens = alone(context, [1, 2], 8)
    short = request([1, 2], end_tokens=frozenset([tokens[4]]))
    add(scheduler, short)
    run(scheduler)
    assert short.tokens == tokens[: tokens.index(tokens[4])] and short.finish_reason == "stop"
    nothing_left(scheduler, context)


def test_a_prompt_is_shared() -> None:
    scheduler, context = make(8, n_ctx=64)
    system = [7] * 24
    requests = [request([*system, 30 + i], 4) for i in range(8)]
    add(scheduler, *requests)
    run(scheduler)
    assert sorted(each.n_cached for each in requests) == [0] + [24] * 7
    assert scheduler.counters.prompt_tokens_computed == 25 + 7
    assert scheduler.counters.prompt_tokens_cached == 7 * 24
    for i, each in enumerate(requests):
        assert each.tokens == alone(context, [*system, 30 + i], 4)
    nothing_left(scheduler, context)


def test_others_go_on_where_the_one_that_computes_gives_up() -> None:
    scheduler, context = make(4, n_batch=4)
    requests = [request([7] * 16 + [i], 4) for i in range(3)]
    add(scheduler, *requests)
    scheduler.round()
    assert [each.n_fed > 0 or each.sequence >= 0 for each in requests] == [True, False, False]
    scheduler.cancel(requests[0])
    run(scheduler)
    # One goes on behind what is there, the other one waits for it.
    assert (requests[1].n_cached, requests[2].n_cached) == (12, 16)
    assert requests[1].tokens == alone(context, requests[1].prompt, 4)
    nothing_left(scheduler, context)


def test_a_conversation() -> None:
    scheduler, context = make(exact=True)
    prompt = [1, 2, 3, 4, 5]
    for turn in range(4):
        each = request(prompt, 6, seed=turn)
        add(scheduler, each)
        run(scheduler)
        assert each.tokens == alone(context, prompt, 6, turn)
        if turn:
            assert len(prompt) - each.n_cached <= 4 + 3  # a block, and what was said between
        prompt = [*prompt, *each.tokens, 40, 41, 42]


def test_exact_never_depends_on_the_cache() -> None:
    """A prompt that goes on as another one's generated text: its numbers are a prompt's."""
    scheduler, context = make(cache="exact")
    first = request([1, 2, 3], 12)
    add(scheduler, first)
    run(scheduler)
    prompt = [1, 2, 3, *first.tokens, 4]
    second = request(prompt, 12)
    add(scheduler, second)
    run(scheduler)
    assert second.n_cached == 0 and second.tokens == alone(context, prompt, 12)


def test_preemption_changes_nothing() -> None:
    """Memory for two and a half: the youngest gives way, and goes on later where it was."""
    for cache in ("shared", "exact", "off"):
        scheduler, context = make(4, cache, n_blocks=20, n_ctx=40)
        requests = [request([i, i + 1, i + 2], 30, seed=i) for i in range(4)]
        add(scheduler, *requests)
        run(scheduler)
        assert scheduler.counters.preemptions > 0
        for i, each in enumerate(requests):
            assert each.tokens == alone(context, each.prompt, 30, i)
        assert requests[0].last_token <= requests[3].last_token  # type: ignore[operator]
        nothing_left(scheduler, context)


def test_preempted_after_what_others_have_generated() -> None:
    """Its prompt came from blocks of generated tokens: computed again, they are fed as such again."""
    scheduler, _ = make(2, n_blocks=11, n_ctx=40)
    first = request([1, 2, 3], 14)
    add(scheduler, first)
    run(scheduler)
    prompt = [1, 2, 3, *first.tokens[:12], 5]
    undisturbed = request(prompt, 10)
    add(scheduler, undisturbed)
    run(scheduler)
    assert undisturbed.n_cached == 12

    scheduler, _ = make(2, n_blocks=11, n_ctx=40)
    first, older, younger = request([1, 2, 3], 14), request([30] * 16, 20), request(prompt, 10)
    add(scheduler, first)
    run(scheduler)
    add(scheduler, older, younger)
    run(scheduler)
    assert scheduler.counters.preemptions > 0 and younger.n_cached == 12
    assert younger.tokens == undisturbed.tokens


def test_what_never_fits_ends_alone() -> None:
    scheduler, context = make(4, n_blocks=5, n_ctx=64)
    small, large = request([1], 4), request([2] * 30, 4)
    add(scheduler, large, small)
    run(scheduler)
    assert isinstance(large.error, OutOfMemoryError) and large.ended
    assert small.error is None and len(small.tokens) == 4
    nothing_left(scheduler, context)


def test_memory_that_ends_early() -> None:
    scheduler, context = make(4, n_blocks=40, n_ctx=40)
    context.memory_ends_at = 12
    requests = [request([i], 24) for i in range(4)]
    add(scheduler, *requests)
    run(scheduler)
    assert [each.tokens for each in requests] == [alone(context, [i], 24) for i in range(4)]
    nothing_left(scheduler, context)


@pytest.mark.parametrize("where", ["prompt", "generated"])
def test_only_the_culprit_fails(where: str) -> None:
    scheduler, context = make(4)
    requests = [request([i, i], 8) for i in range(4)]
    if where == "prompt":
        requests[2] = request([0, 99], 8)
        context.poison = 99
    else:
        context.poison = alone(context, [2, 2], 8)[3]
    others = {i: alone(context, each.prompt, 8) for i, each in enumerate(requests) if i != 2}
    hit = {i for i, tokens in others.items() if context.poison in tokens[:-1]}
    add(scheduler, *requests)
    run(scheduler)
    assert isinstance(requests[2].error, FileError)
    for i, tokens in others.items():
        if i not in hit:
            assert requests[i].tokens == tokens and requests[i].error is None
    assert len(hit) < 3
    nothing_left(scheduler, context)


def test_a_draw_that_fails_is_one_request_s() -> None:
    """As where a mask leaves no token: of all draws of a step none has happened then."""
    scheduler, context = make(4)
    requests = [request([i, i], 8) for i in range(4)]
    culprit = requests[2].sampler
    sample = context.sample

    def failing(samplers: Any, masks: Any = ()) -> list[list[int]]:
        if culprit in [s for s in samplers if s is culprit] and culprit.n_generated == 3:
            raise OptionError("no token is allowed")
        return sample(samplers, masks)

    context.sample = failing  # type: ignore[method-assign]
    add(scheduler, *requests)
    run(scheduler)
    for i, each in enumerate(requests):
        tokens = alone(context, [i, i], 8)
        assert each.tokens == (tokens[:3] if i == 2 else tokens)
        assert isinstance(each.error, OptionError) == (i == 2)
    nothing_left(scheduler, context)


def test_a_device_that_fails_is_everybodys_end() -> None:
    scheduler, context = make()

    def fail(*_: Any) -> None:
        raise DeviceError("the GPU has fallen off the bus")

    add(scheduler, request([1], 20), request([2], 20))
    while len(scheduler.active) < 2 or not all(each.decodes for each in scheduler.active):
        scheduler.round()
    context.forward = fail  # type: ignore[method-assign]
    with pytest.raises(DeviceError):
        run(scheduler)


def test_cancelled_at_any_time() -> None:
    for n_rounds in range(12):
        scheduler, context = make(2, n_batch=4)
        requests = [request([i] * 9, 6) for i in range(3)]
        add(scheduler, *requests)
        for _ in range(n_rounds):
            scheduler.round()
        scheduler.cancel(requests[1])
        scheduler.cancel(requests[1])
        if n_rounds < 3:
            assert not requests[1].tokens
        run(scheduler)
        assert [each.tokens for each in (requests[0], requests[2])] == [
            alone(context, [i] * 9, 6) for i in (0, 2)
        ]
        nothing_left(scheduler, context)


def test_short_prompts_first_but_not_for_ever() -> None:
    scheduler, _ = make(1, n_batch=8)
    long, ended = request([1] * 30, 1), []
    add(scheduler, long)
    shorts = [request([i], 1) for i in range(20)]
    add(scheduler, *shorts)
    while scheduler.waiting or scheduler.active:
        scheduler.round()
        ended += [each for each in scheduler.take_changed() if each.ended]
    at = ended.index(long)
    assert ended == [*shorts[:at], long, *shorts[at:]]
    assert 0 < at <= MOST_PASSED_OVER + 1


def test_a_long_prompt_beside_a_stream() -> None:
    """While it is computed, a step comes after the prompts' share of the time, or a layer more."""
    scheduler, context = make(2, n_ctx=600, n_blocks=300, n_batch=64, n_layer=16)
    stream = request([1], 400)
    add(scheduler, stream)
    while len(stream.tokens) < 40:
        scheduler.round()
    times: list[float] = []
    prompt = request([2] * 400, 1)
    add(scheduler, prompt)
    while not prompt.ended:
        scheduler.round()
        times.append(context.clock.now)
    gaps = [b - a for a, b in pairwise(times)]
    step = pass_seconds(1)
    assert max(gaps[1:]) < 1.75 * step  # a third of the time for prompts
    assert sum(gaps) / len(gaps) > 1.35 * step
    assert all(
        n in (32, 64) for feeds in context.passes for n, is_prompt in feeds[:1] if is_prompt and n > 16
    )


def test_alone_a_prompt_goes_in_whole_batches() -> None:
    scheduler, context = make(1, n_ctx=64, n_batch=16)
    add(scheduler, request([1] * 40, 1))
    run(scheduler)
    assert context.passes == [[(16, True)], [(16, True)], [(8, True)]]


def test_log_probabilities_of_a_prompt() -> None:
    scheduler, context = make(2, n_batch=8)
    prompt = [*range(20)]
    for max_tokens in (0, 3):
        each = request(prompt, max_tokens, n_prompt_logprobs=0, n_logprobs=1)
        add(scheduler, each)
        run(scheduler)
        assert [t and t.token for t in each.prompt_logprobs] == [None, *prompt[1:]]
        assert [t.token for t in each.logprobs] == each.tokens == alone(context, prompt, 3)[:max_tokens]
        assert each.n_cached == 0 and each.finish_reason == "length"
    nothing_left(scheduler, context)


def test_log_probabilities_after_preemption() -> None:
    scheduler, context = make(2, n_blocks=14, n_ctx=48, n_batch=4)
    first, second = request([1], 40), request([*range(3, 33)], 8, n_prompt_logprobs=0)
    add(scheduler, first, second)
    run(scheduler)
    assert scheduler.counters.preemptions
    assert [t and t.token for t in second.prompt_logprobs] == [None, *second.prompt[1:]]
    assert second.tokens == alone(context, second.prompt, 8)


def test_logits_wait_for_their_reader() -> None:
    scheduler, context = make(2, n_batch=8)
    prompt = [*range(20)]
    each = LogitsRequest(prompt, FakeSampler(), 0, uses_cache=False, alone=True, first=6)
    add(scheduler, each)
    sizes = []
    while not each.ended or each.piece is not None:
        assert scheduler.round() or each.piece is not None
        if each.piece is not None:
            assert not scheduler.round()  # it rests
            sizes.append(len(each.piece))
            each.piece = None
    assert sizes == [8, 6]
    nothing_left(scheduler, context)


def test_who_rests_takes_no_place() -> None:
    """Nor the blocks that others need: it is computed again when its reader comes back."""
    scheduler, context = make(1, n_batch=8, n_blocks=10, n_ctx=40)
    resting = LogitsRequest([*range(30)], FakeSampler(), 0, uses_cache=False, alone=True)
    other = request([1] * 20, 8)
    add(scheduler, resting)
    run(scheduler)
    assert resting.piece is not None and len(resting.piece) == 8
    add(scheduler, other)
    run(scheduler)
    assert other.tokens == alone(context, [1] * 20, 8) and scheduler.counters.preemptions == 1
    rows = [resting.piece]
    while not resting.ended:
        resting.piece = None
        run(scheduler)
        rows.append(resting.piece)
    assert np.array_equal(np.concatenate(rows), logits_alone(context, [*range(30)]))
    nothing_left(scheduler, context)


def test_two_ends_of_drafts() -> None:
    """What is drawn behind the end, or past max_tokens, is nobody's."""
    scheduler, context = make(1, n_vocab=3)
    tokens = alone(context, [1, 2], 40)
    for max_tokens in (1, 5, 40):
        each = request([1, 2], max_tokens, drafter=NgramDrafter())
        add(scheduler, each)
        run(scheduler)
        assert each.tokens == tokens[:max_tokens]
    assert scheduler.counters.accepted > 0
    end = tokens[20]
    each = request([1, 2], 40, drafter=NgramDrafter(), end_tokens=frozenset([end]))
    add(scheduler, each)
    run(scheduler)
    assert each.tokens == tokens[: tokens.index(end)]
    nothing_left(scheduler, context)


@pytest.mark.parametrize("small", ["the same", "another", "short of memory", "with fewer tokens"])
def test_a_draft_model_changes_nothing(small: str) -> None:
    scheduler, context = make(4, exact=True)
    drafting = FakeContext(clock=context.clock, n_ctx=64, exact=True, name=small * (small == "another"))
    drafting.memory_ends_at = 3 if small == "short of memory" else None
    drafting.seconds = lambda n_tokens: 1e-4 * pass_seconds(n_tokens)
    model = DraftModel(drafting, 20 if small == "with fewer tokens" else 50, context.clock)
    requests = [
        request(prompt, 20, i, drafter=model, draft_sampler=lambda n, i=i: FakeSampler(i, n))
        for i, prompt in enumerate(PROMPTS)
    ]
    add(scheduler, *requests)
    run(scheduler)
    for i, each in enumerate(requests):
        assert each.tokens == alone(context, PROMPTS[i], 20, i) and each.error is None
    if small == "the same":
        assert scheduler.counters.accepted == scheduler.counters.drafted > 40
    if small == "another":
        assert 0 < scheduler.counters.accepted < scheduler.counters.drafted
    assert not drafting.sequences and not drafting.users
    nothing_left(scheduler, context)


class KnowingDrafter:
    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def draft(self, requests: Any, most: Any, costs: Any) -> list[Drafts]:
        n = len(requests[0].tokens)
        drafts = self.tokens[n : n + most[0]]
        return [Drafts(drafts, [0.99] * len(drafts))]

    def end(self, request: Request) -> None:
        pass


def test_right_drafts_behind_the_end_are_not_published() -> None:
    scheduler, context = make()
    tokens = alone(context, [1] * 12, 40)
    n = next(i for i in range(8, 40) if tokens[i] not in tokens[:i])
    asked = request([1] * 12, 40, end_tokens=frozenset({tokens[n]}), drafter=KnowingDrafter(tokens))
    add(scheduler, asked)
    run(scheduler)
    assert asked.tokens == tokens[:n] and 0 < asked.n_accepted <= n < asked.n_drafted
    assert scheduler.cache.n_unused == len(asked.ids) // context.block_tokens
    nothing_left(scheduler, context)


class FailingDrafter:
    def draft(self, *_: Any) -> Any:
        raise OptionError("the draft model is closed")

    def end(self, request: Request) -> None:
        pass


def test_a_drafter_that_fails_drafts_no_more() -> None:
    scheduler, context = make()
    asked = [request([1], 9, drafter=FailingDrafter()), request([2], 9)]
    add(scheduler, *asked)
    run(scheduler)
    assert [each.tokens for each in asked] == [alone(context, [1], 9), alone(context, [2], 9)]
    assert asked[0].drafter is None
