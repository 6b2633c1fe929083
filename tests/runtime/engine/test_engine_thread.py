"""The engine's thread and its queue, on a context without a model: who is refused, and how it all ends."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fake_context import FakeContext, FakeSampler, alone

from vptq_runtime import BusyError, OptionError, VPTQError
from vptq_runtime.engine.engine import Engine
from vptq_runtime.engine.mailbox import Mailbox, wake
from vptq_runtime.engine.request import Delta, Request
from vptq_runtime.engine.stream import GenerationStream
from vptq_runtime.errors import DeviceError, OutOfMemoryError

PROMPT = [1, 2, 3, 4, 5]
WAIT_S = 30  # for what should come at once


class Gate(FakeContext):
    """A context that computes only when it may, and then fails if it has to."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.reached, self.open = threading.Event(), threading.Event()
        self._permits = threading.Semaphore(0)
        self.error: BaseException | None = None

    def forward(self, *arguments: Any) -> None:
        self._wait()
        super().forward(*arguments)

    def advance(self, n_layers: int) -> bool:
        self._wait()
        return super().advance(n_layers)

    def one_more(self) -> None:
        """Lets it compute once, and waits until it is to compute again."""
        self.reached.clear()
        self._permits.release()
        assert self.reached.wait(WAIT_S)

    def _wait(self) -> None:
        self.reached.set()
        while not self.open.is_set() and not self._permits.acquire(timeout=0.01):
            pass
        if self.error is not None:
            raise self.error


@contextmanager
def engine_of(context: FakeContext, **options: Any) -> Iterator[Engine]:
    options = {"parallel": 8, "queue": 100, "queue_tokens": 1000, "cache": "shared"} | options
    engine = Engine(context, **options, closed=lambda: OptionError("closed"))
    try:
        yield engine
    finally:
        if isinstance(context, Gate):
            context.open.set()
        engine.close()


def request_of(prompt: list[int] = PROMPT, max_tokens: int = 10) -> Request:
    return Request(list(prompt), FakeSampler(), max_tokens)


def stream_of(engine: Engine, request: Request) -> GenerationStream:
    return GenerationStream(engine, request, lambda r: r.tokens)  # type: ignore[arg-type, return-value]


def test_it_generates() -> None:
    with engine_of(FakeContext()) as engine:
        requests = [request_of([*PROMPT, i]) for i in range(20)]
        for request in requests:
            engine.submit(request)
        for request in requests:
            assert request.mailbox.wait(WAIT_S)
            assert request.tokens == alone(FakeContext(), request.prompt, 10)
        assert engine.stats.n_running == engine.stats.n_waiting == 0


class Defect(BaseException):
    pass


@pytest.mark.parametrize("error", [DeviceError("the GPU is gone"), Defect("of the engine")])
@pytest.mark.parametrize("n_places", [1, 8])
def test_a_failure_ends_all_requests(error: BaseException, n_places: int) -> None:
    """Those that are computed, that wait, and that the thread has never seen."""
    context = Gate()
    context.error = error
    with engine_of(context, parallel=n_places) as engine:
        requests = [request_of() for _ in range(3)]
        engine.submit(requests[0])
        assert context.reached.wait(WAIT_S)
        for request in requests[1:]:
            engine.submit(request)  # into the inbox of a thread that is going to die
        engine.cancel(requests[1])
        context.open.set()
        for request in requests:
            assert request.mailbox.wait(WAIT_S)
            with pytest.raises(type(error), match=str(error)):
                stream_of(engine, request).result()
        with pytest.raises(type(error), match=str(error)):
            engine.submit(request_of())
        assert engine.stats.n_running == engine.stats.n_waiting == 0


def test_a_request_that_the_failing_scheduler_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A place is given up in several steps, and the context may fail between two of them."""
    context = Gate()
    with engine_of(context) as engine:
        request = request_of()
        engine.submit(request)
        assert context.reached.wait(WAIT_S)

        def fail(sequence: int) -> None:
            raise DeviceError("gone")

        monkeypatch.setattr(context, "free_sequence", fail)
        engine.cancel(request)
        context.open.set()
        assert request.mailbox.wait(WAIT_S)


def test_close_ends_what_waits() -> None:
    context = Gate()
    with engine_of(context, parallel=1) as engine:
        requests = [request_of() for _ in range(3)]
        for request in requests:
            engine.submit(request)
        assert context.reached.wait(WAIT_S)
        context.open.set()
        engine.close()
        for request in requests:
            assert request.mailbox.ended
        assert [str(request.error) for request in requests[1:]] == ["closed", "closed"]


def test_an_error_that_is_raised_again_does_not_grow() -> None:
    context = Gate()
    context.error = DeviceError("gone")
    with engine_of(context) as engine:
        request = request_of()
        engine.submit(request)
        context.open.set()
        assert request.mailbox.wait(WAIT_S)
        stream = stream_of(engine, request)
        for call in (
            stream.result,
            stream.next_delta,
            engine.check_open,
            lambda: engine.submit(request_of()),
        ):
            lengths = set()
            for _ in range(5):
                with pytest.raises(DeviceError) as caught:
                    call()
                lengths.add(len(caught.traceback))
            assert len(lengths) == 1
            assert caught.traceback[-1].name == "_wait", "where it came from is part of it"


def test_a_thread_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_of(FakeContext()) as engine:
        with monkeypatch.context() as patch:

            def start(thread: threading.Thread) -> None:
                raise RuntimeError("can't start new thread")

            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(OutOfMemoryError, match="thread: cannot be started: can't start new thread"):
                engine.submit(request_of())
        assert engine.stats.n_waiting == 0
        request = request_of()
        engine.submit(request)
        assert request.mailbox.wait(WAIT_S) and len(request.tokens) == 10


class Slow(FakeContext):
    """It is inside of a computation for most of the time."""

    inside = False

    def forward(self, *arguments: Any) -> None:
        self.inside = True
        time.sleep(0.05)
        super().forward(*arguments)
        self.inside = False


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_waits_for_the_end_of_a_round() -> None:
    context = Slow()
    with engine_of(context) as engine:
        request = request_of(max_tokens=30)
        engine.submit(request)
        for _ in range(5):
            while not context.inside:
                time.sleep(0.001)
            child = os.fork()
            if not child:
                ended = request.mailbox.ended and engine.stats.n_running == engine.stats.n_waiting == 0
                os._exit(7 if ended and not context.inside else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert request.mailbox.wait(WAIT_S)
        assert request.tokens == alone(FakeContext(), PROMPT, 30)


# The queue


@contextmanager
def full(**options: Any) -> Iterator[tuple[Engine, Gate]]:
    """An engine with one place, which is taken."""
    context = Gate()
    with engine_of(context, parallel=1, **options) as engine:
        engine.submit(request_of())
        assert context.reached.wait(WAIT_S)
        while engine.stats.n_running == 0:
            context.one_more()
        yield engine, context


def test_a_queue_has_room_for_so_many_tokens() -> None:
    with full(queue=100, queue_tokens=20) as (engine, _):
        engine.submit(request_of([1] * 12))
        engine.submit(request_of([1] * 8))
        with pytest.raises(
            BusyError,
            match=r"^queue_tokens: found 20 tokens of prompts waiting and 1 more, expected at most 20",
        ):
            engine.submit(request_of([1]))
        engine.check_room()  # a shorter one could come


def test_one_prompt_may_always_wait() -> None:
    with full(queue=100, queue_tokens=0) as (engine, _):
        engine.submit(request_of([1] * 60))
        for length in (60, 1):
            with pytest.raises(BusyError, match=f"found 60 tokens of prompts waiting and {length} more"):
                engine.submit(request_of([1] * length))


def test_free_places_come_on_top_of_the_queue() -> None:
    context = Gate(n_ctx=64)
    with engine_of(context, parallel=4, queue=0, queue_tokens=0) as engine:
        for _ in range(4):
            engine.submit(request_of([1] * 63))
        with pytest.raises(BusyError, match="queue: found 4 requests waiting, expected at most 0"):
            engine.submit(request_of([1]))
        with pytest.raises(BusyError):
            engine.check_room()


def test_tokens_leave_the_queue() -> None:
    """Cancelled, or with a place: there is room for others, and whoever waits for it goes on."""
    with full(queue=100, queue_tokens=20) as (engine, context):
        first = request_of([1] * 20)
        engine.submit(first)
        second = request_of([2] * 20)
        waiting = threading.Thread(target=engine.submit, args=(second,), kwargs={"wait": True})
        waiting.start()
        with pytest.raises(BusyError):
            engine.submit(request_of([3]))
        engine.cancel(first)
        context.open.set()
        waiting.join(WAIT_S)
        assert not waiting.is_alive()
        assert second.mailbox.wait(WAIT_S) and len(second.tokens) == 10
        assert engine.stats.n_waiting == 0
        for _ in range(5):  # nothing is counted twice
            request = request_of([1] * 20)
            engine.submit(request)
            assert request.mailbox.wait(WAIT_S)


# The mailbox


def test_a_backlog_leaves_no_waiters() -> None:
    mailbox = Mailbox()
    mailbox.put(Delta(str(i), [i], []) for i in range(50))

    async def read() -> list[str]:
        texts = []
        for _ in range(50):
            delta = await mailbox.take_async()
            assert delta is not None
            texts.append(delta.text)
        assert mailbox.take_waiters() == []
        task = asyncio.ensure_future(mailbox.take_async())
        await asyncio.sleep(0)
        waiters = mailbox.take_waiters()
        assert len(waiters) == 1 and not task.done()
        mailbox.end()
        wake(waiters)
        assert await task is None
        assert await mailbox.take_async() is None
        await mailbox.wait_async()
        assert mailbox.take_waiters() == []
        return texts

    assert asyncio.run(read()) == [str(i) for i in range(50)]


def test_streams_in_asyncio_are_closed_without_blocking() -> None:
    context = Gate()

    async def main(engine: Engine) -> None:
        request = request_of()
        engine.submit(request)
        async with stream_of(engine, request) as stream:
            assert await asyncio.to_thread(context.reached.wait, WAIT_S)
            closing = asyncio.ensure_future(stream.aclose())
            await asyncio.sleep(0.01)  # the loop goes on while the engine's step is not done
            assert not closing.done()
            context.open.set()
            await closing
            assert request.mailbox.ended and [piece async for piece in stream] == []
        assert stream.ended

    with engine_of(context) as engine:
        asyncio.run(main(engine))


def test_errors_keep_what_they_say() -> None:
    from vptq_runtime.errors import again

    for error in (BusyError("full", 7), OptionError("wrong"), VPTQError("a\nb"), KeyError("k")):
        copy = again(error)
        assert copy is not error and type(copy) is type(error)
        assert (str(copy), vars(copy)) == (str(error), vars(error))
