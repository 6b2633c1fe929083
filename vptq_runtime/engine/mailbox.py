"""How a request's news come from the engine's thread to whoever reads them, in a thread or in asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Iterable
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vptq_runtime.engine.request import Delta

WAKE_S = 0.25  # at most in one wait: an interrupt that is no signal (_thread.interrupt_main) shows behind it


class Mailbox:
    """News of one request, in order; the engine only puts, and never waits.

    One thread or one coroutine takes them. Any number may wait for the end.
    """

    def __init__(self) -> None:
        self._news: SimpleQueue[Delta | None] = SimpleQueue()  # None: the end
        self._ended = threading.Event()
        self._waiters: list[asyncio.Future[None]] = []  # of coroutines, each in its own loop
        self._lock = threading.Lock()  # of _waiters

    def put(self, news: Iterable[Delta]) -> None:
        for delta in news:
            self._news.put(delta)

    def end(self) -> None:
        self._ended.set()
        self._news.put(None)

    def take(self) -> Delta | None:
        """The next news, waiting for it; None at the end, again and again."""
        while True:
            with contextlib.suppress(Empty):
                delta = self._news.get(timeout=WAKE_S)
                break
        if delta is None:
            self._news.put(None)
        return delta

    async def take_async(self) -> Delta | None:
        """`take` for a coroutine."""
        waiter: asyncio.Future[None] | None = None
        while True:
            try:
                delta = self._news.get_nowait()
            except Empty:
                if waiter is None:
                    waiter = self._new_waiter()  # and one look more: only what comes from now on wakes it
                else:
                    await waiter
                    waiter = None
                continue
            if delta is None:
                self._news.put(None)
            return delta

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits for the end; False if it has not come in so many seconds."""
        until = math.inf if timeout is None else time.monotonic() + timeout
        while not self._ended.wait(min(WAKE_S, max(0.0, until - time.monotonic()))):
            if time.monotonic() >= until:
                return False
        return True

    async def wait_async(self) -> None:
        """`wait` for a coroutine."""
        while not self._ended.is_set():
            waiter = self._new_waiter()
            if not self._ended.is_set():
                await waiter

    def take_waiters(self) -> list[asyncio.Future[None]]:
        """The coroutines to be woken by now."""
        if not self._waiters:
            return []
        with self._lock:
            waiters, self._waiters = self._waiters, []
        return waiters

    def _new_waiter(self) -> asyncio.Future[None]:
        waiter = asyncio.get_running_loop().create_future()
        with self._lock:
            self._waiters = [w for w in self._waiters if not w.done()]
            self._waiters.append(waiter)
        return waiter


def wake(waiters: Iterable[asyncio.Future[None]]) -> None:
    """Wakes coroutines from another thread: one call into each loop for all of its own."""
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for waiter in waiters:
        by_loop.setdefault(waiter.get_loop(), []).append(waiter)
    for loop, its in by_loop.items():
        try:
            loop.call_soon_threadsafe(_set_done, its)
        except RuntimeError:  # the loop is closed: nobody waits there
            continue


def _set_done(waiters: Iterable[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
