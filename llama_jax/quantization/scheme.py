"""How a model's matrices are kept in few bits: the choice alone, as flags and files tell it."""

import dataclasses

from llama_jax.config import require

KINDS = ("int8", "int4")
GROUP_SIZES = (32, 64)


def require_kind(kind: object) -> None:
    """`UsageError` unless it is one of `KINDS`."""
    require(kind in KINDS, f"quantize={kind!r} is unknown; expected 'int8' or 'int4'")


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Matrices of integers.

    Raises:
      UsageError: when made of an unknown kind or an unsupported group size.
    """

    kind: str  # "int8", a scale for each output; or "int4", a scale and an offset for each group
    group_size: int = 32  # inputs of a group; of int4 only

    def __post_init__(self) -> None:
        require_kind(self.kind)
        require(
            self.group_size in GROUP_SIZES,
            f"group_size={self.group_size} is not supported; expected 32 or 64",
        )
