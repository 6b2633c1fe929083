"""The published `vptq` package's linear layer, of the weights that a file of this runtime would have."""

from __future__ import annotations

import contextlib
import io
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
from random_layer import Arrays

from vptq_runtime.bench.synthetic import Quant

# The package imports sentence_transformers for one isinstance check and needs nothing of it here.
for name in ("sentence_transformers", "sentence_transformers.SentenceTransformer"):
    stub = ModuleType(name)
    stub.__spec__ = ModuleSpec(name, None)  # others may ask whether the package is there
    stub.SentenceTransformer = type("SentenceTransformer", (), {})  # type: ignore[attr-defined]
    sys.modules.setdefault(name, stub)
with contextlib.redirect_stdout(io.StringIO()):  # it prints whether its CUDA kernels are there
    from vptq.layers.vqlinear import VQuantLinear

DTYPES = {"f16": torch.float16, "f32": torch.float32}
# Where the package has what a file has as vptq_...
PUBLISHED = {
    "indices": "indices",
    "centroids": "centroids.weight",
    "res_centroids": "res_centroids.weight",
    "perm": "perm",
    "scale": "weight_scale",
    "shift": "weight_bias",
}


def published_layer(
    quant: Quant, arrays: Arrays, in_features: int, out_features: int, dtype: torch.dtype
) -> VQuantLinear:
    layer = VQuantLinear(
        in_features=in_features,
        out_features=out_features,
        vector_lens=(-1, quant.v),
        num_centroids=(-1, quant.k),
        num_res_centroids=(-1, quant.r or -1),
        group_num=1,
        group_size=in_features,
        outlier_size=0,
        indices_as_float=False,
        enable_norm=True,
        enable_perm=True,
        is_indice_packed=True,
        enable_proxy_error=False,
        dtype=dtype,
    )
    state = {PUBLISHED[name]: torch.from_numpy(array.copy()) for name, (_, array) in arrays.items()}
    for name in ("centroids.weight", "res_centroids.weight"):
        if name in state:
            state[name] = state[name].flatten(1)
    layer.load_state_dict(state, strict=True)
    return layer
