"""What an engine has done so far."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """Running totals; one thread counts, others read."""

    prompt_tokens: int = 0  # of the prompts admitted
    prompt_tokens_cached: int = 0  # of these, that need not be computed
    prompt_tokens_computed: int = 0
    generated_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    preemptions: int = 0
    decode_steps: int = 0
