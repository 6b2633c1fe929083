"""Room on the disk: asked for before it is needed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from vptq_runtime.errors import FileError


def free_bytes(directory: Path) -> int:
    """What there is on the disk of a directory, or of the first one above it that exists."""
    for path in (directory, *directory.parents):
        if path.exists():
            return shutil.disk_usage(path).free
    return 0


def check_free(directory: Path, needs: Mapping[str, int], name: str) -> None:
    """Raises FileError where less is free than all needs (bytes, by what they are for) take together."""
    total, free = sum(needs.values()), free_bytes(directory)
    if total > free:
        parts = ", ".join(f"{what} {size(n_bytes)}" for what, n_bytes in needs.items())
        raise FileError(
            f"{name}: needs {size(total)} of disk ({parts}), found {size(free)} free in {directory}: "
            "make room, or name another place in VPTQ_CACHE"
        )


def used_bytes(directory: Path) -> int:
    """What the files below a directory have in them."""
    sizes = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            sizes += path.lstat().st_size if path.is_file() and not path.is_symlink() else 0
    return sizes


def size(n_bytes: int) -> str:
    """As people read it, in powers of 1000: as disks and downloads are sold."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.{2 if unit == 'GB' else 1}f} {unit}"
    return f"{n_bytes} bytes"
