"""Models with int8 or int4 matrices: `quantize` makes one of a float model."""

from llama_jax.quantization.modules import QuantizedLinear, QuantizedMatrix, quantize_kernel
from llama_jax.quantization.surgery import (
    GROUP_SIZES,
    KINDS,
    QuantizationConfig,
    abstract_quantized,
    model_nbytes,
    quantize,
    require_kind,
)

__all__ = [
    "GROUP_SIZES",
    "KINDS",
    "QuantizationConfig",
    "QuantizedLinear",
    "QuantizedMatrix",
    "abstract_quantized",
    "model_nbytes",
    "quantize",
    "quantize_kernel",
    "require_kind",
]
