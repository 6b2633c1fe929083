"""What a caller holds of a request: its text as it comes, its result, and the means to end it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from vptq_runtime.checks import check_number
from vptq_runtime.errors import OptionError, again

if TYPE_CHECKING:
    from vptq_runtime.engine.engine import Engine
    from vptq_runtime.engine.request import Delta, Request
    from vptq_runtime.generation import Generation


class GenerationStream:
    """A text on its way: an iterator over its pieces, whose concatenation is `.result().text`.

    It is computed whether it is read or not. A piece never splits a UTF-8 character. For asyncio: `async for
    piece in stream`, `await stream` for the Generation. Leaving a `with` or `async with` block, and dropping
    the last reference, end it early; a `with` in a generator that is closed does not wait for that.
    """

    def __init__(self, engine: Engine, request: Request, generation: Callable[[Request], Generation]) -> None:
        self._engine = engine
        self._request = request
        self._generation = generation
        self._closed = False

    def __iter__(self) -> GenerationStream:
        return self

    def __next__(self) -> str:
        while (delta := self.next_delta()) is not None:
            if delta.text:
                return delta.text
        raise StopIteration

    def __aiter__(self) -> GenerationStream:
        return self

    async def __anext__(self) -> str:
        while (delta := await self.next_delta_async()) is not None:
            if delta.text:
                return delta.text
        raise StopAsyncIteration

    def __await__(self) -> Generator[Any, None, Generation]:
        return self._await_result().__await__()

    def __enter__(self) -> GenerationStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not GeneratorExit:
            self.close()
            return
        # A generator is dropped, by the garbage collector maybe, in any thread: that must not wait.
        self._closed = True
        self.cancel()

    async def __aenter__(self) -> GenerationStream:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self.cancel()

    def next_delta(self) -> Delta | None:
        """The next tokens with their text and log-probabilities; None at the end. Raises what ended it."""
        delta = None if self._closed else self._request.mailbox.take()
        if delta is None:
            self._check()
        return delta

    async def next_delta_async(self) -> Delta | None:
        """`next_delta` for asyncio."""
        delta = None if self._closed else await self._request.mailbox.take_async()
        if delta is None:
            self._check()
        return delta

    @property
    def ended(self) -> bool:
        """Whether it has come to its end, and `result` waits for nothing."""
        return self._request.mailbox.ended

    def cancel(self) -> None:
        """Ends it early, within a step of the engine; waits for nothing. After the end it does nothing."""
        if not self._request.mailbox.ended:
            self._engine.cancel(self._request)

    def close(self) -> None:
        """Ends it early, and waits until its place is free; what has not been read is dropped."""
        self._closed = True
        self.cancel()
        if not self._engine.in_thread:  # which the garbage collector may interrupt
            self._request.mailbox.wait()

    async def aclose(self) -> None:
        """`close` for asyncio."""
        self._closed = True
        self.cancel()
        await self._request.mailbox.wait_async()

    def result(self, timeout: float | None = None) -> Generation:
        """Waits for the end; the Generation, or what there is of it after an early end.

        timeout: most seconds to wait: TimeoutError then. Raises what ended the request, and whatever ends
        the waiting, as Ctrl-C does, ends the request.
        """
        if timeout is not None:
            check_number("timeout", timeout, 0)
        try:
            in_time = self._request.mailbox.wait(timeout)
        except BaseException:
            self.close()
            raise
        if not in_time:
            raise TimeoutError(f"the generation has not come to its end in {timeout} s")
        self._check()
        return self._generation(self._request)

    @property
    def generation(self) -> Generation:
        """What `result` returns, without waiting: OptionError before the end."""
        if not self._request.mailbox.ended:
            raise OptionError("generation: the stream has not come to its end")
        return self.result()

    async def _await_result(self) -> Generation:
        try:
            await self._request.mailbox.wait_async()
        except asyncio.CancelledError:
            self.cancel()
            raise
        return self.result()

    def _check(self) -> None:
        if self._request.error is not None and not self._closed:
            raise again(self._request.error)
