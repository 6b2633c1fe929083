"""Logits and greedy tokens against transformers, for every architecture with every configuration.

A model's layers have as many configurations as there are layers, so four small models hold the whole table.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import EMBEDDING, mixed_layers, write_checkpoint
from configurations import ARCHITECTURES, CONFIGURATIONS, VOCAB_SIZE
from converted import float_tensors, raw_tensors
from feeding import all_logits, prefill, step
from reference import Greedy, Reference, mean_kl
from vptq_converter.convert import convert

from vptq_runtime import Runtime, _native

N_GROUPS = 4
GROUPS = [list(CONFIGURATIONS)[n::N_GROUPS] for n in range(N_GROUPS)]
N_CTX = 1024
PROMPT_LENGTHS = (5, 33, 85)  # within a sliding window and beyond; one KV block and several; one batch in all
# Types of the KV cache and precisions, and the most that they may change: KL in nats a token
EXACT, DEFAULT = ("f32", "f32"), ("f16", "auto")
MAX_KL = {EXACT: 1e-6, DEFAULT: 1e-4}
WINDOWED = ("mistral-window", "qwen2-window")


@dataclass(frozen=True)
class Case:
    path: Path  # the converted model
    reference: Reference
    greedy: list[Greedy]  # one for each of PROMPT_LENGTHS

    def runtime(self, device: str, numbers: tuple[str, str]) -> Runtime:
        kv_type, precision = numbers
        return Runtime(self.path, device=device, n_ctx=N_CTX, kv_type=kv_type, precision=precision)

    def context(self, device: str, numbers: tuple[str, str]) -> _native.Context:
        kv_type, precision = numbers
        model = _native.Model(str(self.path))
        return _native.Context(
            model, device=device, n_ctx=N_CTX, n_threads=2, kv_type=kv_type, precision=precision
        )


def make_case(directory: Path, architecture: str, group: int) -> Iterator[Case]:
    layers = mixed_layers(ARCHITECTURES[architecture], [CONFIGURATIONS[name] for name in GROUPS[group]])
    assert {CONFIGURATIONS[name] for name in GROUPS[group]} == set(layers.values())
    source = write_checkpoint(directory / "source", ARCHITECTURES[architecture], layers)
    path = directory / "model.gguf"
    convert(source, path)
    reference = Reference(source)
    yield Case(path, reference, [reference.stable_greedy(length) for length in PROMPT_LENGTHS])
    shutil.rmtree(directory)  # all cases together are a gigabyte


CASES = {f"{name}-{group}": (name, group) for name in ARCHITECTURES for group in range(N_GROUPS)}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    yield from make_case(tmp_path_factory.mktemp("case"), *CASES[request.param])


# Every configuration, and a sliding window.
@pytest.fixture(scope="module", params=["llama-0", "llama-1", "llama-2", "llama-3", "mistral-window-0"])
def one_case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    yield from make_case(tmp_path_factory.mktemp("case"), *CASES[request.param])


@pytest.mark.parametrize("numbers", MAX_KL)
def test_logits_and_greedy_tokens(case: Case, device: str, numbers: tuple[str, str]) -> None:
    """KL to transformers in float32; each prompt alone and all in one batch continue as they do there."""
    with case.runtime(device, numbers) as runtime:
        for greedy in case.greedy:
            tokens = greedy.prompt + greedy.tokens
            logits = runtime.logits(tokens)
            assert logits.dtype == np.float32
            assert mean_kl(case.reference.logits(tokens), logits) < MAX_KL[numbers]
            alone = runtime.generate(greedy.prompt, max_tokens=32, temperature=0)
            assert alone.tokens == greedy.tokens
        batch = runtime.generate([greedy.prompt for greedy in case.greedy], max_tokens=32, temperature=0)
        assert [generation.tokens for generation in batch] == [greedy.tokens for greedy in case.greedy]


@pytest.mark.parametrize("numbers", MAX_KL)
@pytest.mark.parametrize("isa", _native.cpu_isas())
def test_every_instruction_set(
    one_case: Case, isa: str, numbers: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VPTQ_CPU_ISA", isa)
    tokens = one_case.greedy[-1].prompt
    reference = one_case.reference.logits(tokens).astype(np.float64)
    with one_case.runtime("cpu", numbers) as runtime:
        assert isa in runtime.device
        logits = runtime.logits(tokens)
        batch = runtime.generate([greedy.prompt for greedy in one_case.greedy], max_tokens=32, temperature=0)
    assert mean_kl(reference, logits) < MAX_KL[numbers]
    if numbers == EXACT:
        assert np.abs(logits - reference).max() < 1e-4 * np.abs(reference).max()
    assert [generation.tokens for generation in batch] == [greedy.tokens for greedy in one_case.greedy]


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_prompt_in_pieces(one_case: Case, device: str, piece: int) -> None:
    """Fed piece by piece a prompt gives the logits and tokens that it gives when fed whole."""
    context = one_case.context(device, EXACT)
    longest = one_case.greedy[-1]
    prompt = longest.prompt
    assert sum(PROMPT_LENGTHS) <= context.n_batch
    pieces = [prompt[start : start + piece] for start in range(0, len(prompt), piece)]
    whole = all_logits(context, context.new_sequence(), prompt)

    sequence = context.new_sequence()
    logits = np.concatenate([all_logits(context, sequence, tokens) for tokens in pieces])
    assert context.length(sequence) == len(prompt)
    assert np.abs(logits.astype(np.float64) - whole).max() < 1e-4 * np.abs(whole).max()

    sequence = context.new_sequence()
    for tokens in pieces[:-1]:
        prefill(context, [sequence], [tokens])
    sampler = _native.Sampler(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0, seed=0)
    feed, continuation = pieces[-1], []
    for _ in range(32):
        feed = step(context, [sequence], [feed], [sampler])
        continuation += feed
    assert continuation == longest.tokens


def test_in_16_bits_pieces_and_company_change_nothing(one_case: Case, device: str) -> None:
    context = one_case.context(device, DEFAULT)
    prompt, other = one_case.greedy[-1].prompt, one_case.greedy[-2].prompt
    whole = all_logits(context, context.new_sequence(), prompt)
    sequence = context.new_sequence()
    pieces = [all_logits(context, sequence, prompt[a:b]) for a, b in ((0, 1), (1, 34), (34, len(prompt)))]
    assert np.array_equal(np.concatenate(pieces), whole)
    if "avx" in context.device or device == "cuda":  # prompts are rounded, and generated tokens are not
        exact = one_case.context(device, ("f16", "f32"))
        assert not np.array_equal(all_logits(exact, exact.new_sequence(), prompt), whole)
        generated = context.new_sequence()
        sampler = _native.Sampler(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0, seed=0)
        for token in prompt[:-1]:
            step(context, [generated], [[token]], [sampler], [False])
        assert not np.array_equal(all_logits(context, generated, prompt[-1:])[0], whole[-1])

    def fed(company: bool) -> list[np.ndarray]:
        """Logits behind a sequence that goes on and one that begins, in one batch or one after the other."""
        sampler = _native.Sampler(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0, seed=0)
        going, beginning = context.new_sequence(), context.new_sequence()
        prefill(context, [going], [prompt[:-1]])
        if company:
            step(context, [going, beginning], [prompt[-1:], other], [sampler] * 2, [False, True])
        else:
            step(context, [beginning], [other], [sampler], [True])
            step(context, [going], [prompt[-1:]], [sampler], [False])
        return [all_logits(context, sequence, [7]) for sequence in (going, beginning)]

    for together, alone in zip(fed(True), fed(False), strict=True):
        assert np.array_equal(together, alone)


def test_truncated_sequence_continues_as_a_new_one(one_case: Case, device: str) -> None:
    context = one_case.context(device, EXACT)
    prompt, other = one_case.greedy[-1].prompt, one_case.greedy[-2].prompt
    sequence = context.new_sequence()
    prefill(context, [sequence], [prompt])
    context.truncate(sequence, 50)
    logits = all_logits(context, sequence, other)
    expected = one_case.reference.logits(prompt[:50] + other)[50:]
    assert mean_kl(expected, logits) < 1e-6


@pytest.mark.parametrize("architecture", ["llama3-new-spelling", *WINDOWED])
def test_prompts_longer_than_a_batch(architecture: str, device: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", ARCHITECTURES[architecture], CONFIGURATIONS["v8-k512-512"])
    convert(source, tmp_path / "model.gguf")
    reference = Reference(source)
    tokens = np.random.default_rng(0).integers(VOCAB_SIZE, size=N_CTX).tolist()
    greedy = [reference.stable_greedy(length) for length in (100, 300)]
    with Runtime(
        tmp_path / "model.gguf", device=device, n_ctx=N_CTX, kv_type="f32", precision="f32"
    ) as runtime:
        assert mean_kl(reference.logits(tokens), runtime.logits(tokens)) < 1e-6
        batch = runtime.generate([one.prompt for one in greedy], max_tokens=32, temperature=0)
    assert [generation.tokens for generation in batch] == [one.tokens for one in greedy]


@pytest.mark.parametrize("type", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_output_in_fewer_bits(tied: bool, type: str, tmp_path: Path) -> None:
    """The logits are those of the weights that the file then holds; a tied output is the embedding's."""
    architecture = replace(ARCHITECTURES["mistral"], tied=tied)
    source = write_checkpoint(tmp_path / "source", architecture, CONFIGURATIONS["v8-k512-512"])
    path = tmp_path / "model.gguf"
    convert(source, path, embedding_type=type, output_type=type)
    types = {name: found for name, (found, _, _) in raw_tensors(path).items()}
    assert types["token_embd.weight"] == type.upper()
    assert types.get("output.weight") == (None if tied else type.upper())
    reference = Reference(source)
    tokens = np.random.default_rng(0).integers(VOCAB_SIZE, size=100).tolist()
    unrounded = reference.logits(tokens)
    stored = float_tensors(path)
    with torch.no_grad():
        for name, module in (
            ("token_embd.weight", reference.model.get_input_embeddings()),
            ("output.weight", reference.model.get_output_embeddings()),
        ):
            if name in stored:
                module.weight.copy_(torch.from_numpy(stored[name]))
    with Runtime(path, device="cpu", kv_type="f32", precision="f32") as runtime:
        logits = runtime.logits(tokens)
    assert mean_kl(reference.logits(tokens), logits) < 1e-6
    assert mean_kl(unrounded, logits) > 1e-6


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_output_as_vptq_layers(tied: bool, device: str, tmp_path: Path) -> None:
    architecture = replace(ARCHITECTURES["mistral"], tied=tied)
    names = ("v8-k512-512", "norm-dim-1", "f32-outliers")
    layers = mixed_layers(architecture, [CONFIGURATIONS[name] for name in names])
    layers |= {EMBEDDING: CONFIGURATIONS["v8-k512-512"]}
    layers |= {} if tied else {"lm_head": CONFIGURATIONS["norm-dim-1"]}
    source = write_checkpoint(tmp_path / "source", architecture, layers)
    convert(source, tmp_path / "model.gguf")
    reference = Reference(source)
    greedy = reference.stable_greedy(20)
    with Runtime(tmp_path / "model.gguf", device=device, kv_type="f32", precision="f32") as runtime:
        logits = runtime.logits(greedy.prompt)
        assert mean_kl(reference.logits(greedy.prompt), logits) < 1e-6
        assert runtime.generate(greedy.prompt, max_tokens=32, temperature=0).tokens == greedy.tokens


@pytest.mark.parametrize("architecture", WINDOWED)
def test_the_window_matters(architecture: str, tmp_path: Path) -> None:
    """The windowed models of the table do lose sight of old tokens: else nothing above would show it."""
    with_window = ARCHITECTURES[architecture]
    without = replace(with_window, extra={**with_window.extra, "sliding_window": None})
    tokens = np.random.default_rng(0).integers(300, size=140).tolist()
    windowed, full = (
        Reference(write_checkpoint(tmp_path / name, variant, CONFIGURATIONS["v8-k512-512"])).logits(tokens)
        for name, variant in (("windowed", with_window), ("full", without))
    )
    np.testing.assert_allclose(windowed[:24], full[:24], rtol=0, atol=1e-4)
    assert mean_kl(windowed[24:], full[24:]) > 0.01


def test_mean_kl() -> None:
    """KL((1/2, 1/2) || (1/4, 3/4)) = log 2 - log(3) / 2, whatever is added to all logits of a token."""
    reference = np.array([[3.0, 3.0], [0.0, 0.0]], np.float32)
    logits = np.array([[5.0, 5.0 + np.log(3)], [0.0, 0.0]], np.float32)
    expected = np.mean([np.log(2) - np.log(3) / 2, 0.0])
    assert mean_kl(reference, logits) == pytest.approx(expected, abs=1e-6)
