"""What a trained model does beyond its training length: losses by position, and retrieval.

A text is read in sequences of 1, 2, 4 and 8 times the training length T, in one of two ways.
"full": every token sees all tokens before it in its sequence, at positions that training never had.
"sliding": windows of T that overlap by half (Press et al. 2022, appendix B), so that a token sees
T/2 to T tokens before it, at positions of training; what a model that does not extrapolate can do.

Rotary models are also read with their wavelengths scaled to the longer context: divided ("linear",
Chen et al. 2023), or with a higher base ("dynamic", NTK-aware), without being trained for it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import ModelConfig, RopeScaling
from llama_jax.data.token_folder import TokenFolder
from llama_jax.inference.scoring import full_sequence_execution
from llama_jax.model.transformer import Llama
from llama_jax.study.data import is_query, retrieval_sequences
from llama_jax.study.settings import MULTIPLES, Scale
from llama_jax.training.loss import target_logprobs

FULL, SLIDING = "full", "sliding"
TOKENS_AT_ONCE = 4096  # in a forward pass
RETRIEVAL_SEQUENCES = 64  # of each length
Records = list[dict[str, float | int | str]]


def with_config(model: Llama, config: ModelConfig) -> Llama:
    """Return a model that is run by another config."""
    changed = jax.tree.map(lambda array: array, model)  # a shallow copy
    changed.config = config
    return changed


def scores(model: Llama, tokens_RT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss of each token after the first, in nats, and whether it is predicted.

    Both are [R, T - 1]. Sequences are read a few at a time.
    """
    length = tokens_RT.shape[1]
    batch = min(len(tokens_RT), max(1, TOKENS_AT_ONCE // length))
    losses, hits = [], []
    for start in range(0, len(tokens_RT), batch):
        rows = tokens_RT[start : start + batch]
        padded = np.pad(rows, ((0, batch - len(rows)), (0, 0)))
        logprobs, is_top = _logprobs(model, jnp.asarray(padded, jnp.int32))
        losses.append(-np.asarray(logprobs, np.float64)[: len(rows)])
        hits.append(np.asarray(is_top)[: len(rows)])
    return np.concatenate(losses), np.concatenate(hits)


@jax.jit
def _logprobs(model: Llama, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    execution = full_sequence_execution(model)
    hidden_BTD, _ = model.hidden(tokens_BT[:, :-1], execution=execution)
    return target_logprobs(hidden_BTD, model.output_VD, tokens_BT[:, 1:])


# ---- text ----


def evaluate_text(model: Llama, variant: str, data: TokenFolder, scale: Scale) -> Records:
    """Return mean losses by position, for each length, way of reading and scaling.

    A record has the buckets of one length: `T / 2` positions each, of the same tokens of the
    validation split for every length. A table of learned positions has none beyond T: it is read in
    sliding windows only.
    """
    records: Records = []
    length = scale.length
    tokens = _tokens(data, scale)
    for multiple in MULTIPLES:
        if multiple == 1 or variant != "absolute":
            found = scores(model, _sequences(tokens, multiple * length))
            records += _buckets(*found, length, multiple, FULL, "none")
        if multiple > 1:
            found = _sliding_scores(model, _sequences(tokens, multiple * length), length)
            records += _buckets(*found, length, multiple, SLIDING, "none")
        if multiple > 1 and variant == "rope":
            for kind in ("linear", "dynamic"):
                scaled = RopeScaling(kind=kind, factor=multiple, original_context=length)
                config = dataclasses.replace(model.config, rope_scaling=scaled)
                found = scores(with_config(model, config), _sequences(tokens, multiple * length))
                records += _buckets(*found, length, multiple, FULL, kind)
    return records


def _tokens(data: TokenFolder, scale: Scale) -> np.ndarray:
    """Return as many tokens of the validation split as every length divides, and one more."""
    tokens = np.concatenate(data.arrays("validation")).astype(np.int32)
    longest = MULTIPLES[-1] * scale.length
    count = min(len(tokens) - 1, scale.evaluation_tokens) // longest * longest
    return tokens[: max(count, longest) + 1]


def _sequences(tokens: np.ndarray, length: int) -> np.ndarray:
    """Return sequences [R, length + 1] that have every token but the first as a target once."""
    starts = np.arange(0, len(tokens) - length, length)
    return tokens[starts[:, None] + np.arange(length + 1)[None]]


def _sliding_scores(
    model: Llama, tokens_RT: np.ndarray, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return what `scores` does, of each token in the first window that has it as a target."""
    half = window // 2
    starts = np.arange(0, tokens_RT.shape[1] - window, half)
    places_WT = starts[:, None] + np.arange(window + 1)[None]
    windows_RWT = tokens_RT[:, places_WT]
    R, W, _ = windows_RWT.shape
    found = []
    for values in scores(model, windows_RWT.reshape(R * W, -1)):
        values_RWT = values.reshape(R, W, window)
        first, others = values_RWT[:, 0], values_RWT[:, 1:, window - half :]
        found.append(np.concatenate([first, others.reshape(R, -1)], axis=1))
    return found[0], found[1]


def _buckets(
    losses_RT: np.ndarray,
    hits_RT: np.ndarray,
    length: int,
    multiple: int,
    reading: str,
    scaling: str,
) -> Records:
    half = length // 2
    return [
        {
            "multiple": multiple,
            "reading": reading,
            "scaling": scaling,
            "position": start,
            "tokens": losses_RT[:, start : start + half].size,
            "loss": float(losses_RT[:, start : start + half].mean()),
            "accuracy": float(hits_RT[:, start : start + half].mean()),
        }
        for start in range(0, losses_RT.shape[1], half)
    ]


# ---- retrieval ----


def evaluate_retrieval(model: Llama, variant: str, scale: Scale) -> Records:
    """Return the accuracy of retrieval, and the loss in nats, by the distance to the value.

    The distance is rounded down to a multiple of T / 4. Of a table of learned positions, within
    the training length only.
    """
    records: Records = []
    length, quarter = scale.length, scale.length // 4
    for multiple in MULTIPLES if variant != "absolute" else MULTIPLES[:1]:
        random = np.random.default_rng(multiple)  # the same sequences for every model
        tokens_RT = retrieval_sequences(
            RETRIEVAL_SEQUENCES, multiple * length + 1, length, scale.vocab_size, random
        )
        losses_RT, hits_RT = scores(model, tokens_RT)
        rows_A, places_A = np.nonzero(is_query(tokens_RT[:, :-1], scale.vocab_size))
        answers_A = tokens_RT[rows_A, places_A + 1]
        # The values come first; each occurs once there.
        value_A = np.argmax(tokens_RT[rows_A, : length // 2] == answers_A[:, None], axis=1)
        bucket_A = (places_A - value_A) // quarter * quarter
        for distance in np.unique(bucket_A):
            chosen = (rows_A[bucket_A == distance], places_A[bucket_A == distance])
            records.append(
                {
                    "multiple": multiple,
                    "distance": int(distance),
                    "tokens": len(chosen[0]),
                    "loss": float(losses_RT[chosen].mean()),
                    "accuracy": float(hits_RT[chosen].mean()),
                }
            )
    return records
