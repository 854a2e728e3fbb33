"""Validation of a run: the loss on held-out text, and a sample of what the model writes."""

import math
import textwrap
from collections.abc import Callable

import jax

from llama_jax.data.loader import load_validation_batches
from llama_jax.inference.completions import add_text, stop_ids
from llama_jax.inference.engine import Engine
from llama_jax.inference.request import Request, SamplingParams
from llama_jax.model.transformer import unstack
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training.session import Session
from llama_jax.training.step import TrainState


class Validation:
    """Validates and samples a run's model."""

    def __init__(self, session: Session):
        """Open the held-out text.

        Raises:
          UserError: if it is too short to validate on.
        """
        self._session = session
        self._batches()

    def _batches(self):  # type: ignore[no-untyped-def]
        session = self._session
        return load_validation_batches(session.config, session.data, session.mesh)

    def loss(
        self,
        state: TrainState,
        step: int,
        best_loss: float,
        write: Callable[[dict[str, int | float], str], None],
    ) -> float:
        """Return the mean validation loss in nats per token; infinity after a stop signal.

        Args:
          write: takes the record of a validation and its line.
        """
        session, sums = self._session, []
        for batch in self._batches():
            sums.append(session.programs.evaluate(state.trainable, state.frozen, batch))
            jax.block_until_ready(sums[-2:][0])
            if session.stop.requested():
                return math.inf
        total, weights = (sum(float(value) for value in values) for values in zip(*sums))
        loss = total / weights
        perplexity = math.exp(min(loss, 700))
        best = "  best so far" if loss < best_loss else ""
        write(
            {"step": step, "validation_loss": loss, "perplexity": perplexity},
            f"step {step}  validation loss {loss:.4f}  perplexity {perplexity:.2f}{best}",
        )
        return loss

    def sample(self, state: TrainState, seed: int) -> str | None:
        """Return what the model writes after the config's prompt, as lines to show.

        None with several processes, none of which has all parameters.
        """
        session = self._session
        if jax.process_count() > 1:
            return None
        tokenizer = Tokenizer(session.data.tokenizer_path)
        prompt, max_tokens = session.config.run.sample_prompt, session.config.run.sample_tokens
        request = Request(
            prompts=[tokenizer.encode(prompt, bos=True, eos=False)],
            params=[SamplingParams(temperature=0.8, max_tokens=max_tokens, seed=seed)],
            stop_ids=stop_ids(tokenizer, session.data.bos),
            echo=[prompt],
        )
        deltas = Engine(_unstack(state.trainable)).generate(request)
        text = "".join(delta.text for delta in add_text(deltas, request, tokenizer))
        return textwrap.indent(textwrap.fill(text, 96), "  | ")


_unstack = jax.jit(unstack)
