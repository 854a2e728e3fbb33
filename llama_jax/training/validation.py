"""Validation of a run: its metrics on held-out text, and a sample of what the model writes."""

import dataclasses
import textwrap

import jax

from llama_jax.inference.completions import add_text
from llama_jax.inference.engine import Engine
from llama_jax.model.transformer import unstack
from llama_jax.training.objectives import Sums, model_of
from llama_jax.training.session import Session
from llama_jax.training.step import TrainState

Means = dict[str, float]


def validation_metrics(session: Session, state: TrainState) -> dict[str, Means] | None:
    """Return the mean of each metric on held-out text: of all text as "", and by source.

    None after a stop signal.
    """
    sums_of: dict[str, list[Sums]] = {}
    for source, batches in session.validation_batches().items():
        sums = sums_of[source] = []
        for batch in batches:
            sums.append(session.programs.evaluate(state.trainable, state.frozen, batch))
            jax.block_until_ready(sums[-2:][0])  # at most one batch is queued
            if session.stop.requested():
                return None
    everything = [each for sums in sums_of.values() for each in sums]
    return {source: _means(sums) for source, sums in {"": everything, **sums_of}.items()}


def _means(sums: list[Sums]) -> Means:
    """Return the mean of each metric over batches."""
    totals = {name: sum(float(each[name]) for each in sums) for name in sums[0]}
    weights = totals.pop("weights")
    return {name: total / max(weights, 1.0) for name, total in totals.items()}


def sample(session: Session, state: TrainState, seed: int) -> str:
    """Return what the model writes after the config's prompt, as lines to show.

    One process has to hold all parameters.
    """
    model = model_of(session.config, state.trainable, state.frozen)
    params = [dataclasses.replace(each, seed=seed) for each in session.sample.params]
    request = dataclasses.replace(session.sample, params=params)
    deltas = Engine(_unstack(model)).generate(request)
    text = "".join(delta.text for delta in add_text(deltas, request, session.tokenizer))
    return textwrap.indent(textwrap.fill(text, 96), "  | ")


_unstack = jax.jit(unstack)
