"""vptq-run: a prompt in, its continuation out; or a chat."""

from __future__ import annotations

import argparse
import contextlib
import secrets
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vptq_runtime import demo_path
from vptq_runtime.commands import command
from vptq_runtime.commands.chat import chat
from vptq_runtime.commands.output import for_terminal, print_stream
from vptq_runtime.options import Options

if TYPE_CHECKING:
    from vptq_runtime.options import GenerateOptions
    from vptq_runtime.runtime import Runtime

DEFAULT_MAX_TOKENS = 128
OPTION_NAMES = command.RUNTIME_OPTIONS | {
    "max_tokens": "-n",
    "temperature": "--temp",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "min_p": "--min-p",
    "repeat_penalty": "--repeat-penalty",
    "presence_penalty": "--presence-penalty",
    "frequency_penalty": "--frequency-penalty",
    "seed": "--seed",
    "stop": "--stop",
    "logprobs": "--logprobs",
    "json_schema": "--json-schema",
    "regex": "--regex",
    "grammar": "--grammar",
    "parallel": "--parallel",
}
DESCRIPTION = "Continue a text with a VPTQ model, or chat with one."
EPILOG = """\
The text goes to standard output as it comes, a line of timings to standard error. On a terminal the prompt is
shown before its continuation; into a pipe or a file goes the continuation alone.

Prompts are taken as they are: \\n in one is a backslash and an n (bash has $'\\n' for a line break).

  vptq-run -p "def "                                 the demo model
  vptq-run -m VPTQ-community/Meta-Llama-3.1-8B-Instruct-v8-k65536-256-woft --chat
  vptq-run -m model.gguf -p "Once upon a time" -n 200 --temp 0
  echo "Once upon a time" | vptq-run -m model.gguf -p -
  vptq-run -m model.gguf --chat --system "Be brief."
  vptq-run -m model.gguf -p "A user as JSON:" --json-schema user.json
  vptq-run -m model.gguf --prompts prompts.jsonl --parallel 16 > results.jsonl

A model that -m names by its repository or directory is downloaded and converted once, into a cache:
vptq-models lists what is there, removes it, and says which models fit this machine.

--prompts takes a text file with a prompt in each line, or, where its name ends with .jsonl, an object in
each: "prompt" (a text, or token ids) or "messages" (for a chat), if need be an "id", which its result
repeats, and options by their names in Python (max_tokens, temperature, stop, json_schema ...), which go
before the command's. Empty lines are skipped. Results are a JSON object a line, in the same order. The
prompt with index i has the seed --seed + i.

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
        "-m",
        "--model",
        metavar="MODEL",
        help="a GGUF file; owner/model or owner/model@revision of the Hugging Face hub, or a checkpoint's "
        "directory: converted into a cache first (default: the demo model of the package)",
    )
    prompt = p.add_mutually_exclusive_group()
    prompt.add_argument(
        "-p",
        "--prompt",
        metavar="TEXT",
        help="text to continue, or the one message of a chat; -: standard input",
    )
    prompt.add_argument("-f", "--file", metavar="FILE", help="the same from a file")
    prompt.add_argument(
        "--prompts", metavar="FILE", help="many prompts, computed together: see below; the output is JSON"
    )
    p.add_argument(
        "--parallel",
        metavar="N",
        type=int,
        help="of --prompts, most at once (default: 8, on a GPU 64)",
    )
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
    for name, when in (("presence", "once each"), ("frequency", "as often as they were")):
        sampling.add_argument(
            f"--{name}-penalty",
            metavar="R",
            type=float,
            default=0.0,
            help=f"taken from the logits of generated tokens, {when}; -2 to 2 (default: %(default)s)",
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
    sampling.add_argument(
        "--logprobs",
        metavar="N",
        type=int,
        default=0,
        help="after the text, a line for each token: its log-probability, and the N likeliest ones there; "
        "0 is off (default: %(default)s)",
    )
    form = p.add_argument_group("form of the text").add_mutually_exclusive_group()
    form.add_argument("--json-schema", metavar="FILE", help="JSON that matches the JSON schema in a file")
    form.add_argument("--regex", metavar="REGEX", help="a text that matches a regular expression")
    form.add_argument("--grammar", metavar="FILE", help="a text of the grammar (as of Lark) in a file")
    speed = p.add_argument_group("guessing ahead (the text stays the same)").add_mutually_exclusive_group()
    speed.add_argument(
        "--speculate",
        default="auto",
        help="auto, ngram (what followed in the text before) or off (default: %(default)s, which is ngram)",
    )
    speed.add_argument("--draft", metavar="MODEL", help="guesses by a small model with the same tokens")
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
    if arguments.prompt is arguments.file is arguments.prompts is None and not arguments.chat:
        p.error("expected -p PROMPT (or -f FILE, or --prompts FILE, or --chat)")
    if arguments.prompts is not None and arguments.chat:
        p.error("--prompts: found --chat beside it, expected none: lines of JSON can have messages")
    if arguments.parallel is not None and arguments.prompts is None:
        p.error("--parallel: expected --prompts beside it")
    if arguments.system is not None and not arguments.chat:
        p.error("--system: expected --chat beside it")
    return command.run("vptq-run", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    prompt = {} if arguments.chat else {"prompt": "-p" if arguments.file is None else "-f"}
    speculate = "--speculate" if arguments.draft is None else "--draft"
    with command.options_as_typed(OPTION_NAMES | {"speculate": speculate}, prompt):
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
    Options(**options)  # a large model takes its time to load
    with contextlib.ExitStack() as stack:
        runtime = stack.enter_context(
            command.open_runtime(arguments.model, arguments, parallel=arguments.parallel)
        )
        if arguments.draft is not None:
            with command.options_as_typed({}, {str(arguments.draft): f"--draft: {arguments.draft}"}):
                options["speculate"] = stack.enter_context(command.open_runtime(arguments.draft, arguments))
        if arguments.prompts is not None:
            from vptq_runtime.commands.prompts import run_prompts  # rich takes its time to load

            run_prompts(runtime, arguments, options)
        elif arguments.chat:
            chat(runtime, arguments, options, prompt)
        else:
            assert prompt is not None
            _complete(runtime, arguments, options, prompt)


def _complete(runtime: Runtime, arguments: argparse.Namespace, options: GenerateOptions, prompt: str) -> None:
    stream = runtime.generate(prompt, stream=True, **options)
    if sys.stdout.isatty() and not arguments.json:
        print(command.styled(command.BOLD, for_terminal(prompt, sys.stdout), sys.stdout), end="", flush=True)
    print_stream(runtime, arguments, stream, {"prompt": prompt})


def _prompt(arguments: argparse.Namespace) -> str | None:
    given: str | None = arguments.prompt
    if given == "-":
        given = command.read_stdin()
    elif arguments.file is not None:
        given = command.read_text(arguments.file)
    else:
        return given
    return given.removesuffix("\n")  # echo's, or an editor's, and no model expects it


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
        "presence_penalty": arguments.presence_penalty,
        "frequency_penalty": arguments.frequency_penalty,
        "logprobs": arguments.logprobs,
        "json_schema": None if arguments.json_schema is None else command.read_text(arguments.json_schema),
        "regex": arguments.regex,
        "grammar": None if arguments.grammar is None else command.read_text(arguments.grammar),
        "speculate": arguments.speculate,
    }
