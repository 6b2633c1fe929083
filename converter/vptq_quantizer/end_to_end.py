"""End-to-end fine-tuning: centroids and norms of the whole model, trained to give the dense model's logits.

The loss is the KL divergence of the quantised model's next-token distribution from the dense one's, on
windows drawn from the calibration text. Indices stay as they are. Both models are in memory, in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vptq_converter.layer import LayerConfig

from vptq_quantizer.calibration import Calibration
from vptq_quantizer.checkpoint_writer import Part
from vptq_quantizer.dense_model import DenseModel
from vptq_quantizer.options import QuantizeOptions
from vptq_quantizer.quantized_linear import QuantizedLinear

BATCH_TOKENS = 4096  # of one step
LEARNING_RATE = 3e-3  # times a parameter's root mean square: how far Adam moves it in a step
WARM_UP = 0.05  # share of the steps in which the rate rises; then it falls linearly to zero
MEASURED_BATCHES = 4  # the loss is reported on so many others, which may overlap


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
    configs: Mapping[str, LayerConfig],
    parts: Mapping[int, Part],
    options: QuantizeOptions,
    dtype: torch.dtype,
    text: Calibration,
    show: Callable[[str, float], object],
) -> tuple[dict[int, dict[str, Tensor]], dict[str, Any]]:
    """Trains for options.end_to_end steps, from the parts (by decoder layer) on.

    Returns the tensors of each decoder layer by full name, and under the key n_layers the final norm; and
    what to report: the loss before and after, on text that was not trained on but is of the calibration
    files.
    """
    teacher = dense.whole()
    student = copy.deepcopy(teacher)
    linears: dict[str, _VPTQLinear] = {}
    for n, part in parts.items():
        for name, config in configs.items():
            module = f"model.layers.{n}.{name}"
            fields = {
                key.removeprefix(f"{module}."): t for key, t in part.tensors.items() if key.startswith(module)
            }
            layer = QuantizedLinear.from_tensors(config, fields).to(dense.device)
            parent, _, last = module.rpartition(".")
            linears[module] = _VPTQLinear(layer, student.get_submodule(module).bias)  # type: ignore[arg-type]
            setattr(student.get_submodule(parent), last, linears[module])
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

    def loss(step: int) -> Tensor:
        tokens = torch.from_numpy(text.batch(step, n_windows, options.seed)).to(dense.device)
        with torch.no_grad():
            expected = teacher(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
        logits = student(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
        return functional.kl_div(logits, expected, log_target=True, reduction="sum") / tokens.numel()

    @torch.no_grad()
    def measured() -> float:
        return sum(loss(n_steps + n).item() for n in range(MEASURED_BATCHES)) / MEASURED_BATCHES

    before = measured()
    for step in range(n_steps):
        value = loss(step)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        show(f"end to end: KL divergence {value.item():.4f}", 1)
    with torch.no_grad():
        tuned = {n: dict(part.tensors) for n, part in parts.items()} | {dense.n_layers: {}}
        for module, vptq in linears.items():
            fields = vptq.quantized().tensors(dtype)
            tuned[_layer(module, dense)] |= {f"{module}.{name}": t.detach() for name, t in fields.items()}
        for name, norm in norms.items():
            tuned[_layer(name, dense)][name] = norm.detach().to(dtype)
        return tuned, {"steps": n_steps, "kl_divergence": [before, measured()]}


def _layer(name: str, dense: DenseModel) -> int:
    """The decoder layer that a tensor or module belongs to, n_layers for one outside of them."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else dense.n_layers
