"""How far a run is: a bar on a terminal, and lines for whoever wants them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

# A line is due when so much more is done, or so much time has passed.
LINE_SHARE, LINE_S = 0.02, 60.0


class RunProgress(AbstractContextManager["RunProgress"]):
    """Of `total` units, `done` were done before; `tell` gets a line now and then.

    The bar is on standard error, where that is a terminal.
    """

    def __init__(self, total: int, done: int, tell: Callable[[str], None]) -> None:
        # What is being done stands last: it has any length, and the others should keep their places. With a
        # wider bar the longest would not fit 80 columns.
        columns = (
            BarColumn(12),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self._bar = Progress(
            *columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
        )
        self._task = self._bar.add_task("", total=total, completed=done)
        self._total, self._before, self._done = total, done, done
        self._tell, self._told = tell, done
        self._begin = self._told_at = time.monotonic()

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, what: str) -> None:
        """What is being done now."""
        self._bar.update(self._task, description=what)

    def advance(self, what: str, units: int) -> None:
        """What has been done, and how much of the whole it is."""
        self._bar.update(self._task, advance=units)
        self._done += units
        now = time.monotonic()
        much = self._done - self._told >= LINE_SHARE * self._total
        if much or now - self._told_at >= LINE_S or self._done == self._total:
            self._told, self._told_at = self._done, now
            seconds = (now - self._begin) * (self._total - self._done) / (self._done - self._before)
            left = timedelta(seconds=round(seconds))
            self._tell(f"{what}; {self._done / self._total:.0%} done, about {left} left")
