"""vptq-run --chat: message by message, from a terminal or a pipe."""

from __future__ import annotations

import contextlib
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vptq_runtime.commands import command
from vptq_runtime.commands.output import print_stream
from vptq_runtime.errors import OptionError

if TYPE_CHECKING:
    from vptq_runtime.options import GenerateOptions
    from vptq_runtime.runtime import Runtime
    from vptq_runtime.text.chat_template import Message

COMMANDS = (
    "/exit, /quit or Ctrl-D leaves, /reset forgets the conversation, /help shows this, Ctrl-C stops a reply"
)


def chat(runtime: Runtime, arguments: Namespace, options: GenerateOptions, prompt: str | None) -> None:
    """Replies to one message, or to each line until there is none."""
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
            command.note(COMMANDS)
        elif re.fullmatch(r"/[a-z]+", typed or ""):
            command.note(f"no such command: {typed}; {COMMANDS}")
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
    arguments: Namespace,
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
        print_stream(runtime, arguments, stream, {"messages": kept}, with_load=with_load)
    except KeyboardInterrupt:
        if not interactive:
            raise
    return [*kept, {"role": "assistant", "content": stream.generation.text}]


def _lines(interactive: bool) -> Iterator[str]:
    """What is typed or piped in, line by line, until its end."""
    if not interactive:
        for line in sys.stdin.buffer:
            yield command.decoded(line, "standard input").rstrip("\r\n")
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives input() its line editing)
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # refused by name, later
    command.note(COMMANDS)
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
