"""Layers on the CPU and on GPUs: how they are shared out, and that it changes no number it should not."""

import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from emulated import Emulated
from feeding import all_logits, prefill, step
from gpu import need_gpu
from numpy.typing import NDArray
from relative_error import relative_l2

from vptq_runtime import _native, demo_path
from vptq_runtime.errors import OptionError, OutOfMemoryError, UnsupportedError

GREEDY = dict(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0, seed=0)
N_LAYER = 6  # of the demo model


class TestSplit:
    """Sizes are integers that a share of memory, a float, cannot round away."""

    @staticmethod
    def split(layers: Sequence[int], free: Sequence[int], **others: int) -> list[int]:
        others = {"embedding": 0, "output": 0, "shared": 0, "n_layers": len(layers)} | others
        return _native.split_layers(layers=layers, free=free, **others)

    def test_in_proportion_to_what_is_free(self) -> None:
        assert self.split([10] * 12, [200, 200]) == [6, 6]
        assert self.split([10] * 12, [100, 200]) == [4, 8]
        assert self.split([10] * 12, [1000]) == [12]

    def test_the_first_layer_brings_the_embedding_and_the_last_the_output(self) -> None:
        assert self.split([10] * 6, [100, 100], embedding=20) == [2, 4]
        assert self.split([10] * 6, [100, 100], output=20) == [4, 2]
        assert self.split([10] * 6, [100, 100], embedding=20, n_layers=5) == [3, 2]

    def test_a_tied_embedding_is_there_once(self) -> None:
        assert self.split([10] * 6, [100], embedding=40, output=40, shared=40) == [6]
        assert self.split([10] * 6, [99], embedding=40, output=40, shared=40) == []
        assert self.split([10] * 6, [70, 69], embedding=40, output=40, shared=40) == []

    def test_what_does_not_fit(self) -> None:
        assert self.split([10] * 6, [60]) == [6]
        assert self.split([10] * 6, [59]) == []
        assert self.split([10] * 6, [29, 39]) == []
        assert self.split([10] * 6, [0, 60]) == [0, 6]
        assert self.split([10] * 6, []) == []
        assert self.split([10] * 6, [0, 0], n_layers=0) == [0, 0]

    @pytest.mark.parametrize("seed", range(20))
    def test_no_split_uses_less_of_its_fullest_gpu(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        layers = rng.integers(1, 50, size=7).tolist()
        free = rng.integers(20, 300, size=3).tolist()
        embedding, output = (int(n) for n in rng.integers(0, 60, size=2))

        def fullest(cuts: tuple[int, int]) -> float:
            pieces = [layers[: cuts[0]], layers[cuts[0] : cuts[1]], layers[cuts[1] :]]
            used = [sum(piece) for piece in pieces]
            used[min(i for i in range(3) if pieces[i])] += embedding
            used[max(i for i in range(3) if pieces[i])] += output
            return max(u / f for u, f in zip(used, free, strict=True))

        best = min(fullest(cuts) for cuts in itertools.combinations_with_replacement(range(8), 2))
        found = self.split(layers, free, embedding=embedding, output=output)
        if best > 1:
            assert found == []
        else:
            assert sum(found) == 7
            assert fullest((found[0], found[0] + found[1])) == pytest.approx(best, rel=1e-4)


def context(**options: Any) -> _native.Context:
    return _native.Context(
        _native.Model(demo_path()),
        **{"device": "cuda", "n_ctx": 128, "n_threads": 2, "kv_type": "f32", "precision": "f32"} | options,
    )


def greedy(context: _native.Context, prompts: list[list[int]], n_steps: int = 4) -> list[list[int]]:
    """The tokens that a batch of prompts goes on with."""
    sequences = [context.new_sequence() for _ in prompts]
    for sequence, prompt in zip(sequences, prompts, strict=True):
        if len(prompt) > 1:
            prefill(context, [sequence], [prompt[:-1]])
    fed = [prompt[-1:] for prompt in prompts]
    found: list[list[int]] = [[] for _ in prompts]
    for _ in range(n_steps):
        fed = [[token] for token in step(context, sequences, fed, [_native.Sampler(**GREEDY) for _ in fed])]
        for tokens, token in zip(found, fed, strict=True):
            tokens += token
    return found


def logits(context: _native.Context) -> NDArray[np.float32]:
    return all_logits(context, context.new_sequence(), list(range(5, 45)))


def devices(context: _native.Context) -> list[str]:
    return re.findall(r"(\S+) \([^)]*\) with", context.device)


def test_layers_are_the_cpus_where_no_gpu_is_asked_for() -> None:
    for options in ({"device": "cpu"}, *({"device": each, "gpu_layers": 0} for each in ("cpu", "auto"))):
        found = context(**options)
        assert found.device.startswith("cpu (") and found.why_not_cuda == ""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"device": "cpu", "gpu_layers": 3}, "gpu_layers: found 3, expected 0, or none, with device cpu"),
        ({"device": "cuda", "gpu_layers": 0}, "gpu_layers: found 0, expected at least 1 with device cuda"),
        ({"device": "auto", "gpu_layers": -2}, "gpu_layers: found -2, expected at least 0"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(OptionError, match=f"^{expected}$"):
        context(**options)


@pytest.mark.gpu
class TestOnTheCpuAndAGpu:
    @pytest.fixture(autouse=True)
    def gpu(self) -> None:
        need_gpu()

    @pytest.mark.parametrize("gpu_layers", [1, 4])
    def test_the_same_logits_and_tokens(self, gpu_layers: int) -> None:
        both, cpu = context(gpu_layers=gpu_layers), context(device="cpu")
        assert both.device.startswith("cpu (") and both.device.count(" with ") == 2
        assert f") with {N_LAYER - gpu_layers} layers, cuda (" in both.device
        assert both.device.endswith(f") with {gpu_layers} layer{'s' if gpu_layers > 1 else ''}")
        assert relative_l2(logits(both), logits(cpu)) < 1e-5
        prompts = [[1, 5, 9], [7], [3, 4]]
        assert greedy(both, prompts) == greedy(cpu, prompts)

    def test_prompts_in_16_bits_on_both(self) -> None:
        found = logits(context(gpu_layers=3, precision="auto", kv_type="f16"))
        assert relative_l2(found, logits(context(device="cpu"))) < 1e-2

    def test_more_layers_than_there_are(self) -> None:
        assert context(gpu_layers=999).device == context().device

    def test_batches_are_what_both_can_do(self) -> None:
        assert context(gpu_layers=3).n_batch == context(device="cpu").n_batch

    def test_a_step_that_fails_leaves_no_part_of_it(self) -> None:
        both = context(gpu_layers=3)
        sequence = both.new_sequence()
        before = all_logits(both, sequence, [5, 6])
        with pytest.raises(OptionError):
            prefill(both, [sequence], [[1] * 127])  # longer than the context
        both.truncate(sequence, 0)
        assert np.array_equal(all_logits(both, sequence, [5, 6]), before)


@pytest.mark.gpu
def test_a_driver_without_a_gpu(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VPTQ_EMULATED_DEVICES", "0")
    why = "device cuda: there is no GPU that can be used: the driver lists none"
    for make in (context, _native.Gpu):
        with pytest.raises(UnsupportedError, match=f"^{why}$"):
            make()
    assert context(device="auto").why_not_cuda == why
    with pytest.raises(UnsupportedError, match=f"^{why}$"):  # what was asked for is not done elsewhere
        context(device="auto", gpu_layers=2)
    assert context(device="auto", gpu_layers=0).why_not_cuda == ""


@pytest.mark.gpu
def test_a_gpu_that_has_no_machine_code(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VPTQ_EMULATED_CAPABILITY", "75")
    why = (
        "device cuda: kernels cannot be loaded on emulation (compute capability 7.5): "
        "no kernel image is available for execution on the device"
    )
    with pytest.raises(UnsupportedError, match=f"^{re.escape(why)}$"):
        context()
    found = context(device="auto")
    assert found.device.startswith("cpu (") and found.why_not_cuda == why


@pytest.mark.gpu
class TestLittleMemory:
    def test_auto_takes_the_layers_that_fit(self, emulated: Emulated) -> None:
        emulated.have(15)
        found = context(device="auto")
        n_gpu = int(found.device.rpartition(" with ")[2].split()[0])
        assert 0 < n_gpu < N_LAYER
        assert f"; {n_gpu} of {N_LAYER} layers fit (option gpu_layers)" in found.why_not_cuda
        assert greedy(found, [[1, 5, 9]]) == greedy(context(device="cpu"), [[1, 5, 9]])

    def test_auto_takes_the_cpu_where_no_layer_fits(self, emulated: Emulated) -> None:
        emulated.have(13)
        found = context(device="auto")
        assert found.device.startswith("cpu (") and " with " not in found.device
        assert f"GiB, 0.00 GiB are available; 0 of {N_LAYER} layers fit" in found.why_not_cuda

    def test_as_many_as_it_says_fit_and_no_more(self, emulated: Emulated) -> None:
        emulated.have(15)
        with pytest.raises(OutOfMemoryError, match=r"weights of .* GiB and .* need .* are available") as all_:
            context()
        most = int(str(all_.value).partition("; ")[2].split()[0])
        context(gpu_layers=most)
        with pytest.raises(OutOfMemoryError, match=f"the weights of {most + 1} layers of .* GiB and"):
            context(gpu_layers=most + 1)
        with pytest.raises(OutOfMemoryError, match="layers fit"):  # what was asked for is not done by half
            context(device="auto", gpu_layers=most + 1)

    def test_what_makes_layers_faster_takes_what_is_left(self, emulated: Emulated) -> None:
        expected = greedy(context(), [[1]], n_steps=1)
        taken = []
        for mib in (18, 22, 55):
            emulated.have(mib)
            free = _native.Gpu().available_memory
            found = context()
            taken.append(free - found.available_memory)
            assert greedy(found, [[1]], n_steps=1) == expected
            del found  # before the next one looks at what is free
        assert taken == sorted(set(taken))


@pytest.mark.gpu
class TestSeveralGpus:
    def test_what_fits_on_one_is_on_one(self, emulated: Emulated) -> None:
        emulated.have(100, 100, 100)
        assert context().device == "cuda (emulation)"

    def test_the_same_numbers_as_on_one(self, emulated: Emulated) -> None:
        one = context(precision="auto")
        expected = logits(one)
        del one
        emulated.have(15, 14, 16)
        found = context(precision="auto")
        assert devices(found) == ["cuda", "cuda:1", "cuda:2"]
        # A prompt's: generated tokens go through a faster kernel where there is memory for it.
        assert np.array_equal(logits(found), expected)

    def test_and_the_cpu(self, emulated: Emulated) -> None:
        emulated.have(14.8, 14.8)
        found = context(device="auto")
        assert devices(found) == ["cpu", "cuda", "cuda:1"]
        assert "are available on 2 GPUs; " in found.why_not_cuda
        assert greedy(found, [[1, 5, 9]]) == greedy(context(device="cpu"), [[1, 5, 9]])
