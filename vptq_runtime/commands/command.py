"""What the commands have in common: a model and its options, texts, streams, how they end, their version."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from vptq_runtime import __version__
from vptq_runtime.errors import FileError, OptionError, VPTQError

if TYPE_CHECKING:
    from vptq_runtime.runtime import Runtime

SILENT_LOAD_S = 0.5
MAX_TEXT_BYTES = 1 << 28  # a tokenizer takes 150 times as much
BOLD, DIM, PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[0m"
# The Python API's names, which its errors begin with, as the command line has them.
RUNTIME_OPTIONS = {
    "path": "-m",
    "n_ctx": "-c",
    "n_threads": "-t",
    "device": "--device",
    "gpu_layers": "--gpu-layers",
    "kv_type": "--kv-type",
    "precision": "--precision",
}


class UsageError(OptionError):
    """A value on the command line that is out of range, whatever the files are."""


def add_context_options(parser: ArgumentParser) -> None:
    """How long a model's context is, and how many threads compute it."""
    parser.add_argument(
        "-c",
        "--n-ctx",
        "--ctx-size",
        metavar="N",
        type=int,
        help="context in tokens; 0: what the model was trained on (default: that, but not over 4096)",
    )
    parser.add_argument(
        "-t",
        "--n-threads",
        "--threads",
        metavar="N",
        type=int,
        help="threads (default: one for each physical core)",
    )


def add_backend_options(parser: ArgumentParser) -> None:
    """What a model runs on, and in what numbers."""
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "-ngl",
        "--gpu-layers",
        "--n-gpu-layers",
        metavar="N",
        type=int,
        help="layers on the GPU, the others on the CPU (default: all, or with --device auto as many as fit)",
    )
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
        source = error.filename
        if source is None:
            source = "standard output"
            # The interpreter writes what is left once more at its end: into nothing.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # whoever read has seen enough
            return 141  # 128 + SIGPIPE, as of a command that dies of it
        print(f"{name}: error: {FileError(f'{source}: {error.strerror}')}", file=sys.stderr)
        return 1


@contextlib.contextmanager
def options_as_typed(options: Mapping[str, str], given: Mapping[str, str]) -> Iterator[None]:
    """Errors that name an argument of the Python API name what was typed instead.

    options: by the argument's name; a wrong value is wrong usage. given: the same for texts and files, where
    it is not.
    """
    try:
        yield
    except VPTQError as error:
        name, _, found = str(error).partition(": ")
        if name in options:
            kind = UsageError if isinstance(error, OptionError) else type(error)
            raise kind(f"{options[name]}: {found}") from None
        if name in given:
            raise type(error)(f"{given[name]}: {found}") from None
        raise


@contextlib.contextmanager
def open_runtime(path: str | os.PathLike[str], arguments: Namespace, **others: Any) -> Iterator[Runtime]:
    """The model of a file, a directory or a repository, by the options of add_context_options and
    add_backend_options; others: of Runtime, these or more."""
    from vptq_runtime.runtime import Runtime  # only now: --help and wrong usage should not wait for it

    given = {name: getattr(arguments, name) for name in RUNTIME_OPTIONS if name in arguments}
    with log_as_notes(), _loading_bar() as progress:
        runtime = Runtime(path, **given | others, progress=progress)
    with runtime:
        if runtime.n_ctx > runtime.n_ctx_train:
            trained = f"more than the {runtime.n_ctx_train} that the model was trained on"
            note(f"the context of {runtime.n_ctx} tokens is {trained}")
        yield runtime


@contextlib.contextmanager
def _loading_bar() -> Iterator[Callable[[int, int], None] | None]:
    """A bar on the terminal, once loading has taken a moment: a GPU's memory has to be filled first."""
    if not sys.stderr.isatty():
        yield None
        return
    begin: float | None = None  # when the first layers were: a download may come before them
    with contextlib.ExitStack() as shown:
        show: Callable[[int, int], None] | None = None

        def progress(done: int, total: int) -> None:
            nonlocal begin, show
            begin = time.monotonic() if begin is None else begin
            if show is None and time.monotonic() - begin > SILENT_LOAD_S:
                from rich.console import Console
                from rich.progress import Progress

                bar = shown.enter_context(Progress(console=Console(stderr=True), transient=True))
                task = bar.add_task("Loading layers")
                show = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
            if show is not None:
                show(done, total)

        yield progress


def read_text(file: str) -> str:
    """The text of a UTF-8 file."""
    try:
        with Path(file).open("rb") as stream:
            return _read(stream, file)
    except (OSError, ValueError) as error:  # ValueError: a null byte in its name
        raise FileError(f"{file}: cannot be read: {getattr(error, 'strerror', error)}") from None


def read_stdin() -> str:
    """Standard input to its end, a text in UTF-8."""
    try:
        return _read(sys.stdin.buffer, "standard input")
    except OSError as error:
        raise FileError(f"standard input: cannot be read: {error.strerror}") from None


def _read(stream: BinaryIO, source: str) -> str:
    text = stream.read(MAX_TEXT_BYTES + 1)  # a device may have no end
    if len(text) > MAX_TEXT_BYTES:
        raise FileError(
            f"{source}: found more than {MAX_TEXT_BYTES >> 20} MiB, expected a text of at most that"
        )
    return decoded(text, source)


def decoded(text: bytes, source: str) -> str:
    """A text in UTF-8; the error for another names its source."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        found = f"byte 0x{text[error.start]:02x} at offset {error.start}"
        raise FileError(f"{source}: found {found}, expected valid UTF-8") from None


@contextlib.contextmanager
def log_as_notes() -> Iterator[None]:
    """What is logged in between, about downloads and conversions, is said as notes."""
    log, handler = logging.getLogger("vptq_runtime"), _Notes()
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def note(text: str) -> None:
    """A line beside the output."""
    print(styled(DIM, text, sys.stderr), file=sys.stderr, flush=True)


def styled(style: str, text: str, output: TextIO) -> str:
    """The text, in that style on a terminal that has styles."""
    plain = not output.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"{style}{text}{PLAIN}"


def _open_streams() -> None:
    sys.stdin, sys.stdout, sys.stderr = (  # None where the caller has closed one
        stream or Path(os.devnull).open(mode)  # noqa: SIM115 (open to the end)
        for stream, mode in ((sys.stdin, "r"), (sys.stdout, "w"), (sys.stderr, "w"))
    )
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):  # a pipe carries UTF-8; a terminal shows what it can
            output.reconfigure(errors="replace", **({} if output.isatty() else {"encoding": "utf-8"}))


def version() -> str:
    """Of these sources, which may hide an installed distribution."""
    return __version__
