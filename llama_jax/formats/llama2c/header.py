"""The first bytes of a llama2.c model: which version it is, its sizes, how long it has to be.

Does not know in which order the tensors follow.
"""

import dataclasses
import struct
from pathlib import Path

from llama_jax.config import ModelConfig
from llama_jax.errors import UserError, describe_file
from llama_jax.formats.llama2c.int8 import quantized_bytes

MAGIC = 0x616B3432  # of all versions but the first, which has none
LENGTHS = (28, 256, 256)  # bytes of the header, by version
LATER = "<Ii7iB"  # magic, version, sizes, whether the embedding is the output matrix too
GROUP_OFFSET = struct.calcsize(LATER)  # of version 2's group size, an int32
SIZES = {  # the seven int32, and what our config calls them
    "dim": "dim",
    "hidden_dim": "ffn_dim",
    "n_layers": "num_layers",
    "n_heads": "num_heads",
    "n_kv_heads": "num_kv_heads",
    "vocab_size": "vocab_size",
    "max_seq_len": "context_length",
}
# Objects are made for each layer, however small; positions are exact in float32 up to here.
MOST = {"n_layers": 1000, "max_seq_len": 2**24}
FIXED = {"norm_eps": 1e-5, "rope_theta": 10000.0}  # in llama2.c's code, hence in none of its files


@dataclasses.dataclass(frozen=True)
class Header:
    """What a header says."""

    version: int
    config: ModelConfig
    group_size: int  # numbers that share a scale in version 2; 1 in the others


def read_header(path: Path) -> Header:
    """The header of a file, which is exactly as long as it says.

    Raises:
      UserError: if it is not, or is no llama2.c model at all.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}; expected a llama2.c model such as stories15M.bin")
    with path.open("rb") as file:
        head = file.read(max(LENGTHS))
    if why := describe_file(head):
        raise UserError(f"{path} is no llama2.c model but {why}")
    if len(head) < LENGTHS[0]:
        raise UserError(f"{path} is no llama2.c model: it has only {len(head)} bytes")
    version, sizes, tied, group_size = _unpack(path, head)
    _require_sizes(sizes | {"group_size": group_size}, f"{path} is no llama2.c model")
    _require_length(path, version, sizes, tied, group_size)
    return Header(version, _config(path, sizes, tied), group_size)


def pack_header(config: ModelConfig, version: int, group_size: int) -> bytes:
    """The header of a model.

    Raises:
      UserError: if llama2.c has no place for something that the model depends on.
    """
    found = {name: getattr(config, name) for name in FIXED}
    lost = [f"{name}={value}" for name, value in found.items() if value != FIXED[name]]
    if config.rope_scaling.kind != "none":
        lost.append(f"rope_scaling={config.rope_scaling.kind}")
    if config.head_size * config.num_heads != config.dim:
        lost.append(f"head_dim={config.head_size}")
    if lost:
        raise UserError(
            f"llama2.c has no place for {', '.join(lost)}: its code has norm_eps=1e-05,"
            " rope_theta=10000, no rope scaling and heads of dim / n_heads; choose another format"
        )
    sizes = {theirs: getattr(config, ours) for theirs, ours in SIZES.items()}
    _require_sizes(sizes, "llama2.c has no place for this model")
    if version == 0:
        sign = 1 if config.tied_embeddings else -1
        return struct.pack("<7i", *(sizes | {"vocab_size": sign * config.vocab_size}).values())
    head = struct.pack(LATER, MAGIC, version, *sizes.values(), config.tied_embeddings)
    head += struct.pack("<i", group_size) if version == 2 else b""
    return head.ljust(LENGTHS[version], b"\0")


def _unpack(path: Path, head: bytes) -> tuple[int, dict[str, int], bool, int]:
    """Version, sizes, whether tied, and group size, as they stand there."""
    if struct.unpack_from("<I", head)[0] != MAGIC:
        sizes = dict(zip(SIZES, struct.unpack_from("<7i", head)))
        tied = sizes["vocab_size"] > 0
        return 0, sizes | {"vocab_size": abs(sizes["vocab_size"])}, tied, 1
    if len(head) < max(LENGTHS):
        raise UserError(f"{path} is cut short within its header; copy it again")
    _, version, *numbers, tied = struct.unpack_from(LATER, head)
    if version not in (1, 2):
        raise UserError(f"{path} is of llama2.c's version {version}; expected 0, 1 or 2")
    if tied not in (0, 1):
        raise UserError(f"{path} is damaged: byte {GROUP_OFFSET - 1} is {tied}; expected 0 or 1")
    group_size = struct.unpack_from("<i", head, GROUP_OFFSET)[0] if version == 2 else 1
    return version, dict(zip(SIZES, numbers)), bool(tied), group_size


def _require_sizes(sizes: dict[str, int], complaint: str) -> None:
    """Sizes that a model can have; heads are left to `ModelConfig`."""
    most = dict.fromkeys(sizes, 2**31 - 1) | MOST
    wrong = {name: size for name, size in sizes.items() if not 1 <= size <= most[name]}
    if wrong:
        raise UserError(f"{complaint}: {_listed(wrong)} out of range")


def _require_length(
    path: Path, version: int, sizes: dict[str, int], tied: bool, group_size: int
) -> None:
    """The file has the bytes that its header asks for; else one line with both numbers."""
    D, F, L, N, K, V, S = sizes.values()
    kv = K * (D // N)
    in_matrices = V * D * (1 if tied else 2) + L * D * (2 * D + 2 * kv + 3 * F)
    weight = quantized_bytes(in_matrices, group_size) if version == 2 else 4 * in_matrices
    tables = S * (D // N) if version == 0 else 0
    expected = LENGTHS[version] + weight + 4 * (2 * L * D + D + tables)
    said = _listed(sizes | ({"group_size": group_size} if version == 2 else {}))
    if (found := path.stat().st_size) != expected:
        raise UserError(
            f"{path} has {found:,} bytes, but what its header says, llama2.c's version {version}"
            f" with {said}, has {expected:,}; copy it again"
        )
    if any(rows * D % group_size for rows in (V, D, kv, F)):
        raise UserError(f"{path} has a group size that does not divide every matrix: {said}")


def _listed(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())


def _config(path: Path, sizes: dict[str, int], tied: bool) -> ModelConfig:
    ours = {SIZES[name]: size for name, size in sizes.items()}
    hidden_dim = ours.pop("ffn_dim")
    try:
        return ModelConfig(
            **ours,  # type: ignore[arg-type]
            **FIXED,  # type: ignore[arg-type]
            hidden_dim=hidden_dim,
            tied_embeddings=tied,
        )
    except UserError as error:
        raise UserError(f"{path} is no llama2.c model: {error}") from error
