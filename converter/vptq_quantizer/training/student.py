"""The quantised model as one that can be trained: its weights, and their gradients' way to what is stored."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from vptq_quantizer.layers.quantized_linear import QuantizedLinear
from vptq_quantizer.planning.plan import Plan
from vptq_quantizer.run.checkpoint_writer import Part
from vptq_quantizer.training.decode import column_gradient, parameter_gradients


class Student:
    """A copy of the dense model with quantised linear layers; what is not trained is the dense model's own.

    A layer's weight is decoded once a step, into a plain linear layer, and what its gradient means for
    codebooks and norms is worked out once a step. parameters: all that is trained, by full name, in float32.
    """

    def __init__(
        self,
        dense: nn.Module,
        plan: Plan,
        parts: Mapping[int, Part],
        dtype: torch.dtype,
    ) -> None:
        """dense: as HeldLinear has it or not. dtype: of the checkpoint that the parts are of."""
        others = {id(p): p for name, p in dense.named_parameters() if not name.endswith("norm.weight")}
        self.model = copy.deepcopy(dense, others)
        device = next(dense.parameters()).device
        self.layers: dict[str, QuantizedLinear] = {}
        self.linears: dict[str, nn.Linear] = {}
        self.parameters: dict[str, Tensor] = {}
        for n, part in parts.items():
            for name, config in plan.layer(n).items():
                module = f"model.layers.{n}.{name}"
                begin = f"{module}."
                fields = {k.removeprefix(begin): t for k, t in part.tensors.items() if k.startswith(begin)}
                self._put_in(module, QuantizedLinear.from_tensors(config, fields).to(device))
        for name, norm in self.model.named_parameters():
            if name.endswith("norm.weight"):
                norm.data = norm.data.to(dtype).float()
                self.parameters[name] = norm.requires_grad_(True)

    def _put_in(self, module: str, layer: QuantizedLinear) -> None:
        parent, _, last = module.rpartition(".")
        bias = self.model.get_submodule(module).bias
        out_features, in_features = layer.config.out_features, layer.config.in_features
        linear = nn.Linear(in_features, out_features, bias=False, device="meta")
        linear.bias = bias  # type: ignore[assignment]
        setattr(self.model.get_submodule(parent), last, linear)
        self.linears[module] = linear
        self.layers[module] = layer
        self.parameters |= {f"{module}.{name}": p for name, p in layer.parameters_by_name().items()}

    @torch.no_grad()
    def decode(self, dtype: torch.dtype) -> None:
        """Puts what the layers stand for now into the model, in that type."""
        for module, layer in self.layers.items():
            self.linears[module].weight = nn.Parameter(layer.weight().to(dtype).contiguous())

    @torch.no_grad()
    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Brings the weights' gradients to the parameters; yields each module's name and column_gradient.

        What is yielded may be used until the next; the weights' own gradients are gone then.
        """
        for module, layer in self.layers.items():
            gradient = self.linears[module].weight.grad
            assert gradient is not None
            columns = column_gradient(layer, gradient)
            for name, value in parameter_gradients(layer, gradient, columns).items():
                self.parameters[f"{module}.{name}"].grad = value
            self.linears[module].weight.grad = None
            yield module, columns

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The checkpoint's tensors of all that is trained, by full name."""
        found = {
            f"{module}.{name}": tensor.detach()
            for module, layer in self.layers.items()
            for name, tensor in layer.tensors(dtype).items()
        }
        norms = {n: p.detach().to(dtype) for n, p in self.parameters.items() if n.endswith("norm.weight")}
        return found | norms

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the values over that `tensors` of a student of the same model gave (in place)."""
        for module, layer in self.layers.items():
            begin = f"{module}."
            fields = {k.removeprefix(begin): t for k, t in tensors.items() if k.startswith(begin)}
            other = QuantizedLinear.from_tensors(layer.config, fields)
            for own, new in zip(layer.segments, other.segments, strict=True):
                own.index.copy_(new.index)
                if own.res_index is not None and new.res_index is not None:
                    own.res_index.copy_(new.res_index)
            for name, value in other.parameters_by_name().items():
                self.parameters[begin + name].copy_(value)
        for name, p in self.parameters.items():
            if name.endswith("norm.weight"):
                p.copy_(tensors[name])
