"""vptq-run on a terminal: what it shows, and Ctrl-C."""

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vptq_runtime import Runtime

COMMAND = [str(Path(sys.executable).with_name("vptq-run"))]  # as installed, whatever the working directory
GREEDY = ["--temp", "0"]


class Terminal:
    """The command on a pseudo-terminal: what it shows, and what is typed into it."""

    def __init__(self, *arguments: str | Path) -> None:
        self.shown = ""
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env=os.environ | {"TERM": "xterm", "NO_COLOR": ""} | {"INPUTRC": os.devnull},
        )
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def wait_for(self, text: str, *, after: str = "", silence: Callable[[], None] = lambda: None) -> None:
        """Reads on until `text` has been shown (behind `after`); calls `silence` when nothing comes."""
        for _ in range(20):
            while text not in (self.shown.partition(after)[2] if after else self.shown):
                if not self._read(2):
                    break
            else:
                return
            assert self._process.poll() is None, self.shown
            silence()
        raise AssertionError(self.shown)

    def exited(self, within: float) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(within)
        return self._process.poll() is not None

    def wait(self) -> int:
        while self._read(60):
            pass
        return self._process.wait(60)

    def _read(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._master, 4096)
        except OSError:  # what Linux says at the end
            return False
        self.shown += data.decode(errors="replace").replace("\r\n", "\n")
        return bool(data)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)


OpenTerminal = Callable[..., Terminal]


@pytest.fixture
def open_terminal() -> Iterator[OpenTerminal]:
    opened: list[Terminal] = []

    def open_one(*arguments: str | Path) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield open_one
    for terminal in opened:  # of a test that has failed, it would go on and on
        terminal.kill()


def test_a_terminal_shows_prompt_and_colours(
    runtime: Runtime, model: Path, open_terminal: OpenTerminal
) -> None:
    """NO_COLOR is set, but empty: that asks for nothing."""
    terminal = open_terminal("-m", model, "-p", "the quick", "-n", "20", *GREEDY)
    assert terminal.wait() == 0
    assert terminal.shown.startswith("\x1b[1mthe quick\x1b[0m")
    assert "\x1b[2mload " in terminal.shown
    # The random text has control characters; none reaches the terminal.
    assert re.search(
        r"[\x00-\x08\x0b-\x1f]", runtime.generate("the quick", max_tokens=20, temperature=0).text
    )
    assert not re.search(r"[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f]", terminal.shown)


def test_chat_on_a_terminal(model: Path, open_terminal: OpenTerminal) -> None:
    terminal = open_terminal("-m", model, "--chat", "-c", "500000", *GREEDY)
    terminal.wait_for("> ")
    terminal.type("the fox\n")
    terminal.wait_for("the fox\n")
    seen = len(terminal.shown)
    while len(terminal.shown) < seen + 20:  # of a reply that would not end
        assert terminal._read(60)
    terminal.interrupt()
    terminal.wait_for("> ", after="the fox\n")
    terminal.type("/reset\n")
    terminal.wait_for("> ", after="/reset\n")
    terminal.type("abc")
    terminal.wait_for("abc", after="/reset\n")
    terminal.interrupt()  # drops the line and asks anew; a signal just behind a typed character can get lost
    terminal.wait_for("> ", after="abc", silence=terminal.interrupt)
    terminal.type("\x04")
    assert terminal.wait() == 0


def test_ctrl_c_twice_leaves_a_chat(model: Path, open_terminal: OpenTerminal) -> None:
    terminal = open_terminal("-m", model, "--chat", *GREEDY)
    terminal.wait_for("> ")
    terminal.interrupt()
    terminal.wait_for("> ", after="leaves\x1b[0m\n", silence=terminal.interrupt)
    terminal.interrupt()
    while not terminal.exited(within=5):  # a signal just behind the prompt can get lost, too
        terminal.interrupt()
    assert terminal.wait() == 0
    assert terminal.shown.count("Ctrl-C again, /exit or Ctrl-D leaves") == 1
