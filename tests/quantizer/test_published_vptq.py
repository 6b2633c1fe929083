"""The published `vptq` package runs what is written, and so does the converter's file.

`pip install --no-deps vptq==0.0.5.post1` beside the test requirements.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from checkpoints import read_tensors
from configurations import VOCAB_SIZE
from dense_models import SMALL
from reference import Reference
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from vptq_converter import convert
from vptq_quantizer import quantize

from vptq_runtime import Runtime

# The package imports sentence_transformers for one isinstance check and needs nothing of it here.
for stub_name in ("sentence_transformers", "sentence_transformers.SentenceTransformer"):
    stub = ModuleType(stub_name)
    stub.__spec__ = ModuleSpec(stub_name, None)  # others may ask whether the package is there
    stub.SentenceTransformer = type("SentenceTransformer", (), {})  # type: ignore[attr-defined]
    sys.modules.setdefault(stub_name, stub)

RESIDUAL = SMALL
PADDED = replace(SMALL, vector_len=3, res_centroids=0)
OUTLIERS = replace(SMALL, groups=2, outliers=3, outlier_vector_len=4, outlier_centroids=8)
CASES = {
    "llama": ("llama", RESIDUAL),
    "llama-biases": ("llama-biases", PADDED),
    "mistral-window": ("mistral-window", OUTLIERS),
    "qwen2": ("qwen2", replace(RESIDUAL, finetune=True, end_to_end=3)),
    "llama3-no-norm": ("llama3", replace(RESIDUAL, normalize=False, vector_len=8)),
}


def tokens() -> list[int]:
    return np.random.default_rng(0).integers(VOCAB_SIZE, size=40).tolist()


def published_logits(directory: Path) -> Tensor:
    """Logits (n_tokens, n_vocab) of a model with the package's layers, in float32."""
    from vptq.layers.vqlinear import VQuantLinear

    raw = json.loads((directory / "config.json").read_text())
    entries = raw.pop("quantization_config")["config_for_layers"]
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    for path, entry in entries.items():
        parent, _, last = path.rpartition(".")
        layer = VQuantLinear(**entry, enable_proxy_error=False, dtype=torch.float32)
        setattr(model.get_submodule(parent), last, layer)
    # All fields of the layers, and all tensors of the checkpoint; what is tied is there once.
    missing, unexpected = model.load_state_dict(read_tensors(directory), strict=False)
    assert unexpected == [] and missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    model.tie_weights()
    with torch.inference_mode():
        logits: Tensor = model.float().eval()(torch.tensor([tokens()]), use_cache=False).logits[0]
    return logits


def relative_error(logits: Tensor, expected: Tensor) -> float:
    return float((logits.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("case", CASES)
def test_same_logits(case: str, dense_model: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    name, options = CASES[case]
    quantize(dense_model(name), tmp_path / "vptq", options, calibration=[text])
    expected = torch.from_numpy(Reference(tmp_path / "vptq").logits(tokens()))

    convert(tmp_path / "vptq", tmp_path / "model.gguf")
    with Runtime(tmp_path / "model.gguf", device="cpu", kv_type="f32", precision="f32") as runtime:
        assert relative_error(torch.from_numpy(runtime.logits(tokens())), expected) < 1e-4

    pytest.importorskip("vptq", reason="pip install --no-deps vptq==0.0.5.post1")
    assert relative_error(published_logits(tmp_path / "vptq"), expected) < 1e-4
