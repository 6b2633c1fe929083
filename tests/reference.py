"""What the runtime's numbers are measured against: transformers in float32 on dense, dequantised weights."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from checkpoints import dequantise, read_tensors
from configurations import EOS_IDS, VOCAB_SIZE
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

torch.set_num_threads(1)  # these models are so small that threads only wait for each other


@dataclass(frozen=True)
class Greedy:
    """A prompt and its greedy continuation by transformers."""

    prompt: list[int]
    tokens: list[int]
    margin: float  # least distance, over the tokens, of the largest logit to the next

    @property
    def is_stable(self) -> bool:
        """No near-tie that a KV cache in f16 could turn, no early end, no mere repetition.

        An f16 cache changes these models' logits by 0.005 (root mean square), in transformers as here.
        """
        return self.margin > 0.05 and not set(self.tokens) & set(EOS_IDS) and len(set(self.tokens)) > 8


class Reference:
    """The model of a checkpoint directory, dense and in float32."""

    def __init__(self, directory: Path) -> None:
        raw = json.loads((directory / "config.json").read_text())
        del raw["quantization_config"]
        config = AutoConfig.for_model(raw.pop("model_type"), **raw)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        weights = {
            name: tensor.float()
            for name, tensor in read_tensors(directory).items()
            if name.endswith((".weight", ".bias")) and "centroids" not in name
        }
        for path, weight in dequantise(directory).items():
            weights[f"{path}.weight"] = torch.from_numpy(weight)
        if config.tie_word_embeddings:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        model.load_state_dict(weights, strict=True)
        self.model: PreTrainedModel = model.eval()

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """Logits (len(tokens), n_vocab)."""
        with torch.inference_mode():
            return self.model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()

    def greedy(self, prompts: NDArray[np.int64], n: int = 32) -> list[Greedy]:
        """The n tokens that follow each of prompts (n_prompts, length), end-of-text tokens like any other."""
        cache = DynamicCache(config=self.model.config)
        new, margins = torch.from_numpy(prompts), torch.full((len(prompts),), torch.inf)
        tokens = []
        for _ in range(n):
            with torch.inference_mode():
                # Input, mask, positions, cache: the cache's name depends on the version.
                logits = self.model(new, None, None, cache, use_cache=True).logits[:, -1]
            best = logits.topk(2)
            margins = torch.minimum(margins, best.values[:, 0] - best.values[:, 1])
            new = best.indices[:, :1]
            tokens.append(new)
        rows = zip(prompts.tolist(), torch.cat(tokens, dim=1).tolist(), margins.tolist(), strict=True)
        return [Greedy(*row) for row in rows]

    def stable_greedy(self, n_prompt: int) -> Greedy:
        """The first random prompt of n_prompt tokens that has a stable continuation."""
        rng = np.random.default_rng(n_prompt)
        for _ in range(20):
            for greedy in self.greedy(rng.integers(VOCAB_SIZE, size=(16, n_prompt))):
                if greedy.is_stable:
                    return greedy
        raise AssertionError("no stable continuation: this model's logits are too flat")


def mean_kl(reference: NDArray[np.floating], logits: NDArray[np.floating]) -> float:
    """Mean over the tokens of KL(reference || logits) in nats; both (n_tokens, n_vocab)."""
    if reference.shape != logits.shape:
        raise ValueError(f"logits are {logits.shape}, expected {reference.shape}")
    log_p, log_q = (_log_softmax(values.astype(np.float64)) for values in (reference, logits))
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean())


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
