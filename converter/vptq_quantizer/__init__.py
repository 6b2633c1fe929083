"""Makes VPTQ checkpoints of dense ones: `quantize("model", "out", QuantizeOptions(), calibration=["a.txt"])`.

The method is the paper's, "VPTQ: Extreme Low-bit Vector Post-Training Quantization" (arXiv 2409.17066);
docs/quantize.md says what is done, step by step.
"""

from typing import TYPE_CHECKING, Any

from vptq_quantizer.options import QuantizeOptions
from vptq_runtime.errors import OptionError

if TYPE_CHECKING:
    from vptq_quantizer.run.model_quantizer import quantize

__all__ = ["QuantizeOptions", "quantize"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: torch and transformers take seconds, and belong to an extra.
    if name != "quantize":
        raise AttributeError(f"module 'vptq_quantizer' has no attribute {name!r}")
    try:
        from vptq_quantizer.run.model_quantizer import quantize
    except ImportError as error:
        missing = error.name or error
        raise OptionError(
            f'quantising needs {missing}, which is not installed: pip install "vptq-runtime[quantize]"'
        ) from error
    return quantize
