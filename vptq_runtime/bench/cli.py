"""vptq-bench: how fast a model runs here, from its file or as a synthetic one of its shape."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from vptq_runtime.bench.shapes import find_shape, known_shapes
from vptq_runtime.commands import command
from vptq_runtime.errors import OptionError

if TYPE_CHECKING:
    from vptq_runtime.bench.machine import Cpu, Gpu
    from vptq_runtime.bench.speed import Measured, ModelFacts, SpeedTest

DEFAULT_QUANT = "v8-k65536-256"
DENSE_TYPES = (
    "auto",
    "f16",
    "q8_0",
    "q5_1",
    "q5_0",
    "q4_1",
    "q4_0",
    "vq",
)  # as vptq-convert has them
MAX_BATCH = 128  # sequences; what a call takes on every device
MIN_LAYERS = 2  # to extrapolate from: of the last one a prompt runs only a part
# What is said of a model, what its tests took, and how many layers were measured if not all.
Outcome = tuple["ModelFacts", "Measured", "int | None"]

EPILOG = """\
Prompt (pp512, no logits computed) and decoding (tg128) start from an empty context. Bytes a token are those
that a test has to read at least: the layers' weights once for each batch of tokens, the output matrix (in
decoding), a row of the embedding, and keys and values up to there. They, times tok/s, are the share of the
memory bandwidth, which is measured as what numpy reads with as many threads. On a GPU it is that of large
copies within its memory, bytes read and written, and all that is said of memory is of the GPU's, also where
--gpu-layers leaves other layers to the CPU.

With --engine, eg128x8 is what tg128x8 is, for requests that go through the engine, as all that vptq-run
computes does. ng128 is one request with n-gram drafts, on a text of one token over and over: all drafts are
right, so it is what guesses ahead can bring at most. What it reads a token depends on them, and is not said.

Without logits only q, k and v of the last layer run. So --layers N counts what a prompt runs as N - 1 layers
and the share of a layer's weights that these three have; and what decoding takes without the output matrix,
which is measured apart, in float32, as N - 1 layers and these three's share of the bytes.

  vptq-bench -m model.gguf -p 512 -n 128 -t 1,2
  vptq-bench --synthetic llama-3.1-8b --quant v8-k65536-256 --output-type q8_0
  vptq-bench --synthetic llama-3.1-405b --quant v16-k65536-65536 --layers 2
  vptq-bench --synthetic llama-3.1-8b --device cuda -p 512,2048 -b 1,8
  vptq-bench --fits --embedding-type q8_0 --output-type q8_0

Exit status: 0 done, 1 an error, 2 wrong usage, 130 stopped by Ctrl-C.
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "vptq-bench",
        description="Measure how fast a VPTQ model reads a prompt and decodes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = p.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "-m",
        "--model",
        metavar="MODEL",
        help="a GGUF file, a checkpoint's directory, or owner/model of the Hugging Face hub",
    )
    model.add_argument(
        "--synthetic",
        metavar="SHAPE",
        help=f"no file, but random weights in memory, of the shape of {', '.join(known_shapes())}",
    )
    model.add_argument(
        "--fits", action="store_true", help="measure nothing, but say which of these models fits which device"
    )
    p.add_argument(
        "-p",
        "--n-prompt",
        metavar="N,...",
        type=_numbers,
        default=[512],
        help="0: no such test (default: 512)",
    )
    p.add_argument("-n", "--n-gen", metavar="N", type=int, default=128, help="0: no such test (default: 128)")
    p.add_argument(
        "-b",
        "--batch",
        metavar="N,...",
        type=_numbers,
        default=[1],
        help="sequences decoded together (default: 1)",
    )
    p.add_argument(
        "-t",
        "--threads",
        metavar="N,...",
        type=_numbers,
        help="of the CPU (default: one for each physical core); not for a GPU",
    )
    p.add_argument(
        "--engine",
        action="store_true",
        help="also through the engine: decoding by requests (eg128), and with guesses ahead (ng128)",
    )
    p.add_argument("-r", "--repetitions", metavar="N", type=int, default=3, help="default: %(default)s")
    command.add_backend_options(p)
    synthetic = p.add_argument_group(
        "synthetic models",
        "All but --layers are for --fits, too, which has a configuration for each of 1.5, 2, 3 and 4 bits "
        "unless --quant names one.",
    )
    synthetic.add_argument(
        "--quant", metavar="V-K-R", help=f"as in checkpoints' names (default: {DEFAULT_QUANT})"
    )
    synthetic.add_argument(
        "--layers",
        metavar="N",
        type=int,
        help="measure N layers, at least 2, and extrapolate to all, where the whole does not fit or takes "
        "too long (N such that they do not stay in the caches)",
    )
    for name in ("embedding", "output"):
        synthetic.add_argument(
            f"--{name}-type",
            choices=DENSE_TYPES,
            help=f"of the {name} matrix; vq: as --quant says (default: auto, which is f16)",
        )
    output = p.add_mutually_exclusive_group()
    output.add_argument("--md", action="store_true", help="print Markdown")
    output.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument("--version", action="version", version=f"%(prog)s {command.version()}")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    p = parser()
    arguments = p.parse_args(argv)
    for option in ("quant", "layers", "embedding_type", "output_type"):
        beside = arguments.synthetic is not None or (arguments.fits and option != "layers")
        if not beside and getattr(arguments, option) is not None:
            p.error(f"--{option.replace('_', '-')}: expected --synthetic beside it")
    if arguments.fits and arguments.engine:
        p.error("--engine: found --fits beside it, which measures nothing")
    return command.run("vptq-bench", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    try:
        if arguments.fits:
            _fits(arguments)
        else:
            with command.options_as_typed(command.RUNTIME_OPTIONS, {}):
                _measure(arguments)
    except OptionError as error:  # all options are the command's, and named as they are typed
        raise command.UsageError(str(error)) from None


def _fits(arguments: argparse.Namespace) -> None:
    from vptq_runtime.bench.fits import QUANTS, print_fits
    from vptq_runtime.checks import check_choice
    from vptq_runtime.runtime import KV_TYPES

    check_choice("--kv-type", arguments.kv_type, KV_TYPES)
    print_fits(
        QUANTS if arguments.quant is None else [arguments.quant],
        _dense_type(arguments.embedding_type),
        _dense_type(arguments.output_type),
        arguments.kv_type,
        json_=arguments.json,
        markdown=arguments.md,
    )


def _measure(arguments: argparse.Namespace) -> None:
    from vptq_runtime.bench import machine  # only now: --help and wrong usage should not wait for it

    _check(arguments)
    if arguments.engine and arguments.layers is not None:
        raise OptionError("--engine: found --layers beside it, expected a whole model")
    no_gpu = arguments.device == "auto" and arguments.gpu_layers == 0
    device = machine.find("cpu" if no_gpu else arguments.device)
    tests = _tests(arguments, device)
    run = _run_file if arguments.model is not None else _run_synthetic
    facts, measured, layers_measured = run(arguments, tests, device)
    with _status("memory bandwidth"):
        bandwidth = {n: device.bandwidth(n) for n in dict.fromkeys(test.threads for test in tests)}
    report = {
        "system": device.description(bandwidth) | {"device": measured.device},
        "model": asdict(facts)
        | {
            "synthetic": arguments.model is None,
            "kv_type": arguments.kv_type,
            "precision": arguments.precision,
            "memory_bytes": facts.memory_bytes(_n_cached(tests), device.rest_bytes),
            "layers_measured": layers_measured,  # from which the speeds are extrapolated; null: all there are
        },
        "results": [
            _result(
                test,
                seconds,
                None if test.kind == "ng" else facts.bytes_per_token(test, measured.n_batch),
                bandwidth[test.threads],
            )
            | {"extrapolated": layers_measured is not None}
            for test, seconds in measured.seconds.items()
        ],
        "load_s": measured.load_s,
        "peak_memory_bytes": measured.peak_memory,
    }
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        from vptq_runtime.bench.report import print_report

        print_report(report, markdown=arguments.md)


def _run_file(arguments: argparse.Namespace, tests: list[SpeedTest], device: Cpu | Gpu) -> Outcome:
    from vptq_runtime.bench.speed import ModelFacts, measure, open_model
    from vptq_runtime.models.model import model_file

    model, open_s = open_model(model_file(arguments.model, command.note))
    facts = ModelFacts.of_model(model, Path(arguments.model).absolute().name, arguments.kv_type)
    _check_memory(arguments, facts, tests, device)
    return facts, measure(model, open_s, tests, **_options(arguments, device)), None


def _run_synthetic(arguments: argparse.Namespace, tests: list[SpeedTest], device: Cpu | Gpu) -> Outcome:
    from vptq_runtime import _native
    from vptq_runtime.bench.speed import LAST_FOR_ALL, extrapolated, measure, open_model
    from vptq_runtime.bench.synthetic import Quant, SyntheticModel
    from vptq_runtime.checks import check_int

    shape = find_shape(arguments.synthetic)
    model = SyntheticModel(
        arguments.synthetic,
        shape,
        Quant.parse(DEFAULT_QUANT if arguments.quant is None else arguments.quant),
        embedding_type=_dense_type(arguments.embedding_type),
        output_type=_dense_type(arguments.output_type),
    )
    n_layer = shape.n_layer if arguments.layers is None else arguments.layers
    check_int("--layers", n_layer, MIN_LAYERS, shape.n_layer)
    made, hint = model.facts(n_layer, arguments.kv_type), "--layers N measures N of them"
    _check_memory(arguments, made, tests, device, hint)
    if device.name == "cuda":  # it is uploaded from a file in the host's memory
        made.check_memory(0, _native.available_memory(), memory_name="host memory", hint=hint)

    facts, partial = model.facts(shape.n_layer, arguments.kv_type), n_layer < shape.n_layer
    if partial:
        kinds = {"pp": ("pp",), "tg": ("tg", "layers")}
        tests = [replace(test, kind=kind) for test in tests for kind in kinds[test.kind]]
    with model.file(n_layer) as path:
        measured = measure(*open_model(path), tests, **_options(arguments, device))
    if partial:
        # A prompt's time goes with the weights, decoding's with the bytes: codebooks are read for each token.
        left_out = {
            "pp": 1 - shape.share(LAST_FOR_ALL),
            "layers": shape.n_layer * (1 - facts.prompt_bytes / facts.layers_bytes),
        }
        return facts, extrapolated(measured, n_layer, shape.n_layer, left_out), n_layer
    return facts, measured, None


def _result(
    test: SpeedTest, seconds: list[float], bytes_per_token: float | None, bandwidth: float
) -> dict[str, Any]:
    speeds = [test.n_all / s for s in seconds]
    return {
        "test": test.name,
        "threads": test.threads or None,
        "sequences": test.n_sequences,
        "n_tokens": test.n_all,
        "seconds": seconds,
        "tok_s": fmean(speeds),
        "tok_s_std": stdev(speeds) if len(speeds) > 1 else 0.0,
        "bytes_per_token": bytes_per_token,
        "bandwidth_share": None if bytes_per_token is None else bytes_per_token * fmean(speeds) / bandwidth,
    }


def _check(arguments: argparse.Namespace) -> None:
    from vptq_runtime.checks import check_choice, check_int
    from vptq_runtime.runtime import DEVICES, KV_TYPES, MAX_INT, PRECISIONS

    for n in arguments.n_prompt:
        check_int("--n-prompt", n, 0, MAX_INT)
    check_int("--n-gen", arguments.n_gen, 0, MAX_INT)
    for n in arguments.batch:
        check_int("--batch", n, 1, MAX_BATCH)
    check_int("--repetitions", arguments.repetitions, 1, 1000)
    for n in arguments.threads or ():
        check_int("--threads", n, 1, 1024)
    check_choice("--device", arguments.device, DEVICES)
    if arguments.gpu_layers is not None:
        check_int("--gpu-layers", arguments.gpu_layers, 0, MAX_INT)
    check_choice("--kv-type", arguments.kv_type, KV_TYPES)
    check_choice("--precision", arguments.precision, PRECISIONS)
    if not any(arguments.n_prompt) and not arguments.n_gen:
        raise OptionError("--n-prompt, --n-gen: found 0 for both, expected one test at least")


def _tests(arguments: argparse.Namespace, device: Cpu | Gpu) -> list[SpeedTest]:
    from vptq_runtime import _native
    from vptq_runtime.bench.speed import SpeedTest

    if device.name == "cuda" and arguments.threads:
        raise OptionError("--threads: found a number of the CPU's, expected none on a GPU, or --device cpu")
    threads = (arguments.threads or [_native.physical_cores()]) if device.name == "cpu" else [0]
    tests = []
    for n_threads in dict.fromkeys(threads):
        tests += [SpeedTest("pp", n, n_threads) for n in dict.fromkeys(arguments.n_prompt) if n]
        if arguments.n_gen:
            batches = dict.fromkeys(arguments.batch)
            tests += [SpeedTest("tg", arguments.n_gen, n_threads, n) for n in batches]
            if arguments.engine:
                tests += [SpeedTest("eg", arguments.n_gen, n_threads, n) for n in batches]
                tests.append(SpeedTest("ng", arguments.n_gen, n_threads))
    return tests


def _check_memory(
    arguments: argparse.Namespace,
    facts: ModelFacts,
    tests: list[SpeedTest],
    device: Cpu | Gpu,
    hint: str = "",
) -> None:
    if arguments.gpu_layers is not None and device.name == "cuda":
        return  # the runtime knows how much of it goes there
    facts.check_memory(
        _n_cached(tests),
        device.available_memory(),
        rest=device.rest_bytes,
        memory_name=device.memory_name,
        hint=hint,
    )


def _options(arguments: argparse.Namespace, device: Cpu | Gpu) -> dict[str, Any]:
    return {
        "device": device.name,
        "gpu_layers": -1 if arguments.gpu_layers is None else arguments.gpu_layers,
        "kv_type": arguments.kv_type,
        "precision": arguments.precision,
        "repetitions": arguments.repetitions,
        "peak_memory": device.peak_memory,
        "status": _status,
    }


def _n_cached(tests: list[SpeedTest]) -> int:
    return max(test.n_all for test in tests)


def _dense_type(option: str | None) -> str:
    return "f16" if option in (None, "auto") else str(option)


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r:.80}, expected numbers such as 1,2") from None


@contextmanager
def _status(text: str) -> Iterator[None]:
    """Says on a terminal what takes its time."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


if __name__ == "__main__":
    sys.exit(main())
