"""What vptq-perplexity --multiple-choice prints, for people and as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from vptq_runtime.commands import command
from vptq_runtime.errors import printable
from vptq_runtime.evaluate.multiple_choice import Choices
from vptq_runtime.evaluate.report import estimate, plus_minus
from vptq_runtime.runtime import Runtime

MEASURES = {"acc": False, "acc_norm": True}  # lm-eval's names, and whether scores are normalised


def print_choices(
    runtime: Runtime,
    model: Choices,
    reference: Choices | None,
    arguments: argparse.Namespace,
    seconds: float,
) -> None:
    """Prints a result, and how long it took."""
    if arguments.json:
        report = _report(runtime, model, reference, arguments) | {"seconds": seconds}
        print(json.dumps(report, ensure_ascii=False), flush=True)
        return
    for line in _lines(model, reference, arguments):
        print(line)
    sys.stdout.flush()
    why = f"; {runtime.why_not_cuda}" if runtime.why_not_cuda else ""
    command.note(f"{len(model.items)} items in {seconds:.1f} s | {runtime.device}{why}")


def running(model: Choices) -> str:
    """In a few words."""
    return f"acc_norm {plus_minus(model.accuracy(normalised=True), '.1%')}"


def _lines(model: Choices, reference: Choices | None, arguments: argparse.Namespace) -> Iterator[str]:
    n_items = len(model.items)
    yield f"{printable(arguments.multiple_choice)}: {n_items} item{'s' * (n_items != 1)}"
    name = printable(str(arguments.model))
    yield f"{name}: {_accuracies(model)}"
    if reference is not None:
        yield f"{printable(arguments.compare)}: {_accuracies(reference)}"
        yield f"{name} beside it, on the same items:"
        for measure, normalised in MEASURES.items():
            difference = model.accuracy_difference(reference, normalised=normalised)
            yield f"  {f'{measure}, difference':21}{plus_minus(difference, '.2%')}"
        yield f"  {'same choice':21}{plus_minus(model.agreement(reference, normalised=True), '.2%')}"


def _accuracies(choices: Choices) -> str:
    found = {name: choices.accuracy(normalised=normalised) for name, normalised in MEASURES.items()}
    return ", ".join(f"{name} {plus_minus(each, '.2%')}" for name, each in found.items())


def _report(
    runtime: Runtime, model: Choices, reference: Choices | None, arguments: argparse.Namespace
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "model": str(arguments.model),
        "compare": arguments.compare,
        "items": arguments.multiple_choice,
        "device": runtime.device,
        "kv_type": arguments.kv_type,
        "precision": arguments.precision,
        "n_items": len(model.items),
        **_measures(model),
        "comparison": None,
    }
    if reference is not None:
        report["comparison"] = {
            "reference": _measures(reference),
            **{
                f"{name}_difference": estimate(model.accuracy_difference(reference, normalised=normalised))
                for name, normalised in MEASURES.items()
            },
            "same_choice": estimate(model.agreement(reference, normalised=True)),
        }
    return report


def _measures(choices: Choices) -> dict[str, Any]:
    return {name: estimate(choices.accuracy(normalised=normalised)) for name, normalised in MEASURES.items()}
