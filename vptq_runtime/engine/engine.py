"""The thread that owns a context: callers queue requests and read what comes of them."""

from __future__ import annotations

import atexit
import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from queue import Empty, SimpleQueue

from vptq_runtime.engine.batch import Context
from vptq_runtime.engine.forks import Forked
from vptq_runtime.engine.mailbox import WAKE_S, Mailbox, wake
from vptq_runtime.engine.prefix_cache import CacheMode
from vptq_runtime.engine.request import Request
from vptq_runtime.engine.scheduler import Scheduler
from vptq_runtime.errors import BusyError, OutOfMemoryError, again

Inbox = SimpleQueue[Callable[[Scheduler], None] | None]  # commands; None: the end

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


class Engine(Forked):
    """One context, and the thread that works on it from the first request to `close`.

    parallel: most requests that are computed together; the others wait.
    queue, queue_tokens: most requests that wait, and most tokens of their prompts; more are a BusyError. As
        many come on top as there are free places. Where nobody waits, a prompt may be longer.
    closed: makes the error of whoever asks for something after `close`.
    """

    def __init__(
        self,
        context: Context,
        *,
        parallel: int,
        queue: int,
        queue_tokens: int,
        cache: CacheMode,
        closed: Callable[[], Exception],
    ) -> None:
        super().__init__()
        self._scheduler: Scheduler | None = Scheduler(
            context, time.perf_counter, parallel=parallel, cache=cache
        )
        self._parallel = parallel
        self._queue = queue
        self._queue_tokens = queue_tokens
        self._n_ctx = context.n_ctx
        self._closed_error = closed
        self._room = threading.Condition()  # of all below; notified when the queue gets shorter
        self._error: BaseException | None = None  # that has ended the thread
        self._closing = False
        self._n_requests = 0
        self._open: dict[Request, None] = {}  # those that have not ended
        self._open_tokens = 0  # of their prompts
        self._n_active = 0  # of them, those that have a place
        self._n_resting = 0  # of those, that wait for their reader and take nobody's place
        self._active_tokens = 0
        self._mean_held: float | None = None  # seconds that a request has its place
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()  # the thread
        self._inbox: Inbox = SimpleQueue()
        self._forks: dict[int, threading.Event] = {}  # of threads that fork: the end of it
        self._inherited = False  # whether the scheduler is as the parent left it
        self._counters = self._scheduler.counters
        self._block_tokens = context.block_tokens
        self._blocks = (context.n_blocks, context.n_free_blocks)  # all, free

    def submit(self, request: Request, *, wait: bool = False) -> None:
        """Queues a request. A full queue is a BusyError, or with `wait` waited for."""
        with self._room:
            self._check_open()
            while busy := self._busy(len(request.prompt)):
                if not wait:
                    raise busy
                self._room.wait()
                self._check_open()
            self._start()
            request.number = self._n_requests
            self._n_requests += 1
            self._open[request] = None
            self._open_tokens += len(request.prompt)
            self._inbox.put(lambda scheduler: scheduler.add(request))

    def cancel(self, request: Request) -> None:
        """Ends a request as it is, soon. Safe in a destructor: it takes no lock."""
        self._inbox.put(lambda scheduler: scheduler.cancel(request))

    def resume(self) -> None:
        """Says that a request which rested can go on."""
        self._inbox.put(lambda scheduler: None)

    @property
    def stats(self) -> EngineStats:
        """Of this moment, or of the last one before `close`."""
        with self._room:
            return EngineStats(
                n_running=self._n_active,
                n_waiting=len(self._open) - self._n_active,
                kv_blocks=self._blocks[0],
                kv_blocks_free=self._blocks[1],
                block_tokens=self._block_tokens,
                **asdict(self._counters),
            )

    @property
    def in_thread(self) -> bool:
        """Whether this is the engine's own thread, which must not wait for itself."""
        return threading.current_thread() is self._thread

    def check_open(self) -> None:
        """Raises what `submit` would raise of a closed engine, or one whose device has failed."""
        with self._room:
            self._check_open()

    def check_room(self) -> None:
        """Raises what `submit` would raise of the shortest prompt: before work is done for a longer one."""
        with self._room:
            self._check_open()
            if busy := self._busy(0):
                raise busy

    def close(self) -> None:
        """Ends all requests and the thread, and gives back the context."""
        with self._room:
            self._closing = True
            thread, self._thread = self._thread, None
            self._room.notify_all()
        if thread is not None:
            self._inbox.put(None)
            if thread is not threading.current_thread():
                _wait_for(self._ended)
                thread.join()
        self._scheduler = None  # and the context with it

    def _check_open(self) -> None:
        if self._error is not None:
            raise again(self._error)
        if self._closing:
            raise self._closed_error()

    def _busy(self, n_tokens: int) -> BusyError | None:
        """Why a prompt of so many tokens cannot wait, too."""
        n_waiting = len(self._open) - self._n_active
        waiting_tokens = self._open_tokens - self._active_tokens
        places = max(0, self._parallel - self._n_active + self._n_resting)
        if n_waiting >= self._queue + places:
            found = f"queue: found {n_waiting} requests waiting, expected at most {self._queue}"
            found += f" beside {places} free places" if places else ""
        elif n_waiting and waiting_tokens + n_tokens > self._queue_tokens + places * self._n_ctx:
            found = f"queue_tokens: found {waiting_tokens} tokens of prompts waiting and {n_tokens} more"
            found += f", expected at most {self._queue_tokens}"
        else:
            return None
        if self._mean_held is None:
            return BusyError(found)
        after = math.ceil(self._mean_held * (n_waiting + 1) / self._parallel)
        return BusyError(f"{found}; one of them gets its turn in about {after} s", after)

    def _start(self) -> None:
        if self._thread is not None:
            return
        assert self._scheduler is not None
        if self._inherited:
            self._inherited = False
            self._scheduler.cancel_all()
            self._scheduler.take_changed()  # they have ended here
        self._ended = threading.Event()
        thread = threading.Thread(target=self._work, args=[self._ended], name="vptq-engine", daemon=True)
        _at_work[self._ended] = self._inbox
        try:
            thread.start()
        except RuntimeError as error:
            del _at_work[self._ended]
            raise OutOfMemoryError(f"the engine's thread: cannot be started: {error}") from None
        self._thread = thread

    # At a fork

    def stand_still(self) -> None:
        """Keeps the thread between two rounds meanwhile: the child has what it works on."""
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        stands = threading.Event()
        ended = self._forks[threading.get_ident()] = threading.Event()

        def stand(_: Scheduler) -> None:
            stands.set()
            ended.wait()

        self._inbox.put(stand)
        while thread.is_alive() and not stands.wait(WAKE_S):
            pass

    def go_on(self) -> None:
        if ended := self._forks.pop(threading.get_ident(), None):
            ended.set()

    def renew(self) -> None:
        """Without the thread, and the requests, of the parent: here they have ended as they are."""
        self._room = threading.Condition()
        self._inbox = SimpleQueue()
        self._forks = {}
        self._inherited = self._inherited or self._thread is not None
        self._thread = None
        _at_work.clear()
        for request in self._open:
            request.mailbox = Mailbox()
            request.mailbox.end()
        self._open = {}
        self._open_tokens = self._n_active = self._n_resting = self._active_tokens = 0

    # In the thread

    def _work(self, ended: threading.Event) -> None:
        scheduler, inbox = self._scheduler, self._inbox
        assert scheduler is not None
        error: BaseException | None = None
        try:
            any_work = False
            while self._take_commands(scheduler, inbox, wait=not any_work):
                any_work = scheduler.round()
                self._deliver(scheduler)
        except BaseException as failure:  # DeviceError, or a defect: nobody can go on
            error = failure
        with self._room:
            self._error = error  # from now on nobody queues a request
        error = error or self._closed_error()
        try:
            scheduler.give_up(error)
            self._deliver(scheduler)
        finally:
            try:
                self._end_left(error)
            finally:
                _at_work.pop(ended, None)
                ended.set()

    def _end_left(self, error: BaseException) -> None:
        """Ends the requests that the scheduler has not seen, or has lost in its failure."""
        left = list(self._open)
        for request in left:
            if not request.ended:
                request.error, request.ended = error, True
        self._tell(left, [])

    def _take_commands(self, scheduler: Scheduler, inbox: Inbox, *, wait: bool) -> bool:
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

    def _deliver(self, scheduler: Scheduler) -> None:
        context = scheduler.context
        self._blocks = context.n_blocks, context.n_free_blocks + scheduler.cache.n_unused
        self._tell(scheduler.take_changed(), scheduler.active)

    def _tell(self, changed: Sequence[Request], active: Sequence[Request]) -> None:
        """Counts who has a place and who has ended by now, and then delivers the news."""
        with self._room:
            ended = {request for request in changed if request.ended and request in self._open}
            for request in ended:
                del self._open[request]
                self._open_tokens -= len(request.prompt)
                self._saw_end(request)
            going = [request for request in active if request in self._open]  # without those that leave soon
            self._n_active = len(going)
            self._n_resting = sum(request.rests for request in going)
            self._active_tokens = sum(len(request.prompt) for request in going)
            self._room.notify_all()
        waiters = []
        for request in changed:
            request.mailbox.put(request.news)
            request.news.clear()
            if request in ended:
                request.mailbox.end()
            waiters += request.mailbox.take_waiters()
        if waiters:
            wake(waiters)

    def _saw_end(self, request: Request) -> None:
        request.left = time.perf_counter()
        if request.admitted is not None:
            held = request.left - request.admitted
            before = held if self._mean_held is None else self._mean_held
            self._mean_held = before + HELD_WEIGHT * (held - before)


def _wait_for(ended: threading.Event) -> None:
    """Waits, a step's time, and only then raises what interrupts that.

    Not by `Thread.join`: in Python 3.11 a thread whose `join` was interrupted counts as ended.
    """
    interruption: BaseException | None = None
    while not ended.is_set():
        try:
            ended.wait()
        except BaseException as error:  # Ctrl-C, maybe several times
            interruption = error
    if interruption is not None:
        raise interruption


_at_work: dict[threading.Event, Inbox] = {}  # of threads that run: how they are to be ended


@atexit.register
def _end_all() -> None:
    """A thread that comes back from the native library after Python's end would abort the process."""
    with contextlib.suppress(BaseException):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python ends in any case
    for ended, inbox in list(_at_work.items()):
        inbox.put(None)
        with contextlib.suppress(BaseException):
            _wait_for(ended)
