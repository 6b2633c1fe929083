"""The thread that owns a context: callers queue requests and read what comes of them."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from queue import Empty, SimpleQueue

from vptq_runtime.engine.batch import Context
from vptq_runtime.engine.mailbox import wake
from vptq_runtime.engine.prefix_cache import CacheMode
from vptq_runtime.engine.request import Request
from vptq_runtime.engine.scheduler import Scheduler
from vptq_runtime.errors import BusyError

HELD_WEIGHT = 0.1  # of the newest request in the mean of how long one has its place


@dataclass(frozen=True)
class EngineStats:
    """What an engine does and has done.

    n_running have a place in the context, n_waiting have none yet. kv_blocks is how many blocks of
    block_tokens tokens the KV cache may have, kv_blocks_free how many of them nobody needs: unused ones that
    the prefix cache keeps are among these. The others count from the start: prompt_tokens of all prompts that
    got a place, prompt_tokens_cached of these that the prefix cache had, prompt_tokens_computed with what was
    computed again, tokens generated, drafted by speculation, and accepted of those, preemptions for lack of
    memory.
    """

    n_running: int
    n_waiting: int
    kv_blocks: int
    kv_blocks_free: int
    block_tokens: int
    prompt_tokens: int
    prompt_tokens_cached: int
    prompt_tokens_computed: int
    generated_tokens: int
    drafted: int
    accepted: int
    preemptions: int
    decode_steps: int


class Engine:
    """One context, and the thread that works on it from the first request to `close`.

    parallel: most requests that are computed together; the others wait.
    max_waiting: most requests that wait; more are a BusyError.
    closed: makes the error of whoever asks for something after `close`.
    """

    def __init__(
        self,
        context: Context,
        *,
        parallel: int,
        max_waiting: int,
        cache: CacheMode,
        closed: Callable[[], Exception],
    ) -> None:
        self._scheduler: Scheduler | None = Scheduler(
            context, time.perf_counter, parallel=parallel, cache=cache
        )
        self._parallel = parallel
        self._max_waiting = max_waiting
        self._closed_error = closed
        self._error: BaseException | None = None  # that has ended the thread
        self._room = threading.Condition()  # of all below; notified when the queue gets shorter
        self._closing = False
        self._n_requests = 0
        self._n_unseen = 0  # requests that the thread has not seen yet
        self._n_queued = 0  # those that it has seen and that have no place
        self._n_active = 0
        self._mean_held: float | None = None  # seconds that a request has its place
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        self._inbox: SimpleQueue[Callable[[Scheduler], None] | None] = SimpleQueue()
        self._counters = self._scheduler.counters
        self._block_tokens = context.block_tokens
        self._blocks = (context.n_blocks, context.n_free_blocks)  # all, free

    def submit(self, request: Request, *, wait: bool = False) -> None:
        """Queues a request. A full queue is a BusyError, or with `wait` waited for."""
        with self._room:
            self._check_open()
            while self._n_unseen + self._n_queued >= self._max_waiting + max(
                0, self._parallel - self._n_active
            ):
                if not wait:
                    raise self._busy()
                self._room.wait()
                self._check_open()
            self._n_unseen += 1
            request.number = self._n_requests
            self._n_requests += 1
            self._start()
            self._inbox.put(lambda scheduler: self._add(scheduler, request))

    def cancel(self, request: Request) -> None:
        """Ends a request as it is, soon. Safe in a destructor: it takes no lock."""
        if self._process != os.getpid():
            request.mailbox.end()  # it is the parent's
        self._inbox.put(lambda scheduler: scheduler.cancel(request))

    def wake(self) -> None:
        """Says that a request which rested can go on."""
        self._inbox.put(lambda scheduler: None)

    @property
    def stats(self) -> EngineStats:
        """Of this moment, or of the last one before `close`."""
        return EngineStats(
            n_running=self._n_active,
            n_waiting=self._n_unseen + self._n_queued,
            kv_blocks=self._blocks[0],
            kv_blocks_free=self._blocks[1],
            block_tokens=self._block_tokens,
            **asdict(self._counters),
        )

    def check_open(self) -> None:
        """Raises what `submit` would raise of a closed engine, or one whose device has failed."""
        with self._room:
            self._check_open()

    def close(self) -> None:
        """Ends all requests and the thread, and gives back the context."""
        with self._room:
            self._closing = True
            thread, self._thread = self._thread, None
            self._room.notify_all()
        if thread is not None and self._process == os.getpid():
            self._inbox.put(None)
            if thread is not threading.current_thread():
                thread.join()
        self._scheduler = None  # and the context with it

    def _check_open(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closing:
            raise self._closed_error()

    def _busy(self) -> BusyError:
        n = self._n_unseen + self._n_queued
        after = None
        if self._mean_held is not None:
            after = math.ceil(self._mean_held * (n + 1) / self._parallel)
        estimate = "" if after is None else f"; one of them gets its turn in about {after} s"
        return BusyError(
            f"queue: found {n} requests waiting, expected at most {self._max_waiting}{estimate}", after
        )

    def _start(self) -> None:
        if self._process != os.getpid():  # a forked child: its parent's thread is not there
            self._process = os.getpid()
            self._inbox = SimpleQueue()
            self._thread = None
            assert self._scheduler is not None
            self._n_unseen, self._n_queued = 1, 0
            self._scheduler.cancel_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="vptq-engine", daemon=True)
            self._thread.start()

    # In the thread

    def _work(self) -> None:
        scheduler, inbox = self._scheduler, self._inbox
        assert scheduler is not None
        error: BaseException | None = None
        try:
            any_work = False
            while self._take_commands(scheduler, inbox, wait=not any_work):
                any_work = scheduler.round()
                self._deliver(scheduler)
        except BaseException as failure:  # DeviceError, or a defect: nobody can go on
            error = self._error = failure
        scheduler.give_up(error or self._closed_error())
        self._deliver(scheduler)

    def _take_commands(
        self, scheduler: Scheduler, inbox: SimpleQueue[Callable[[Scheduler], None] | None], *, wait: bool
    ) -> bool:
        """Does what callers ask for, if need be after waiting for it; False: they want the end."""
        try:
            while True:
                command = inbox.get(block=wait)
                if command is None:
                    return False
                command(scheduler)
                wait = False
        except Empty:
            return True

    def _add(self, scheduler: Scheduler, request: Request) -> None:
        with self._room:
            self._n_unseen -= 1
            self._n_queued += 1
        scheduler.add(request)

    def _deliver(self, scheduler: Scheduler) -> None:
        waiters = []
        for request in scheduler.take_changed():
            request.mailbox.put(request.news)
            request.news.clear()
            if request.ended and not request.mailbox.ended:
                self._saw_end(request)
                request.mailbox.end()
            waiters += request.mailbox.take_waiters()
        if waiters:
            wake(waiters)
        context = scheduler.context
        self._blocks = context.n_blocks, context.n_free_blocks + scheduler.cache.n_unused
        with self._room:
            self._n_queued, self._n_active = len(scheduler.waiting), len(scheduler.active)
            self._room.notify_all()

    def _saw_end(self, request: Request) -> None:
        if request.admitted is not None:
            held = time.perf_counter() - request.admitted
            before = held if self._mean_held is None else self._mean_held
            self._mean_held = before + HELD_WEIGHT * (held - before)
