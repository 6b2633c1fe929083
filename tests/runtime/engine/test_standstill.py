"""What could wait for itself: the garbage collector in the engine's thread, readers that rest, forks."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from vptq_runtime import Runtime, demo_path
from vptq_runtime.engine.engine import _wait_for


def test_a_dropped_generator_waits_for_nothing(runtime: Runtime) -> None:
    """The garbage collector may come to it in the engine's own thread."""

    def pieces() -> Iterator[str]:
        with runtime.submit("abc", max_tokens=400) as stream:
            yield from stream

    closed_in: list[threading.Thread] = []
    stream = runtime.submit("abc", max_tokens=400)
    iterator = pieces()
    next(iterator)

    def in_the_thread(_: Any) -> None:
        iterator.close()
        stream.close()
        closed_in.append(threading.current_thread())

    runtime._engine._inbox.put(in_the_thread)
    assert runtime.submit("def", max_tokens=5).result(timeout=30).tokens
    assert [thread.name for thread in closed_in] == ["vptq-engine"]


def test_unread_logits_take_no_place_in_the_queue() -> None:
    with Runtime(demo_path(), parallel=1, queue=0) as runtime:
        pieces = runtime.logits_in_pieces([1 + i % 50 for i in range(300)])
        next(pieces)
        while not runtime._engine._n_resting:
            time.sleep(0.01)
        assert runtime.generate(["x", "y"], max_tokens=3)
        pieces.close()


def test_logits_of_a_full_cache() -> None:
    with Runtime(demo_path(), n_ctx=64, kv_tokens=64) as runtime:
        assert len(runtime.logits([1] * 64)) == 64


FORKS = """
import os, threading
from vptq_runtime import Runtime, demo_path
runtime = Runtime(demo_path())
runtime.generate("x", regex="a{3}")
def load():
    while True:
        runtime.generate("x", regex="[a-z]{20}", max_tokens=20)
for _ in range(3):
    threading.Thread(target=load, daemon=True).start()
for _ in range(100):
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
print("done", flush=True)
os._exit(0)
"""


def test_forks_beside_forms() -> None:
    pytest.importorskip("llguidance")
    done = subprocess.run([sys.executable, "-c", FORKS], stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.stdout == "done\n"


def test_an_interrupted_wait_for_the_thread_goes_on() -> None:
    ended = threading.Event()

    def interrupt(*_: object) -> None:
        if not ended.is_set():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    threading.Timer(0.3, ended.set).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            _wait_for(ended)
        assert ended.is_set()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


CTRL_C = """
import os, signal, threading, time
from vptq_runtime import Runtime, demo_path
def interrupt():
    time.sleep(0.3)
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.001)
threading.Thread(target=interrupt).start()
with Runtime(demo_path()) as runtime:
    runtime.generate(["a", "b"] * 100, max_tokens=400)
"""


def test_ctrl_c_again_and_again_aborts_nothing() -> None:
    """Python ends when the engine's thread has ended."""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", CTRL_C], stderr=subprocess.PIPE, timeout=60)
        assert done.returncode in (-2, 1, 130) and b"terminate" not in done.stderr
