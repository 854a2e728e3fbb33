"""Which matrices of a model in four bits keep eight: as many as its memory has room for.

Knows shapes alone. What is lost was measured on small models: with all in four bits, half of what
perplexity loses it loses by keys, values and tables; of the blocks, most by the last, after which
nothing makes good what went wrong.
"""

import dataclasses

from llama_jax.config import ModelConfig
from llama_jax.packing import BLOCK
from llama_jax.quantization.scheme import Quantization

MOST = 0.2  # of the memory that float32 takes
INT8_ALWAYS = ("wk", "wv")


@dataclasses.dataclass(frozen=True)
class Groups:
    """Inputs that share a scale, of the matrices here and there; 0: all of an output, in int8."""

    tables: int
    last_block: int
    blocks: int

    def of(self, name: str, is_last: bool) -> int:
        """Those of a block's linear layer."""
        if name in INT8_ALWAYS:
            return 0
        return self.last_block if is_last else self.blocks


def groups_of(config: ModelConfig, quantization: Quantization) -> Groups:
    """What a model of this shape keeps in which form."""
    if quantization.kind == "int8":
        return Groups(0, 0, 0)
    size = quantization.group_size
    chosen = Groups(size, size, size)
    for name in ("tables", "last_block"):
        wider = dataclasses.replace(chosen, **{name: 0})
        if _bytes(config, wider) <= MOST * 4 * _numbers(config):
            chosen = wider
    return chosen


def _shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a block's matrices."""
    D, F, keys = config.dim, config.ffn_dim, config.num_kv_heads * config.head_dim
    shapes = {"wq": (D, D), "wk": (keys, D), "wv": (keys, D), "wo": (D, D)}
    return shapes | {"gate": (F, D), "up": (F, D), "down": (D, F)}


def _tables(config: ModelConfig) -> int:
    return 1 if config.tied_embeddings else 2


def _norms(config: ModelConfig) -> int:
    """Numbers that stay floats."""
    return (2 * config.num_layers + 1) * config.dim


def _numbers(config: ModelConfig) -> int:
    block = sum(outputs * inputs for outputs, inputs in _shapes(config).values())
    tables = _tables(config) * config.vocab_size * config.dim
    return tables + config.num_layers * block + _norms(config)


def _bytes(config: ModelConfig, groups: Groups) -> int:
    """Bytes that a model takes whose norms are float32."""

    def block(is_last: bool) -> int:
        shapes = _shapes(config).items()
        return sum(_matrix(*shape, groups.of(name, is_last)) for name, shape in shapes)

    tables = _tables(config) * _matrix(config.vocab_size, config.dim, groups.tables)
    return tables + (config.num_layers - 1) * block(False) + block(True) + 4 * _norms(config)


def _matrix(outputs: int, inputs: int, group_size: int) -> int:
    """Bytes of a `QuantizedMatrix`."""
    if not group_size:
        return outputs * (inputs + 4)
    padded = -(-inputs // BLOCK) * BLOCK
    return outputs * (padded // 2 + 4 * padded // group_size)
