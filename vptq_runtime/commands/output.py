"""How vptq-run prints a text as it comes, and what it says of it."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

from vptq_runtime.commands import command

if TYPE_CHECKING:
    from vptq_runtime.generation import Generation, TokenLogprob
    from vptq_runtime.runtime import GenerationStream, Runtime

# What a model writes must not steer the terminal: control characters become their pictures.
CONTROL_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
CONTROL_PICTURES |= dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)


def print_stream(
    runtime: Runtime,
    arguments: Namespace,
    stream: GenerationStream,
    asked: dict[str, Any],
    *,
    with_load: bool = True,
) -> None:
    """Prints a text as it comes, ends its line, and reports on it, also where Ctrl-C ends it.

    asked: what the JSON object says that it answers.
    """
    last = ""
    try:
        with stream:
            try:
                for last in stream:
                    if not arguments.json:
                        print(for_terminal(last, sys.stdout), end="", flush=True)
            finally:
                if not arguments.json and not last.endswith("\n"):
                    print(flush=True)
    except KeyboardInterrupt:
        if stream.generation.tokens:
            _report(runtime, arguments, asked, stream.generation, with_load)
        raise
    _report(runtime, arguments, asked, stream.generation, with_load)


def generation_as_json(runtime: Runtime, generation: Generation) -> dict[str, Any]:
    """What the JSON objects of all modes say of a generation."""
    timings = generation.timings
    told = {
        name: [None if entry is None else _logprob_as_json(runtime, entry) for entry in entries]
        for name in ("logprobs", "prompt_logprobs")
        if (entries := getattr(generation, name)) is not None
    }
    return {
        "text": generation.text,
        "tokens": generation.tokens,
        "finish_reason": generation.finish_reason,
        "n_cached": generation.n_cached,
        "n_drafted": generation.n_drafted,
        "n_accepted": generation.n_accepted,
        **told,
        "timings": asdict(timings)
        | {
            "prompt_tokens_per_s": timings.prompt_tokens_per_s,
            "decode_tokens_per_s": timings.decode_tokens_per_s,
        },
    }


def for_terminal(text: str, output: TextIO) -> str:
    """A model's text, such that it does nothing to a terminal."""
    return text.translate(CONTROL_PICTURES) if output.isatty() else text


def _report(
    runtime: Runtime,
    arguments: Namespace,
    asked: dict[str, Any],
    generation: Generation,
    with_load: bool,
) -> None:
    if generation.finish_reason == "length" and len(generation.tokens) != arguments.max_tokens:
        command.note(f"the context of {runtime.n_ctx} tokens is full: the text ends here")
    elif generation.finish_reason == "length" and (
        arguments.json_schema or arguments.regex or arguments.grammar
    ):
        command.note(f"-n: {arguments.max_tokens} tokens are generated, and the text's form is not complete")
    if arguments.json:
        result = {
            "model": str(arguments.model),
            "device": runtime.device,
            "n_ctx": runtime.n_ctx,
            "seed": arguments.seed,
            **asked,
            **generation_as_json(runtime, generation),
        }
        print(json.dumps(result, ensure_ascii=False), flush=True)
        return
    for entry in generation.logprobs or ():
        _print_logprob(runtime, entry)
    timings = generation.timings
    load = f"load {timings.load_s:.2f} s | " if with_load else ""
    prompt = _counted(timings.prompt_tokens, timings.prompt_tokens_per_s)
    cached = f" and {generation.n_cached} from the cache" if generation.n_cached else ""
    generated = _counted(len(generation.tokens), timings.decode_tokens_per_s)
    drafts = ""
    if generation.n_drafted:
        drafts = f" ({generation.n_accepted} of {generation.n_drafted} drafts were right)"
    why = f"; {runtime.why_not_cuda}" if with_load and runtime.why_not_cuda else ""
    command.note(f"{load}prompt {prompt}{cached} | generated {generated}{drafts} | {runtime.device}{why}")


def _counted(n_tokens: int, per_s: float) -> str:
    speed = f", {per_s:.1f} tok/s" if per_s else ""
    return f"{n_tokens} token{'' if n_tokens == 1 else 's'}{speed}"


def _print_logprob(runtime: Runtime, entry: TokenLogprob) -> None:
    """A line of standard output: the token's log-probability, its text, and the likeliest ones' there."""
    top = "  ".join(f"{logprob:.4f} {_spelled(runtime, token)}" for token, logprob in entry.top)
    print(f"{entry.logprob:9.4f}  {_spelled(runtime, entry.token):<16}  {top}".rstrip())


def _logprob_as_json(runtime: Runtime, entry: TokenLogprob) -> dict[str, Any]:
    def one(token: int, logprob: float) -> dict[str, Any]:
        return {"token": token, "text": runtime.token_text(token), "logprob": logprob}

    return one(entry.token, entry.logprob) | {"top": [one(*each) for each in entry.top]}


def _spelled(runtime: Runtime, token: int) -> str:
    """A token's text in one word, as JSON has it."""
    return json.dumps(for_terminal(runtime.token_text(token), sys.stdout), ensure_ascii=False)
