"""Decoding through the engine: what requests get, with all that is done for them between two steps."""

from __future__ import annotations

import time

import numpy as np

from vptq_runtime import _native
from vptq_runtime.bench.speed import GREEDY, SpeedTest
from vptq_runtime.engine.drafters.ngram import NgramDrafter
from vptq_runtime.engine.engine import Engine
from vptq_runtime.engine.request import Request

FORCED = 100.0  # a bias that leaves a model no choice


def run_engine(context: _native.Context, test: SpeedTest, repetitions: int, n_vocab: int) -> list[float]:
    """The seconds of each repetition of an "eg" or "ng" test.

    Each request has a prompt of one token. Of "ng" each says the same token over and over, which a bias makes
    it do, so that n-grams always guess right: the most that they can bring.
    """
    drafter = NgramDrafter() if test.kind == "ng" else None
    rng = np.random.default_rng(0)
    engine = Engine(
        context,
        parallel=test.n_sequences,
        queue=test.n_sequences,
        queue_tokens=test.n_sequences,  # a token each
        cache="off",
        closed=lambda: RuntimeError("the engine is closed"),
    )

    def run(n_tokens: int) -> float:
        begin = time.perf_counter()
        requests = []
        for token in rng.integers(n_vocab, size=test.n_sequences).tolist():
            bias = {"logit_bias": {token: FORCED}} if drafter else {}
            sampler = _native.Sampler(**GREEDY, **bias)  # type: ignore[arg-type]
            requests.append(Request([token], sampler, n_tokens, drafter=drafter))
        for request in requests:
            engine.submit(request)
        for request in requests:
            request.mailbox.wait()
            if request.error is not None:
                raise request.error
        return time.perf_counter() - begin

    try:
        run(min(test.n_tokens, 8))  # a GPU's first steps are run, recorded and played
        return [run(test.n_tokens) for _ in range(repetitions)]
    finally:
        engine.close()
