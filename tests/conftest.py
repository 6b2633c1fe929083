"""What a model runs on."""

import signal

import pytest
from gpu import need_gpu

# Where the tests are a shell's background job, Ctrl-C is ignored, and would be by the commands they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "cuda":
        need_gpu()
    return name
