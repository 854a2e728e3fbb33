"""A Llama as a library object: complete, chat, score and embed.

    llm = llama_jax.LLM("ckpt/")
    llm.complete("Once upon a time", max_tokens=64, temperature=0).text

It ties checkpoint, tokenizer, engine and templates together and holds no arithmetic of its own.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoints.load import deploy, tensor_mesh
from llama_jax.config import require
from llama_jax.distributed.mesh import on_mesh
from llama_jax.inference.completions import (
    Piece,
    gather,
    stop_ids,
    stream,
    told,
    without_leading_space,
)
from llama_jax.inference.engine import Engine
from llama_jax.inference.request import (
    Request,
    SamplingOptions,
    Wishes,
    request_of_dialogue,
    texts_of,
    wishes_of,
)
from llama_jax.inference.scoring import embed_texts, score_texts
from llama_jax.text.chat import find_template, parse_messages, template_of
from llama_jax.text.tokenizer import Tokenizer

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
        template: str = "",
        tensor: int = 1,
    ):
        """Load a checkpoint folder.

        Args:
          quantize: "int8" or "int4" keeps matrices in that many bits; None as they are stored.
          dtype: of parameters and arithmetic, "float32" or "bfloat16"; "" as it suits the device.
          max_context: tokens of prompt and completion together; 0: as many as the model is for.
          cache_dtype: "int8" keeps the key/value cache in a fourth of float32's memory.
          template: the chat format, "llama2" or "alpaca"; "" the checkpoint's, or "llama2" where
            that does not tell.
          tensor: devices that every matrix is cut over.

        Raises:
          UsageError: naming an argument out of range.
          UserError: when the checkpoint cannot be used.
        """
        message = f"cache_dtype={cache_dtype!r} is unknown; expected 'int8' or ''"
        require(cache_dtype in CACHE_DTYPES, message)
        if template:
            find_template(template)
        mesh = tensor_mesh(tensor)
        loaded = deploy(checkpoint, dtype, quantize=quantize, max_context=max_context, mesh=mesh)
        self.tokenizer: Tokenizer = loaded.tokenizer
        self.engine = Engine(loaded.model, cache_dtype, mesh)
        self._stop_ids = stop_ids(loaded.tokenizer, loaded.bos)
        self._template = template or loaded.chat_template

    @property
    def context_length(self) -> int:
        """Tokens that prompt and completion have together."""
        return self.engine.model.config.context_length

    def complete(
        self,
        prompt: str | Sequence[str],
        *,
        max_tokens: int = Wishes.max_tokens,
        temperature: float = SamplingOptions.temperature,
        top_k: int = SamplingOptions.top_k,
        top_p: float = SamplingOptions.top_p,
        min_p: float = SamplingOptions.min_p,
        repetition_penalty: float = SamplingOptions.repetition_penalty,
        presence_penalty: float = SamplingOptions.presence_penalty,
        frequency_penalty: float = SamplingOptions.frequency_penalty,
        logit_bias: Mapping[int, float] | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int = Wishes.seed,
        n: int = Wishes.n,
        logprobs: int | None = None,
        echo: bool = False,
        stream: bool = False,
        speculate: bool = False,
        rng: str = SamplingOptions.rng,
    ) -> Any:
        """What the model writes after a prompt.

        Args:
          prompt: a text, or several; "" starts from nothing.
          max_tokens: new tokens of each completion at most.
          temperature: 0 takes the likeliest token; so does, nearly, a small one.
          top_k: tokens that may be drawn, the likeliest; 0: all.
          top_p: the likeliest may be drawn, as few as together have this probability; 1: all.
          min_p: those at least this many times as likely as the likeliest may be drawn; 0: all.
          repetition_penalty: more than 1 discourages what prompt and completion have already.
          presence_penalty: off the logits of what the completion has already.
          frequency_penalty: the same, for each time that it has it.
          logit_bias: added to logits, by token id; minus infinity forbids a token.
          stop: texts at which a completion ends; they are not part of it.
          seed: the same seed gives the same text; completion j of a prompt has `seed` + j.
          n: completions of each prompt.
          logprobs: how many of the likeliest tokens to tell of beside each; None: tell nothing.
          echo: begin each text with its prompt.
          stream: yield pieces as they are made.
          speculate: guess ahead where a text repeats itself; only for temperature 0.
          rng: "xorshift" writes what llama2.c would, one text at a time and slowly.

        Returns:
          A `Completion`; for a list of prompts, or `n` > 1, a list of them, prompt by prompt. With
          `stream`, an iterator of `CompletionPiece`.

        Raises:
          UsageError: naming an argument and its range.
          UserError: when a prompt does not leave room in the context.
        """
        wishes = wishes_of(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=logit_bias,
            stop=stop,
            seed=seed,
            n=n,
            logprobs=logprobs,
            speculate=speculate,
            rng=rng,
        )
        request = self.request(prompt, wishes, echo)
        pieces = self.pieces(request)
        if stream:
            return told(pieces, request)
        made = gather(pieces, request, self.tokenizer)
        return made[0] if isinstance(prompt, str) and n == 1 else made

    def request(self, prompt: str | Sequence[str], wishes: Wishes, echo: bool = False) -> Request:
        """A call of `complete` as rows of ids, for `pieces`."""
        prompts = texts_of("prompt", prompt)
        encoded = [self.tokenizer.encode(text, bos=True, eos=False) for text in prompts]
        rows = [ids for ids in encoded for _ in range(wishes.n)]
        echoes = [text if echo else "" for text in prompts for _ in range(wishes.n)]
        return Request(rows, echoes, self._stop_ids, wishes)

    def chat(
        self,
        messages: Sequence[Any],
        *,
        template: str = "",
        truncate: bool = False,
        stream: bool = False,
        **wishes: Any,
    ) -> Any:
        """The assistant's answer to a dialogue; the next turn is read from where it differs.

        Args:
          messages: like [{"role": "user", "content": "Hello"}], system first if there is one.
          template: of this call, where it is not the one the object was made with.
          truncate: leave the oldest exchanges out where the dialogue outgrows the context, warn,
            and tell how many in `Completion.dropped`; otherwise that is an error.
          stream: yield pieces as they are made.
          wishes: all that `complete` takes but `n` and `echo`, by the same names.

        Returns:
          A `Completion`, or with `stream` an iterator of `CompletionPiece`.

        Raises:
          UserError: for roles out of order, content with the format's own tags, a malformed
            message, a checkpoint that tells it learnt no chat format, or a dialogue that leaves
            less than `max_tokens`, or a quarter of the context if that is less, to the answer.
        """
        request, dropped = request_of_dialogue(
            parse_messages(messages),
            template_of(template or self._template),
            self.tokenizer,
            wishes_of(**wishes),
            self._stop_ids,
            context=self.context_length,
            truncate=truncate,
        )
        pieces = without_leading_space(self.pieces(request))
        if stream:
            return told(pieces, request)
        made = gather(pieces, request, self.tokenizer)[0]
        return dataclasses.replace(made, dropped=dropped)

    def score(self, texts: str | Sequence[str]) -> Any:
        """The log-probability of each token of a text: a `Score`, or a list of them for a list.

        Raises:
          UserError: for a text longer than the context.
        """
        with on_mesh(self.engine.mesh):
            scores = score_texts(self.engine.model, self.tokenizer, texts_of("texts", texts))
        return scores[0] if isinstance(texts, str) else scores

    def embed(self, texts: str | Sequence[str], normalize: bool = True) -> np.ndarray:
        """The mean hidden state of a text, float32 [D]; of a list of texts, [texts, D].

        `normalize` scales each to length 1, so that a dot product of two is their cosine.

        Raises:
          UserError: for a text longer than the context.
        """
        listed = texts_of("texts", texts)
        with on_mesh(self.engine.mesh):
            vectors = embed_texts(self.engine.model, self.tokenizer, listed, normalize)
        return vectors[0] if isinstance(texts, str) else vectors

    def pieces(self, request: Request) -> Iterator[Piece]:
        """The texts of a request as they grow, rows interleaved."""
        wishes = request.wishes
        sampler = wishes.sampling.sampler
        self.engine.check(request.rows, sampler, wishes.logprobs, wishes.speculate)
        return stream(
            self.engine,
            self.tokenizer,
            request.rows,
            sampler,
            max_tokens=wishes.max_tokens,
            seeds=request.seeds,
            stop_ids=request.stop_ids,
            stops=request.stops,
            logprobs=wishes.logprobs,
            speculate=wishes.speculate,
            choose=wishes.sampling.chooser(wishes.seed),
        )
