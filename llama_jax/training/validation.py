"""Validation of a run: the loss on held-out text, and a sample of what the model writes."""

import textwrap

import jax

from llama_jax.inference.completions import add_text, encode_prompt, stop_ids
from llama_jax.inference.engine import Engine
from llama_jax.inference.request import Request, SamplingParams
from llama_jax.model.transformer import unstack
from llama_jax.training.session import Session
from llama_jax.training.step import TrainState


def validation_loss(session: Session, state: TrainState) -> float | None:
    """Return the mean loss on held-out text in nats per token; None after a stop signal."""
    sums = []
    for batch in session.validation_batches():
        sums.append(session.programs.evaluate(state.trainable, state.frozen, batch))
        jax.block_until_ready(sums[-2:][0])  # at most one batch is queued
        if session.stop.requested():
            return None
    total, weights = (sum(float(value) for value in values) for values in zip(*sums))
    return total / weights


def sample(session: Session, state: TrainState, seed: int) -> str:
    """Return what the model writes after the config's prompt, as lines to show.

    One process has to hold all parameters.
    """
    run, tokenizer = session.config.run, session.tokenizer
    request = Request(
        prompts=[encode_prompt(tokenizer, run.sample_prompt, session.data.bos)],
        params=[SamplingParams(temperature=0.8, max_tokens=run.sample_tokens, seed=seed)],
        stop_ids=stop_ids(tokenizer, session.data.bos),
        echo=[run.sample_prompt],
    )
    deltas = Engine(_unstack(state.trainable)).generate(request)
    text = "".join(delta.text for delta in add_text(deltas, request, tokenizer))
    return textwrap.indent(textwrap.fill(text, 96), "  | ")


_unstack = jax.jit(unstack)
