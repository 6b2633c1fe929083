"""H = 2 X X^T of every linear layer's inputs, from calibration text; kept on disk where asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from vptq_converter.checkpoint import Checkpoint

from vptq_quantizer.dense_model import DenseModel, linears
from vptq_quantizer.run.safe_files import REMEDY, opened, write_tensors
from vptq_runtime.errors import FileError, OptionError

# Linear layers that read the same input share a Hessian, which has the first one's name.
HESSIAN_OF = {
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.gate_proj",
    "mlp.down_proj": "mlp.down_proj",
}
SAMPLED_BYTES = 1 << 15  # of each tensor's start go into a model's key: enough to tell two models apart


def collect(dense: DenseModel, n: int, layer: nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    """Runs decoder layer n over hidden states (in place) and returns its Hessians by HESSIAN_OF's names.

    A Hessian is (in_features, in_features): 2 X X^T / n_tokens of the inputs X (in_features, n_tokens).
    Raises OptionError where inputs overflow.
    """
    modules = linears(layer)
    sums = {
        name: torch.zeros(modules[name].in_features, modules[name].in_features, device=dense.device)
        for name in dict.fromkeys(HESSIAN_OF.values())
    }

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)  # (tokens, in_features)
            sums[name].addmm_(x.T, x, alpha=2)

        return hook

    hooks = [modules[name].register_forward_pre_hook(watch(name)) for name in sums]
    dense.advance(n, layer, hidden)
    for handle in hooks:
        handle.remove()
    n_tokens = hidden.shape[0] * hidden.shape[1]
    for name, total in sums.items():
        if not total.isfinite().all():
            raise OptionError(f"decoder layer {n}, {name}: found inputs that overflow float32")
    return {name: total.div_(n_tokens) for name, total in sums.items()}


def model_key(checkpoint: Checkpoint) -> str:
    """Names a dense model: its config, its tensors' names, types and shapes, and how each begins."""
    digest = hashlib.sha256(json.dumps(checkpoint.config.values, sort_keys=True).encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        # Bytes, not numbers: tensors that the model does not use may be of any type.
        stop = tensor.start + min(tensor.nbytes, SAMPLED_BYTES)
        digest.update(tensor.shard.map[tensor.start : stop])
    return digest.hexdigest()[:32]


class HessianStore:
    """A directory of Hessians, a safetensors file for each decoder layer.

    calibration: the key of the calibration text, None to take them whatever they are from. Raises FileError
    for what cannot be one.
    """

    def __init__(self, directory: Path, model: str, calibration: str | None) -> None:
        self.directory = directory
        self.model, self.calibration = model, calibration
        try:
            next(directory.iterdir(), None)
        except FileNotFoundError:
            pass  # it is made when there is something to keep
        except (OSError, ValueError) as error:  # ValueError: a null byte in its name
            reason = getattr(error, "strerror", error)
            raise FileError(f"--hessians: {directory}: cannot be used: {reason}") from error

    def path(self, n: int) -> Path:
        return self.directory / f"hessian-{n:05}.safetensors"

    def has(self, n: int) -> bool:
        """Whether layer n's Hessians are there; raises FileError for a damaged file, OptionError for those of
        another model or another text."""
        path = self.path(n)
        if not path.exists():
            return False
        metadata = self._metadata(path)
        for key, expected in (("model", self.model), ("calibration", self.calibration)):
            if expected is not None and metadata.get(key) != expected:
                raise OptionError(
                    f"--hessians: {path}: found the Hessians of another {key} ({metadata.get(key)}), "
                    f"expected this one's ({expected}): give another directory"
                )
        return True

    def text(self) -> str | None:
        """The key of the calibration text that the Hessians are from, None where there are none."""
        for path in sorted(self.directory.glob("hessian-*.safetensors")):
            return self._metadata(path).get("calibration")
        return None

    def _metadata(self, path: Path) -> dict[str, str]:
        with opened(path) as file:
            return file.metadata() or {}

    def load(self, n: int, shapes: dict[str, int]) -> dict[str, Tensor]:
        """Layer n's Hessians, (size, size) for each of `shapes`; raises FileError for others."""
        path = self.path(n)
        with opened(path) as file:
            hessians = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        found = {name: tuple(hessian.shape) for name, hessian in hessians.items()}
        expected = {name: (size, size) for name, size in shapes.items()}
        if found != expected:
            raise FileError(f"{path}: found Hessians {found}, expected {expected}; {REMEDY}")
        for name, hessian in hessians.items():
            if (
                hessian.dtype != torch.float32
                or not hessian.isfinite().all()
                or (hessian.diagonal() < 0).any()
            ):
                raise FileError(
                    f"{path}: tensor {name}: found a NaN, an infinity, a diagonal below 0, or a type that is "
                    f"not F32; {REMEDY}"
                )
        return hessians

    def save(self, n: int, hessians: dict[str, Tensor]) -> None:
        """Raises FileError when the disk is full."""
        assert self.calibration is not None
        metadata = {"model": self.model, "calibration": self.calibration}
        write_tensors(self.path(n), hessians, metadata)
