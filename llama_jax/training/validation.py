"""How good the model is now: its loss on text held back, and a sample of what it writes."""

import math
import textwrap
from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import Mesh

from llama_jax.config import Config
from llama_jax.data.loader import Batch, load_validation_batches
from llama_jax.data.token_folder import TokenFolder
from llama_jax.distributed.preemption import StopSignal
from llama_jax.inference.completions import add_text, stop_ids
from llama_jax.inference.engine import Engine
from llama_jax.inference.request import Request, SamplingParams
from llama_jax.model.transformer import Llama
from llama_jax.model.unstacked import unstack
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.training.metrics import Console, MetricsFile


class Validation:
    """Validates and samples a run's model."""

    def __init__(
        self,
        config: Config,
        data: TokenFolder,
        mesh: Mesh,
        evaluate: Callable[[Llama, Batch], tuple[jax.Array, jax.Array]],
        stop: StopSignal,
    ):
        """Find out now, not hours later, whether the text is too short to validate on.

        Raises:
          UserError: when it is.
        """
        self._config, self._data, self._stop = config, data, stop
        self._evaluate = evaluate
        self._tokenizer = Tokenizer(data.tokenizer_path)
        self._batches = partial(load_validation_batches, config, data, mesh)
        self._batches()

    def __call__(
        self, model: Llama, step: int, best_loss: float, console: Console, metrics: MetricsFile
    ) -> float:
        """The mean validation loss in nats a token, said and written; inf if stopped meanwhile."""
        sums = []
        for batch in self._batches():
            sums.append(self._evaluate(model, batch))
            jax.block_until_ready(sums[-2:][0])
            if self._stop.requested():
                return math.inf
        nll, tokens = (sum(float(value) for value in values) for values in zip(*sums))
        loss = nll / tokens
        perplexity = math.exp(min(loss, 700))
        metrics.write({"step": step, "validation_loss": loss, "perplexity": perplexity})
        best = "  best so far" if loss < best_loss else ""
        console.line(f"step {step}  validation loss {loss:.4f}  perplexity {perplexity:.2f}{best}")
        if self._config.run.sample_tokens and jax.process_count() == 1:
            console.line(self._sample(model, seed=step))
        return loss

    def _sample(self, model: Llama, seed: int) -> str:
        """What the model writes now, as lines to show."""
        prompt = self._config.run.sample_prompt
        max_tokens = self._config.run.sample_tokens
        request = Request(
            prompts=[self._tokenizer.encode(prompt, bos=True, eos=False)],
            params=[SamplingParams(temperature=0.8, max_tokens=max_tokens, seed=seed)],
            stop_ids=stop_ids(self._tokenizer, self._data.bos),
            echo=[prompt],
        )
        deltas = Engine(_unstack(model)).generate(request)
        text = "".join(delta.text for delta in add_text(deltas, request, self._tokenizer))
        return textwrap.indent(textwrap.fill(text, 96), "  | ")


_unstack = jax.jit(unstack)
