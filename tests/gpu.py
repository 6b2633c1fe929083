"""Whether there is a GPU to test on, or an emulation of one."""

import functools
import os

import pytest

from vptq_runtime import _native
from vptq_runtime.errors import UnsupportedError


@functools.cache
def why_not() -> str:
    try:
        _native.Operations("cuda", 1)
    except UnsupportedError as error:
        return str(error)
    return ""


def need_gpu() -> None:
    """Skips the test where there is none; a library that VPTQ_CUDA_LIBRARY names has to work."""
    if why_not():
        if "VPTQ_CUDA_LIBRARY" in os.environ:
            pytest.fail(why_not())
        pytest.skip(why_not())
