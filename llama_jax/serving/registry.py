"""The models that a server has: listed from the start, loaded when one is first needed."""

import asyncio
import contextlib
import dataclasses
import gc
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.checkpoints.metadata import Description, read_description
from llama_jax.checkpoints.restore import folder_and_step
from llama_jax.errors import GIB, UserError, did_you_mean, require
from llama_jax.files import progress
from llama_jax.formats.named_models import checkpoint_path
from llama_jax.inference.request import SamplingParams
from llama_jax.llm import LLM
from llama_jax.model.parameters import count_parameters
from llama_jax.serving.fields import NUMBERS, ApiError
from llama_jax.serving.scheduler import Scheduler, default_slots
from llama_jax.text.chat_formats import NO_TEMPLATE, TEMPLATES

SHOWN = ("top_k", *NUMBERS)  # sampling parameters in a model's listing
CONTEXT = {"cpu": 2048}  # tokens that a slot has room for, at most, by default; by platform
OTHER_CONTEXT = 8192
BYTES = {"int8": 1.1, "int4": 0.6, "nf4": 0.6}  # of a quantized parameter, with its scales


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint that a server was started with."""

    name: str
    path: Path
    base: Path | None  # the checkpoint that adapters belong to; None: it is a model itself
    description: Description
    created: int  # seconds since 1970


def served_context(description: Description, max_context: int = 0) -> int:
    """Return how many tokens a prompt and its completion may have: `max_context`, if it is set.

    By default it is the model's context, up to what every slot can have room for.
    """
    most = CONTEXT.get(jax.default_backend(), OTHER_CONTEXT)
    return max_context or min(description.model.context_length, most)


def find_sources(words: Sequence[str], base: str = "") -> list[Source]:
    """Return the checkpoints that words such as "ckpt/smollm2" or "small=ckpt/smollm2" name.

    Args:
      base: of all adapters among them; "": where it was in training.

    Raises:
      UsageError: for two models of one name, or a base without adapters.
      UserError: when a checkpoint, or the base of one, does not exist or cannot be read.
    """
    found: dict[str, Source] = {}
    for word in words:
        name, is_named, path = word.partition("=")
        if not is_named or Path(word).exists():
            name, path = "", word
        folder = checkpoint_path(path)
        home = folder_and_step(folder)[0]
        description = read_description(home)
        name = name or home.resolve().name
        twice = f"--model={word} is the second of the name {name}; name it with --model=NAME={path}"
        require(name not in found, twice)
        origin = None
        if description.lora.rank:
            origin = checkpoint_path(base or description.base).resolve()
            read_description(folder_and_step(origin)[0])
        created = int(home.stat().st_mtime)
        found[name] = Source(name, folder, origin, description, created)
    has_adapters = any(source.base for source in found.values())
    require(has_adapters or not base, f"--base={base} is for adapters; leave it out")
    return list(found.values())


class Served:
    """A loaded model, and the scheduler that runs its requests."""

    def __init__(self, source: Source, llm: LLM, base: LLM, scheduler: Scheduler):
        self.source, self.llm, self.base, self.scheduler = source, llm, base, scheduler
        self.users = 0  # requests that use it now
        self.last_used = 0.0


class Registry:
    """Loads models when they are needed, and unloads those least recently used."""

    def __init__(
        self,
        sources: Sequence[Source],
        load: Callable[[Path, bool], LLM],
        make_scheduler: Callable[[LLM], Scheduler],
        *,
        template: str = "",
        max_context: int = 0,
        memory: float = 0.0,
        size_of: Callable[[Source], tuple[float, float]] | None = None,
    ):
        """Make a registry in which nothing is loaded.

        Args:
          load: returns the model of a checkpoint that is no adapter, given its path and whether
            it is served itself, not adapters of it alone.
          make_scheduler: returns a started scheduler.
          template: the chat format of all; "": each its own.
          max_context: as for `served_context`; `load` uses it too.
          memory: GiB that loaded models may fill together; 0: any.
          size_of: returns the bytes that the parameters of a model and its cache will need; None:
            not known.

        Raises:
          UsageError: when one of the models needs more by itself.
        """
        self._sources = {source.name: source for source in sources}
        self._load, self._make_scheduler = load, make_scheduler
        self._template, self._max_context = template, max_context
        self._limit, self._size_of = memory * GIB, size_of or (lambda source: (0, 0))
        self._loaded: dict[str, Served] = {}
        self._lock = asyncio.Lock()
        for source in sources:
            needs = sum(self._size_of(source))
            require(
                not memory or needs <= self._limit,
                f"--memory={memory:g} is less than the {needs / GIB:.2f} GiB of {source.name};"
                " raise it, or quantize",
            )

    def find(self, name: str) -> Source:
        """Return the model of a name, the first for ""; raises `ApiError` for an unknown one."""
        name = name or next(iter(self._sources))
        if name not in self._sources:
            expected = f"expected one of {', '.join(self._sources)}"
            hint = did_you_mean(name, self._sources)
            raise ApiError(
                f"model={name!r} does not exist; {expected}{hint}",
                "model",
                status=404,
                code="model_not_found",
            )
        return self._sources[name]

    def listing(self) -> list[dict[str, Any]]:
        """Return the JSON of all models."""
        return [self.describe(source) for source in self._sources.values()]

    def describe(self, source: Source) -> dict[str, Any]:
        """Return the JSON of a model: OpenAI's keys, and how to prompt and to sample it."""
        known = source.description
        template = self._template or known.chat_template
        is_named = template in TEMPLATES or template in ("", NO_TEMPLATE)
        generation: dict[str, Any] = dict(known.generation)
        defaults = SamplingParams(**generation)
        return {
            "id": source.name,
            "object": "model",
            "created": source.created,
            "owned_by": "llama_jax",
            "context_length": served_context(known, self._max_context),
            "chat_format": (template if is_named else "jinja").replace(NO_TEMPLATE, ""),
            "sampling": {name: getattr(defaults, name) for name in SHOWN},
            "loaded": source.name in self._loaded,
        }

    def loaded(self) -> list[Served]:
        """Return the models that are loaded."""
        return list(self._loaded.values())

    @contextlib.asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Served]:
        """Return a model, loaded if need be, which stays loaded while the block runs.

        Raises:
          ApiError: if its name is unknown, it cannot be loaded, or others in use fill the memory.
        """
        source = self.find(name)
        served = self._loaded.get(source.name) or await self._load_one(source)
        served.users += 1
        try:
            yield served
        finally:
            served.users -= 1
            served.last_used = time.monotonic()

    async def _load_one(self, source: Source) -> Served:
        """Return a model that was not loaded, in a thread; one is loaded at a time."""
        async with self._lock:
            served = self._loaded.get(source.name)  # another request may have waited for it
            if served is None:
                self._make_room(source)
                try:
                    served = await asyncio.to_thread(self._load_source, source)
                except UserError as error:
                    raise unavailable(f"model {source.name} cannot be loaded: {error}") from error
                self._loaded[source.name] = served
            return served

    def _load_source(self, source: Source) -> Served:
        """Load a model; adapters share the model that they belong to, if it is loaded."""
        origin = source.base or source.path.resolve()
        others = (other for other in self._loaded.values() if _origin(other.source) == origin)
        base = next((other.base for other in others), None)
        with progress(f"loading {source.name}"):
            base = base or self._load(origin, not source.base)
            llm = base.with_adapter(source.path) if source.base else base
            return Served(source, llm, base, self._make_scheduler(llm))

    def _make_room(self, source: Source) -> None:
        """Unload idle models, the least recently used first, until another one has room."""
        if not self._limit:
            return
        while self.bytes_used() + self._new_bytes(source) > self._limit:
            idle = [served for served in self._loaded.values() if not served.users]
            if not idle:
                raise unavailable(
                    f"model {source.name} has no room beside those in use; try again later"
                )
            self._unload(min(idle, key=lambda served: served.last_used))

    def _new_bytes(self, source: Source) -> float:
        origin = source.base or source.path.resolve()
        is_shared = any(_origin(other.source) == origin for other in self._loaded.values())
        parameters, cache = self._size_of(source)
        return cache if is_shared else parameters + cache

    def _unload(self, served: Served) -> None:
        del self._loaded[served.source.name]
        served.scheduler.close()
        del served.llm, served.base
        gc.collect()

    def bytes_used(self) -> int:
        """Return the bytes of all loaded models, each array once, and of their caches."""
        arrays = {
            id(leaf): leaf.nbytes
            for served in self._loaded.values()
            for leaf in jax.tree.leaves(served.llm.engine.model)
        }
        caches = (served.scheduler.stats().cache_bytes for served in self._loaded.values())
        return sum(arrays.values()) + sum(caches)

    def close(self) -> None:
        """Unload all."""
        for served in self.loaded():
            self._unload(served)


def unavailable(message: str) -> ApiError:
    """Return the error for a model that cannot be used now."""
    return ApiError(message, "model", status=503, code="model_unavailable", retry_after="5")


def _origin(source: Source) -> Path:
    return source.base or source.path.resolve()


def estimate_bytes(
    source: Source,
    *,
    slots: int,
    quantize: str | None = None,
    dtype: str = "",
    cache_dtype: str = "",
    max_context: int = 0,
) -> tuple[float, float]:
    """Return about how many bytes a model's parameters and its cache take; arguments as `LLM`'s."""
    config, stored = source.description.model, source.description.quantization
    kind = quantize or (stored.kind if stored else "")
    on_cpu = jax.default_backend() == "cpu"
    itemsize = jnp.dtype(dtype or ("float32" if on_cpu else config.compute_dtype)).itemsize
    parameters = count_parameters(config) * BYTES.get(kind, itemsize)
    tokens = (slots or default_slots()) * served_context(source.description, max_context)
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_size
    return parameters, tokens * per_token * (1 if cache_dtype else itemsize)
