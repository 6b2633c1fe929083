"""The operations of the CPU on every instruction set that the machine has, and of a GPU."""

import os

import pytest

from vptq_runtime import _native
from vptq_runtime.errors import UnsupportedError


@pytest.fixture(params=[*_native.cpu_isas(), pytest.param("cuda", marks=pytest.mark.gpu)])
def operations(request: pytest.FixtureRequest) -> _native.Operations:
    try:
        return _native.Operations(request.param, 2)
    except UnsupportedError as e:
        if "VPTQ_CUDA_LIBRARY" in os.environ:  # it is there to be tested
            raise
        pytest.skip(str(e))
