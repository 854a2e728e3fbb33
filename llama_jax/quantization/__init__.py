"""Models with int8, int4 or NF4 matrices: `quantize` makes one of a float model."""

from llama_jax.quantization.modules import QuantizedLinear, QuantizedMatrix, quantize_kernel
from llama_jax.quantization.rounding import GROUP_SIZES, KINDS, QuantizationConfig, require_kind
from llama_jax.quantization.surgery import (
    abstract_quantized,
    model_nbytes,
    quantize,
    restack,
    shard_matmuls,
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
    "restack",
    "shard_matmuls",
]
