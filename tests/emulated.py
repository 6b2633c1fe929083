"""The memory of the GPUs that the emulation has."""

import gc

import pytest

from vptq_runtime import _native

MIB = 1 << 20


class Emulated:
    """GPUs of any number and memory, which a real one is not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._setenv = monkeypatch.setenv
        gc.collect()
        gpu = _native.Gpu()
        self._taken = gpu.total_memory - gpu.available_memory  # by whatever other tests have left

    def have(self, *mib: float) -> None:
        """A device for each number, which has so many MiB free."""
        sizes = [int(mib[0] * MIB) + self._taken, *(int(each * MIB) for each in mib[1:])]
        self._setenv("VPTQ_EMULATED_DEVICES", str(len(mib)))
        self._setenv("VPTQ_EMULATED_MEMORY", ",".join(map(str, sizes)))
