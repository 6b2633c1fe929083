"""What the system does to a process that has a Runtime: a fork, a limit."""

import subprocess
import sys
from pathlib import Path

import pytest


def run(script: str, model: Path) -> str:
    command = [sys.executable, "-c", script, str(model)]
    return subprocess.run(
        command, stdout=subprocess.PIPE, text=True, timeout=60, check=True, cwd=model.parent
    ).stdout


FORK = """
import os, sys
from vptq_runtime import Runtime
runtime = Runtime(sys.argv[1], n_threads=3)
tokens = runtime.generate("a", max_tokens=20, temperature=0).tokens
child = os.fork()
if not child:
    assert runtime.generate("a", max_tokens=20, temperature=0).tokens == tokens
    runtime.close()
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
assert runtime.generate("a", max_tokens=20, temperature=0).tokens == tokens
"""


def test_a_child_by_fork_has_the_runtime_too(model: Path) -> None:
    assert run(FORK, model) == "7\n"


FORK_AT_WORK = """
import os, sys, threading, time
from vptq_runtime import Runtime
runtime = Runtime(sys.argv[1], n_threads=2, n_ctx=8192)
options = {"max_tokens": 20, "temperature": 0}
tokens = runtime.generate("a", **options).tokens
done = threading.Event()

def ask():
    while not done.is_set():
        runtime.submit("b", max_tokens=5).result()

askers = [threading.Thread(target=ask) for _ in range(3)]
for asker in askers:
    asker.start()
statuses = []
for _ in range(20):
    stream = runtime.submit([20] * 200, max_tokens=None)
    time.sleep(0.003 * len(statuses))  # its prompt is computed, then it generates
    child = os.fork()
    if not child:
        stream.cancel()
        assert runtime.generate("a", **options).tokens == tokens
        stream.cancel()
        assert stream.result().finish_reason is None  # it is the parent's
        stream.close()
        assert runtime.generate("a", **options).tokens == tokens
        assert runtime.stats().n_running == runtime.stats().n_waiting == 0
        runtime.close()
        os._exit(7)
    stream.close()
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
done.set()
for asker in askers:
    asker.join()
print(set(statuses))
assert runtime.generate("a", **options).tokens == tokens
"""


def test_a_fork_while_the_parent_is_at_work(model: Path) -> None:
    """The child can neither wait for the parent's threads nor go on with half a step of theirs."""
    assert run(FORK_AT_WORK, model) == "{7}\n"


FORK_WITH_A_FORM = """
import os, sys, threading
from vptq_runtime import Runtime
runtime = Runtime(sys.argv[1], n_threads=2)
form = {"regex": "(fox|dog) [a-z]{3,9}", "max_tokens": 30, "temperature": 0}
text = runtime.generate("a", **form).text
child = os.fork()
if not child:
    assert runtime.generate("a", **form).text == text
    assert runtime.generate("a", regex="[0-9]{3}", max_tokens=30).finish_reason == "stop"
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
assert runtime.generate("a", **form).text == text
"""


def test_a_child_by_fork_has_forms_too(model: Path) -> None:
    pytest.importorskip("llguidance")
    assert run(FORK_WITH_A_FORM, model) == "7\n"


NO_THREADS = """
import resource, sys
from vptq_runtime import OutOfMemoryError, Runtime
Runtime(sys.argv[1], n_threads=1)
resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))  # room for some hundred stacks of 8 MiB
resource.setrlimit(resource.RLIMIT_STACK, (2**23, resource.getrlimit(resource.RLIMIT_STACK)[1]))
try:
    Runtime(sys.argv[1], n_threads=1024)
except OutOfMemoryError as error:
    print(error)
Runtime(sys.argv[1], n_threads=2).generate("a", max_tokens=2)
"""


def test_more_threads_than_the_system_gives(model: Path) -> None:
    assert run(NO_THREADS, model).startswith("n_threads: found 1024, expected at most the ")
