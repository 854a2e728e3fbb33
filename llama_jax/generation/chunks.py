"""What the host sees of a stretch of the decode loop."""

import dataclasses

import jax
import numpy as np

from llama_jax.generation.decoding import NOTHING, Chosen, GenerationState, are_done


@dataclasses.dataclass(frozen=True)
class Logprob:
    """What the model thought of a token: its log-probability, and the likeliest ids with theirs."""

    logprob: float  # nats
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What a stretch of the loop added: ids of each row, without the stop token."""

    rows: list[list[int]]
    finished: list[str]  # "" while a row goes on; "stop" at a stop token; "length" at its limit
    logprobs: list[list[Logprob]]  # as many as ids where they were asked for; else empty


def chunk_of(chosen: Chosen, state: GenerationState) -> Chunk:
    """The host's view of new tokens."""
    ends = (state.stopped_B, state.cache.length_B, state.limit_B)
    stopped_B, length_B, limit_B = map(np.asarray, ends)
    done_B = are_done(stopped_B, length_B, limit_B)  # here: on the device it is three programs more
    reasons = np.where(stopped_B, "stop", np.where(done_B, "length", ""))
    ids_BC = np.asarray(chosen.token).reshape(len(done_B), -1)
    rows = [[int(token) for token in row if token != NOTHING] for row in ids_BC]
    told: list[list[Logprob]] = [[] for _ in rows]
    if chosen.logprobs is not None:
        shape = ids_BC.shape
        own, top_ids, top = (np.asarray(array) for array in jax.tree.leaves(chosen.logprobs))
        own, top_ids, top = own.reshape(shape), top_ids.reshape(*shape, -1), top.reshape(*shape, -1)
        for b, c in zip(*np.nonzero(ids_BC != NOTHING)):
            pairs = tuple(zip(top_ids[b, c].tolist(), top[b, c].tolist()))
            told[b].append(Logprob(float(own[b, c]), pairs))
    return Chunk(rows, [str(reason) for reason in reasons], told)
