"""What the commands have in common: the options of a backend, their streams, how they end, their version."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

from vptq_runtime.errors import OptionError, VPTQError


class UsageError(OptionError):
    """A value on the command line that is out of range, whatever the files are."""


def add_backend_options(parser: ArgumentParser) -> None:
    """What a model runs on, and in what numbers."""
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--kv-type", default="f16", help="KV cache in f16, f32 or q8_0 (default: %(default)s)"
    )
    parser.add_argument(
        "--precision",
        default="auto",
        help="auto: prompts in 16-bit numbers where that pays; f32: all in float32 (default: %(default)s)",
    )


def run(name: str, body: Callable[[], object]) -> int:
    """Runs what a command does and returns its exit status.

    0: done; 1: an error, said in one line on standard error; 2: a UsageError, said so too; 130: stopped by
    Ctrl-C; 141: whoever read its output has gone.
    """
    _open_streams()
    try:
        body()
        sys.stdout.flush()
        return 0
    except (VPTQError, MemoryError, ImportError) as error:
        message = " ".join(str(error).split()) or "out of memory"
        print(f"{name}: error: {message}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        # The interpreter writes what is left once more at its end: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # whoever read has seen enough
            return 141  # 128 + SIGPIPE, as of a command that dies of it
        print(f"{name}: error: standard output: {error.strerror}", file=sys.stderr)
        return 1


def _open_streams() -> None:
    sys.stdin, sys.stdout, sys.stderr = (  # None where the caller has closed one
        stream or Path(os.devnull).open(mode)  # noqa: SIM115 (open to the end)
        for stream, mode in ((sys.stdin, "r"), (sys.stdout, "w"), (sys.stderr, "w"))
    )
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):  # a pipe carries UTF-8; a terminal shows what it can
            output.reconfigure(errors="replace", **({} if output.isatty() else {"encoding": "utf-8"}))


def version() -> str:
    """Of the installed distribution."""
    from importlib import metadata  # slow to load, seldom needed

    try:
        return metadata.version("vptq-runtime")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "(not installed)"
