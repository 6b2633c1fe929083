"""The CPU backend's operations, on every instruction set that the machine has."""

import pytest

from vptq_runtime import _native


@pytest.fixture(params=_native.cpu_isas())
def operations(request: pytest.FixtureRequest) -> _native.Operations:
    return _native.Operations(request.param, 2)
