"""vptq-run --prompts: many prompts from a file, computed together; a line of JSON for each."""

from __future__ import annotations

import json
from argparse import Namespace
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vptq_runtime.checks import shown
from vptq_runtime.commands import command
from vptq_runtime.commands.output import generation_as_json
from vptq_runtime.commands.progress import RunProgress, print_line
from vptq_runtime.errors import BusyError, FileError, OptionError, VPTQError
from vptq_runtime.options import FORMS, SEEDS

if TYPE_CHECKING:
    from vptq_runtime.options import GenerateOptions
    from vptq_runtime.runtime import GenerationStream, Runtime

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
AHEAD = 4  # times as many are asked for as are computed: those behind a long one have their turn meanwhile
# What a line of JSON may ask for beside its prompt.
LINE_OPTIONS = (
    *("max_tokens", "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed", "stop"),
    *("presence_penalty", "frequency_penalty", "min_tokens", "logprobs", "prompt_logprobs"),
    *FORMS,
)


@dataclass
class Line:
    """A line of the file."""

    number: int  # from 1 on
    text: str
    index: int  # of its prompt, from 0 on: empty lines have none
    id: object = None  # as the line has it
    seed: object = None


def run_prompts(runtime: Runtime, arguments: Namespace, options: GenerateOptions) -> None:
    """Prints a JSON object for each prompt, in the file's order.

    A prompt that fails has its error there; FileError at the end says how many did.
    """
    texts = enumerate(command.read_text(arguments.prompts).split("\n"), 1)
    numbered = [(number, text.removesuffix("\r")) for number, text in texts if text.strip()]
    lines = [Line(number, text, index) for index, (number, text) in enumerate(numbered)]
    is_json = str(arguments.prompts).endswith(JSON_SUFFIXES)
    waiting: deque[tuple[Line, GenerationStream | VPTQError]] = deque()
    n_failed = 0

    def print_next() -> None:
        nonlocal n_failed
        line, stream = waiting.popleft()
        n_failed += not _print_result(runtime, line, stream)
        progress.advance(f"{line.index + 1} of {len(lines)} prompts", 1)

    with RunProgress(len(lines), 0, print_line) as progress:
        for line in lines:
            while len(waiting) >= AHEAD * runtime.parallel:
                print_next()
            stream = _submitted(runtime, line, is_json, options)
            while isinstance(stream, BusyError) and waiting:  # many or long ones wait: its turn comes
                print_next()
                stream = _submitted(runtime, line, is_json, options)
            waiting.append((line, stream))
        while waiting:
            print_next()
    if n_failed:
        raise FileError(f"{arguments.prompts}: {n_failed} of {len(lines)} prompts failed, as their lines say")
    stats = runtime.stats()
    command.note(
        f"{len(lines)} prompt{'' if len(lines) == 1 else 's'} with {stats.prompt_tokens} tokens, "
        f"{stats.prompt_tokens_cached} of them from the cache | "
        f"generated {stats.generated_tokens} tokens | {runtime.device}"
    )


def _submitted(
    runtime: Runtime, line: Line, is_json: bool, options: GenerateOptions
) -> GenerationStream | VPTQError:
    try:
        values = _object(line.text) if is_json else {"prompt": line.text}
        line.id = _taken_id(values)
        asked: Any = options | {"seed": ((options["seed"] or 0) + line.index) % SEEDS}
        if any(name in FORMS for name in values):  # a line's form stands for the command's
            asked = {name: value for name, value in asked.items() if name not in FORMS}
        prompt = _taken_prompt(runtime, values)
        asked |= values
        stream = runtime.submit(prompt, **asked)
        line.seed = asked["seed"]
        return stream
    except VPTQError as error:
        return type(error)(f"line {line.number}: {error}")


def _object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"found no JSON ({error}), expected an object") from None
    if not isinstance(values, dict):
        raise OptionError(f"found {text[:40]!r}, expected a JSON object")
    return values


def _taken_id(values: dict[str, Any]) -> object:
    """The line's `id`, which the result repeats."""
    found = values.pop("id", None)
    try:
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:  # NaN, half a character
        raise OptionError(f"id: found {shown(found)}, expected what JSON can hold: {error}") from None
    return found


def _taken_prompt(runtime: Runtime, values: dict[str, Any]) -> Any:
    """What `prompt` or `messages` says; the others of the values are options, and stay."""
    given = [name for name in ("prompt", "messages") if values.get(name) is not None]
    if len(given) != 1:
        raise OptionError(f"found {' and '.join(given) or 'neither'}, expected prompt or messages")
    prompt, messages = values.pop("prompt", None), values.pop("messages", None)
    for name in values:
        if name not in LINE_OPTIONS:
            raise OptionError(f"found the key {name[:40]!r}, expected one of {', '.join(LINE_OPTIONS)}")
    return prompt if messages is None else runtime.chat_tokens(messages)


def _print_result(runtime: Runtime, line: Line, stream: GenerationStream | VPTQError) -> bool:
    """Waits for it; whether it has not failed."""
    result: dict[str, Any] = {"index": line.index} | ({} if line.id is None else {"id": line.id})
    try:
        if isinstance(stream, VPTQError):
            raise stream
        result |= {"seed": line.seed, **generation_as_json(runtime, stream.result())}
    except VPTQError as error:
        result["error"] = str(error)
    print(json.dumps(result, ensure_ascii=False), flush=True)
    return "error" not in result
