"""A dense checkpoint as a model of which one decoder layer is in memory at a time."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn
from vptq_converter.architectures import LINEARS, Model, read_model
from vptq_converter.checkpoint import Checkpoint

from vptq_runtime.errors import FileError, UnsupportedError
from vptq_runtime.evaluate.dense_model import class_and_config, quiet

BATCH_TOKENS = 8192  # tokens that go through a layer at a time: bounds the memory of its activations


class _Recorder(nn.Module):
    """Stands in a model for a decoder layer: keeps what the layer would be called with, computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.arguments = arguments
        return hidden_states


class DenseModel:
    """A checkpoint's embedding and decoder layers in float32 on `device`, loaded when asked for.

    Raises UnsupportedError for an architecture that is not supported and for a model that is quantised
    already, FileError for what is damaged, missing or contradicts itself.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        quantization = checkpoint.config.values.get("quantization_config")
        if quantization is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise UnsupportedError(
                f"{checkpoint.config.path}: quantization_config: found a model that is quantised already "
                f"({method!r}), expected a dense one"
            )
        self.checkpoint = checkpoint
        self.device = device
        self.model: Model = read_model(checkpoint)
        self.n_layers = self.model.hyperparameters.n_layer
        self.n_vocab = self.model.hyperparameters.n_vocab
        # transformers' code without weights: what layers are called with (masks, positions) is its affair.
        try:
            with quiet(transformers):
                self.causal_class, self.config = class_and_config(transformers, checkpoint.config.values)
                self._body = self._without_weights().model
                rotary = type(self._body.rotary_emb)(self.config)  # its buffers are needed
        except Exception as error:  # the library's have no common base
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise FileError(f"{checkpoint.config.path}: transformers cannot use it: {reason}") from error
        self._layers = list(self._body.layers)
        self._body.layers = nn.ModuleList(_Recorder() for _ in self._layers)
        self._body.norm = nn.Identity()
        self._body.rotary_emb = rotary.to(device)

    def _without_weights(self) -> Any:
        with torch.device("meta"):
            return self.causal_class._from_config(
                self.config, attn_implementation="sdpa", dtype=torch.float32
            )

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of a decoder layer's linear layers by their path in it."""
        shapes = {name: self.checkpoint.tensors[f"model.layers.0.{name}.weight"].shape for name in LINEARS}
        return {name: (shape[0], shape[1]) for name, shape in shapes.items()}

    def layer_tensors(self, n: int) -> list[str]:
        """Full names of decoder layer n's tensors."""
        return [f"model.layers.{n}.{name}" for name in self._layers[n].state_dict()]

    def embed(self, tokens: NDArray[np.int64]) -> Tensor:
        """Hidden states (n_windows, seq_len, n_embd) that enter layer 0, on the CPU."""
        used, place = np.unique(tokens, return_inverse=True)
        embedding = self.checkpoint.tensor("model.embed_tokens.weight")
        rows = embedding.finite(used)
        return torch.from_numpy(rows)[torch.from_numpy(place.reshape(tokens.shape))]

    def load_layer(self, n: int) -> nn.Module:
        """Decoder layer n with its dense weights, in float32; raises FileError for a NaN or infinity."""
        prefix = f"model.layers.{n}."
        layer: nn.Module = copy.deepcopy(self._layers[n])
        state = {
            name: torch.from_numpy(self.checkpoint.tensor(prefix + name).finite()).to(self.device)
            for name in layer.state_dict()
        }
        layer.load_state_dict(state, strict=True, assign=True)
        for name in state:
            self.checkpoint.tensor(prefix + name).release()
        return layer.eval().requires_grad_(False)

    def whole(self) -> nn.Module:
        """The whole model with its dense weights, in float32: for models that fit in memory."""
        with quiet(transformers):
            model = self._without_weights()
        names = [name for name in model.state_dict() if name in self.checkpoint.tensors]
        state = {
            name: torch.from_numpy(self.checkpoint.tensor(name).finite()).to(self.device) for name in names
        }
        model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
        model.model.rotary_emb = self._body.rotary_emb
        whole: nn.Module = model.eval().requires_grad_(False)
        return whole

    def advance(self, n: int, layer: nn.Module, hidden: Tensor) -> None:
        """Runs decoder layer n over hidden states (n_windows, seq_len, n_embd), in place."""
        arguments = self.arguments(n, hidden[:1].to(self.device))
        for batch in torch.split(hidden, max(1, BATCH_TOKENS // hidden.shape[1])):
            with torch.inference_mode():
                batch.copy_(layer(batch.to(self.device), **arguments))

    def call(self, n: int, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states (n_windows, seq_len, n_embd) after decoder layer n; gradients flow through it."""
        arguments = self.arguments(n, hidden[:1].detach())
        after: Tensor = layer(
            hidden, **{name: _outside_inference(value) for name, value in arguments.items()}
        )
        return after

    @torch.inference_mode()
    def arguments(self, n: int, window: Tensor) -> dict[str, Any]:
        """What the model calls layer n with, for windows of this length (1, seq_len, n_embd)."""
        self._body(inputs_embeds=window, use_cache=False)
        recorder = self._body.layers[n]
        assert isinstance(recorder, _Recorder)
        return recorder.arguments


def _outside_inference(value: Any) -> Any:
    """Copies of tensors that inference mode has made: autograd refuses to keep those."""
    if isinstance(value, Tensor):
        return value.clone()
    return tuple(map(_outside_inference, value)) if isinstance(value, tuple) else value


def linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a decoder layer by their path in it, in the file's order."""
    modules = dict(layer.named_modules())
    found = {name: modules[name] for name in LINEARS}
    assert all(isinstance(module, nn.Linear) for module in found.values())
    return found
