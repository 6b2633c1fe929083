"""What vptq-perplexity prints, for people and as JSON."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from typing import Any

from vptq_runtime.commands import command
from vptq_runtime.errors import printable
from vptq_runtime.evaluate.scoring import Comparison, Estimate, Perplexity, Result
from vptq_runtime.runtime import Runtime

QUANTILES = {"median": 0.5, "p99": 0.99, "max": 1.0}  # of the KL divergence


def print_report(runtime: Runtime, result: Result, arguments: argparse.Namespace, seconds: float) -> None:
    """Prints a result, and how long it took."""
    perplexity = _of_model(result)
    n_read = perplexity.n_windows * perplexity.windows.n_ctx
    if arguments.json:
        timings = {"seconds": seconds, "tokens_per_s": n_read / seconds}
        print(json.dumps(_report(runtime, result, arguments) | timings, ensure_ascii=False), flush=True)
        return
    for line in _lines(result, arguments):
        print(line)
    sys.stdout.flush()
    why = f"; {runtime.why_not_cuda}" if runtime.why_not_cuda else ""
    command.note(f"{n_read} tokens in {seconds:.1f} s, {n_read / seconds:.1f} tok/s | {runtime.device}{why}")


def running(result: Result) -> str:
    """In a few words."""
    words = f"perplexity {plus_minus(_of_model(result).perplexity, '.3f')}"
    if isinstance(result, Comparison):
        words += f", KL {result.mean_kl_divergence.value:.3g}"
    return words


def _lines(result: Result, arguments: argparse.Namespace) -> Iterator[str]:
    model, perplexity = printable(str(arguments.model)), _of_model(result)
    yield f"{model}: perplexity {plus_minus(perplexity.perplexity, '.4f')}"
    yield _definition(perplexity)
    if isinstance(result, Comparison):
        yield ""
        theirs = plus_minus(result.reference.perplexity, ".4f")
        yield f"{printable(arguments.compare)}: perplexity {theirs}"
        yield f"{model} beside it, on the same tokens:"
        quantiles = {name: result.kl_quantile(fraction) for name, fraction in QUANTILES.items()}
        for name, value in (
            ("perplexity ratio", plus_minus(result.perplexity_ratio, ".5f")),
            ("KL divergence", f"{plus_minus(result.mean_kl_divergence, '#.4g')} nats a token"),
            *((f"  {name}", f"{value:#.4g}") for name, value in quantiles.items()),
            ("top-token agreement", plus_minus(result.top_token_agreement, ".3%")),
        ):
            yield f"  {name:21}{value}"


def _definition(perplexity: Perplexity) -> str:
    windows = perplexity.windows
    n_windows = f"{perplexity.n_windows} window{'s' * (perplexity.n_windows != 1)} of {windows.n_ctx} tokens"
    if windows.method == "llama.cpp":
        scored = f"the second half of each{'' if windows.bos is None else ', behind BOS,'} scored"
    elif windows.stride < windows.n_ctx:
        scored = f"one every {windows.stride}, what is new in each scored"
    else:
        scored = "all but the first token of each scored"
    error = f" (±: standard error over {windows.error_over})"
    if perplexity.mean_nll.standard_error is None:
        error = ""
    return f"{windows.method}: {n_windows}, {scored}: {len(perplexity.nll)} tokens{error}"


def _report(runtime: Runtime, result: Result, arguments: argparse.Namespace) -> dict[str, Any]:
    perplexity = _of_model(result)
    windows = perplexity.windows
    return {
        "model": str(arguments.model),
        "compare": arguments.compare,
        "texts": arguments.texts,
        "device": runtime.device,
        "kv_type": arguments.kv_type,
        "precision": arguments.precision,
        "method": windows.method,
        "n_ctx": windows.n_ctx,
        "stride": windows.stride,
        "bos": windows.bos,
        "n_tokens": len(windows.tokens),
        "n_windows": perplexity.n_windows,
        "n_scored": len(perplexity.nll),
        "standard_error_over": windows.error_over,
        **_perplexity(perplexity),
        "comparison": _comparison(result) if isinstance(result, Comparison) else None,
    }


def _perplexity(perplexity: Perplexity) -> dict[str, Any]:
    return {"perplexity": estimate(perplexity.perplexity), "mean_nll": estimate(perplexity.mean_nll)}


def _comparison(comparison: Comparison) -> dict[str, Any]:
    return {
        "reference": _perplexity(comparison.reference),
        "perplexity_ratio": estimate(comparison.perplexity_ratio),
        "kl_divergence": estimate(comparison.mean_kl_divergence)
        | {name: comparison.kl_quantile(fraction) for name, fraction in QUANTILES.items()},
        "top_token_agreement": estimate(comparison.top_token_agreement),
    }


def estimate(found: Estimate) -> dict[str, float | None]:
    """For JSON. null: a standard error of one part, and what passes a float, which JSON has not."""
    values = {"value": found.value, "standard_error": found.standard_error}
    return {name: x if x is not None and math.isfinite(x) else None for name, x in values.items()}


def plus_minus(found: Estimate, form: str) -> str:
    """A value and its standard error, if there is one."""
    error = found.standard_error
    return f"{found.value:{form}}" + ("" if error is None else f" ± {error:{form}}")


def _of_model(result: Result) -> Perplexity:
    return result.model if isinstance(result, Comparison) else result
