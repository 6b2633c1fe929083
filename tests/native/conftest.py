"""The operations of the CPU on every instruction set that the machine has, and of a GPU; emulated GPUs."""

import pytest
from emulated import Emulated
from gpu import need_gpu

from vptq_runtime import _native


@pytest.fixture(params=_native.cpu_isas())
def cpu_operations(request: pytest.FixtureRequest) -> _native.Operations:
    return _native.Operations(request.param, 2)


GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "cuda-plain")]


@pytest.fixture(params=[*_native.cpu_isas(), *GPU])
def operations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> _native.Operations:
    name: str = request.param
    if name.startswith("cuda"):
        need_gpu()
        monkeypatch.setenv("VPTQ_CUDA_KERNEL", name.removeprefix("cuda").removeprefix("-"))
        name = "cuda"
    return _native.Operations(name, 2)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Emulated:
    need_gpu()
    if "emulation" not in _native.Gpu().description:
        pytest.skip("needs the emulation of a GPU")
    return Emulated(monkeypatch)
