"""What the system does to a process that has a Runtime: a fork, a limit."""

import subprocess
import sys
from pathlib import Path


def run(script: str, model: Path) -> str:
    command = [sys.executable, "-c", script, str(model)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True).stdout


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
