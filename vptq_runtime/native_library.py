"""The native library: where it lies, and whether it was built from these sources."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from threading import Lock
from types import ModuleType

import vptq_runtime

NAME = "vptq_runtime._native"
PACKAGE = Path(__file__).parent
REMEDY = f"run `pip install .` in {PACKAGE.parent}"
_lock = Lock()


def load() -> ModuleType:
    """vptq_runtime._native, which lies beside these sources, or in an installed package that they hide: so it
    is in a clone. Nothing else comes from there.

    Raises ImportError where there is none, and where it was built from other sources than these.
    """
    with _lock:
        module = _loaded()
        _check(module)
        sys.modules[NAME] = vptq_runtime._native = module
        return module


@cache  # also of one that is refused: it cannot be loaded twice
def _loaded() -> ModuleType:
    spec = importlib.util.find_spec(NAME) or _hidden_spec()
    if spec is None or spec.loader is None:
        raise ImportError(f"{PACKAGE}: found no native library, expected one: {REMEDY}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.pop(NAME, None)  # some enter themselves
    return module


def _hidden_spec() -> ModuleSpec | None:
    from pkgutil import extend_path  # only here: few need it, and it loads much

    return PathFinder.find_spec(NAME, extend_path(list(vptq_runtime.__path__), "vptq_runtime"))


def _check(module: ModuleType) -> None:
    from hashlib import sha256

    interface = sha256((PACKAGE / "_native.pyi").read_bytes()).hexdigest()
    found = (getattr(module, "version", "unknown"), getattr(module, "interface", "unknown"))
    if found != (vptq_runtime.__version__, interface):
        raise ImportError(
            f"{module.__file__}: found a native library of version {found[0]}, interface {found[1]:.12}, "
            f"expected {vptq_runtime.__version__}, {interface:.12}, as of {PACKAGE}: {REMEDY}"
        )
