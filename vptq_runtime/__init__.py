"""Run VPTQ models: `Runtime("model.gguf").generate("...")`."""

from importlib import import_module
from pathlib import Path
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
    from vptq_runtime.engine.engine import EngineStats
    from vptq_runtime.engine.stream import GenerationStream
    from vptq_runtime.generation import Generation, Timings, TokenLogprob
    from vptq_runtime.runtime import Runtime

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
    "Timings",
    "TokenLogprob",
    "UnsupportedError",
    "VPTQError",
    "demo_path",
]
# Of the distribution, too, and of the native library.
__version__ = "0.1.0"

# Loaded on first use: the converter needs only the errors, not the native library and the tokenizers.
_LAZY = {
    "EngineStats": "vptq_runtime.engine.engine",
    "Generation": "vptq_runtime.generation",
    "GenerationStream": "vptq_runtime.engine.stream",
    "Runtime": "vptq_runtime.runtime",
    "Timings": "vptq_runtime.generation",
    "TokenLogprob": "vptq_runtime.generation",
}


def __getattr__(name: str) -> Any:
    if name == "_native":
        from vptq_runtime import native_library

        return native_library.load()
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'vptq_runtime' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


def demo_path() -> Path:
    """The demo model, a file of the package: a small Llama that continues Python code.

    FileError says that this installation has none.
    """
    path = Path(__file__).parent / "demo" / "demo.gguf"
    if not path.is_file():
        raise FileError(f"{path}: found no demo model in this installation, expected one: give a model file")
    return path
