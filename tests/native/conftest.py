"""The operations of the CPU on every instruction set that the machine has, and of a GPU."""

import pytest
from gpu import need_gpu

from vptq_runtime import _native


@pytest.fixture(params=_native.cpu_isas())
def cpu_operations(request: pytest.FixtureRequest) -> _native.Operations:
    return _native.Operations(request.param, 2)


@pytest.fixture(params=[*_native.cpu_isas(), pytest.param("cuda", marks=pytest.mark.gpu)])
def operations(request: pytest.FixtureRequest) -> _native.Operations:
    if request.param == "cuda":
        need_gpu()
    return _native.Operations(request.param, 2)
