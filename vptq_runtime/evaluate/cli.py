"""vptq-perplexity: how well a model predicts a text, and how far it is from another model."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vptq_runtime import demo_path
from vptq_runtime.commands import command
from vptq_runtime.errors import OptionError, OutOfMemoryError
from vptq_runtime.evaluate.scored_windows import METHODS, check_options

if TYPE_CHECKING:
    from vptq_runtime.evaluate.dense_model import DenseModel
    from vptq_runtime.evaluate.multiple_choice import Choices, Item
    from vptq_runtime.evaluate.scoring import Result
    from vptq_runtime.runtime import Runtime

# The Python API's names, which its errors begin with, as the command line has them.
OPTION_NAMES = command.RUNTIME_OPTIONS | {
    "method": "--method",
    "stride": "--stride",
    "max_windows": "--windows",
    "dtype": "--compare-dtype",
}
TOKENIZER_BYTES = 150  # of memory for a byte of ordinary text
DESCRIPTION = "Perplexity of a VPTQ model on a text, and how far its predictions are from another model's."
EPILOG = """\
The texts, UTF-8, are joined as they are and cut into windows of -c tokens. --method papers scores every token
of a window but its first, as papers on quantisation do; llama.cpp only the second half, behind BOS, as
llama-perplexity does. Figures of the two do not compare, nor do those of other windows. The standard error is
over windows; with llama.cpp it takes the tokens as independent, as there, and is smaller than the truth.

--compare takes a GGUF file or owner/model as -m does, and runs it with the same options; or the directory
of a dense checkpoint or a dense GGUF file of llama.cpp, which transformers runs
(pip install "vptq-runtime[quantize]") with all weights in memory: the file that vptq-convert makes of a
directory is mapped, and needs no PyTorch. The KL divergence is KL(OTHER || model), the ratio the model's
perplexity over OTHER's.

--multiple-choice takes a file of items in place of texts, a JSON object in each line: context, choices
(texts, with the space that they begin with), answer (the index of the right one). acc is how often the right
choice is the likeliest, acc_norm how often by log-likelihood a character, both as lm-eval counts.

  vptq-perplexity -m model.gguf wiki.test.raw -c 2048
  vptq-perplexity -m model.gguf wiki.test.raw -c 2048 --compare ./Llama-3.1-8B --windows 20
  vptq-perplexity -m model.gguf wiki.test.raw -c 512 --method llama.cpp --json
  vptq-perplexity -m model.gguf --multiple-choice items.jsonl --compare dense.gguf

Ctrl-C prints what the windows so far gave.
Exit status: 0 done, 1 an error, 2 wrong usage, 130 stopped by Ctrl-C.
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "vptq-perplexity",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("texts", metavar="TEXT", nargs="*", help="text files; -: standard input")
    p.add_argument(
        "-m",
        "--model",
        metavar="MODEL",
        help="a GGUF file, a VPTQ checkpoint's directory, or owner/model of the Hugging Face hub (default: "
        "the demo model of the package)",
    )
    p.add_argument(
        "--multiple-choice", metavar="FILE", help="in place of texts: items, as JSON lines (below)"
    )
    p.add_argument(
        "--method",
        default=METHODS[0],
        help=f"which tokens of a window are scored: {' or '.join(METHODS)} (default: %(default)s)",
    )
    p.add_argument("--windows", "--chunks", metavar="N", type=int, help="stop after N windows")
    p.add_argument(
        "--stride",
        metavar="N",
        type=int,
        help="with the method papers: begin a window every N tokens, and score those that the one before did "
        "not (default: the context, so that windows do not overlap)",
    )
    command.add_context_options(p)
    command.add_backend_options(p)
    p.add_argument(
        "--compare", metavar="OTHER", help="the reference: a GGUF file or a dense checkpoint's directory"
    )
    p.add_argument(
        "--compare-dtype",
        metavar="TYPE",
        help="what a dense checkpoint is computed in: float32, bfloat16 or float16 (default: float32)",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument("--version", action="version", version=f"%(prog)s {command.version()}")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    p = parser()
    arguments = p.parse_args(argv)
    if arguments.compare_dtype is not None and arguments.compare is None:
        p.error("--compare-dtype: expected --compare beside it")
    if arguments.multiple_choice is None and not arguments.texts:
        p.error("expected a TEXT, or --multiple-choice")
    if arguments.multiple_choice is not None and (
        arguments.texts or arguments.windows is not None or arguments.stride is not None
    ):
        p.error("--multiple-choice: expected no TEXT, --windows or --stride beside it")
    return command.run("vptq-perplexity", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    with command.options_as_typed(OPTION_NAMES, {"text": "TEXT", "reference": "--compare"}):
        # A large model takes its time to load. The context of 0 is the model's own.
        check_options(n_ctx=arguments.n_ctx or None, **_window_options(arguments))
        if arguments.model is None:
            arguments.model = demo_path()
        if arguments.multiple_choice is not None:
            from vptq_runtime.evaluate.multiple_choice import read_items

            items = read_items(Path(arguments.multiple_choice))
            with command.open_runtime(arguments.model, arguments) as runtime:
                _choose(runtime, items, arguments)
            return
        text = "".join(map(_text, arguments.texts))
        with command.open_runtime(arguments.model, arguments) as runtime:
            _measure(runtime, text, arguments)


def _window_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"method": arguments.method, "stride": arguments.stride, "max_windows": arguments.windows}


def _text(file: str) -> str:
    return command.read_stdin() if file == "-" else command.read_text(file)


def _measure(runtime: Runtime, text: str, arguments: argparse.Namespace) -> None:
    """Loads the reference, scores the windows, and prints what came of it, also where Ctrl-C ends it."""
    from vptq_runtime.commands.progress import RunProgress, print_line
    from vptq_runtime.evaluate.report import print_report, running
    from vptq_runtime.evaluate.scoring import running_comparison, running_perplexity, windows_of

    _check_memory(text)
    tokens = runtime.tokenize(text)
    windows = windows_of(runtime, tokens, **_window_options(arguments))
    if windows.n_ctx < runtime.n_ctx:
        n_tokens = f"{len(tokens)} tokens, fewer than the context of {runtime.n_ctx}"
        command.note(f"the text has {n_tokens}: they are the one window")
    with _reference(runtime, arguments) as reference:
        results: Iterator[Result] = running_perplexity(runtime, windows)
        if reference is not None:
            _check_same_tokens(reference, text, tokens)
            results = running_comparison(runtime, reference, windows)
        last: Result | None = None
        start = time.monotonic()

        def report() -> None:
            if last is not None:
                print_report(runtime, last, arguments, time.monotonic() - start)

        try:
            with RunProgress(windows.n_windows, 0, print_line) as progress:
                for last in results:
                    progress.advance(running(last), 1)
        except KeyboardInterrupt:
            report()
            raise
    report()


def _choose(runtime: Runtime, items: Sequence[Item], arguments: argparse.Namespace) -> None:
    """Loads the reference, scores the items, and prints what came of it, also where Ctrl-C ends it."""
    from vptq_runtime.commands.progress import RunProgress, print_line
    from vptq_runtime.evaluate.choice_report import print_choices, running
    from vptq_runtime.evaluate.multiple_choice import running_choices

    with _reference(runtime, arguments) as reference:
        theirs: Iterator[Choices | None] = itertools.repeat(None, len(items))
        if reference is not None:
            theirs = running_choices(reference, items)
        last: tuple[Choices, Choices | None] | None = None
        start = time.monotonic()

        def report() -> None:
            if last is not None:
                print_choices(runtime, *last, arguments, time.monotonic() - start)

        try:
            with RunProgress(len(items), 0, print_line) as progress:
                for last in zip(running_choices(runtime, items), theirs, strict=True):
                    progress.advance(running(last[0]), 1)
        except KeyboardInterrupt:
            report()
            raise
    report()


def _check_memory(text: str) -> None:
    """A tokenizer needs the whole text, as merges may reach over any cut; where its memory ends, so does the
    process."""
    from vptq_runtime import _native

    n_bytes, available = len(text.encode()), _native.available_memory()
    if TOKENIZER_BYTES * n_bytes > available:
        needed = f"{TOKENIZER_BYTES * n_bytes / 2**30:.1f} GiB to tokenise, of which there are"
        raise OutOfMemoryError(
            f"text: found {n_bytes / 2**20:.0f} MiB, which take some {needed} {available / 2**30:.1f}, "
            f"expected at most {available // TOKENIZER_BYTES >> 20} MiB"
        )


@contextlib.contextmanager
def _reference(runtime: Runtime, arguments: argparse.Namespace) -> Iterator[Runtime | DenseModel | None]:
    if arguments.compare is None:
        yield None
        return
    with command.options_as_typed({"path": "--compare"}, {}):
        if not _is_dense(arguments.compare):
            if arguments.compare_dtype is not None:
                raise OptionError("dtype: found no dense model to compare with, expected one")
            with command.open_runtime(arguments.compare, arguments, n_ctx=runtime.n_ctx) as reference:
                yield reference
            return
        from vptq_runtime.evaluate.dense_model import DenseModel

        yield DenseModel(
            arguments.compare,
            device="cuda" if runtime.device.startswith("cuda") else "cpu",
            dtype=arguments.compare_dtype or "float32",
            n_threads=arguments.n_threads,
        )


def _is_dense(reference: str) -> bool:
    """Whether transformers is to run it: a directory, or a file that vptq-convert has not made."""
    if not reference or not Path(reference).is_file():
        return bool(reference) and Path(reference).is_dir()
    from vptq_runtime.evaluate.dense_gguf import is_dense_gguf

    return is_dense_gguf(Path(reference))


def _check_same_tokens(reference: Runtime | DenseModel, text: str, tokens: list[int]) -> None:
    theirs = reference.tokenize(text)
    if theirs != tokens:
        pairs = enumerate(itertools.zip_longest(theirs, tokens))
        at, (found, expected) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
        what = f"found a tokenizer that makes token {at} of the text {found}"
        raise OptionError(f"reference: {what}, expected {expected} as the model's: they read other tokens")


if __name__ == "__main__":
    sys.exit(main())
