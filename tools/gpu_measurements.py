"""The parts of tools/check_gpu.py that measure: the machine, whole models, single layers."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from gpu_child import ChildError, in_child
from gpu_plans import PREFILL_AT_LEAST, Model, Plan
from gpu_report import Row
from matrix_rate import matrix_seconds
from random_layer import layer_bytes, raw_tensors, rotating_layers

from vptq_runtime import _native
from vptq_runtime.bench import cli as bench_command
from vptq_runtime.bench import machine as machine_module
from vptq_runtime.bench.shapes import SHAPES, Shape
from vptq_runtime.bench.speed import LAST_FOR_ALL
from vptq_runtime.bench.synthetic import Quant

SMI_FIELDS = ("driver_version", "compute_cap", "clocks.max.sm", "clocks.max.memory", "power.limit")
Found = tuple[dict[str, Any], list[Row]]


def machine(plan: Plan, out: Path, allowed: float, report: dict[str, Any]) -> Found:
    end = time.monotonic() + allowed
    found = in_child(allowed, _gpu) | {"nvidia_smi": _nvidia_smi()}
    rows = [
        Row("machine", "GPU", f"{found['device']}; {found['nvidia_smi']}"),
        Row("machine", "host", f"{found['cpu']}, cores: {found['cores']}"),
        Row(
            "machine", "memory", f"{_gib(found['memory_bytes'])}, {_gib(found['available_bytes'])} available"
        ),
        Row("machine", "copy bandwidth", f"{found['copy_bandwidth'] / 1e9:.0f} GB/s"),
    ]
    for row in rows:
        print(f"{row.what}: {row.found}", flush=True)
    try:
        found["matrices"] = in_child(end - time.monotonic(), _matrices, plan)
    except ChildError as error:
        rows.append(Row("machine", "matrix products", f"left out: {error}"))
        print(f"matrix products: {rows[-1].found}", flush=True)
        return found, rows
    for name, by_tokens in found["matrices"].items():
        weights = sum(map(prod, plan.shape(name).linears.values()))
        for n_tokens, rate in by_tokens.items():
            for dtype, seconds in rate["seconds"].items():
                tflop_s = 2 * int(n_tokens) * weights / sum(seconds) / 1e12
                what = f"{dtype} matrices of {name}, {n_tokens} tokens"
                rows.append(Row("machine", what, f"{tflop_s:.0f} TFLOP/s ({rate['library']})"))
                print(f"{what}: {rows[-1].found}", flush=True)
    return found, rows


def _matrices(plan: Plan) -> dict[str, Any]:
    """Of each shape and length of prompt: what the GPU's library takes for a layer's matrices."""
    sizes = {model.name: list(plan.shape(model.name).linears.values()) for model in plan.models}
    return {name: {str(n): matrix_seconds(each, n) for n in plan.prompts} for name, each in sizes.items()}


def _gpu() -> dict[str, Any]:
    gpu = machine_module.Gpu()
    return gpu.description({0: gpu.bandwidth(0)}) | {"device": _native.Gpu().description}


def _nvidia_smi() -> str:
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi is not on the PATH"
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    values = done.stdout.strip().split("\n")[0].split(", ")
    return ", ".join(f"{name} {value}" for name, value in zip(SMI_FIELDS, values, strict=False))


def bench(plan: Plan, out: Path, allowed: float, report: dict[str, Any]) -> Found:
    return _measure(plan.models, plan, allowed, report)


def large(plan: Plan, out: Path, allowed: float, report: dict[str, Any]) -> Found:
    return _measure(plan.large, plan, allowed, report)


def _measure(models: Sequence[Model], plan: Plan, allowed: float, report: dict[str, Any]) -> Found:
    end = time.monotonic() + allowed
    found: dict[str, Any] = {"models": []}
    rows: list[Row] = []
    matrices = report.get("machine", {}).get("matrices", {})
    for model in models:
        what = model.title
        begin = time.monotonic()
        made = []
        try:
            measured = in_child(end - begin, _bench, model, plan)
        except ChildError as error:
            found["failure"] = f"{what}: {error}"
            made.append(Row("bench", what, str(error), failed=True))
        else:
            found["models"].append(measured)
            made += _bench_rows(model, plan.shape(model.name), measured, matrices.get(model.name, {}))
        for row in made:
            print(f"{row.what}: {row.found} {row.verdict()}", flush=True)
        print(f"  took {time.monotonic() - begin:.0f} s", flush=True)
        rows += made
    return found, rows


def _bench(model: Model, plan: Plan) -> dict[str, Any]:
    SHAPES[model.name] = plan.shape(model.name)
    os.environ["VPTQ_CUDA_KERNEL"] = model.kernel
    if (host_memory := plan.host_memory) is not None:
        _native.available_memory = lambda: host_memory
    options = ["--synthetic", model.name, "--quant", model.quant, "--device", "cuda", "--json"]
    options += ["--embedding-type", "q8_0", "--output-type", "q8_0", "-n", str(plan.n_gen)]
    options += ["-p", ",".join(map(str, plan.prompts)), "-b", ",".join(map(str, model.batches))]
    if model.layers is not None:
        options += ["--layers", str(model.layers)]
    printed, complaint = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint):
        status = bench_command.main(options)
    if status != 0:
        raise RuntimeError(complaint.getvalue() or f"vptq-bench ended with status {status}")
    return json.loads(printed.getvalue())  # type: ignore[no-any-return]


def _bench_rows(model: Model, shape: Shape, measured: dict[str, Any], matrices: dict[str, Any]) -> list[Row]:
    rows = []
    for result in measured["results"]:
        what = f"{model.title} {result['test']}"
        speed = f"{result['tok_s']:.1f} tok/s" + (" (extrapolated)" if result["extrapolated"] else "")
        if result["test"].startswith("pp"):
            rows.append(_prompt_row(what, speed, result, shape, matrices))
        elif result["sequences"] > 1:
            rows.append(Row("bench", what, speed, share=result["bandwidth_share"]))
        else:
            number = result["tok_s"] if model.in_tok_s else None
            share = result["bandwidth_share"]
            rows.append(Row("bench", what, speed, share, model.at_least, model.aim, number))
    memory = (
        f"{_gib(measured['model']['model_bytes'])} in the file, {_gib(measured['peak_memory_bytes'])} taken"
    )
    load = f"{memory}, loaded in {measured['load_s']:.1f} s"
    return [*rows, Row("bench", f"{model.title} memory", load)]


def _prompt_row(what: str, speed: str, result: dict[str, Any], shape: Shape, matrices: dict[str, Any]) -> Row:
    """share: of the speed that the GPU's own library has in the same products, at its best type."""
    weights = sum(map(prod, shape.linears.values()))
    part = shape.share(LAST_FOR_ALL)  # of the last layer, what a prompt runs
    n_layer = shape.n_layer - 1 + part
    rate = 2 * n_layer * weights * result["tok_s"]
    found = f"{speed}, {rate / 1e12:.1f} TFLOP/s"
    library = matrices.get(str(result["n_tokens"]))
    if library is None:
        return Row("bench", what, found)
    seconds = min(sum(each) for each in library["seconds"].values())
    return Row("bench", what, found, n_layer * seconds / median(result["seconds"]), PREFILL_AT_LEAST)


def kernels(plan: Plan, out: Path, allowed: float, report: dict[str, Any]) -> Found:
    end = time.monotonic() + allowed
    found: dict[str, Any] = {"layers": []}
    rows: list[Row] = []
    for quant, kernel in ((quant, kernel) for quant in plan.quants for kernel in plan.kernels):
        title = quant + (f" ({kernel})" if kernel else "")
        try:
            layers = in_child(end - time.monotonic(), _kernels, quant, kernel, plan)
        except ChildError as error:
            found["failure"] = f"{title}: {error}"
            rows.append(Row("kernels", title, str(error), failed=True))
            continue
        found["layers"] += layers
        for layer in layers:
            what = f"{title} {layer['out_features']} x {layer['in_features']}"
            times = [f"{n} token{'s' * (n != '1')} {s * 1e6:.1f} us" for n, s in layer["seconds"].items()]
            figure = ", ".join([*times, f"{layer['prompt_flop_s'] / 1e12:.1f} TFLOP/s in prompts"])
            rows.append(Row("kernels", what, figure, share=layer["share"]))
            print(f"{what}: {figure}; {layer['share']:.1%} of the bandwidth", flush=True)
    return found, rows


def _kernels(quant: str, kernel: str, plan: Plan) -> list[dict[str, Any]]:
    os.environ["VPTQ_CUDA_KERNEL"] = kernel
    bandwidth = _native.Gpu().copy_bandwidth()
    rng = np.random.default_rng(0)
    layers = []
    for out_features, in_features in plan.sizes:
        arrays = rotating_layers(Quant.parse(quant), out_features, in_features, plan.rotating_bytes)
        raw = [raw_tensors(each) for each in arrays]
        seconds = {}
        for n, n_prompt in ((1, 0), (8, 0), (plan.prompt_tokens, plan.prompt_tokens)):
            x = rng.standard_normal((n, in_features), np.float32)
            operations = _native.Operations("cuda", 1)  # a GPU's has time for one list of layers
            seconds[n] = median(operations.time_linear(raw, out_features, x, 11, n_prompt))
        n_bytes = layer_bytes(arrays[0]) + 4 * (in_features + out_features)
        n_flop = 2 * plan.prompt_tokens * in_features * out_features
        layers.append(
            {
                "quant": quant,
                "kernel": kernel,
                "out_features": out_features,
                "in_features": in_features,
                "layers": len(raw),
                "bytes": n_bytes,  # that one token needs
                "copy_bandwidth": bandwidth,
                "seconds": {str(n): s for n, s in seconds.items()},
                "share": n_bytes / bandwidth / seconds[1],
                "prompt_flop_s": n_flop / seconds[plan.prompt_tokens],
            }
        )
    return layers


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"
