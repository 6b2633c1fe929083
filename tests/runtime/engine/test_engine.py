"""The engine on a real context: the same tokens whatever else it does, on a CPU and on a GPU."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from configurations import BOS, EOS_IDS, VOCAB_SIZE
from gpu import need_gpu
from hypothesis import given, settings
from hypothesis import strategies as st

from vptq_runtime import BusyError, OptionError, Runtime, demo_path
from vptq_runtime.engine.constraints import Constraints
from vptq_runtime.evaluate import perplexity

SYSTEM = [BOS, *range(20, 120)]
# Of every kind of sampling; the penalties look back at what was generated.
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.5, "top_k": 0, "top_p": 1, "min_p": 0},
    {"temperature": 1.0, "top_k": 20, "repeat_penalty": 1.3},
    {"temperature": 0.8, "presence_penalty": 0.7, "frequency_penalty": 0.4, "logit_bias": {5: 3.0, 9: -50}},
    {"temperature": 0, "logprobs": 2},
    {
        "temperature": 1.0,
        "logit_bias": {5: 100, 6: 100, 7: 99.5},
    },  # guesses are often right
]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Some begin alike; one is longer than a batch."""
    rng = np.random.default_rng(0)
    ends = [rng.integers(20, 300, size=n).tolist() for n in (1, 5, 30, 64, 150)]
    return [*([*SYSTEM, *end] for end in ends), [BOS], [BOS, 30, 31]]


@pytest.fixture(scope="module")
def expected(model: Path, prompts: list[list[int]]) -> dict[tuple[int, int], list[int]]:
    """By prompt and kind: what it gives alone, from an empty cache, without guesses ahead."""
    with Runtime(model, device="cpu", cache="off") as runtime:
        return {
            (i, kind): alone(runtime, prompt, kind)
            for i, prompt in enumerate(prompts)
            for kind in range(len(KINDS))
        }


def alone(runtime: Runtime, prompt: list[int], kind: int, max_tokens: int = 40) -> list[int]:
    options = KINDS[kind] | {"seed": kind, "max_tokens": max_tokens, "speculate": "off"}
    return runtime.generate(prompt, **options).tokens


@pytest.fixture(scope="module")
def small(model: Path) -> Iterator[Runtime]:
    """With a cache so small that requests have to give way, and only what is exact in it."""
    with Runtime(model, device="cpu", n_ctx=320, kv_tokens=352, cache="exact", parallel=4) as runtime:
        yield runtime


Chosen = st.tuples(
    st.integers(0, 6),
    st.integers(0, len(KINDS) - 1),
    st.integers(1, 40) | st.just(40),
    st.sampled_from(["off", "ngram"]),
    st.booleans(),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(Chosen, min_size=1, max_size=10))
def test_any_company(
    small: Runtime,
    prompts: list[list[int]],
    expected: dict[tuple[int, int], list[int]],
    chosen: list[tuple[int, int, int, str, bool]],
) -> None:
    """In any order, beside others that are cancelled, after preemption, from the cache, with drafts."""
    streams = []
    for i, kind, max_tokens, speculate, beside_cancelled in chosen:
        if beside_cancelled:
            small.submit(prompts[-i], max_tokens=None, seed=1).cancel()
        options = KINDS[kind] | {"seed": kind, "max_tokens": max_tokens, "speculate": speculate}
        streams.append(small.submit(prompts[i], **options))
    for stream, (i, kind, max_tokens, *_) in zip(streams, chosen, strict=True):
        assert stream.result().tokens == expected[i, kind][:max_tokens]


def test_hard_company(
    small: Runtime, prompts: list[list[int]], expected: dict[tuple[int, int], list[int]]
) -> None:
    """All at once: what the test before may not have met."""
    streams = {
        (i, kind): small.submit(prompts[i], **KINDS[kind], seed=kind, max_tokens=40) for i, kind in expected
    }
    for key, stream in streams.items():
        assert stream.result().tokens == expected[key]
    stats = small.stats()
    assert stats.preemptions > 0
    assert stats.accepted > 0
    assert stats.prompt_tokens_cached > 1000
    assert stats.kv_blocks == stats.kv_blocks_free == 352 // 32


def test_from_eight_threads(
    model: Path, prompts: list[list[int]], expected: dict[tuple[int, int], list[int]]
) -> None:
    found: dict[tuple[int, int], list[list[int]]] = {}
    with Runtime(model, device="cpu", cache="exact") as runtime:

        def work(kind: int) -> None:
            for i, prompt in enumerate(prompts):
                options = KINDS[kind % len(KINDS)] | {"seed": kind % len(KINDS), "max_tokens": 40}
                found.setdefault((i, kind % len(KINDS)), []).append(
                    runtime.generate(prompt, **options).tokens
                )

        threads = [threading.Thread(target=work, args=(kind,)) for kind in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert runtime.stats().decode_steps < 0.6 * 8 * len(prompts) * 39  # they were computed together
    assert found.keys() == {(i, kind) for i, kind in expected if kind < len(KINDS)}
    for key, several in found.items():
        assert all(tokens == expected[key] for tokens in several)


@pytest.mark.gpu
def test_on_a_gpu(model: Path, prompts: list[list[int]]) -> None:
    """As test_any_company, with its own numbers; one schedule, as an emulation is slow."""
    need_gpu()
    chosen = [(3, 0, 80), (5, 1, 50), (6, 2, 50), (0, 5, 8)]
    with Runtime(model, device="cuda", cache="off") as runtime:
        expected = [alone(runtime, prompts[i], kind, max_tokens) for i, kind, max_tokens in chosen]
    with Runtime(model, device="cuda", n_ctx=320, kv_tokens=320, cache="exact", parallel=4) as runtime:
        streams = []
        for i, kind, max_tokens in chosen:
            streams.append(runtime.submit(prompts[i], **KINDS[kind], seed=kind, max_tokens=max_tokens))
            if len(streams) == 1:
                next(streams[0])  # the longest prompt first
        assert [stream.result().tokens for stream in streams] == expected
        assert runtime.stats().preemptions > 0


def test_one_system_prompt_is_computed_once(model: Path) -> None:
    with Runtime(model, device="cpu") as runtime:
        prompts = [[*SYSTEM, 200 + i] for i in range(8)]
        several = runtime.generate(prompts, max_tokens=4, temperature=0)
        n_cached = len(SYSTEM) // 32 * 32
        assert sorted(generation.n_cached for generation in several) == [0] + 7 * [n_cached]
        assert runtime.stats().prompt_tokens_computed == 8 * (len(SYSTEM) + 1) - 7 * n_cached


def test_a_conversation_feeds_what_is_new(model: Path) -> None:
    """With precision "f32" the same as from an empty cache."""
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 0}
    with (
        Runtime(model, device="cpu", precision="f32") as runtime,
        Runtime(model, device="cpu", precision="f32", cache="off") as fresh,
    ):
        prompt = SYSTEM
        for turn in range(4):
            generation = runtime.generate(prompt, **options)
            assert generation.tokens == fresh.generate(prompt, **options).tokens
            if turn:
                assert generation.timings.prompt_tokens < 32 + 4
            prompt = [*prompt, *generation.tokens, 30, 31, 32]


@pytest.mark.parametrize("cache", ["shared", "exact", "off"])
def test_cache_modes(model: Path, cache: Any) -> None:
    with Runtime(model, device="cpu", cache=cache) as runtime:
        first = runtime.generate(SYSTEM, max_tokens=60, temperature=0)
        again = runtime.generate(SYSTEM, max_tokens=60, temperature=0)
        assert again.tokens == first.tokens
        assert again.n_cached == (0 if cache == "off" else 96)
        turn = runtime.generate([*SYSTEM, *first.tokens, 30], max_tokens=4, temperature=0)
        assert turn.n_cached == {"off": 0, "exact": 96, "shared": 160}[cache]


def test_salts_share_nothing(model: Path) -> None:
    with Runtime(model, device="cpu") as runtime:
        for salt, n_cached in (("a", 0), ("b", 0), ("a", 96), ("", 0)):
            assert runtime.generate(SYSTEM, max_tokens=1, cache_salt=salt).n_cached == n_cached


def test_log_probabilities(runtime: Runtime) -> None:
    prompt = [*SYSTEM, *range(120, 260)]
    tokens = runtime.generate(prompt, max_tokens=10, temperature=0).tokens
    generation = runtime.generate(
        prompt,
        max_tokens=10,
        temperature=1.3,
        logit_bias={t: 100 for t in tokens[:1]},
        seed=1,
        logprobs=3,
        prompt_logprobs=2,
    )
    whole = [*prompt, *generation.tokens]
    logits = runtime.logits(whole).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    assert generation.prompt_logprobs is not None and generation.logprobs is not None
    assert generation.prompt_logprobs[0] is None
    for place, (token, told) in enumerate(zip(prompt[1:], generation.prompt_logprobs[1:], strict=True)):
        assert told is not None and told.token == token
        assert told.logprob == pytest.approx(expected[place, token], abs=1e-12)
        order = np.argsort(-expected[place], kind="stable")[:2].tolist()
        assert [t for t, _ in told.top] == order
        assert [p for _, p in told.top] == pytest.approx(expected[place, order].tolist(), abs=1e-12)
    for place, (token, told) in enumerate(zip(generation.tokens, generation.logprobs, strict=True)):
        # What was generated is not rounded as a prompt's tokens are.
        assert told.token == token and len(told.top) == 3
        assert told.logprob == pytest.approx(expected[len(prompt) - 1 + place, token], abs=0.05)


def test_a_prompt_s_log_probabilities_are_the_perplexity(runtime: Runtime) -> None:
    text = SYSTEM * 3
    told = runtime.generate(text, max_tokens=0, prompt_logprobs=0).prompt_logprobs
    assert told is not None
    nll = [-entry.logprob for entry in told if entry is not None]
    assert nll == pytest.approx(perplexity(runtime, text, n_ctx=len(text)).nll.tolist(), abs=1e-12)


def test_only_a_score(runtime: Runtime) -> None:
    generation = runtime.generate([BOS], max_tokens=0, prompt_logprobs=1)
    assert (generation.prompt_logprobs, generation.tokens) == ([None], [])
    assert generation.finish_reason == "length" and generation.logprobs is None
    before = runtime.stats().prompt_tokens_computed
    for prompt, n_fed in (([BOS], 1), ([*SYSTEM, 300], len(SYSTEM))):
        timings = runtime.generate(prompt, max_tokens=0, prompt_logprobs=0).timings
        assert timings.prompt_tokens == n_fed and timings.prompt_s > 0 and timings.decode_s == 0
        after = runtime.stats().prompt_tokens_computed
        assert after - before == n_fed
        before = after


def test_min_tokens(runtime: Runtime) -> None:
    """Neither an end token nor a stop string ends the text before."""
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 30, "logit_bias": {EOS_IDS[0]: 100}}
    assert runtime.generate("the", **options).tokens == []
    assert len(runtime.generate("the", min_tokens=7, **options).tokens) == 7
    whole = runtime.generate("the quick", temperature=0, max_tokens=60)
    stop = whole.text[10:12]
    generation = runtime.generate("the quick", temperature=0, max_tokens=60, min_tokens=30, stop=stop)
    assert len(generation.tokens) >= 30
    assert generation.text.startswith(runtime.detokenize(whole.tokens[:29]).rstrip("\ufffd"))


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
def test_a_draft_model(
    model: Path, kv_type: str, prompts: list[list[int]], expected: dict[tuple[int, int], list[int]]
) -> None:
    """The same model drafts, on one thread, and with other numbers."""
    with (
        Runtime(model, device="cpu") as runtime,
        Runtime(model, device="cpu", n_threads=1, kv_type=kv_type) as other,
    ):
        streams = {
            (i, kind): runtime.submit(prompts[i], **KINDS[kind], seed=kind, max_tokens=40, speculate=other)
            for i, kind in expected
        }
        for key, stream in streams.items():
            assert stream.result().tokens == expected[key]
        stats = runtime.stats()
        assert stats.drafted >= stats.accepted > 0


def test_bad_draft_models(model: Path, runtime: Runtime) -> None:
    with pytest.raises(OptionError, match="speculate: found this Runtime itself"):
        runtime.generate("a", speculate=runtime)
    closed = Runtime(model)
    closed.close()
    with pytest.raises(OptionError, match="speculate: found a closed Runtime"):
        runtime.generate("a", speculate=closed)
    with Runtime(model) as used:
        runtime.generate("a", speculate=used, max_tokens=4)
    with pytest.raises(OptionError, match="speculate: found a closed Runtime"):
        runtime.generate("a", speculate=used)
    with Runtime(demo_path()) as other, pytest.raises(OptionError, match="speculate: found other tokens in"):
        runtime.generate("a", speculate=other)


def test_a_form_in_any_company(runtime: Runtime) -> None:
    """A grammar's request is the same alone, in company and without drafts, and leaves the others alone."""
    forms: list[dict[str, Any]] = [
        {"json_schema": {"enum": ["fox", "dog", 5]}},
        {"regex": "(the|fox|dog){1,4}"},
        {"grammar": 'start: "a" start | "b"'},
    ]
    options: dict[str, Any] = {"max_tokens": 60, "temperature": 1.0, "seed": 3}
    alone = [runtime.generate("the", **form, **options, speculate="off") for form in forms]
    free = runtime.generate("the", **options)
    streams = [runtime.submit("the", **form, **options) for form in [*forms, {}, *forms]]
    found = [stream.result() for stream in streams]
    assert [each.tokens for each in found] == [each.tokens for each in [*alone, free, *alone]]
    assert [each.finish_reason for each in alone] == ["stop", "stop", "stop"]
    assert json.loads(alone[0].text) in ["fox", "dog", 5]
    assert re.fullmatch("(the|fox|dog){1,4}", alone[1].text) and re.fullmatch("a*b", alone[2].text)
    assert free.tokens not in [each.tokens for each in alone]


def test_first_forms_at_the_same_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model's forms share is made once: it can take a second."""
    made = []
    init = Constraints.__init__

    def slow_init(self: Constraints, *arguments: Any) -> None:
        made.append(self)
        time.sleep(0.1)
        init(self, *arguments)

    monkeypatch.setattr(Constraints, "__init__", slow_init)
    texts = []
    with Runtime(model, device="cpu") as runtime:
        ask = lambda: texts.append(runtime.generate("the", regex="fox").text)  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (len(made), texts) == (1, ["fox"] * 4)


def test_a_form_with_everything_else(runtime: Runtime) -> None:
    """Log-probabilities are the model's own; min_tokens does not keep a finished text from ending."""
    generation = runtime.generate("the", regex="fox", logprobs=2, min_tokens=50, max_tokens=60, temperature=0)
    assert (generation.text, generation.finish_reason) == ("fox", "stop")
    assert generation.logprobs is not None and len(generation.logprobs) == len(generation.tokens)
    with pytest.raises(OptionError, match=r"^json_schema: found .* expected"):
        runtime.generate("the", json_schema="{")


def test_a_full_queue(model: Path) -> None:
    with Runtime(model, device="cpu", parallel=1, queue=2, n_ctx=1024) as runtime:
        streams = [runtime.submit([BOS], max_tokens=1000)]
        while runtime.stats().n_running == 0:
            time.sleep(0.001)
        streams += [runtime.submit([BOS, i], max_tokens=5) for i in range(2)]
        with pytest.raises(
            BusyError, match=r"^queue: found 2 requests waiting, expected at most 2$"
        ) as error:
            runtime.submit([BOS], max_tokens=1)
        assert error.value.retry_after is None  # nothing has ended yet
        assert (
            len(runtime.generate([[BOS, i] for i in range(5)], max_tokens=3)) == 5
        )  # a list waits for its turn
        assert all(stream.result().finish_reason for stream in streams)
        streams = [runtime.submit([BOS], max_tokens=1000) for _ in range(3)]
        with pytest.raises(BusyError, match=r"one of them gets its turn in about \d+ s$") as error:
            for _ in range(2):
                runtime.submit([BOS], max_tokens=1)
        assert error.value.retry_after is not None
        for stream in streams:
            stream.cancel()


def test_a_cancelled_prompt_frees_its_place_within_a_step(model: Path) -> None:
    with Runtime(model, device="cpu", n_ctx=100_000) as runtime:
        stream = runtime.submit([20] * 90_000, max_tokens=1)
        while runtime.stats().n_running == 0:
            time.sleep(0.001)
        stream.close()
        stats = runtime.stats()
        assert (stats.n_running, stats.kv_blocks - stats.kv_blocks_free) == (0, 0)
        assert stats.prompt_tokens_computed < 45_000


def test_streams_are_delivered_where_nobody_reads(runtime: Runtime) -> None:
    unread = [runtime.submit("the quick", max_tokens=200, seed=i) for i in range(4)]
    assert len(runtime.generate("the fox", max_tokens=20, temperature=0).tokens) == 20
    assert {len(stream.result().tokens) for stream in unread} == {200}
    assert "".join(unread[0]) == unread[0].result().text


def test_asyncio(runtime: Runtime) -> None:
    alone = runtime.generate("the quick", max_tokens=30, temperature=0)

    async def read(n: int) -> str:
        return "".join([piece async for piece in runtime.submit("the quick", max_tokens=n, temperature=0)])

    async def main() -> None:
        texts = await asyncio.gather(*(read(30) for _ in range(8)))
        assert set(texts) == {alone.text}
        assert (await runtime.submit("the quick", max_tokens=30, temperature=0)).tokens == alone.tokens
        endless = runtime.submit("a", max_tokens=None)
        waiting = asyncio.ensure_future(_awaited(endless))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await asyncio.to_thread(endless._request.mailbox.wait, 30)

    asyncio.run(main())


async def _awaited(stream: Any) -> Any:
    return await stream


def test_a_loop_that_is_gone_stops_nobody(runtime: Runtime) -> None:
    async def begin() -> Any:
        stream = runtime.submit("a", max_tokens=300, temperature=0)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stream._request.mailbox.wait_async(), 1e-3)  # a waiter is left behind
        return stream

    stream = asyncio.run(begin())
    assert len(stream.result().tokens) == 300
    assert len(runtime.generate("b", max_tokens=3).tokens) == 3


def test_result_with_a_timeout(runtime: Runtime) -> None:
    stream = runtime.submit("a", max_tokens=None)
    with pytest.raises(TimeoutError, match="has not come to its end in 0 s"):
        stream.result(timeout=0)
    assert not stream.ended
    stream.cancel()
    assert stream.result(timeout=30).finish_reason is None


def test_logits_in_pieces_rest_while_others_go_on(runtime: Runtime) -> None:
    tokens = [BOS, *range(20, 320)] * 2
    pieces = runtime.logits_in_pieces(tokens, first=10)
    first = next(pieces)
    assert len(runtime.generate("a", max_tokens=20, temperature=0).tokens) == 20
    whole = np.concatenate([first, *pieces])
    assert whole.shape == (len(tokens) - 10, VOCAB_SIZE)
    assert np.array_equal(whole, runtime.logits(tokens)[10:])
    unread = runtime.logits_in_pieces(tokens)
    next(unread)
    unread.close()  # it waits for nothing, but its place is free within a step
    while runtime.stats().n_running:
        time.sleep(0.01)
