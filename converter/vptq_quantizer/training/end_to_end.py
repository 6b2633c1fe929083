"""End-to-end fine-tuning: centroids and norms of the whole model, trained to give the dense model's logits.

The loss is the KL divergence of the quantised model's next-token distribution from the dense one's, on
windows drawn from the first 95 % of the calibration text; what came of it is measured on the rest. Indices
stay as they are. Both models are in memory, in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vptq_quantizer.calibration.text import Calibration
from vptq_quantizer.dense_model import DenseModel
from vptq_quantizer.layers.quantized_linear import QuantizedLinear
from vptq_quantizer.options import QuantizeOptions
from vptq_quantizer.planning.plan import Plan
from vptq_quantizer.run.checkpoint_writer import Part
from vptq_runtime.commands.progress import RunProgress

BATCH_TOKENS = 4096  # of one step
LEARNING_RATE = 3e-3  # times a parameter's root mean square: how far Adam moves it in a step
WARM_UP = 0.05  # share of the steps in which the rate rises; then it falls linearly to zero
MEASURED_BATCHES = 4  # the loss is reported on at most so many that are not trained on


class _VPTQLinear(nn.Module):
    """A quantised linear layer with its centroids and norms as parameters."""

    def __init__(self, layer: QuantizedLinear, bias: Tensor | None) -> None:
        super().__init__()
        self.layer = layer
        self.names = list(layer.parameters_by_name())
        self.values = nn.ParameterList(nn.Parameter(value) for value in layer.parameters_by_name().values())
        self.bias = bias

    def quantized(self) -> QuantizedLinear:
        return self.layer.with_parameters(dict(zip(self.names, self.values, strict=True)))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.quantized().weight(), self.bias)


def tune(
    dense: DenseModel,
    plan: Plan,
    parts: Mapping[int, Part],
    options: QuantizeOptions,
    dtype: torch.dtype,
    text: Calibration,
    progress: RunProgress,
) -> tuple[dict[int, dict[str, Tensor]], dict[str, Any]]:
    """Trains for options.end_to_end steps, from the parts (by decoder layer) on.

    Returns the tensors of each decoder layer by full name, and under the key n_layers the final norm; and
    what to report: "kl_divergence", before and after, in the numbers that are stored, on text that was not
    trained on; and "kept": where the training did not lower it, everything is as it was before.
    """
    progress.show("end to end")
    teacher = dense.whole()
    # Norms are copied, as they are trained; all else is the teacher's own, or soon replaced.
    shared = {id(p): p for name, p in teacher.named_parameters() if not name.endswith("norm.weight")}
    student = copy.deepcopy(teacher, shared)
    linears = _put_in(student, plan, parts, dense.device)
    norms = {name: p for name, p in student.named_parameters() if name.endswith("norm.weight")}
    for norm in norms.values():
        norm.requires_grad_(True)
        norm.data = norm.data.to(dtype).float()

    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p], "lr": LEARNING_RATE * p.detach().square().mean().sqrt().item()} for p in trained
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    n_steps = options.end_to_end
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (WARM_UP * n_steps + 1), 1 - step / n_steps)
    )
    n_windows = max(1, BATCH_TOKENS // text.windows.shape[1])

    held_out = torch.split(torch.from_numpy(text.held_out(MEASURED_BATCHES * n_windows)), n_windows)

    @torch.no_grad()
    def measured() -> float:
        total = sum(_divergence(teacher, student, batch).item() * len(batch) for batch in held_out)
        return total / sum(map(len, held_out))

    start, before = [p.detach().clone() for p in trained], measured()
    for step in range(n_steps):
        tokens = torch.from_numpy(text.batch(step, n_windows, options.seed))
        value = _divergence(teacher, student, tokens)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.advance(f"end to end: step {step + 1}, KL divergence {value.item():.4f}", 1)
    with torch.no_grad():
        for p in trained:
            p.copy_(p.to(dtype))
        after = measured()
        kept = after < before and all(bool(p.isfinite().all()) for p in trained)
        if not kept:
            after = before
            for p, value in zip(trained, start, strict=True):
                p.copy_(value)
        tuned = {n: dict(part.tensors) for n, part in parts.items()} | {dense.n_layers: {}}
        for module, vptq in linears.items():
            fields = vptq.quantized().tensors(dtype)
            tuned[_layer(module, dense)] |= {f"{module}.{name}": t.detach() for name, t in fields.items()}
        for name, norm in norms.items():
            tuned[_layer(name, dense)][name] = norm.detach().to(dtype)
        return tuned, {"steps": n_steps, "kl_divergence": [before, after], "kept": kept}


def _put_in(
    student: nn.Module, plan: Plan, parts: Mapping[int, Part], device: torch.device
) -> dict[str, _VPTQLinear]:
    """Puts the quantised linear layers in the place of the dense ones; returns them by full name."""
    linears: dict[str, _VPTQLinear] = {}
    for n, part in parts.items():
        for name, config in plan.layer(n).items():
            module = f"model.layers.{n}.{name}"
            fields = {
                key.removeprefix(f"{module}."): t for key, t in part.tensors.items() if key.startswith(module)
            }
            layer = QuantizedLinear.from_tensors(config, fields).to(device)
            parent, _, last = module.rpartition(".")
            linears[module] = _VPTQLinear(layer, student.get_submodule(module).bias)  # type: ignore[arg-type]
            setattr(student.get_submodule(parent), last, linears[module])
    return linears


def _divergence(teacher: nn.Module, student: nn.Module, tokens: Tensor) -> Tensor:
    """KL(teacher || student) of the token after each of tokens (n_windows, seq_len), in nats: the mean."""
    tokens = tokens.to(next(teacher.parameters()).device)
    with torch.no_grad():
        expected = teacher(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
    logits = student(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
    return functional.kl_div(logits, expected, log_target=True, reduction="sum") / tokens.numel()


def _layer(name: str, dense: DenseModel) -> int:
    """The decoder layer that a tensor or module belongs to, n_layers for one outside of them."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else dense.n_layers
