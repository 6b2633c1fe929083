"""How far a long run is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

LINE_S = 30.0  # between two lines, at least


class RunProgress(AbstractContextManager["RunProgress"]):
    """Of `total` units, `done` were done before; `tell` gets the lines.

    The bar is on standard error, where that is a terminal.
    """

    def __init__(self, total: int, done: int, tell: Callable[[str], None]) -> None:
        # What is being done stands last: it has any length, and the others should keep their places. With a
        # wider bar the longest would not fit 80 columns. rich's own estimate of the time that is left forgets
        # what was done 30 s ago, and a unit can take minutes.
        left, what = (
            TextColumn(f"{{task.{name}}}", markup=False) for name in ("fields[left]", "description")
        )
        self._bar = Progress(
            BarColumn(12), TaskProgressColumn(), left, what,
            console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self._id = self._bar.add_task("", total=total, completed=done, left="-:--:--")
        self._before, self._tell = done, tell
        self._begin = self._told_at = time.monotonic()

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, what: str) -> None:
        """What is being done now."""
        self._bar.update(self._id, description=what)

    def advance(self, what: str, units: int) -> None:
        """What has been done, and how much of the whole it is."""
        self._bar.update(self._id, advance=units, description=what)
        task, now = self._bar.tasks[0], time.monotonic()
        seconds = (now - self._begin) * (task.remaining or 0) / (task.completed - self._before)
        left = timedelta(seconds=round(seconds))
        self._bar.update(self._id, left=str(left))
        if now - self._told_at >= LINE_S:
            self._told_at = now
            self._tell(f"{what}; {task.percentage:.0f}% done, about {left} left")


def print_line(line: str) -> None:
    """To standard error, unless that is a terminal: there is the bar."""
    if not sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)
