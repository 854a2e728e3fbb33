"""The scheduler: runs the requests of many callers on one model, by continuous batching.

One thread uses the device. Each turn of its loop reads chunks of waiting prompts into free slots,
starts a block of decode steps for all slots in use, and delivers the tokens of the block before
while the device computes. A sequence leaves its slot as soon as it has ended or is cancelled.

What an ended sequence leaves in its slot is kept until the slot is used again, the least recently
used first. A prompt that begins like something in a slot, whether that is in use or not, is read
from where it differs: the next turn of a chat, or a system prompt that many share.
"""

import collections
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.distributed.mesh import on_mesh
from llama_jax.errors import UsageError, UserError
from llama_jax.inference.decode import NO_TOKEN, Tokens, shard_cache
from llama_jax.inference.engine import Engine
from llama_jax.inference.request import Delta, Request, SamplingParams, TokenLogprob
from llama_jax.inference.sampler import MAX_BIASES, Level, Sampler
from llama_jax.inference.slots import (
    CHUNK_SIZES,
    activate,
    chunk_size,
    copy_prefix,
    decode_slots,
    empty_slots,
    read_chunk,
)

SLOTS = {"cpu": 8}  # by platform
OTHER_SLOTS = 32
STEPS = {"cpu": 4}  # decode steps a block, after which callers see their tokens; by platform
OTHER_STEPS = 8
READ_BETWEEN = 256  # tokens of prompts that are read between two blocks
MIN_PREFIX = 16  # tokens in a slot that are worth copying to another
MAX_STOPS = 32  # token ids that end a sequence
MAX_LOGPROBS = 20  # top tokens that are reported, as in OpenAI's API
COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event

# Called on the scheduler's thread with each delta, or once with what went wrong; it must not block.
Deliver = Callable[[Delta | Exception], None]


class QueueFullError(UserError):
    """More sequences wait than the scheduler accepts; `retry_after` is in seconds."""

    retry_after: float = 1.0


@dataclasses.dataclass(frozen=True)
class Stats:
    """Figures of a scheduler since it was made."""

    slots: int  # sequences that are decoded together
    active: int  # slots in use
    waiting: int  # sequences in the queue
    prompt_tokens: int  # that were read
    reused_tokens: int  # of prompts, that were in a slot already
    generated_tokens: int
    compilations: int  # of programs, since `start` returned
    cache_bytes: int


class Ticket:
    """A submitted request, by which it can be cancelled."""

    def __init__(self, request: Request, deliver: Deliver):
        self.request, self.deliver = request, deliver
        self.cancelled: set[int] = set()

    def cancel(self, index: int | None = None) -> None:
        """End one sequence of the request, or all; its deltas cease soon after."""
        self.cancelled |= set(range(len(self.request.prompts))) if index is None else {index}


@dataclasses.dataclass(eq=False)
class _Sequence:
    """One sequence of a request, from the queue to its end."""

    ticket: Ticket
    index: int
    prompt: Sequence[int]
    params: SamplingParams
    limit: int  # tokens, prompt included, at which it ends
    read: int = 0  # tokens of the prompt that are in the slot
    generated: list[int] = dataclasses.field(default_factory=list)

    @property
    def is_cancelled(self) -> bool:
        return self.index in self.ticket.cancelled

    @property
    def stop_ids(self) -> Sequence[int]:
        return self.ticket.request.stop_ids

    def deliver(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob], reason: str) -> None:
        self.ticket.deliver(Delta(self.index, tuple(ids), tuple(logprobs), reason))


@dataclasses.dataclass(eq=False)
class _Slot:
    """What the host knows of a slot of the batch."""

    index: int
    cached: list[int] = dataclasses.field(default_factory=list)  # tokens that are in it
    sequence: _Sequence | None = None
    is_active: bool = False  # whether its sequence's prompt has been read
    used: int = 0  # when a sequence last began in it

    def common(self, prompt: Sequence[int]) -> int:
        """Return how many tokens of a prompt are in the slot; its last is not looked at."""
        most = min(len(self.cached), len(prompt) - 1)
        return next((i for i in range(most) if self.cached[i] != prompt[i]), most)


@dataclasses.dataclass(frozen=True)
class _Block:
    """A block of decode steps that the device runs or has run."""

    slots: list[tuple[_Slot, _Sequence]]
    tokens: Tokens
    stopped_B: jax.Array


class Scheduler:
    """Runs requests of many callers on one model; one thread of its own uses the device."""

    def __init__(self, engine: Engine, *, slots: int = 0, max_waiting: int = 64):
        """Make a scheduler, which serves after `start`.

        Args:
          engine: with the model, the cache's dtype and the mesh.
          slots: sequences that are decoded together; 0 chooses by device.
          max_waiting: sequences that may wait for a slot.
        """
        platform = jax.default_backend()
        self.engine, self.max_waiting = engine, max_waiting
        self.slots = slots or SLOTS.get(platform, OTHER_SLOTS)
        self._steps = np.int32(STEPS.get(platform, OTHER_STEPS))
        self._waiting: collections.deque[_Sequence] = collections.deque()
        self._changed = threading.Condition()
        self._is_closing = self._drains = False
        self._counts = dict.fromkeys(("prompt", "reused", "generated", "compilations"), 0)
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    # --- what callers use ---

    def start(self) -> None:
        """Compile or load every program that service needs, and begin to serve."""
        self._thread.start()
        self._ready.wait()
        if self._failure:
            raise self._failure

    def submit(self, request: Request, deliver: Deliver) -> Ticket:
        """Queue a request; its deltas are given to `deliver` as they are made.

        Raises:
          UserError, UsageError: at once, as `Engine.generate` does.
          QueueFullError: when too many sequences are waiting already.
        """
        self.check(request)
        ticket, context = Ticket(request, deliver), self.engine.model.config.context_length
        sequences = [
            _Sequence(ticket, index, prompt, params, min(len(prompt) + params.max_tokens, context))
            for index, (prompt, params) in enumerate(zip(request.prompts, request.params))
        ]
        with self._changed:
            if self._is_closing:
                raise QueueFullError("the server is stopping; send the request to another one")
            room = self.max_waiting + self._count_free() - len(self._waiting)
            if len(sequences) > room:
                raise QueueFullError(
                    f"{len(self._waiting)} sequences are waiting, and at most {self.max_waiting}"
                    " may; try again later"
                )
            self._waiting.extend(sequences)
            self._changed.notify()
        return ticket

    def check(self, request: Request) -> None:
        """Raise what `submit` raises for a request that this model cannot run."""
        self.engine.check(request)
        shared = request.shared
        if shared.rng != "jax" or shared.speculate:
            raise UsageError("rng and speculate are for single requests; a server has neither")
        if (shared.logprobs or 0) > MAX_LOGPROBS:
            raise UsageError(f"logprobs={shared.logprobs} is out of range; expected 0 to 20")
        if len(request.stop_ids) > MAX_STOPS:
            raise UsageError(f"{len(request.stop_ids)} stop ids; expected at most {MAX_STOPS}")
        most = max(len(params.logit_bias) for params in request.params)
        if most > MAX_BIASES:
            raise UsageError(f"logit_bias has {most} tokens; expected at most {MAX_BIASES}")

    def generate(self, request: Request) -> Iterator[Delta]:
        """Return an iterator over the deltas of a request, as `Engine.generate` does."""
        deltas: queue.Queue[Delta | Exception] = queue.Queue()
        ticket = self.submit(request, deltas.put)

        def received() -> Iterator[Delta]:
            running = len(request.prompts)
            try:
                while running:
                    delta = deltas.get()
                    if isinstance(delta, Exception):
                        raise delta
                    running -= bool(delta.finish_reason)
                    yield delta
            finally:
                ticket.cancel()

        return received()

    def stats(self) -> Stats:
        """Return the figures of now."""
        counts = self._counts
        return Stats(
            slots=self.slots,
            active=self.slots - self._count_free(),
            waiting=len(self._waiting),
            prompt_tokens=counts["prompt"],
            reused_tokens=counts["reused"],
            generated_tokens=counts["generated"],
            compilations=counts["compilations"],
            cache_bytes=self._cache_bytes,
        )

    def close(self, drain: bool = False) -> None:
        """Stop; `drain` finishes what was submitted first. What is not finished gets an error."""
        with self._changed:
            self._is_closing, self._drains = True, drain
            self._changed.notify()
        self._thread.join()

    # --- the thread that uses the device ---

    def _run(self) -> None:
        with on_mesh(self.engine.mesh):
            try:
                self._reset()
                self._warm_up()
                jax.monitoring.register_event_duration_secs_listener(self._count_compilation)
            except BaseException as error:
                self._failure = error
            self._ready.set()
            while self._failure is None and self._wait():
                try:
                    self._turn()
                except Exception as error:  # the device's, such as a lack of memory
                    self._fail(error)
            self._fail(UserError("the server is stopping"))

    def _reset(self) -> None:
        """Begin with empty slots."""
        engine = self.engine
        config = engine.model.config
        state = empty_slots(config, self.slots, config.context_length, engine.cache_dtype)
        if engine.mesh:
            state = dataclasses.replace(state, cache=shard_cache(state.cache, engine.mesh))
        self._state = state
        self._cache_bytes = sum(array.nbytes for array in jax.tree.leaves(state.cache.layers))
        self._slots = [_Slot(index) for index in range(self.slots)]
        self._reading: _Slot | None = None
        self._pending: _Block | None = None
        self._sampling: tuple[Any, ...] = ()
        self._no_counts_V = jnp.zeros(config.vocab_size, jnp.int32)

    def _warm_up(self) -> None:
        """Run every program once, without a sequence."""
        for size in CHUNK_SIZES:
            self._read(np.zeros(size, np.int32), 0, 0)
        self._state = copy_prefix(self._state, *np.zeros(3, np.int32))
        self._activate(0, 0, 0, 0, 0, self._no_counts_V)
        nothing = SamplingParams(temperature=0)
        for level in Level:
            sampler = Sampler.of([nothing] * self.slots, level)
            stops_BS = np.full((self.slots, MAX_STOPS), NO_TOKEN, np.int32)
            block = self._decode(np.zeros(self.slots, bool), sampler, stops_BS, level)
            jax.block_until_ready(block[0].token)

    def _wait(self) -> bool:
        """Wait until there is something to do; return False when the thread should end."""
        with self._changed:
            while True:
                is_busy = self._waiting or self._pending or self._count_free() < self.slots
                if self._is_closing and not (is_busy and self._drains):
                    return False
                if is_busy:
                    return True
                self._changed.wait()

    def _turn(self) -> None:
        """Read prompts, start a block, and deliver the one before."""
        self._drop_cancelled()
        self._read_prompts()
        running = [slot for slot in self._slots if slot.is_active]
        block = self._start_block(running) if running else None
        if self._pending:
            self._deliver(self._pending)
        self._pending = block

    def _drop_cancelled(self) -> None:
        with self._changed:
            if any(sequence.is_cancelled for sequence in self._waiting):
                kept = [each for each in self._waiting if not each.is_cancelled]
                self._waiting = collections.deque(kept)
        for slot in self._slots:
            if slot.sequence and slot.sequence.is_cancelled:
                self._leave(slot)

    def _leave(self, slot: _Slot) -> None:
        """Free a slot; what it has cached stays."""
        slot.sequence, slot.is_active = None, False
        if self._reading is slot:
            self._reading = None

    def _read_prompts(self) -> None:
        """Read chunks of prompts into free slots: all, or a few if sequences are being decoded."""
        left = READ_BETWEEN
        while left > 0 or not any(slot.is_active for slot in self._slots):
            slot = self._reading or self._admit()
            if slot is None:
                return
            self._reading = slot
            left -= self._read_some(slot)

    def _admit(self) -> _Slot | None:
        """Give the next waiting sequence a slot, and return that; None if either lacks."""
        with self._changed:
            free = [slot for slot in self._slots if slot.sequence is None]
            if not free or not self._waiting:
                return None
            sequence = self._waiting.popleft()
            slot, source, length = self._choose(free, sequence.prompt)
            slot.sequence, slot.used = sequence, max(each.used for each in self._slots) + 1
        if source is not slot and length:
            self._state = copy_prefix(
                self._state, np.int32(source.index), np.int32(slot.index), np.int32(length)
            )
        slot.cached = list(sequence.prompt[:length])
        sequence.read = length
        self._counts["reused"] += length
        return slot

    def _choose(self, free: list[_Slot], prompt: Sequence[int]) -> tuple[_Slot, _Slot, int]:
        """Return a free slot for a prompt, a slot that has its first tokens, and their number."""
        source = max(self._slots, key=lambda slot: slot.common(prompt))
        length = source.common(prompt)
        oldest = min(free, key=lambda slot: slot.used)
        # Continue where it is, unless that would throw away most of another dialogue.
        if source in free and (2 * length > len(source.cached) or source is oldest):
            return source, source, length
        return oldest, source, length if length >= MIN_PREFIX else 0

    def _read_some(self, slot: _Slot) -> int:
        """Read a chunk of a slot's prompt, or activate it; return the tokens read."""
        sequence = slot.sequence
        assert sequence is not None
        last = len(sequence.prompt) - 1  # the first decode step reads the last token
        if sequence.read == last:
            self._begin(slot, sequence)
            return 0
        size = chunk_size(last - sequence.read)
        # A padded chunk may not go beyond the slot; then some tokens are read again.
        start = min(sequence.read, self._state.cache.size - size)
        ids_T = np.zeros(size, np.int32)
        ids = sequence.prompt[start : min(start + size, last)]
        ids_T[: len(ids)] = ids
        self._read(ids_T, slot.index, start)
        self._counts["prompt"] += start + len(ids) - sequence.read
        sequence.read = start + len(ids)
        slot.cached = list(sequence.prompt[: sequence.read])
        return size

    def _begin(self, slot: _Slot, sequence: _Sequence) -> None:
        """Let a sequence whose prompt has been read take part in decoding."""
        counts_V: Any = self._no_counts_V
        if sequence.params.has_penalties:
            counts_V = np.bincount(sequence.prompt, minlength=counts_V.shape[0]).astype(np.int32)
        last, seed = len(sequence.prompt) - 1, sequence.params.seed
        self._activate(slot.index, sequence.prompt[last], last, sequence.limit, seed, counts_V)
        slot.is_active, self._reading = True, None

    def _start_block(self, running: list[_Slot]) -> _Block:
        """Start decode steps for all active slots."""
        pairs = [(slot, slot.sequence) for slot in running if slot.sequence]
        if not self._sampling or self._sampling[0] != pairs:
            self._sampling = (pairs, *self._arguments(running))
        tokens, stopped_B = self._decode(*self._sampling[1:])
        return _Block(pairs, tokens, stopped_B)

    def _arguments(self, running: list[_Slot]) -> tuple[np.ndarray, Sampler, np.ndarray, Level]:
        """Return what a block is run with, which changes with the sequences only."""
        params = [SamplingParams(temperature=0)] * self.slots
        active_B = np.zeros(self.slots, bool)
        stops_BS = np.full((self.slots, MAX_STOPS), NO_TOKEN, np.int32)
        for slot in running:
            assert slot.sequence is not None
            active_B[slot.index] = True
            params[slot.index] = slot.sequence.params
            stop_ids = slot.sequence.stop_ids
            stops_BS[slot.index, : len(stop_ids)] = stop_ids
        level = max(map(Level.of, params))
        return active_B, Sampler.of(params, level), stops_BS, level

    def _deliver(self, block: _Block) -> None:
        """Wait for a block and give its tokens to their callers."""
        ids_BC, stopped_B = np.asarray(block.tokens.token), np.asarray(block.stopped_B)
        for slot, sequence in block.slots:
            if slot.sequence is not sequence:  # it ended in the block before, or was cancelled
                continue
            ids = [token for token in ids_BC[slot.index].tolist() if token != NO_TOKEN]
            logprobs = _logprobs(block.tokens, slot.index, len(ids), sequence.params.logprobs)
            sequence.generated += ids
            self._counts["generated"] += len(ids)
            reason = "stop" if stopped_B[slot.index] else ""
            if len(sequence.prompt) + len(sequence.generated) >= sequence.limit:
                reason = reason or "length"
            # The last token is decoded, and cached, only when another follows or would have.
            known = [*sequence.prompt, *sequence.generated]
            slot.cached = known if reason == "stop" else known[:-1]
            if reason:
                self._leave(slot)
            sequence.deliver(ids, logprobs, reason)

    def _fail(self, error: Exception) -> None:
        """Tell every caller of an error that is nobody's fault, and begin anew."""
        with self._changed:
            sequences = [slot.sequence for slot in self._slots if slot.sequence]
            if self._is_closing:
                sequences += self._waiting
                self._waiting.clear()
        for ticket in {sequence.ticket for sequence in sequences}:
            ticket.cancel()
            ticket.deliver(error)
        if not self._is_closing:
            del self._state  # before there is another
            self._reset()

    def _count_free(self) -> int:
        return sum(slot.sequence is None for slot in self._slots)

    def _count_compilation(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED and threading.current_thread() is self._thread:
            self._counts["compilations"] += 1

    # --- programs ---

    def _read(self, ids_T: np.ndarray, slot: int, start: int) -> None:
        at = (np.int32(slot), np.int32(start))
        self._state = read_chunk(self.engine.model, self._state, *at, ids_T, self.engine.execution)

    def _activate(
        self, slot: int, token: int, length: int, limit: int, seed: int, counts_V: Any
    ) -> None:
        numbers = map(np.int32, (slot, token, length, limit))
        self._state = activate(self._state, *numbers, np.uint32(seed), counts_V)

    def _decode(
        self, active_B: np.ndarray, sampler: Sampler, stops_BS: np.ndarray, level: Level
    ) -> tuple[Tokens, jax.Array]:
        logprobs = MAX_LOGPROBS if level is Level.ALL else None
        self._state, tokens, stopped_B = decode_slots(
            self.engine.model,
            self._state,
            active_B,
            sampler,
            stops_BS,
            self._steps,
            logprobs,
            self.engine.execution,
        )
        return tokens, stopped_B


def _logprobs(tokens: Tokens, slot: int, count: int, top: int | None) -> list[TokenLogprob]:
    """Return the log-probabilities of a slot's new tokens; none if they are not requested."""
    if top is None or tokens.logprobs is None:
        return []
    arrays = (tokens.token, tokens.logprobs.token, tokens.logprobs.top_ids, tokens.logprobs.top)
    ids, own, top_ids, values = (np.asarray(array)[slot, :count] for array in arrays)
    return [
        TokenLogprob(
            int(ids[c]),
            float(own[c]),
            tuple(map(TokenLogprob, top_ids[c, :top].tolist(), values[c, :top].tolist())),
        )
        for c in range(count)
    ]
