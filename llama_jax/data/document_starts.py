"""Where the documents of a token folder start, read and checked.

Does not know what documents are for.
"""

import numpy as np

from llama_jax.data.tokens import AGAIN, Shard, TokenFolder, starts_path
from llama_jax.errors import UserError


def document_starts(folder: TokenFolder, split: str) -> np.ndarray:
    """Where the documents of a split start, counted over all its files, as int64.

    Raises:
      UserError: if the folder does not tell, or tells what cannot be.
    """
    positions, before = [], 0
    for shard in folder.splits[split].shards:
        positions.append(_starts_in(shard) + before)
        before += shard.tokens
    starts = np.concatenate(positions) if positions else np.zeros(0, np.int64)
    if before and starts[:1].tolist() != [0]:
        raise UserError(
            f"the {split} split of {folder.path} does not say where its documents start, so they"
            " cannot be packed; prepare it again, or set --config.data.packing=none"
        )
    return starts


def _starts_in(shard: Shard) -> np.ndarray:
    """The positions at which documents start in one file, as int64."""
    path = starts_path(shard.path)
    try:
        starts = np.load(path)
        is_sane = (starts.dtype, starts.shape) == (np.dtype("<u8"), (shard.documents,))
    except (ValueError, EOFError, OSError, AttributeError):
        is_sane = False
    if is_sane:
        starts = starts.astype(np.int64)
        is_sane = bool((np.diff(starts, prepend=-1, append=shard.tokens) > 0).all())
    if not is_sane:
        raise UserError(f"{path} is damaged; {AGAIN}")
    return starts
