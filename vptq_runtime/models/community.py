"""The community's models, and what each of them needs, on paper."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("community.txt")
KV_TYPE = DENSE_TYPE = "f16"  # what a model runs with, and what its embedding has, unless asked otherwise


@dataclass(frozen=True)
class CommunityModel:
    """A repository, and what a model of its shape and configuration takes; all in bytes."""

    repo: str
    bits: float  # of a weight of a linear layer, codebooks aside
    file_bytes: int  # a tokenizer aside; the download has about as much
    kv_bytes: int  # of N_CTX tokens
    memory_bytes: int  # both, and what a process takes beside them


def community_models() -> list[CommunityModel]:
    """All that are known, in the table's order."""
    from vptq_runtime.bench.fits import Fit  # it computes with numpy, gguf and the converter
    from vptq_runtime.bench.shapes import find_shape
    from vptq_runtime.bench.synthetic import Quant, SyntheticModel

    models = []
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        repo, shape = line.split()
        match = re.search(r"v\d+-k\d+-\d+(?=-woft$)", repo)
        assert match is not None, repo
        quant = Quant.parse(match[0])
        fit = Fit.of(SyntheticModel(repo, find_shape(shape), quant, DENSE_TYPE, DENSE_TYPE), KV_TYPE)
        models.append(
            CommunityModel(repo, quant.bits / quant.v, fit.file_bytes, fit.kv_bytes, fit.memory_bytes)
        )
    return models
