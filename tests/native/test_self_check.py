"""A GPU's numbers are compared with the CPU's before it is trusted with a model: what is right passes, with
layers of any kind, and what is wrong anywhere does not."""

import gc
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feeding import all_logits
from gpu import need_gpu
from layer_tensors import MATRIX_TYPES, Raw, raw, vptq_layer
from tiny_gguf import KEYS, tensors, write

from vptq_runtime import _native, demo_path
from vptq_runtime.errors import DeviceError

N_FEATURES = 96  # of all layers' inputs and outputs
VPTQ: list[dict[str, Any]] = [
    dict(v=2, k=16),
    dict(v=3, k=5, dtype="f32"),
    dict(v=4, k=256, r=256, perm=False),
    dict(v=5, k=7, r=3, dtype="bf16"),
    dict(v=6, k=4096, g=2),
    dict(v=8, k=2, perm=False, norm_dim=None),
    dict(v=8, k=65536, perm=False),
    dict(v=8, k=65536, r=256, bias=True),
    dict(v=8, k=65536, r=4, dtype="bf16"),
    dict(v=8, k=512, r=512, dtype="f32", norm_dim=1),
    dict(v=12, k=4096, r=4096, g=5, n0=6, k0=8192),
    dict(v=12, k=64, n0=1, v0=8, norm_dim=1, bias=True),
    dict(v=16, k=32768, r=32768, norm_dim=1),
    dict(v=16, k=65536, r=64, norm_dim=None),
    dict(v=64, k=9),
    dict(v=4, k=16, r=8, g=16, n0=16, v0=4),
    dict(v=1, k=4),
]


def layers() -> list[dict[str, Raw]]:
    """One layer (N_FEATURES, N_FEATURES) of each kind."""
    rng = np.random.default_rng(0)
    found = [{"weight": raw(rng.normal(size=(N_FEATURES, N_FEATURES)), dtype)} for dtype in MATRIX_TYPES]
    for kind in VPTQ:
        group_size = (N_FEATURES - kind.get("n0", 0)) // kind.get("g", 1)
        made, n_in = vptq_layer(rng, out=N_FEATURES, group_size=group_size, **kind)
        assert n_in == N_FEATURES
        found.append(made)
    return found


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory: pytest.TempPathFactory) -> _native.Model:
    """Four layers, two of them windowed; every linear layer is of another kind, until all kinds are there."""
    linear = layers()
    linear += linear[: 4 * 7 - len(linear)]
    assert len(linear) == 4 * 7
    keys = KEYS | {"llama.block_count": 4, "llama.embedding_length": N_FEATURES}
    keys |= {"llama.feed_forward_length": N_FEATURES, "llama.attention.head_count": 3}
    keys |= {"llama.attention.head_count_kv": 3, "llama.attention.sliding_window": 4096}
    keys |= {"llama.attention.sliding_window_pattern": [True, False, True, False]}
    keys |= {
        f"llama.{name}": 32
        for name in ("attention.key_length", "attention.value_length", "rope.dimension_count")
    }
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(keys["llama.vocab_size"], N_FEATURES))
    arrays = {"token_embd.weight": raw(matrix, "q8_0"), "output.weight": raw(matrix, "bf16")}
    for norm in ("output_norm", *(f"blk.{i}.{n}" for i in range(4) for n in ("attn_norm", "ffn_norm"))):
        arrays[f"{norm}.weight"] = raw(np.ones(N_FEATURES), "f32")
    for i, layer in enumerate(linear):
        arrays |= {f"blk.{i // 7}.{names[i % 7]}.{suffix}": tensor for suffix, tensor in layer.items()}
    return _native.Model(str(write(tmp_path_factory.mktemp("kinds") / "kinds.gguf", keys, arrays)))


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("isa", _native.cpu_isas())
def test_right_numbers_of_every_kind_pass(
    all_kinds: _native.Model, isa: str, kv_type: str, rounded: bool
) -> None:
    assert _native.self_check(all_kinds, isa=isa, kv_type=kv_type, rounded=rounded, n_threads=2) > 0


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU, with the self-check on."""
    need_gpu()
    monkeypatch.delenv("VPTQ_SELF_CHECK", raising=False)
    return monkeypatch


@pytest.fixture
def emulated(checked: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    if "emulation" not in _native.Gpu().description:
        pytest.skip("needs the emulation of a GPU")
    return checked


def context(model: _native.Model | None = None, **options: Any) -> _native.Context:
    return _native.Context(
        model or _native.Model(demo_path()),
        **{"device": "cuda", "n_ctx": 64, "n_threads": 2, "kv_type": "f16"} | options,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["f32", "auto"])
@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
def test_a_gpu_that_is_right_passes(checked: pytest.MonkeyPatch, kv_type: str, precision: str) -> None:
    found = context(device="auto", kv_type=kv_type, precision=precision)
    assert found.device.startswith("cuda (") and found.why_not_cuda == ""


@pytest.mark.gpu
def test_layers_of_any_kind_pass_on_a_gpu(checked: pytest.MonkeyPatch, all_kinds: _native.Model) -> None:
    assert context(all_kinds).device.startswith("cuda (")


# Where the last block of threads of a source's launches is left out: which operation is found to be wrong,
# the first one, and what of it.
LOST = r"[1-9]\d* of [1-9]\d* numbers are not finite, expected all of them to be"
DIFFERENT = r"found numbers that differ from the CPU's by \S+ \(relative L2\), expected at most 1\.0e-05"
LINEAR = r"linear layers \(v4-k256-256 F16, norms per input\)"
FAULTS = {
    "embed": ("embed", LOST),
    "rms_norm": ("rms_norm", LOST),
    "dense_few": (r"linear layers \(F16\), 1 token", LOST),
    "vq_sliced": (f"{LINEAR}, 1 token", LOST),
    "vq_few": (f"{LINEAR} in little memory, 1 token", LOST),
    "activations": (f"{LINEAR}, 33 tokens of a prompt", LOST),
    "vq_many": (f"{LINEAR}, 33 tokens of a prompt", LOST),
    "dense_many": (r"linear layers \(F16\), 33 tokens of a prompt", LOST),
    "rope": ("rope", DIFFERENT),
    "store_kv": ("store_kv and attention of prompts", LOST),
    "attention_many": ("store_kv and attention of prompts", LOST),
    "attention_few": ("store_kv and attention of generated tokens", LOST),
    "elementwise": ("swiglu", DIFFERENT),
    "top_logits": ("the largest logits", "105 of 210 are not those that sorting finds, expected none"),
}


def test_every_source_of_kernels_can_be_wrong() -> None:
    sources = (Path(__file__).parents[2] / "native/src/cuda/kernels").glob("*.cu")
    assert {path.stem for path in sources} - {"attention"} == FAULTS.keys()  # which launches others' kernels


@pytest.mark.gpu
@pytest.mark.parametrize("source", FAULTS)
def test_a_wrong_kernel_is_found(emulated: pytest.MonkeyPatch, tmp_path: Path, source: str) -> None:
    operation, what = FAULTS[source]
    path = demo_path()
    if source == "dense_many":  # the demo model's only dense layer, its output, takes no prompts
        path = write(tmp_path / "tiny.gguf", KEYS, tensors())
    model = _native.Model(str(path))
    emulated.setenv("VPTQ_EMULATED_FAULT", source)
    with pytest.raises(DeviceError) as error:
        context(model)
    assert re.fullmatch(rf"device cuda \(emulation\): self-check of {operation}: {what}", str(error.value))
    with pytest.raises(DeviceError):  # what was asked for is not done elsewhere
        context(model, device="auto", gpu_layers=99)
    found = context(model, device="auto")
    assert found.device.startswith("cpu (") and found.why_not_cuda == str(error.value)
    assert np.isfinite(all_logits(found, found.new_sequence(), [1, 2])).all()


@pytest.mark.gpu
def test_a_kernel_that_fails(emulated: pytest.MonkeyPatch) -> None:
    emulated.setenv("VPTQ_EMULATED_FAILURE", "rope")
    failure = "cuda: launching a kernel: invalid configuration argument"
    why = f"device cuda (emulation): self-check of rope: {failure}"
    with pytest.raises(DeviceError, match=f"^{re.escape(why)}$"):
        context()
    assert context(device="auto").why_not_cuda == why


@pytest.mark.gpu
def test_what_a_gpu_does_not_do_for_a_model_can_be_wrong(emulated: pytest.MonkeyPatch) -> None:
    """Without the first layer there is no embedding, in float32 no tensor core."""
    for source, options in {
        "embed": {"gpu_layers": 3},
        "vq_many": {"precision": "f32"},
        "activations": {"precision": "f32"},
        "attention_many": {"kv_type": "f32"},
    }.items():
        emulated.setenv("VPTQ_EMULATED_FAULT", source)
        assert "cuda (" in context(**options).device
    emulated.setenv("VPTQ_CUDA_KERNEL", "plain")
    emulated.setenv("VPTQ_EMULATED_FAULT", "vq_sliced")
    assert "cuda (" in context().device


@pytest.mark.gpu
def test_each_gpu_that_gets_layers_is_checked(emulated: pytest.MonkeyPatch) -> None:
    """And no other."""
    gc.collect()
    mib = 1 << 20
    gpu = _native.Gpu()
    taken = gpu.total_memory - gpu.available_memory  # by whatever other tests have left
    del gpu
    emulated.setenv("VPTQ_EMULATED_DEVICES", "3")
    for free, expected in ((14, "cuda:1 (emulation)"), (100, "")):
        emulated.setenv("VPTQ_EMULATED_MEMORY", f"{free * mib + taken},{64 * mib},{64 * mib}")
        emulated.setenv("VPTQ_EMULATED_FAULT", "rope:1")
        found = context(device="auto", n_ctx=128, kv_type="f32")
        assert expected in found.why_not_cuda
        assert found.device.startswith("cpu" if expected else "cuda")
        del found


@pytest.mark.gpu
def test_it_can_be_turned_off(emulated: pytest.MonkeyPatch) -> None:
    emulated.setenv("VPTQ_EMULATED_FAULT", "rope")
    emulated.setenv("VPTQ_SELF_CHECK", "off")
    assert context().device == "cuda (emulation)"


@pytest.mark.gpu
def test_its_memory_is_given_back(checked: pytest.MonkeyPatch) -> None:
    def left() -> int:
        gc.collect()
        return context().available_memory

    left()
    with_check = left()
    checked.setenv("VPTQ_SELF_CHECK", "off")
    assert left() == with_check
