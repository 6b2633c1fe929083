"""What a model runs on."""

import os
import signal

import pytest
from gpu import need_gpu

# An emulated GPU would be compared with the CPU for each model anew; native/test_self_check.py is about that.
if "VPTQ_CUDA_LIBRARY" in os.environ:
    os.environ.setdefault("VPTQ_SELF_CHECK", "off")

# Where the tests are a shell's background job, Ctrl-C is ignored, and would be by the commands they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "cuda":
        need_gpu()
    return name
