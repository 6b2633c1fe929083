"""What the system does to a process that has a Runtime: a fork, a limit."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import vptq_runtime


def run(script: str, model: Path) -> str:
    command = [sys.executable, "-c", script, str(model)]
    # Python looks for modules where it runs first: not in the source tree, which lacks the native one.
    return subprocess.run(
        command, stdout=subprocess.PIPE, text=True, timeout=60, check=True, cwd=model.parent
    ).stdout


def test_a_source_tree_says_what_it_is(tmp_path: Path) -> None:
    """-S: no installed packages, whose editable ones would come first."""
    package = Path(vptq_runtime.__file__).parent
    shutil.copytree(package, tmp_path / "vptq_runtime", ignore=shutil.ignore_patterns("*.so", "demo"))
    for arguments in (
        ["-c", "import vptq_runtime; vptq_runtime.Runtime"],
        ["-m", "vptq_runtime", "-m", "x", "-p", "a"],
    ):
        done = subprocess.run(
            [sys.executable, "-S", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1
        assert re.search(
            r"rror: .*vptq_runtime has no native library: .* install the tree as editable",
            done.stderr.splitlines()[-1],
        )


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
