"""A Llama as a library object: complete, chat, score and embed.

    llm = llama_jax.LLM("ckpt/")
    llm.complete("Once upon a time", max_tokens=64, temperature=0).text

It ties checkpoint, tokenizer, engine and templates together and holds no arithmetic of its own.
"""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.appraisal import embed_texts, score_texts
from llama_jax.arguments import whole_number
from llama_jax.chat import find_template, fit
from llama_jax.completions import Request, gather, told, without_leading_space
from llama_jax.config import require
from llama_jax.generation import Engine
from llama_jax.loading import load
from llama_jax.messages import parse_messages
from llama_jax.model import unstack
from llama_jax.quantization import KINDS
from llama_jax.quantization import quantize as quantized
from llama_jax.sampling import NO_BIAS, Sampler, make_sampler
from llama_jax.text import Piece, stop_ids, stream
from llama_jax.tokenizer import Tokenizer

MOST_COMPLETIONS = 10_000  # of a prompt; they are made side by side
CACHE_DTYPES = ("", "int8")


class LLM:
    """A model with its tokenizer, ready to write."""

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        quantize: str | None = None,
        dtype: str = "",
        max_context: int = 0,
        cache_dtype: str = "",
        template: str = "llama2",
        rows: int = 1,
    ):
        """Load a checkpoint folder.

        Args:
          quantize: "int8" or "int4" keeps matrices in that many bits; None as they are stored.
          dtype: of parameters and arithmetic, "float32" or "bfloat16"; "" as it suits the device.
          max_context: tokens of prompt and completion together; 0: as many as the model is for.
          cache_dtype: "int8" keeps the key/value cache in a fourth of float32's memory.
          template: the chat format, "llama2" or "alpaca".
          rows: how many texts are mostly written at once; any number works.

        Raises:
          UsageError: naming an argument out of range.
          UserError: when the checkpoint cannot be used.
        """
        require(
            cache_dtype in CACHE_DTYPES,
            f"cache_dtype={cache_dtype!r} is unknown; expected 'int8' or ''",
        )
        require(
            quantize is None or quantize in KINDS,
            f"quantize={quantize!r} is unknown; expected 'int8' or 'int4'",
        )
        whole_number("max_context", max_context, lambda n: n >= 0, "0 (the model's) or more")
        self._template = find_template(template)
        loaded = load(checkpoint, dtype)
        model = quantized(loaded.model, quantize) if quantize else unstack(loaded.model, rows)
        if max_context:
            require(
                2 <= max_context <= loaded.config.context_length,
                f"max_context={max_context} is out of range; expected 2 to"
                f" {loaded.config.context_length}, the model's context",
            )
            model.config = dataclasses.replace(model.config, context_length=max_context)
        self.tokenizer: Tokenizer = loaded.tokenizer
        self.engine = Engine(model, cache_dtype)
        self._stop_ids = stop_ids(loaded.tokenizer, loaded.bos)

    @property
    def context_length(self) -> int:
        """Tokens that prompt and completion have together."""
        return self.engine.model.config.context_length

    def complete(
        self,
        prompt: str | Sequence[str],
        *,
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 0.9,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] = NO_BIAS,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        n: int = 1,
        logprobs: int | None = None,
        echo: bool = False,
        stream: bool = False,
        speculate: bool = False,
    ) -> Any:
        """What the model writes after a prompt.

        Args:
          prompt: a text, or several; "" starts from nothing.
          max_tokens: new tokens of each completion at most.
          temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
            frequency_penalty, logit_bias: see `sampling.make_sampler`.
          stop: texts at which a completion ends; they are not part of it.
          seed: the same seed gives the same text; completion j of a prompt has `seed` + j.
          n: completions of each prompt.
          logprobs: how many of the likeliest tokens to tell of beside each; None: tell nothing.
          echo: begin each text with its prompt.
          stream: yield pieces as they are made.
          speculate: guess ahead where a text repeats itself; only for temperature 0.

        Returns:
          A `Completion`; for a list of prompts, or `n` > 1, a list of them, prompt by prompt. With
          `stream`, an iterator of `CompletionPiece`.

        Raises:
          UsageError: naming an argument and its range.
          UserError: when a prompt does not leave room in the context.
        """
        request = self.request(
            prompt,
            n=n,
            seed=seed,
            max_tokens=max_tokens,
            stop=stop,
            logprobs=logprobs,
            echo=echo,
            speculate=speculate,
            sampler=make_sampler(
                temperature,
                top_k,
                top_p,
                min_p,
                repetition_penalty,
                presence_penalty,
                frequency_penalty,
                logit_bias,
            ),
        )
        pieces = self.pieces(request)
        if stream:
            return told(pieces, request)
        made = gather(pieces, request, self.tokenizer)
        return made[0] if isinstance(prompt, str) and n == 1 else made

    def request(
        self,
        prompt: str | Sequence[str],
        *,
        sampler: Sampler,
        max_tokens: int,
        n: int = 1,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        echo: bool = False,
        speculate: bool = False,
    ) -> Request:
        """A call of `complete` as rows of ids, for `pieces`."""
        prompts = _texts("prompt", prompt)
        whole_number("n", n, lambda n: 1 <= n <= MOST_COMPLETIONS, f"1 to {MOST_COMPLETIONS}")
        encoded = [self.tokenizer.encode(text, bos=True, eos=False) for text in prompts]
        return Request(
            rows=[ids for ids in encoded for _ in range(n)],
            echoes=[text if echo else "" for text in prompts for _ in range(n)],
            sampler=sampler,
            max_tokens=max_tokens,
            seeds=_seeds(seed, n) * len(prompts),
            stop_ids=self._stop_ids,
            stops=_listed(stop),
            logprobs=logprobs,
            speculate=speculate,
        )

    def chat(
        self,
        messages: Sequence[Any],
        *,
        template: str = "",
        truncate: bool = False,
        stop: str | Sequence[str] = (),
        max_tokens: int = 256,
        stream: bool = False,
        seed: int = 0,
        logprobs: int | None = None,
        speculate: bool = False,
        temperature: float = 1.0,
        top_p: float = 0.9,
        **sampling: Any,
    ) -> Any:
        """The assistant's answer to a dialogue; the next turn is read from where it differs.

        Args:
          messages: like [{"role": "user", "content": "Hello"}], system first if there is one.
          template: of this call, where it is not the one the object was made with.
          truncate: leave the oldest exchanges out where the dialogue outgrows the context, and
            warn; otherwise that is an error.
          sampling: further settings of `sampling.make_sampler`.

        Returns:
          A `Completion`, or with `stream` an iterator of `CompletionPiece`.

        Raises:
          UserError: for roles out of order, content with the format's own tags, a malformed
            message, or a dialogue that leaves less than `max_tokens`, or a quarter of the context
            if that is less, to the answer.
        """
        chosen = find_template(template) if template else self._template
        room = self.context_length - min(max_tokens, self.context_length // 4)
        fitted = fit(parse_messages(messages), chosen, self.tokenizer, room, truncate)
        if fitted.statement:
            warnings.warn(fitted.statement, stacklevel=2)
        ends = chosen.stops(self.tokenizer)
        request = Request(
            rows=[fitted.ids],
            echoes=[""],
            sampler=make_sampler(temperature, top_p=top_p, **sampling),
            max_tokens=max_tokens,
            seeds=_seeds(seed, 1),
            stop_ids=(*ends.ids, *self._stop_ids),
            stops=(*ends.strings, *_listed(stop)),
            logprobs=logprobs,
            speculate=speculate,
        )
        pieces = without_leading_space(self.pieces(request))
        if stream:
            return told(pieces, request)
        return gather(pieces, request, self.tokenizer)[0]

    def score(self, texts: str | Sequence[str]) -> Any:
        """The log-probability of each token of a text: a `Score`, or a list of them for a list.

        Raises:
          UserError: for a text longer than the context.
        """
        scores = score_texts(self.engine.model, self.tokenizer, _texts("texts", texts))
        return scores[0] if isinstance(texts, str) else scores

    def embed(self, texts: str | Sequence[str], normalize: bool = True) -> np.ndarray:
        """The mean hidden state of a text, float32 [D]; of a list of texts, [texts, D].

        `normalize` scales each to length 1, so that a dot product of two is their cosine.

        Raises:
          UserError: for a text longer than the context.
        """
        listed = _texts("texts", texts)
        vectors = embed_texts(self.engine.model, self.tokenizer, listed, normalize)
        return vectors[0] if isinstance(texts, str) else vectors

    def pieces(self, request: Request) -> Iterator[Piece]:
        """The texts of a request as they grow, rows interleaved."""
        whole_number("max_tokens", request.max_tokens, lambda n: n >= 1, "1 or more")
        if request.logprobs is not None:
            most = self.engine.model.config.vocab_size
            whole_number("logprobs", request.logprobs, lambda n: 0 <= n <= most, f"0 to {most}")
        return stream(
            self.engine,
            self.tokenizer,
            request.rows,
            request.sampler,
            max_tokens=request.max_tokens,
            seeds=request.seeds,
            stop_ids=request.stop_ids,
            stops=request.stops,
            logprobs=request.logprobs,
            speculate=request.speculate,
            choose=request.choose,
        )


def _texts(name: str, texts: str | Sequence[str]) -> list[str]:
    """The texts of an argument, refused if they are something else."""
    listed = [texts] if isinstance(texts, str) else texts
    is_list = isinstance(listed, list | tuple) and all(isinstance(text, str) for text in listed)
    require(is_list and len(listed) > 0, f"{name}={texts!r:.60} is not a text or a list of texts")
    return list(listed)


def _listed(stop: str | Sequence[str]) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _seeds(seed: int, n: int) -> list[int]:
    most = 2**32 - n
    whole_number("seed", seed, lambda value: 0 <= value <= most, f"0 to {most}")
    return [seed + j for j in range(n)]
