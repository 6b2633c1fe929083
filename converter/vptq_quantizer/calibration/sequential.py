"""Sequential calibration: a layer's inputs once all before it is quantised, and what that asks of it.

Beside the dense model's hidden states go those of the quantised one. With X the dense and Y the quantised
inputs (in_features, n) of a linear layer of weight W, not |W Y - Q Y| should be small but |W X - Q Y|: errors
of the layers before are so mended by those after. As |W X - Q Y|^2 = tr((W' - Q) H (W' - Q)^T) + const. with

    H = 2 Y Y^T / n      C = 2 X Y^T / n      W' = W C H^-1 = W + W (C - H) H^-1

that is the same problem with another weight (GPTAQ, arXiv 2504.02692, has it as a term of each column's).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vptq_quantizer.calibration.hessians import HESSIAN_OF
from vptq_quantizer.dense_model import BATCH_TOKENS, DenseModel, linears
from vptq_runtime.errors import OptionError

# Linear layers that read the same input, in the order in which a decoder layer computes them.
GROUPS = {of: [name for name in HESSIAN_OF if HESSIAN_OF[name] == of] for of in HESSIAN_OF.values()}


class _Reached(Exception):
    """The linear layer whose inputs are wanted: what comes after it need not be computed."""


@dataclass
class Streams:
    """Hidden states (n_windows, seq_len, n_embd) of both models in front of decoder layer n, and that layer.

    quantised_layer is the dense one at first; its weights are replaced as they are quantised.
    """

    model: DenseModel
    dense: Tensor
    quantised: Tensor
    n: int
    dense_layer: nn.Module
    quantised_layer: nn.Module

    def statistics(self, name: str) -> tuple[Tensor, Tensor]:
        """H and C (in_features, in_features) of the linear layer `name`; see above.

        Raises OptionError where inputs overflow.
        """
        in_features = linears(self.dense_layer)[name].in_features
        hessian, cross = (torch.zeros(in_features, in_features, device=self.model.device) for _ in range(2))
        scale = 2 / (self.dense.shape[0] * self.dense.shape[1])
        inputs = (
            self._inputs(self.dense_layer, self.dense, name),
            self._inputs(self.quantised_layer, self.quantised, name),
        )
        for x, y in zip(*inputs, strict=True):
            hessian.addmm_(y.T, y, alpha=scale)
            cross.addmm_(x.T, y, alpha=scale)
        if not (hessian.isfinite().all() and cross.isfinite().all()):
            raise OptionError(f"decoder layer {self.n}, {name}: found inputs that overflow float32")
        return hessian, cross

    def _inputs(self, layer: nn.Module, hidden: Tensor, name: str) -> Iterator[Tensor]:
        """The inputs (tokens, in_features) of the linear layer `name`, batch by batch."""
        arguments = self.model.arguments(self.n, hidden[:1].to(self.model.device))
        found: list[Tensor] = []

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.append(inputs[0].flatten(0, -2))
            raise _Reached

        for batch in torch.split(hidden, max(1, BATCH_TOKENS // hidden.shape[1])):
            handle = linears(layer)[name].register_forward_pre_hook(hook)
            try:
                with torch.inference_mode():
                    layer(batch.to(self.model.device), **arguments)
            except _Reached:
                yield found.pop()
            finally:
                handle.remove()

    def replace(self, weights: Mapping[str, Tensor]) -> None:
        """Puts quantised weights, by their path in the layer, in the place of the dense ones."""
        modules = linears(self.quantised_layer)
        for name, weight in weights.items():
            modules[name].weight = nn.Parameter(weight.contiguous(), requires_grad=False)

    def advance(self) -> None:
        """Runs the decoder layer over both, in place."""
        self.model.advance(self.n, self.dense_layer, self.dense)
        self.model.advance(self.n, self.quantised_layer, self.quantised)


def target(weight: Tensor, hessian: Tensor, cross: Tensor, relative_damping: float) -> Tensor:
    """W' (out_features, in_features), drawn towards the weight by the damping: the mean diagonal's share that
    is added to H's diagonal. Where H is nothing, or singular all the same, the weight itself."""
    damped = hessian.clone()
    damped.diagonal().add_(relative_damping * hessian.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return weight
    change: Tensor = torch.cholesky_solve((weight @ (cross - hessian)).T, factor).T
    return weight + change
