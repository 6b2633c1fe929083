"""Whoever has threads or locks is told of a fork: a child has none of its parent's threads, and its locks as
they were.
"""

from __future__ import annotations

# Only so that it is registered first: what is registered later runs earlier before a fork. Its hook takes a
# lock that the engine's thread needs to come to a standstill.
import concurrent.futures.thread  # noqa: F401
import os
import weakref


class Forked:
    """What has threads or locks that a child by fork has to make anew."""

    def __init__(self) -> None:
        _all.add(self)

    def stand_still(self) -> None:
        """Before a fork, in the thread that forks: brings what the child inherits into order."""

    def go_on(self) -> None:
        """After it, in the parent."""

    def renew(self) -> None:
        """After it, in the child."""


_all: weakref.WeakSet[Forked] = weakref.WeakSet()


def _before() -> None:
    for each in list(_all):
        each.stand_still()


def _in_parent() -> None:
    for each in list(_all):
        each.go_on()


def _in_child() -> None:
    for each in list(_all):
        each.renew()


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
