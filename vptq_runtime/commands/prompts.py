"""vptq-run --prompts: many prompts from a file, computed together; a line of JSON for each."""

from __future__ import annotations

import json
from argparse import Namespace
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vptq_runtime.commands import command
from vptq_runtime.commands.output import generation_as_json
from vptq_runtime.commands.progress import RunProgress, print_line
from vptq_runtime.errors import BusyError, FileError, OptionError, VPTQError
from vptq_runtime.options import SEEDS

if TYPE_CHECKING:
    from vptq_runtime.options import GenerateOptions
    from vptq_runtime.runtime import GenerationStream, Runtime

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
AHEAD = 4  # times as many are asked for as are computed: those behind a long one have their turn meanwhile
# What a line of JSON may ask for beside its prompt.
LINE_OPTIONS = (
    *("max_tokens", "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed", "stop"),
    *("presence_penalty", "frequency_penalty", "min_tokens", "logprobs", "prompt_logprobs"),
    *("json_schema", "regex", "grammar"),
)


@dataclass(frozen=True)
class Asked:
    """A line of the file."""

    prompt: object  # a text, or token ids; None where there are messages
    messages: Any = None
    id: object = None  # as the line has it
    options: GenerateOptions | None = None


def run_prompts(runtime: Runtime, arguments: Namespace, options: GenerateOptions) -> None:
    """Prints a JSON object for each prompt, in the file's order.

    A prompt that fails has its error there; FileError at the end says how many did.
    """
    lines = [
        (number, line.removesuffix("\r"))
        for number, line in enumerate(command.read_text(arguments.prompts).split("\n"), 1)
        if line.strip()
    ]
    is_json = str(arguments.prompts).endswith(JSON_SUFFIXES)
    waiting: deque[tuple[int, Asked, GenerationStream | VPTQError]] = deque()
    n_failed = 0

    def print_next() -> None:
        nonlocal n_failed
        index, asked, stream = waiting.popleft()
        n_failed += not _print_result(runtime, index, asked, stream)
        progress.advance(f"{index + 1} of {len(lines)} prompts", 1)

    with RunProgress(len(lines), 0, print_line) as progress:
        for index, (number, line) in enumerate(lines):
            while len(waiting) >= AHEAD * runtime.parallel:
                print_next()
            asked, stream = _submitted(runtime, index, number, line, is_json, options)
            while isinstance(stream, BusyError) and waiting:  # many or long ones wait: its turn comes
                print_next()
                asked, stream = _submitted(runtime, index, number, line, is_json, options)
            waiting.append((index, asked, stream))
        while waiting:
            print_next()
    if n_failed:
        raise FileError(f"{arguments.prompts}: {n_failed} of {len(lines)} prompts failed, as their lines say")
    stats = runtime.stats()
    command.note(
        f"{len(lines)} prompts with {stats.prompt_tokens} tokens, {stats.prompt_tokens_cached} of them from "
        f"the cache | generated {stats.generated_tokens} tokens | {runtime.device}"
    )


def _submitted(
    runtime: Runtime, index: int, number: int, line: str, is_json: bool, options: GenerateOptions
) -> tuple[Asked, GenerationStream | VPTQError]:
    asked = Asked(None)
    try:
        asked = _asked(line) if is_json else Asked(line)
        prompt = asked.prompt if asked.messages is None else runtime.chat_tokens(asked.messages)
        seeded = {"seed": ((options["seed"] or 0) + index) % SEEDS}
        return asked, runtime.submit(prompt, **(options | seeded | (asked.options or {})))  # type: ignore[arg-type]
    except VPTQError as error:
        return asked, type(error)(f"line {number}: {error}")


def _asked(line: str) -> Asked:
    """A JSON object with `prompt` or `messages`, and if need be an `id` and options."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"found no JSON ({error}), expected an object") from None
    if not isinstance(values, dict):
        raise OptionError(f"found {line[:40]!r}, expected a JSON object")
    given = [name for name in ("prompt", "messages") if values.get(name) is not None]
    if len(given) != 1:
        raise OptionError(f"found {' and '.join(given) or 'neither'}, expected prompt or messages")
    others = {name: value for name, value in values.items() if name not in ("prompt", "messages", "id")}
    for name in others:
        if name not in LINE_OPTIONS:
            raise OptionError(f"found the key {name[:40]!r}, expected one of {', '.join(LINE_OPTIONS)}")
    return Asked(values.get("prompt"), values.get("messages"), values.get("id"), others)  # type: ignore[arg-type]


def _print_result(runtime: Runtime, index: int, asked: Asked, stream: GenerationStream | VPTQError) -> bool:
    """Waits for it; whether it has not failed."""
    result: dict[str, Any] = {"index": index} | ({} if asked.id is None else {"id": asked.id})
    try:
        if isinstance(stream, VPTQError):
            raise stream
        result |= generation_as_json(runtime, stream.result())
    except VPTQError as error:
        result["error"] = str(error)
    print(json.dumps(result, ensure_ascii=False), flush=True)
    return "error" not in result
