"""Run VPTQ models: `Runtime("model.gguf").generate("...")`."""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vptq_runtime.errors import (
    BusyError,
    DeviceError,
    FileError,
    OptionError,
    OutOfMemoryError,
    UnsupportedError,
    VPTQError,
)

if TYPE_CHECKING:
    from vptq_runtime.runtime import EngineStats, Generation, GenerationStream, Runtime

__all__ = [
    "BusyError",
    "DeviceError",
    "EngineStats",
    "FileError",
    "Generation",
    "GenerationStream",
    "OptionError",
    "OutOfMemoryError",
    "Runtime",
    "UnsupportedError",
    "VPTQError",
    "demo_path",
]


def demo_path() -> Path:
    """The demo model, a file of the package: a small Llama that continues Python code.

    FileError says that this installation has none.
    """
    path = Path(__file__).parent / "demo" / "demo.gguf"
    if not path.is_file():
        raise FileError(f"{path}: found no demo model in this installation, expected one: give a model file")
    return path


def __getattr__(name: str) -> Any:
    # Loaded on first use: the converter needs only the errors, not the native library and the tokenizers.
    if name == "_native":
        return _import_native()
    if name in ("EngineStats", "Generation", "GenerationStream", "Runtime"):
        from vptq_runtime import runtime

        return getattr(runtime, name)
    raise AttributeError(f"module 'vptq_runtime' has no attribute {name!r}")


def _import_native() -> ModuleType:
    try:
        return import_module("vptq_runtime._native")
    except ModuleNotFoundError as error:
        if error.name != "vptq_runtime._native":
            raise
        raise ImportError(
            f"{Path(__file__).parent} has no native library: a source tree, which hides an installed one; "
            "start Python elsewhere, or install the tree as editable (docs/hacking.md)"
        ) from None
