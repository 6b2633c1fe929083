"""What the model loses by each type that the embedding and the output matrix can be stored in.

The types' errors are those of the matrices themselves: every row is brought into the type and back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from vptq_converter.checkpoint import Tensor
from vptq_converter.dense import CHUNK_ELEMENTS, OPTION_TYPES, rounded

from vptq_quantizer.dense_model import DenseModel
from vptq_quantizer.planning.plan import AUTO
from vptq_quantizer.planning.sensitivity import Sensitivity

# A matrix's use: what a squared error costs, by row (n_vocab,) and by column (n_embd,).
Use = tuple[NDArray[np.float32], NDArray[np.float32]]


def matrix_losses(
    dense: DenseModel,
    sensitivity: Sensitivity | None,
    types: Sequence[str],
    show: Callable[[str], object] = lambda what: None,
) -> dict[str, dict[str, float]]:
    """By the matrices' names in the file and by type: nats a token, a tied matrix's for both of its uses.

    Without a sensitivity: the squared error in units of the mean squared weight. A type that cannot hold a
    matrix's numbers is left out.
    """
    embedding, last = dense.model.weights[0], dense.model.weights[-1]
    uses: dict[str, list[Use]] = {
        weight.name: [] for weight in (embedding, last) if "norm" not in weight.name
    }
    if sensitivity is not None:
        n_embd = len(sensitivity.output_columns)
        uses["token_embd"].append((sensitivity.embedding.cpu().numpy(), np.ones(n_embd, np.float32)))
        output = (sensitivity.output.cpu().numpy(), sensitivity.output_columns.cpu().numpy())
        uses["output" if "output" in uses else "token_embd"].append(output)
    tensors = {"token_embd": embedding.weight, "output": last.weight}
    result: dict[str, dict[str, float]] = {}
    for name, wanted in uses.items():
        tensor = tensors[name]
        assert isinstance(tensor, Tensor)
        result[name] = {}
        for type in types:
            show(f"{name} in {'16 bits' if type == AUTO else type}")
            loss = 0.0 if type == AUTO else _loss(tensor, type, wanted)
            if np.isfinite(loss):
                result[name][type] = loss
    return result


def _loss(tensor: Tensor, type: str, uses: Sequence[Use]) -> float:
    n_rows, n_columns = tensor.shape
    step = max(1, CHUNK_ELEMENTS // n_columns)
    loss = square = 0.0
    for start in range(0, n_rows, step):
        rows = slice(start, min(start + step, n_rows))
        values = tensor.finite(rows)
        squares = (values - rounded(values, OPTION_TYPES[type])) ** 2
        for by_row, by_column in uses:
            loss += float(by_row[rows] @ (squares @ by_column))
        if not uses:
            loss += float(squares.sum())
            square += float((values**2).sum())
    tensor.release()
    return loss if uses else loss / square * n_rows * n_columns if square else 0.0
