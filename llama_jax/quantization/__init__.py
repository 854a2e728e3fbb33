"""Models whose matrices are small integers: `quantize` makes one of a float model."""

from llama_jax.quantization.modules import QuantizedLinear, QuantizedMatrix, rounded
from llama_jax.quantization.surgery import (
    GROUP_SIZES,
    KINDS,
    Quantization,
    abstract_quantized,
    held_bytes,
    quantize,
    require_kind,
)

__all__ = [
    "GROUP_SIZES",
    "KINDS",
    "Quantization",
    "QuantizedLinear",
    "QuantizedMatrix",
    "abstract_quantized",
    "held_bytes",
    "quantize",
    "require_kind",
    "rounded",
]
