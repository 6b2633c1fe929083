"""Work in processes of its own: a kernel's error ends the process that ran it, and what hangs is ended."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class ChildError(Exception):
    """It failed, died or took too long."""


def in_child(allowed: float, function: Callable[..., T], *arguments: object) -> T:
    """What the function returns, run in a new process for at most so many seconds."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(max(allowed, 0)):
            raise ChildError(f"not done after {allowed:.0f} s")
        outcome, error = receiver.recv()
    except EOFError:
        process.join(10)
        raise ChildError(f"its process ended with status {process.exitcode}") from None
    finally:
        if process.is_alive():
            process.join(5 if receiver.poll(0) else 0)
            process.kill()
        process.join()
    if error is not None:
        raise ChildError(error)
    return outcome  # type: ignore[no-any-return]


def _send(sender: Connection, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    outcome: Any = None
    error = None
    try:
        outcome = function(*arguments)
    except Exception as caught:
        error = f"{type(caught).__name__}: {' '.join(str(caught).split())[:300]}"
    sender.send((outcome, error))


def run_logged(command: Sequence[str], log: Path, allowed: float) -> tuple[int | None, str]:
    """Runs a command for at most so many seconds, all that it prints going to a file.

    Returns its exit status, None if it was ended, and what it printed.
    """
    entries = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    searched = [str(Path(entry).absolute()) for entry in entries]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=log.parent,  # whatever lies where this was started, the command imports what is installed
            env=os.environ | {"PYTHONPATH": os.pathsep.join(searched)},
            start_new_session=True,
        )
        status: int | None = None
        try:
            status = process.wait(max(allowed, 0))
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):  # its children, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return status, log.read_text(encoding="utf-8", errors="replace")
