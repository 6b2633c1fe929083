"""vptq-run: a prompt in, its continuation out; or a chat."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

from vptq_runtime import demo_path
from vptq_runtime.commands import command
from vptq_runtime.errors import OptionError
from vptq_runtime.generation import Options

if TYPE_CHECKING:
    from vptq_runtime.generation import GenerateOptions, Generation, GenerationStream
    from vptq_runtime.runtime import Runtime
    from vptq_runtime.text.chat_template import Message

DEFAULT_MAX_TOKENS = 128
CHAT_COMMANDS = (
    "/exit, /quit or Ctrl-D leaves, /reset forgets the conversation, /help shows this, Ctrl-C stops a reply"
)
OPTION_NAMES = command.RUNTIME_OPTIONS | {
    "max_tokens": "-n",
    "temperature": "--temp",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "min_p": "--min-p",
    "repeat_penalty": "--repeat-penalty",
    "seed": "--seed",
    "stop": "--stop",
}
# What a model writes must not steer the terminal: control characters become their pictures.
CONTROL_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
CONTROL_PICTURES |= dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)

DESCRIPTION = "Continue a text with a VPTQ model, or chat with one."
EPILOG = """\
The text goes to standard output as it comes, a line of timings to standard error. On a terminal the prompt is
shown before its continuation; into a pipe or a file goes the continuation alone.

Prompts are taken as they are: \\n in one is a backslash and an n (bash has $'\\n' for a line break).

  vptq-run -p "def "                                 the demo model
  vptq-run -m model.gguf -p "Once upon a time" -n 200 --temp 0
  echo "Once upon a time" | vptq-run -m model.gguf -p -
  vptq-run -m model.gguf --chat --system "Be brief."

Exit status: 0 done, 1 an error, 2 wrong usage, 130 stopped by Ctrl-C.
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "vptq-run",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "-m", "--model", metavar="FILE", help="the GGUF file (default: the demo model of the package)"
    )
    prompt = p.add_mutually_exclusive_group()
    prompt.add_argument(
        "-p",
        "--prompt",
        metavar="TEXT",
        help="text to continue, or the one message of a chat; -: standard input",
    )
    prompt.add_argument("-f", "--file", metavar="FILE", help="the same from a file")
    p.add_argument(
        "-n",
        "--max-tokens",
        "--n-predict",
        "--predict",
        metavar="N",
        type=int,
        help=f"most new tokens; -1: as the context allows (default: {DEFAULT_MAX_TOKENS}; with --chat -1)",
    )
    command.add_context_options(p)
    command.add_backend_options(p)
    sampling = p.add_argument_group("sampling")
    sampling.add_argument(
        "--temp",
        "--temperature",
        metavar="T",
        type=float,
        default=0.8,
        help="0 is greedy (default: %(default)s)",
    )
    sampling.add_argument(
        "--top-k", metavar="K", type=int, default=40, help="0 is off (default: %(default)s)"
    )
    sampling.add_argument(
        "--top-p", metavar="P", type=float, default=0.95, help="1 is off (default: %(default)s)"
    )
    sampling.add_argument(
        "--min-p", metavar="P", type=float, default=0.05, help="0 is off (default: %(default)s)"
    )
    sampling.add_argument(
        "--repeat-penalty", metavar="R", type=float, default=1.0, help="1 is off (default: %(default)s)"
    )
    sampling.add_argument(
        "--seed",
        "-s",
        metavar="N",
        type=int,
        default=-1,
        help="the same seed gives the same text; -1: a random one (default: %(default)s)",
    )
    sampling.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end before this text; may be given again"
    )
    chat = p.add_argument_group("chat")
    chat.add_argument(
        "--chat",
        action="store_true",
        help="chat by the model's own template; each line is a message, or a command: /help lists them",
    )
    chat.add_argument(
        "--system", "--system-prompt", "-sys", metavar="TEXT", help="system message of the chat"
    )
    p.add_argument(
        "--json", action="store_true", help="print one JSON object (in a chat, one a line for each reply)"
    )
    p.add_argument("--version", action="store_true", help="print the version and exit")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    p = parser()
    arguments = p.parse_args(argv)
    if arguments.version:
        print(f"vptq-run {command.version()}")
        return 0
    if arguments.prompt is None and arguments.file is None and not arguments.chat:
        p.error("expected -p PROMPT (or -f FILE, or --chat)")
    if arguments.system is not None and not arguments.chat:
        p.error("--system: expected --chat beside it")
    return command.run("vptq-run", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    prompt = {} if arguments.chat else {"prompt": "-p" if arguments.file is None else "-f"}
    with command.options_as_typed(OPTION_NAMES, prompt):
        _run_model(arguments)


def _run_model(arguments: argparse.Namespace) -> None:
    prompt = _prompt(arguments)
    if arguments.model is None:
        arguments.model = demo_path()
    if arguments.max_tokens is None:
        arguments.max_tokens = -1 if arguments.chat else DEFAULT_MAX_TOKENS
    if arguments.seed == -1:
        arguments.seed = secrets.randbits(32)
    options = _options(arguments)
    Options.checked(**options)  # a large model takes its time to load
    with command.open_runtime(arguments.model, arguments) as runtime:
        if arguments.chat:
            _chat(runtime, arguments, options, prompt)
        else:
            _complete(runtime, arguments, options, prompt)


def _prompt(arguments: argparse.Namespace) -> str | None:
    given: str | None = arguments.prompt
    if given == "-":
        given = command.read_stdin()
    elif arguments.file is not None:
        given = command.read_text(arguments.file)
    else:
        return given
    return given.removesuffix("\n")  # echo's, or an editor's, and no model expects it


def _complete(
    runtime: Runtime, arguments: argparse.Namespace, options: GenerateOptions, prompt: str | None
) -> None:
    assert prompt is not None
    stream = runtime.generate(prompt, stream=True, **options)
    if sys.stdout.isatty() and not arguments.json:
        print(command.styled(command.BOLD, _printable(prompt, sys.stdout), sys.stdout), end="", flush=True)
    _print_stream(runtime, arguments, stream, {"prompt": prompt})


def _chat(
    runtime: Runtime, arguments: argparse.Namespace, options: GenerateOptions, prompt: str | None
) -> None:
    interactive = prompt is None and sys.stdin.isatty()
    system: list[Message] = []
    if arguments.system is not None:
        system.append({"role": "system", "content": arguments.system})
    # A model without a template, or with one that takes no system message, is refused before anyone types.
    runtime.chat_tokens([*system, {"role": "user", "content": "?"}])
    messages = system
    replied = False
    for line in _lines(interactive) if prompt is None else [prompt]:
        typed = line.strip() if prompt is None else None
        if typed in ("/exit", "/quit"):
            break
        if typed == "/reset":
            messages = system
        elif typed == "/help":
            command.note(CHAT_COMMANDS)
        elif re.fullmatch(r"/[a-z]+", typed or ""):
            command.note(f"no such command: {typed}; {CHAT_COMMANDS}")
        elif typed != "":
            try:
                asked = [*messages, {"role": "user", "content": line}]
                messages = _turn(runtime, arguments, options, asked, interactive, with_load=not replied)
                replied = True
            except OptionError as error:
                if not interactive:
                    raise
                print(f"error: {error}", file=sys.stderr)  # the message was too long, say: the chat goes on


def _turn(
    runtime: Runtime,
    arguments: argparse.Namespace,
    options: GenerateOptions,
    messages: list[Message],
    interactive: bool,
    *,
    with_load: bool,
) -> list[Message]:
    """Prints the reply to the last message; returns what the context holds of the conversation."""
    from vptq_runtime.text.chat_template import trimmed

    room = min(options["max_tokens"] or runtime.n_ctx, runtime.n_ctx // 4)  # kept free for the reply
    kept = trimmed(messages, lambda some: len(runtime.chat_tokens(some)), runtime.n_ctx - room)
    if len(kept) < len(messages):
        command.note(f"the context of {runtime.n_ctx} tokens is full: the oldest turns are forgotten")
    stream = runtime.chat(kept, stream=True, **options)
    try:
        _print_stream(runtime, arguments, stream, {"messages": kept}, with_load=with_load)
    except KeyboardInterrupt:
        if not interactive:
            raise
    return [*kept, {"role": "assistant", "content": stream.generation.text}]


def _print_stream(
    runtime: Runtime,
    arguments: argparse.Namespace,
    stream: GenerationStream,
    asked: dict[str, Any],
    *,
    with_load: bool = True,
) -> None:
    """Prints a text as it comes, ends its line, and reports on it, also where Ctrl-C ends it."""
    last = ""
    try:
        with stream:
            try:
                for last in stream:
                    if not arguments.json:
                        print(_printable(last, sys.stdout), end="", flush=True)
            finally:
                if not arguments.json and not last.endswith("\n"):
                    print(flush=True)
    except KeyboardInterrupt:
        if stream.generation.tokens:
            _report(runtime, arguments, asked, stream.generation, with_load)
        raise
    _report(runtime, arguments, asked, stream.generation, with_load)


def _report(
    runtime: Runtime,
    arguments: argparse.Namespace,
    asked: dict[str, Any],
    generation: Generation,
    with_load: bool,
) -> None:
    if generation.finish_reason == "length" and len(generation.tokens) != arguments.max_tokens:
        command.note(f"the context of {runtime.n_ctx} tokens is full: the text ends here")
    timings = generation.timings
    speeds = {
        "prompt_tokens_per_s": timings.prompt_tokens_per_s,
        "decode_tokens_per_s": timings.decode_tokens_per_s,
    }
    if arguments.json:
        result = {
            "model": str(arguments.model),
            "device": runtime.device,
            "n_ctx": runtime.n_ctx,
            "seed": arguments.seed,
            **asked,
            "text": generation.text,
            "tokens": generation.tokens,
            "finish_reason": generation.finish_reason,
            "timings": asdict(timings) | speeds,
        }
        print(json.dumps(result, ensure_ascii=False), flush=True)
        return
    load = f"load {timings.load_s:.2f} s | " if with_load else ""
    prompt = _counted(timings.prompt_tokens, timings.prompt_tokens_per_s)
    generated = _counted(len(generation.tokens), timings.decode_tokens_per_s)
    why = f"; {runtime.why_not_cuda}" if with_load and runtime.why_not_cuda else ""
    command.note(f"{load}prompt {prompt} | generated {generated} | {runtime.device}{why}")


def _counted(n_tokens: int, per_s: float) -> str:
    speed = f", {per_s:.1f} tok/s" if per_s else ""
    return f"{n_tokens} token{'' if n_tokens == 1 else 's'}{speed}"


def _options(arguments: argparse.Namespace) -> GenerateOptions:
    return {
        "max_tokens": None if arguments.max_tokens == -1 else arguments.max_tokens,
        "temperature": arguments.temp,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "min_p": arguments.min_p,
        "repeat_penalty": arguments.repeat_penalty,
        "seed": arguments.seed,
        "stop": arguments.stop,
    }


def _lines(interactive: bool) -> Iterator[str]:
    """What is typed or piped in, line by line, until its end."""
    if not interactive:
        for line in sys.stdin.buffer:
            yield command.decoded(line, "standard input").rstrip("\r\n")
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives input() its line editing)
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # refused by name, later
    command.note(CHAT_COMMANDS)
    interrupted = False
    while True:
        try:
            line = input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:  # an unfinished line is dropped, as in a shell
            print(file=sys.stderr)
            if interrupted:
                return
            interrupted = True
            command.note("Ctrl-C again, /exit or Ctrl-D leaves")
        else:
            interrupted = False
            yield line


def _printable(text: str, output: TextIO) -> str:
    return text.translate(CONTROL_PICTURES) if output.isatty() else text
