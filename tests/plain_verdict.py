"""What a verdict has to say of a quantised model: both models as a whole, in transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import dequantise, read_tensors
from dense_models import SEQ_LEN, SMALL
from numpy.typing import NDArray
from vptq_converter.checkpoint import Checkpoint
from vptq_converter.dense import OPTION_TYPES, rounded
from vptq_quantizer.calibration.text import read_calibration
from vptq_quantizer.dense_model import DenseModel
from vptq_quantizer.training.end_to_end import MEASURED_TOKENS


def log_probabilities(model: Any, windows: NDArray[np.int64]) -> torch.Tensor:
    """(n, seq_len, n_vocab) in float64."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.from_numpy(windows)).logits
    return logits.double().log_softmax(-1)


def expected_verdict(source: Path, out: Path, text: Path, type: str = "auto") -> dict[str, float]:
    """Both models as a whole, in transformers, and nothing spared; type: of a tied embedding."""
    dense = DenseModel(Checkpoint(source), torch.device("cpu"))
    calibration = read_calibration(dense.checkpoint, dense.n_vocab, [text], SMALL.samples, SEQ_LEN, 0)
    windows = calibration.held_out(MEASURED_TOKENS // SEQ_LEN)
    quantised = dense.whole()
    state = {name: t.float() for name, t in read_tensors(out).items() if name in quantised.state_dict()}
    state |= {f"{path}.weight": torch.from_numpy(weight) for path, weight in dequantise(out).items()}
    if type != "auto":
        embedding = state["model.embed_tokens.weight"].numpy()
        state["model.embed_tokens.weight"] = torch.from_numpy(rounded(embedding, OPTION_TYPES[type]))
    missing, unexpected = quantised.load_state_dict(state, strict=False, assign=True)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    quantised.tie_weights()
    p, q = (log_probabilities(model, windows) for model in (dense.whole(), quantised))
    labels = torch.from_numpy(windows[:, 1:, None])
    own, other = (float(x[:, :-1].gather(2, labels).mean()) for x in (q, p))
    return {
        "kl_divergence": float((p.exp() * (p - q)).sum(-1).mean()),
        "perplexity": float(np.exp(-own)),
        "dense_perplexity": float(np.exp(-other)),
        "perplexity_ratio": float(np.exp(other - own)),
        "n_tokens": windows.size,
    }
