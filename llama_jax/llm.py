"""A Llama as a library object: complete, chat, score and embed.

llm = llama_jax.LLM("ckpt/")
llm.complete("Once upon a time", max_tokens=64, temperature=0).text
"""

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Unpack, overload

import numpy as np

from llama_jax.checkpoints.load import load_for_inference, tensor_mesh
from llama_jax.config import require
from llama_jax.distributed.mesh import on_mesh
from llama_jax.errors import UsageError
from llama_jax.inference.completions import Completion, add_text, collect, stop_ids
from llama_jax.inference.engine import Engine
from llama_jax.inference.request import Delta, Request, SamplingOptions, SamplingParams
from llama_jax.inference.scoring import Score, embed_texts, score_texts
from llama_jax.text.chat import TruncationWarning, fit, parse_messages
from llama_jax.text.chat_formats import find_template, resolve_template
from llama_jax.text.tokenizer import Tokenizer

Method = TypeVar("Method", bound=Callable[..., Any])
Texts = list[str] | tuple[str, ...]
Stream = Generator[Delta, None, None]


def _with_sampling_params(method: Method) -> Method:
    """Show the fields of `SamplingParams` in the method's signature, as `help` and IPython do."""
    signature = inspect.signature(method)
    *named, _ = signature.parameters.values()
    named += inspect.signature(SamplingParams).parameters.values()
    method.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    return method


class LLM:
    """A model with its tokenizer, ready to generate."""

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
          quantize: "int8" or "int4" quantizes the matrices; None leaves them as stored.
          dtype: of parameters and arithmetic, "float32" or "bfloat16"; "" chooses by device.
          max_context: tokens of prompt and completion together; 0 is the model's context.
          cache_dtype: "int8" for a key/value cache of a fourth of float32's memory.
          template: the chat format, "llama2" or "alpaca"; "" is the checkpoint's, or "llama2" for
            a checkpoint without one.
          tensor: number of devices that the matrices are sharded over.

        Raises:
          UsageError: naming an argument out of range.
          UserError: when the checkpoint cannot be used.
        """
        is_known = cache_dtype in ("", "int8")
        require(is_known, f"cache_dtype={cache_dtype!r} is unknown; expected 'int8' or ''")
        if template:
            find_template(template)
        mesh = tensor_mesh(tensor)
        loaded = load_for_inference(
            checkpoint, dtype, quantize=quantize, max_context=max_context, mesh=mesh
        )
        self.tokenizer: Tokenizer = loaded.tokenizer
        self.engine = Engine(loaded.model, cache_dtype, mesh)
        self._stop_ids = stop_ids(loaded.tokenizer, loaded.bos)
        self._template = template or loaded.chat_template
        self._name = f"{str(checkpoint)!r}" + (f", quantize={quantize!r}" if quantize else "")

    def __repr__(self) -> str:
        config = self.engine.model.config
        shape = f"{config.num_layers} layers of dim {config.dim}, {config.compute_dtype}"
        return f"LLM({self._name}: {shape}, context {config.context_length})"

    @property
    def context_length(self) -> int:
        """Tokens that prompt and completion may have together."""
        return self.engine.model.config.context_length

    @overload
    def complete(
        self, prompt: str, *, echo: bool = ..., **params: Unpack[SamplingOptions]
    ) -> Completion: ...

    @overload
    def complete(
        self, prompt: Texts, *, n: int = ..., echo: bool = ..., **params: Unpack[SamplingOptions]
    ) -> list[Completion]: ...

    @overload
    def complete(
        self, prompt: str, *, n: int, echo: bool = ..., **params: Unpack[SamplingOptions]
    ) -> Completion | list[Completion]: ...

    @overload
    def complete(
        self,
        prompt: str | Texts,
        *,
        n: int = ...,
        echo: bool = ...,
        stream: Literal[True],
        **params: Unpack[SamplingOptions],
    ) -> Stream: ...

    @_with_sampling_params
    def complete(
        self,
        prompt: str | Texts,
        *,
        n: int = 1,
        echo: bool = False,
        stream: bool = False,
        **params: Unpack[SamplingOptions],
    ) -> Completion | list[Completion] | Stream:
        """Generate what follows a prompt.

        Args:
          prompt: a text, or several; "" starts from nothing.
          n: completions of each prompt; completion j has `seed` + j.
          echo: begin each text with its prompt.
          stream: yield deltas as they are made.
          params: such as `max_tokens` and `temperature`; `SamplingParams` describes them all.

        Returns:
          A `Completion`; for a list of prompts, or `n` > 1, a list of them, prompt by prompt. With
          `stream`, an iterator of `Delta`, whose `index` is the place in that list.

        Raises:
          UsageError: naming an argument and its range.
          UserError: when a prompt does not leave room in the context.
        """
        request = self.request(prompt, SamplingParams.of(**params), n=n, echo=echo)
        deltas = self.generate(request)
        if stream:
            return deltas
        completions = collect(deltas, request)
        return completions[0] if isinstance(prompt, str) and n == 1 else completions

    @overload
    def chat(
        self,
        messages: Sequence[Any],
        *,
        template: str = ...,
        truncate: bool = ...,
        **params: Unpack[SamplingOptions],
    ) -> Completion: ...

    @overload
    def chat(
        self,
        messages: Sequence[Any],
        *,
        template: str = ...,
        truncate: bool = ...,
        stream: Literal[True],
        **params: Unpack[SamplingOptions],
    ) -> Stream: ...

    @_with_sampling_params
    def chat(
        self,
        messages: Sequence[Any],
        *,
        template: str = "",
        truncate: bool = False,
        stream: bool = False,
        **params: Unpack[SamplingOptions],
    ) -> Completion | Stream:
        """Generate the assistant's answer to a dialogue.

        The next call with a longer dialogue reads only what is new.

        Args:
          messages: like [{"role": "user", "content": "Hello"}]; a system message comes first.
          template: the chat format of this call; "" for that of the object.
          truncate: leave out the oldest exchanges of a dialogue that outgrows the context, with a
            warning and their number in `Completion.dropped`; otherwise that is an error.
          stream: yield deltas as they are made.
          params: as in `complete`.

        Returns:
          A `Completion`, or with `stream` an iterator of `Delta`.

        Raises:
          UsageError: naming a parameter and its range.
          UserError: for roles out of order, content with the format's own tags, a malformed
            message, a checkpoint that was trained on no chat format, or a dialogue that leaves
            less than `max_tokens`, or a quarter of the context if that is less, for the answer.
        """
        require("n" not in params, "a chat has one answer; leave n out, or use complete")
        chosen = resolve_template(template or self._template)
        sampling = SamplingParams.of(**params)
        room = self.context_length - min(sampling.max_tokens, self.context_length // 4)
        fitted = fit(parse_messages(messages), chosen, self.tokenizer, room, truncate)
        if fitted.statement:
            warnings.warn(fitted.statement, TruncationWarning, stacklevel=2)
        stops = chosen.stops(self.tokenizer)
        request = Request(
            prompts=[fitted.ids],
            params=[sampling],
            stop_ids=(*stops.ids, *self._stop_ids),
            stop_strings=stops.strings,
            strip=True,  # a format's prompt ends before the space that precedes the answer
        )
        deltas = self.generate(request)
        if stream:
            return deltas
        return dataclasses.replace(collect(deltas, request)[0], dropped=fitted.dropped)

    def request(
        self,
        prompt: str | Texts,
        params: SamplingParams,
        *,
        n: int = 1,
        echo: bool = False,
    ) -> Request:
        """Return a call of `complete` as a request for `generate`."""
        prompts = _texts("prompt", prompt)
        return Request.same_params(
            [self.tokenizer.encode(text, bos=True, eos=False) for text in prompts],
            params,
            n=n,
            echo=prompts if echo else (),
            stop_ids=self._stop_ids,
        )

    def generate(self, request: Request) -> Stream:
        """Return an iterator over the deltas of a request, with text; see `Engine.generate`."""
        return add_text(self.engine.generate(request), request, self.tokenizer)

    @overload
    def score(self, texts: str) -> Score: ...

    @overload
    def score(self, texts: Texts) -> list[Score]: ...

    def score(self, texts: str | Texts) -> Score | list[Score]:
        """Return the log-probability of each token of a text: a `Score`, or a list for a list.

        Raises:
          UserError: for a text longer than the context.
        """
        with on_mesh(self.engine.mesh):
            scores = score_texts(self.engine.model, self.tokenizer, _texts("texts", texts))
        return scores[0] if isinstance(texts, str) else scores

    def embed(self, texts: str | Texts, normalize: bool = True) -> np.ndarray:
        """Return the mean hidden state of a text, float32 [D]; of a list of texts, [texts, D].

        `normalize` scales each to length 1, so that the dot product of two is their cosine.

        Raises:
          UserError: for a text longer than the context.
        """
        listed = _texts("texts", texts)
        with on_mesh(self.engine.mesh):
            vectors = embed_texts(self.engine.model, self.tokenizer, listed, normalize)
        return vectors[0] if isinstance(texts, str) else vectors


def _texts(name: str, texts: str | Texts) -> list[str]:
    """Return the texts of an argument as a list."""
    listed = [texts] if isinstance(texts, str) else texts
    is_list = isinstance(listed, list | tuple) and all(isinstance(text, str) for text in listed)
    if not is_list or not listed:
        raise UsageError(f"{name}={texts!r:.60} is not a text or a list of texts")
    return list(listed)
