"""End-to-end training: codebooks, norms and indices of the whole model, towards the dense model's logits.

The loss is the KL divergence of the quantised model's next-token distribution from the dense one's, on
windows drawn from the first 95 % of the calibration text; what came of it is measured on the rest.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vptq_quantizer.calibration.text import Calibration
from vptq_quantizer.dense_model import DenseModel
from vptq_quantizer.options import QuantizeOptions
from vptq_quantizer.planning.plan import Plan
from vptq_quantizer.run.checkpoint_writer import Part
from vptq_quantizer.training.divergence import divergence, divergence_gradient
from vptq_quantizer.training.index_updates import Offsets, update_indices
from vptq_quantizer.training.precision import HeldLinear, compute_dtype, computing_in
from vptq_quantizer.training.student import Student
from vptq_runtime.commands.progress import RunProgress

BATCH_TOKENS = 2048  # of one step
MICRO_TOKENS = 1024  # of these go through the model at a time: bounds the memory of activations
MEASURED_TOKENS = 8192  # the loss is reported on at most so many that are not trained on
SAVE_S = 45.0  # of work between two states on disk, at least
# How far a step moves things, in units of a layer's spacing (index_updates.py): with more bits a weight it is
# smaller, and so is what there is to mend.
LEARNING_RATE = 1e-2  # of Adam: codebooks, and in proportion to their own size all others
OFFSET_RATE = 4e-2  # of the offsets that choose indices
INDEX_STEPS = 2  # from one choice of indices to the next
WARM_UP = 0.05  # share of the steps in which the rates rise; then they fall linearly to zero


class States(Protocol):
    """Where a training's state is kept, so that one that was stopped goes on (CheckpointWriter)."""

    def read_training(self) -> Part | None: ...

    def write_training(self, part: Part) -> None: ...


def tune(
    dense: DenseModel,
    plan: Plan,
    parts: Mapping[int, Part],
    options: QuantizeOptions,
    dtype: torch.dtype,
    text: Calibration,
    states: States,
    progress: RunProgress,
) -> tuple[dict[int, dict[str, Tensor]], dict[str, Any]]:
    """Trains for options.end_to_end steps, from the parts (by decoder layer) or from the state on disk on.

    Returns the tensors of each decoder layer by full name, and under the key n_layers the final norm; and
    what to report: "kl_divergence", before and after, in the numbers that are stored, on text that was not
    trained on; "changed_indices", how often a vector took another centroid; and "kept": where the training
    did not lower the divergence, everything is as it was before.
    """
    progress.show("end to end")
    training = _Training(dense, plan, parts, options, dtype, text)
    state = states.read_training()
    if state is None:
        training.before = training.measure()
    else:
        training.load(state)
        progress.advance(f"end to end: {training.step} steps were there", training.step)
    saved_at = time.monotonic()
    while training.step < options.end_to_end:
        value = training.advance()
        progress.advance(f"end to end: step {training.step}, KL divergence {value:.4f}", 1)
        if time.monotonic() - saved_at >= SAVE_S and training.step < options.end_to_end:
            progress.show("end to end: saving")
            states.write_training(training.state())
            saved_at = time.monotonic()
    return training.result(parts)


class _Training:
    """Both models, and all that changes from step to step."""

    def __init__(
        self,
        dense: DenseModel,
        plan: Plan,
        parts: Mapping[int, Part],
        options: QuantizeOptions,
        dtype: torch.dtype,
        text: Calibration,
    ) -> None:
        self.dense, self.options, self.dtype, self.text = dense, options, dtype, text
        self.compute = compute_dtype(dense.device)
        self.teacher = dense.whole()
        self.student = Student(self.teacher, plan, parts, dtype)
        for module in self.student.linears:
            parent, _, last = module.rpartition(".")
            linear = self.teacher.get_submodule(module)
            assert isinstance(linear, nn.Linear)
            setattr(self.teacher.get_submodule(parent), last, HeldLinear(linear, dtype))
        self.output: Tensor = self.teacher.get_output_embeddings().weight.to(self.compute)  # type: ignore[operator]
        self.offsets = {name: Offsets.none(layer) for name, layer in self.student.layers.items()}
        groups = [{"params": [p], "rate": rate} for p, rate in self._rates()]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        self.step, self.before, self.changed = 0, 0.0, 0

    def _rates(self) -> Iterator[tuple[Tensor, float]]:
        """How far Adam moves each parameter in a step at the full rate."""
        finest = {}
        for module, layer in self.student.layers.items():
            unit = self.offsets[module].unit.item()
            finest[module] = unit / _root_mean_square(layer.columns())
            for name, p in layer.parameters_by_name().items():
                size = unit if name.endswith("centroids") else finest[module] * _root_mean_square(p)
                yield p, LEARNING_RATE * size
        mean = sum(finest.values()) / len(finest)
        for name, p in self.student.parameters.items():
            if name.endswith("norm.weight"):
                yield p, LEARNING_RATE * mean * _root_mean_square(p)

    def advance(self) -> float:
        """One step; returns the mean divergence of its tokens, before it."""
        n_steps = self.options.end_to_end
        schedule = min((self.step + 1) / (WARM_UP * n_steps + 1), 1 - self.step / n_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = schedule * group["rate"]
        self.student.decode(self.compute)
        n_windows = max(1, BATCH_TOKENS // self.text.windows.shape[1])
        tokens = torch.from_numpy(self.text.batch(self.step, n_windows, self.options.seed))
        n_together = max(1, MICRO_TOKENS // tokens.shape[1])
        total = sum(self._backward(part, tokens.numel()) for part in torch.split(tokens, n_together))
        for module, gradient in self.student.gradients():
            self.offsets[module].descend(gradient, self.step, schedule * OFFSET_RATE)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.step % INDEX_STEPS == 0:
            for module, layer in self.student.layers.items():
                self.changed += update_indices(layer, self.offsets[module])
        return total / tokens.numel()

    def _backward(self, tokens: Tensor, n_step: int) -> float:
        """Adds to all gradients those of tokens (n_windows, seq_len); returns their divergences' sum.

        n_step: tokens of the whole step.
        """
        tokens = tokens.to(self.dense.device)
        with computing_in(self.compute, self.dense.device):
            with torch.no_grad():
                expected = _hidden(self.teacher, tokens)
            found = _hidden(self.student.model, tokens)
        total, gradient = divergence_gradient((expected, self.output), (found.detach(), self.output))
        found.backward(gradient / n_step)  # type: ignore[no-untyped-call]
        return total.item()

    @torch.no_grad()
    def measure(self) -> float:
        """The divergence on text that is not trained on, computed in float32."""
        self.student.decode(torch.float32)
        output: Tensor = self.teacher.get_output_embeddings().weight  # type: ignore[operator]
        windows = self.text.held_out(max(1, MEASURED_TOKENS // self.text.windows.shape[1]))
        total = 0.0
        for window in torch.from_numpy(windows).to(self.dense.device):
            expected, found = (_hidden(model, window[None]) for model in (self.teacher, self.student.model))
            total += divergence((expected, output), (found, output)).item()
        return total / windows.size

    def state(self) -> Part:
        """All that the steps to come depend on."""
        tensors = self.student.tensors(torch.float32)
        for name, p in self.student.parameters.items():
            moments = self.optimizer.state[p]
            tensors |= {f"adam.{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
        for module, offsets in self.offsets.items():
            tensors |= {f"offsets.{name}.{module}": t for name, t in offsets.tensors().items()}
        report = {"step": self.step, "before": self.before, "changed": self.changed}
        return Part(tensors, report)

    def load(self, state: Part) -> None:
        """Goes on from `state`, of a training with the same options."""
        self.step, self.before = state.report["step"], state.report["before"]
        self.changed = state.report["changed"]
        self.student.load(state.tensors)
        for name, p in self.student.parameters.items():
            moments = {key: state.tensors[f"adam.{key}.{name}"].to(p) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {"step": torch.tensor(float(self.step)), **moments}
        for module, offsets in self.offsets.items():
            for name, tensor in offsets.tensors().items():
                tensor.copy_(state.tensors[f"offsets.{name}.{module}"])

    @torch.no_grad()
    def result(self, parts: Mapping[int, Part]) -> tuple[dict[int, dict[str, Tensor]], dict[str, Any]]:
        """What `tune` returns, of the numbers that are stored."""
        for p in self.student.parameters.values():
            p.copy_(p.to(self.dtype))
        after = self.measure()
        finite = all(bool(p.isfinite().all()) for p in self.student.parameters.values())
        kept = after < self.before and finite
        tuned = {n: dict(part.tensors) for n, part in parts.items()} | {self.dense.n_layers: {}}
        norm = "model.norm.weight"
        tuned[self.dense.n_layers][norm] = self.teacher.get_parameter(norm).to(self.dtype)
        if kept:
            for name, tensor in self.student.tensors(self.dtype).items():
                tuned[_layer(name, self.dense)][name] = tensor
        return tuned, {
            "steps": self.step,
            "kl_divergence": [self.before, after if kept else self.before],
            "changed_indices": self.changed if kept else 0,
            "kept": kept,
        }


def _hidden(model: nn.Module, tokens: Tensor) -> Tensor:
    """The last hidden states (n_tokens, n_embd) of tokens (n_windows, seq_len), after the final norm."""
    hidden: Tensor = model.model(input_ids=tokens, use_cache=False).last_hidden_state  # type: ignore[operator]
    return hidden.flatten(0, 1).float()


def _root_mean_square(values: Tensor) -> float:
    return values.detach().square().mean().sqrt().item()


def _layer(name: str, dense: DenseModel) -> int:
    """The decoder layer that a tensor belongs to, n_layers for one outside of them."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else dense.n_layers
