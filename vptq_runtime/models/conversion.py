"""A checkpoint's conversion into the cache. Beside synthetic models, all that needs the converter here."""

from __future__ import annotations

from pathlib import Path

from vptq_runtime.errors import UnsupportedError

SPARE = 0.01  # of the weights: what a file has more of than the checkpoint's tensors
TOKENIZER_TIMES = 3  # it goes into the file whole, and its tokens and merges once more


def file_bytes(sizes: dict[str, int]) -> int:
    """About what the file takes that is made of a checkpoint's files, given their bytes."""
    weights = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
    beside = sum(size for name, size in sizes.items() if not name.endswith(".safetensors"))
    return int((1 + SPARE) * weights) + TOKENIZER_TIMES * beside


def check_config(path: Path, name: str, source: str) -> None:
    """Refuses a model that cannot be converted, by its config.json alone, before its weights are there.

    name: of the model, for people; source: as `vptq-quantize` takes it. Raises UnsupportedError, FileError.
    """
    from vptq_converter.architectures import find_architecture
    from vptq_converter.config import Section

    config = Section.read(path)
    find_architecture(config)
    quantization = config.section("quantization_config").values
    if not quantization:
        raise UnsupportedError(
            f"{name}: found a dense model, expected a VPTQ one: make it with "
            f"vptq-quantize {source} OUT_DIR --calibration TEXT"
        )
    method = quantization.get("quant_method", "vptq")
    if method != "vptq":
        raise UnsupportedError(f"{name}: found a model quantised by {method!r:.80}, expected a VPTQ one")


def check_checkpoint(path: Path, source: str) -> None:
    """The same of a checkpoint that is here; also its files are there."""
    from vptq_converter.checkpoint import Checkpoint

    check_config(Checkpoint(path).directory / "config.json", str(path), source)


def convert(source: Path, target: Path, name: str) -> None:
    """Writes the GGUF file of a checkpoint, lossless; name: what the model is called in it."""
    import vptq_converter

    vptq_converter.convert(source, target, name=name)
