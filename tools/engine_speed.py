"""What the engine is worth: requests together, a prompt beside a stream, shared prefixes, guesses ahead.

    python tools/engine_speed.py -m FILE                    # what is measured of any model
    python tools/engine_speed.py --synthetic llama-3.2-1b --quant v8-k65536-0
    python tools/engine_speed.py -m FILE --only speculation # of an instruct model: it has to copy

Ratios are of runs that take turns, medians over the rounds; let there be no other work on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import numpy as np

from vptq_runtime import GenerationStream, Runtime, _native, demo_path
from vptq_runtime.bench.shapes import find_shape
from vptq_runtime.bench.synthetic import Quant, SyntheticModel
from vptq_runtime.commands import command
from vptq_runtime.errors import OptionError, VPTQError
from vptq_runtime.options import Options

GREEDY: dict[str, Any] = {"temperature": 0.0, "speculate": "off"}
N_TOGETHER = 8
SYSTEM_TOKENS = 1024
N_SYSTEM = 16  # requests with one system prompt
LONG_PROMPT = 4096
N_ALONE = 128  # gaps between tokens before it comes
CODE = '''\
def total_price(items, tax_rate):
    """Sum the prices of all items and add the tax."""
    total = 0.0
    for item in items:
        price = item.price * item.quantity
        if item.discount is not None:
            price = price * (1.0 - item.discount)
        total = total + price
    return total * (1.0 + tax_rate)


def cheapest(items):
    """The item with the lowest price, or None if there are no items."""
    best = None
    for item in items:
        if best is None or item.price < best.price:
            best = item
    return best
'''
NEWS = """\
The city council voted on Tuesday to close the old harbour bridge for repairs from the first of March until
the end of June. "We have waited too long already," said Maria Lindqvist, who leads the department of works.
"Each winter that we wait makes the repairs more expensive, and the bridge less safe." The ferry will run
every ten minutes during that time, and it will be free of charge. Shop owners on the north side had asked for
a later date. "Spring is when our customers come," said Tomas Berg, who sells bicycles near the bridge."""
# What is asked for, and how the answer begins: small models need to be shown that they shall copy.
REPEATING = [
    (
        f"Rename `items` to `products` in this code, and change nothing else.\n\n{CODE}",
        'def total_price(products, tax_rate):\n    """Sum the prices of all products and add the tax."""\n',
    ),
    (
        f"Write this code again, with comments.\n\n{CODE}",
        'def total_price(items, tax_rate):\n    """Sum the prices of all items and add the tax."""\n'
        "    # Add the price of each item.\n",
    ),
    (
        f"Repeat the following article, but write 'town' instead of 'city'.\n\n{NEWS}",
        "The town council voted on Tuesday to close the old",
    ),
    (
        f"Summarise the following article, and quote what people said in full.\n\n{NEWS}",
        "The harbour bridge will be closed for repairs. Maria Lindqvist said: "
        '"We have waited too long already.',
    ),
]
FRESH = [
    ("Write a story about a lighthouse keeper who finds a door in the sea.", ""),
    ("Explain why the sky is blue to a child, then to a physicist.", ""),
    ("What should I cook tonight with rice, lemons and spinach?", ""),
    ("Describe a walk through a town on Mars.", ""),
]


def main() -> int:
    """Runs the command and returns its exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = p.add_mutually_exclusive_group()
    model.add_argument("-m", "--model", metavar="FILE", default=demo_path(), help="default: the demo model")
    model.add_argument("--synthetic", metavar="SHAPE", help="random weights of a known shape")
    p.add_argument("--quant", metavar="V-K-R", default="v8-k65536-0", help="default: %(default)s")
    p.add_argument(
        "-r", "--rounds", metavar="N", type=int, default=3, help="at least 1 (default: %(default)s)"
    )
    p.add_argument(
        "-n", "--n-gen", metavar="N", type=int, default=64, help="tokens, at least 2 (default: %(default)s)"
    )
    p.add_argument("--device", default="cpu", help="default: %(default)s")
    p.add_argument("--only", metavar="NAME,...", default=",".join(MEASUREMENTS), help="default: %(default)s")
    arguments = p.parse_args()
    return command.run("engine_speed", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    for option, found, least in (("--rounds", arguments.rounds, 1), ("--n-gen", arguments.n_gen, 2)):
        if found < least:
            raise command.UsageError(f"{option}: found {found}, expected at least {least}")
    with _model_file(arguments) as path:
        for name in arguments.only.split(","):
            if name not in MEASUREMENTS:
                raise command.UsageError(
                    f"--only: found {name!r}, expected some of {', '.join(MEASUREMENTS)}"
                )
            MEASUREMENTS[name](path, arguments)


@contextlib.contextmanager
def _model_file(arguments: argparse.Namespace) -> Iterator[str]:
    if arguments.synthetic is None:
        yield str(arguments.model)
        return
    shape = find_shape(arguments.synthetic)
    model = SyntheticModel(arguments.synthetic, shape, Quant.parse(arguments.quant), "q8_0", "q8_0")
    with model.file(shape.n_layer) as path:
        yield path


def _open(path: str, arguments: argparse.Namespace, **options: Any) -> Runtime:
    runtime = Runtime(path, device=arguments.device, **options)
    runtime.generate(_random_tokens(runtime, 16, 0), max_tokens=4, **GREEDY)  # all is read and warm
    return runtime


def _exactly(n_gen: int) -> dict[str, Any]:
    """No end token ends the text before."""
    return GREEDY | {"max_tokens": n_gen, "min_tokens": n_gen}


def _random_tokens(runtime: Runtime, n: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(runtime.n_vocab), k=n)


def together(path: str, arguments: argparse.Namespace) -> None:
    """Eight requests of 16 tokens together, beside one after another."""
    what = f"{N_TOGETHER} requests together / one after another"
    with _open(path, arguments, cache="off") as runtime:
        prompts = [_random_tokens(runtime, 16, 1 + i) for i in range(N_TOGETHER)]
        options = _exactly(arguments.n_gen)
        ratios, speeds = [], []
        for _ in range(arguments.rounds):
            alone = _seconds(lambda: [runtime.generate(prompt, **options) for prompt in prompts])
            all_at_once = _seconds(lambda: runtime.generate(prompts, **options))
            ratios.append(alone / all_at_once)
            speeds.append(N_TOGETHER * arguments.n_gen / all_at_once)
        _say(what, ratios, f"{median(speeds):.0f} tok/s together")


def gap(path: str, arguments: argparse.Namespace) -> None:
    """The time between a stream's tokens while a long prompt is computed, beside the same alone."""
    n_ctx = LONG_PROMPT + 512
    with _open(path, arguments, cache="off", n_ctx=n_ctx) as runtime:
        n_prompt = min(LONG_PROMPT, runtime.n_ctx - 2)
        ratios, medians, seconds = [], [], []
        for i in range(arguments.rounds):
            prompt = _random_tokens(runtime, n_prompt, 100 + i)
            stream = runtime.submit(_random_tokens(runtime, 16, i), max_tokens=None, **GREEDY)
            alone = _gaps(stream, lambda n: n > N_ALONE)
            begin = time.perf_counter()
            other = runtime.submit(prompt, max_tokens=1, **GREEDY)
            beside = _gaps(stream, _ended(other))
            seconds.append(time.perf_counter() - begin)
            stream.close()
            ratios.append(np.quantile(beside, 0.99) / np.quantile(alone, 0.99))
            medians.append(median(beside) / median(alone))
        _say(
            f"99th percentile gap beside a prompt of {n_prompt} tokens / alone",
            ratios,
            f"of medians {median(medians):.2f}; the prompt took {median(seconds):.1f} s",
        )


def _ended(stream: GenerationStream) -> Callable[[int], bool]:
    return lambda _: stream.ended


def _gaps(stream: GenerationStream, done: Callable[[int], bool]) -> list[float]:
    times = [time.perf_counter()]
    while not done(len(times)) and stream.next_delta() is not None:
        times.append(time.perf_counter())
    return np.diff(times).tolist()[1:]  # the first may lie between two measurements


def prefix(path: str, arguments: argparse.Namespace) -> None:
    """Prompt tokens computed, of all: requests with one system prompt, all at once."""
    with _open(path, arguments, n_ctx=2048, parallel=N_SYSTEM) as runtime:
        before = runtime.stats()
        system = _random_tokens(runtime, min(SYSTEM_TOKENS, runtime.n_ctx // 2), 7)
        prompts = [[*system, *_random_tokens(runtime, 8, 200 + i)] for i in range(N_SYSTEM)]
        generations = runtime.generate(prompts, max_tokens=4, **GREEDY)
        after = runtime.stats()
        computed = after.prompt_tokens_computed - before.prompt_tokens_computed
        print(
            f"{N_SYSTEM} requests with one system prompt of {len(system)} tokens: {computed} of "
            f"{sum(map(len, prompts))} prompt tokens computed, "
            f"{computed / sum(map(len, prompts)):.1%}; from the cache {sum(g.n_cached for g in generations)}"
        )


def speculation(path: str, arguments: argparse.Namespace) -> None:
    """Tokens a second with n-gram drafts, beside without: text copied with small changes, and new text."""
    for what, texts, options in (
        ("text rewritten with small changes, greedy", REPEATING, {"temperature": 0.0}),
        ("new text, greedy", FRESH, {"temperature": 0.0}),
        ("new text, temperature 1", FRESH, {"temperature": 1.0, "top_p": 0.95, "seed": 1}),
    ):
        with _open(path, arguments) as runtime:
            prompts = [_as_prompt(runtime, *text) for text in texts]
            ratios, accepted = [], []
            for _ in range(arguments.rounds):
                ratio, share = _faster(runtime, prompts, options | {"max_tokens": arguments.n_gen})
                ratios.append(ratio)
                accepted.append(share)
            more = f"{np.mean(accepted):.0%} of the tokens were drafts"
            _say(f"{what}: with n-gram drafts / without", ratios, more)


def _faster(runtime: Runtime, prompts: Sequence[list[int]], options: dict[str, Any]) -> tuple[float, float]:
    """How much faster it is with drafts, and the share of the tokens that were drafts."""
    seconds = {"off": 0.0, "ngram": 0.0}
    n_tokens = n_accepted = 0
    for prompt in prompts:
        tokens = []
        for speculate in seconds:
            g = runtime.generate(prompt, speculate=speculate, **options)
            seconds[speculate] += g.timings.decode_s
            tokens.append(g.tokens)
        if tokens[0] != tokens[1]:
            raise OptionError("speculate: found other tokens with drafts, expected the same")
        n_tokens += len(g.tokens)
        n_accepted += g.n_accepted
    return seconds["off"] / seconds["ngram"], n_accepted / n_tokens


def _as_prompt(runtime: Runtime, text: str, answer: str) -> list[int]:
    """A chat's turn, or plain text where the model has no chat template; and the beginning of the answer."""
    try:
        prompt = runtime.chat_tokens([{"role": "user", "content": text}])
    except VPTQError:
        prompt = runtime.tokenize(text + "\n\n")
    return prompt + runtime.tokenize(answer, add_special=False)


def overhead(path: str, arguments: argparse.Namespace) -> None:
    """A step of eight requests through the engine, beside the native calls of such a step."""
    model = _native.Model(path)
    context = _native.Context(model, device=arguments.device, n_ctx=2048, n_threads=0, kv_type="f16")
    with _open(path, arguments, cache="off", n_ctx=2048) as runtime:
        prompts = [_random_tokens(runtime, 16, 1 + i) for i in range(N_TOGETHER)]
        ratios, steps = [], []
        for _ in range(arguments.rounds):
            native = _native_step(runtime, context, prompts, arguments.n_gen)
            generations = runtime.generate(prompts, **_exactly(arguments.n_gen))
            step = max(g.timings.decode_s for g in generations) / (arguments.n_gen - 1)
            ratios.append(step / native)
            steps.append(step - native)
        _say("a step of 8 requests / its native calls", ratios, f"{1e6 * median(steps):.0f} us more")


def _native_step(
    runtime: Runtime, context: _native.Context, prompts: Sequence[list[int]], n_gen: int
) -> float:
    """Seconds of a decode step, the prompts left out; with samplers that do what the engine's do."""
    options = Options(**_exactly(n_gen))
    end_tokens = np.atleast_1d(runtime.metadata.get("vptq.eos_token_ids", [])).tolist()
    samplers = [options.sampler(0, end_tokens, runtime.n_vocab) for _ in prompts]
    sequences = [context.new_sequence() for _ in prompts]
    context.forward(sequences, prompts, [True] * len(prompts), ["last"] * len(prompts), samplers)
    tokens = context.sample(samplers)
    begin = time.perf_counter()
    for _ in range(n_gen - 1):
        context.forward(sequences, tokens, (), (), samplers)
        tokens = context.sample(samplers)
    seconds = time.perf_counter() - begin
    for sequence in sequences:
        context.free_sequence(sequence)
    return seconds / (n_gen - 1)


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _say(what: str, ratios: Sequence[float], more: str) -> None:
    print(f"{what}: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); {more}", flush=True)


MEASUREMENTS: dict[str, Callable[[str, argparse.Namespace], None]] = {
    "together": together,
    "gap": gap,
    "prefix": prefix,
    "speculation": speculation,
    "overhead": overhead,
}

if __name__ == "__main__":
    sys.exit(main())
