"""Models whose matrices are small integers: `quantize` makes one of a float model."""

from llama_jax.quantization.modules import QuantizedLinear, QuantizedMatrix, rounded
from llama_jax.quantization.scheme import GROUP_SIZES, KINDS, Quantization, require_kind
from llama_jax.quantization.surgery import abstract_quantized, held_bytes, quantize

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
