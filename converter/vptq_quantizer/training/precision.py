"""What the training computes in: bfloat16 where the processor multiplies it faster, else float32.

Weights are held in 16 bits, and what runs through the layers, norms and sums is float32 in any case.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional


def compute_dtype(device: torch.device) -> torch.dtype:
    """The type of matrix products: a GPU has bfloat16, a processor where it has instructions for it."""
    if device.type == "cuda":
        return torch.bfloat16
    has = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(has.get(name) for name in ("avx512_bf16", "amx_bf16")) else torch.float32


def computing_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Matrix products of the model's own code in that type."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


class HeldLinear(nn.Module):
    """A dense linear layer whose weight (out_features, in_features) stays in 16 bits until it is used."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.to(dtype), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        # Autocast would cast, too, but keep all copies to the end of the forward pass.
        if torch.is_autocast_enabled(x.device.type):
            return functional.linear(x.bfloat16(), weight.bfloat16(), self.bias)
        return functional.linear(x, weight.to(x.dtype), self.bias)
