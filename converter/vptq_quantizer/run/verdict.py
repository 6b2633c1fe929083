"""What became of the whole model: how its predictions differ from the dense one's, on text held back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from vptq_converter.architectures import EMBEDDING, OUTPUT
from vptq_converter.dense import CHUNK_ELEMENTS, OPTION_TYPES, rounded

from vptq_quantizer.dense_model import DenseModel
from vptq_quantizer.layers.quantized_linear import decoded
from vptq_quantizer.planning.plan import AUTO, Plan
from vptq_quantizer.planning.sensitivity import output_matrix
from vptq_quantizer.training.divergence import comparison

NORM = "model.norm.weight"


@torch.no_grad()
def measure_verdict(
    dense: DenseModel,
    plan: Plan,
    tensors: Callable[[int], Mapping[str, Tensor]],
    dtype: torch.dtype,
    windows: NDArray[np.int64],
    show: Callable[[str], object] = lambda what: None,
) -> dict[str, float | int]:
    """Runs windows (n, seq_len) of at least two tokens through both models, a decoder layer in memory at a
    time.

    tensors: those of the new checkpoint by full name, of decoder layer n, and for n_layers the final norm and
    the plan's matrices; dtype: of its dense tensors. Embedding and output matrix are as the plan has them.

    Returns "kl_divergence", the mean in nats a token, from the dense model; "perplexity",
    "dense_perplexity" and "perplexity_ratio" of the text; "n_tokens".
    """
    hidden = dense.embed(windows)
    rest = tensors(dense.n_layers)
    matrices = decoded(plan.matrices, rest)
    if EMBEDDING in matrices:
        quantised = matrices[EMBEDDING][torch.from_numpy(windows)]
    else:
        quantised = _as_stored(hidden.flatten(0, 1), dtype, plan.embedding_type).view(hidden.shape)
    if quantised.data_ptr() == hidden.data_ptr():
        quantised = hidden.clone()
    for n in range(dense.n_layers):
        show(f"layer {n}")
        layer = dense.load_layer(n)
        dense.advance(n, layer, hidden)
        prefix = f"model.layers.{n}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors(n).items()}
        state = {name: own[name].float() for name in layer.state_dict() if name in own}
        state |= {f"{path}.weight": weight for path, weight in decoded(plan.layer(n), own).items()}
        state = {name: tensor.to(dense.device) for name, tensor in state.items()}
        layer.load_state_dict(state, strict=True, assign=True)
        dense.advance(n, layer, quantised)
    show("output")
    norm = torch.from_numpy(dense.checkpoint.tensor(NORM).finite())
    output = torch.from_numpy(output_matrix(dense).finite())
    tied = dense.model.weights[-1].name != "output"
    stored_output = matrices.get(EMBEDDING if tied else OUTPUT)
    if stored_output is None:
        stored_output = _as_stored(output, dtype, plan.embedding_type if tied else plan.output_type)
    both = [(norm, output), (rest[NORM].float(), stored_output)]
    both = [(norm.to(dense.device), output.to(dense.device)) for norm, output in both]
    labels = np.pad(windows[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    eps = dense.model.hyperparameters.norm_rms_eps
    totals = torch.zeros(3, dtype=torch.float64, device=dense.device)
    for *states, following in zip(hidden, quantised, torch.from_numpy(labels), strict=True):
        last = [
            (functional.rms_norm(x.to(dense.device), norm.shape, norm, eps), output)
            for x, (norm, output) in zip(states, both, strict=True)
        ]
        totals += comparison(last[0], last[1], following.to(dense.device))
    divergence, entropy, own_entropy = totals.numpy(force=True)
    n_labels = int((labels >= 0).sum())
    with np.errstate(over="ignore"):
        perplexities = np.exp(np.array([own_entropy, entropy, own_entropy - entropy]) / n_labels).tolist()
    return {
        "kl_divergence": float(divergence) / windows.size,
        **dict(zip(("perplexity", "dense_perplexity", "perplexity_ratio"), perplexities, strict=True)),
        "n_tokens": windows.size,
    }


def _as_stored(values: Tensor, dtype: torch.dtype, type: str) -> Tensor:
    """Rows of a matrix once the checkpoint, and then the file, have stored them; the same where that changes
    nothing."""
    result = values.to(dtype).float()
    if type != AUTO:
        step = max(1, CHUNK_ELEMENTS // values.shape[1])
        for rows in torch.split(result, step):
            rows.copy_(torch.from_numpy(rounded(rows.numpy(), OPTION_TYPES[type])))
    return values if torch.equal(result, values) else result
