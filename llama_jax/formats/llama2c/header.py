"""The header of a llama2.c model: its version, its sizes, and the length of the file."""

import dataclasses
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.config import ModelConfig
from llama_jax.errors import UserError, describe_file
from llama_jax.formats.llama2c.int8 import quantized_bytes
from llama_jax.formats.rules import beyond_llama2

MAGIC = 0x616B3432  # of all versions but 0, which has none
LENGTHS = (28, 256, 256)  # bytes of the header, by version
LATER = "<Ii7iB"  # magic, version, sizes, whether embeddings are tied
GROUP_OFFSET = struct.calcsize(LATER)  # of version 2's group size, an int32
SIZES = {  # the seven int32, and their names in our config
    "dim": "dim",
    "hidden_dim": "ffn_dim",
    "n_layers": "num_layers",
    "n_heads": "num_heads",
    "n_kv_heads": "num_kv_heads",
    "vocab_size": "vocab_size",
    "max_seq_len": "context_length",
}
# Objects are made for each layer, however small; positions are exact in float32 up to here.
LIMITS = {"n_layers": 1000, "max_seq_len": 2**24}
FIXED: dict[str, Any] = {"norm_eps": 1e-5, "rope_theta": 10000.0}  # constants in llama2.c's code


@dataclasses.dataclass(frozen=True)
class Header:
    """The content of a header."""

    version: int
    config: ModelConfig
    group_size: int  # numbers that share a scale in version 2; 1 in the others


def read_header(path: Path) -> Header:
    """Return the header of a file.

    Raises:
      UserError: if it is not a llama2.c model, or not exactly as long as its header says.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}; expected a llama2.c model such as stories15M.bin")
    with path.open("rb") as file:
        head = file.read(max(LENGTHS))
    if why := describe_file(head):
        raise UserError(f"{path} is not a llama2.c model but {why}")
    if len(head) < LENGTHS[0]:
        raise UserError(f"{path} is not a llama2.c model: it has only {len(head)} bytes")
    version, sizes, tied, group_size = _unpack(path, head)
    _check_sizes(sizes | {"group_size": group_size}, f"{path} is not a llama2.c model")
    _check_length(path, version, sizes, tied, group_size)
    ours: dict[str, Any] = {SIZES[name]: size for name, size in sizes.items()}
    hidden_dim = ours.pop("ffn_dim")
    try:
        config = ModelConfig(**ours, **FIXED, hidden_dim=hidden_dim, tied_embeddings=tied)
    except UserError as error:
        raise UserError(f"{path} is not a llama2.c model: {error}") from error
    return Header(version, config, group_size)


def pack_header(config: ModelConfig, version: int, group_size: int) -> bytes:
    """Return the header of a model.

    Raises:
      UserError: if llama2.c has no place for something that the model depends on.
    """
    found = {name: getattr(config, name) for name in FIXED}
    lost = [f"{name}={value}" for name, value in found.items() if value != FIXED[name]]
    lost += beyond_llama2(config)
    if lost:
        raise UserError(
            f"llama2.c has no place for {', '.join(lost)}: its code has norm_eps=1e-05,"
            " rope_theta=10000 and nothing beyond Llama 2; choose another format"
        )
    sizes = {theirs: getattr(config, ours) for theirs, ours in SIZES.items()}
    _check_sizes(sizes, "llama2.c has no place for this model")
    if version == 0:
        sign = 1 if config.tied_embeddings else -1
        return struct.pack("<7i", *(sizes | {"vocab_size": sign * config.vocab_size}).values())
    head = struct.pack(LATER, MAGIC, version, *sizes.values(), config.tied_embeddings)
    head += struct.pack("<i", group_size) if version == 2 else b""
    return head.ljust(LENGTHS[version], b"\0")


def _unpack(path: Path, head: bytes) -> tuple[int, dict[str, int], bool, int]:
    """Return version, sizes, whether embeddings are tied, and group size, unchecked."""
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


def _check_sizes(sizes: Mapping[str, int], complaint: str) -> None:
    """Refuse sizes that no model has; heads are checked by `ModelConfig`."""
    wrong = {
        name: size for name, size in sizes.items() if not 1 <= size <= LIMITS.get(name, 2**31 - 1)
    }
    if wrong:
        raise UserError(f"{complaint}: {_listed(wrong)} out of range")


def _check_length(
    path: Path, version: int, sizes: dict[str, int], tied: bool, group_size: int
) -> None:
    D, F, L, N, K, V, S = sizes.values()
    kv = K * (D // N)
    in_matrices = V * D * (1 if tied else 2) + L * D * (2 * D + 2 * kv + 3 * F)
    weight = quantized_bytes(in_matrices, group_size) if version == 2 else 4 * in_matrices
    tables = S * (D // N) if version == 0 else 0
    expected = LENGTHS[version] + weight + 4 * (2 * L * D + D + tables)
    listed = _listed(sizes | ({"group_size": group_size} if version == 2 else {}))
    if (found := path.stat().st_size) != expected:
        raise UserError(
            f"{path} has {found:,} bytes, but what its header says, llama2.c's version {version}"
            f" with {listed}, has {expected:,}; copy it again"
        )
    if any(rows * D % group_size for rows in (V, D, kv, F)):
        raise UserError(f"{path} has a group size that does not divide every matrix: {listed}")


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())
