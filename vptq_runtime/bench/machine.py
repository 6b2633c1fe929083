"""What vptq-bench says of the machine: the CPU or the GPU, its memory, and what the process takes of that."""

from __future__ import annotations

import os
import platform
import resource
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vptq_runtime import _native
from vptq_runtime.bench.speed import REST_BYTES
from vptq_runtime.errors import VPTQError

READ_BYTES = 1 << 29  # more than caches hold
READS = 5
READ_METHOD = "numpy.max over 512 MiB, or a quarter of the available memory where that is less; best of 5"
COPY_METHOD = "median of 11 copies of 1 GiB, or a sixteenth of the free memory, read and written"
GPU_REST_BYTES = 512 << 20  # the activations of a batch


class Cpu:
    """The processor, and the memory that it shares with all other processes."""

    name = "cpu"
    memory_name = "memory"
    rest_bytes = REST_BYTES

    def available_memory(self) -> int:
        return _native.available_memory()

    def peak_memory(self) -> int:
        """Most bytes that this process had resident, mapped files included."""
        try:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        except OSError:
            pass
        # What follows an exec here may be the parent's: hence only where there is nothing better.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def bandwidth(self, n_threads: int) -> float:
        """Bytes a second that n_threads threads read together, each its part, as READ_METHOD says."""
        n_bytes = min(READ_BYTES, _native.available_memory() // 4)
        buffer = np.full(n_bytes // 4, 1, np.int32)  # written: pages of zeros would all be the same one
        parts = np.array_split(buffer, n_threads)
        seconds = []
        for _ in range(READS):
            threads = [threading.Thread(target=part.max) for part in parts]
            begin = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            seconds.append(time.perf_counter() - begin)
        return buffer.nbytes / min(seconds)

    def description(self, bandwidth: Mapping[int, float]) -> dict[str, Any]:
        """For the report: the processor, its cores that this process may use, and memory in bytes."""
        return processor() | {
            "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            "available_bytes": self.available_memory(),
            "read_bandwidth": {str(n): rate for n, rate in bandwidth.items()},  # threads: bytes a second
            "read_bandwidth_method": READ_METHOD,
        }


class Gpu:
    """The GPU of device "cuda". Raises UnsupportedError where there is none."""

    name = "cuda"
    memory_name = "GPU memory"
    rest_bytes = GPU_REST_BYTES

    def __init__(self) -> None:
        self._gpu = _native.Gpu()
        self._available = self._gpu.available_memory

    def available_memory(self) -> int:
        """In bytes, before anything was measured."""
        return self._available

    def peak_memory(self) -> int:
        """Bytes taken since then: a context takes more as it goes, and gives nothing back before its end."""
        return self._available - self._gpu.available_memory

    def bandwidth(self, n_threads: int) -> float:
        """Bytes a second, as COPY_METHOD says; of threads there is nothing to tell."""
        return self._gpu.copy_bandwidth()

    def description(self, bandwidth: Mapping[int, float]) -> dict[str, Any]:
        """For the report: the host's processor, and the GPU's memory in bytes."""
        return processor() | {
            "memory_bytes": self._gpu.total_memory,
            "available_bytes": self._available,
            "copy_bandwidth": bandwidth[0],
            "copy_bandwidth_method": COPY_METHOD,
        }


def find(device: str) -> Cpu | Gpu:
    """What "auto", "cpu" or "cuda" is here."""
    if device == "cpu":
        return Cpu()
    try:
        return Gpu()
    except VPTQError:
        if device == "cuda":
            raise
        return Cpu()


def processor() -> dict[str, Any]:
    return {"cpu": _cpu_name(), "cores": _native.physical_cores()}


def _cpu_name() -> str:
    """As /proc/cpuinfo or a board's device tree has it, else the architecture's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
        return Path("/proc/device-tree/model").read_text(errors="replace").strip("\0\n ")
    except OSError:
        return platform.machine() or "unknown"
