"""A batch of slots on the device, which sequences enter and leave.

What an ended sequence leaves in its slot is kept until the slot is used again, the least recently
used first. A prompt that begins like something in a slot, whether that is in use or not, is read
from where it differs: the next turn of a chat, or a system prompt that many share.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.distributed.mesh import placed
from llama_jax.errors import UserError
from llama_jax.inference.constraints import Constraint, masks
from llama_jax.inference.decode import (
    NO_TOKEN,
    Tokens,
    cache_config,
    common_prefix,
    state_shardings,
)
from llama_jax.inference.engine import Engine
from llama_jax.inference.request import SamplingParams, TokenLogprob
from llama_jax.inference.sampler import Level, Sampler
from llama_jax.inference.scoring import score_hidden
from llama_jax.inference.slots import (
    CHUNK_SIZES,
    activate,
    chunk_size,
    copy_prefix,
    decode_one_slot,
    decode_slots,
    empty_slots,
    read_chunk,
)
from llama_jax.serving.reading import MAX_LOGPROBS, Reading

STEPS = {"cpu": 2}  # decode steps of a block, after which callers see their tokens; by platform
OTHER_STEPS = 8
MIN_PREFIX = 16  # tokens in a slot that are worth copying to another
MAX_STOPS = 32  # token ids that end a sequence
IDLE = SamplingParams(temperature=0)  # of a slot without a sequence


@dataclasses.dataclass(eq=False)
class Running:
    """A sequence, from the queue to its end."""

    prompt: Sequence[int]
    params: SamplingParams
    limit: int  # tokens, prompt included, at which it ends
    stop_ids: Sequence[int]
    constraint: Constraint | None
    num_read: int = 0  # tokens of the prompt that are in its slot
    generated: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class _Slot:
    """What the host knows of a slot."""

    index: int
    cached: list[int] = dataclasses.field(default_factory=list)  # tokens in it, but for new ones
    sequence: "Running | Reading[Any] | None" = None
    is_active: bool = False  # whether its sequence's prompt has been read
    used: int = 0  # when a sequence last entered it


_Row = tuple[int, _Slot, Running]  # a row of the arrays of a block, and whose it is


@dataclasses.dataclass(frozen=True)
class Block:
    """Decode steps that the device runs or has run."""

    running: list[_Row]
    tokens: Tokens
    stopped_B: jax.Array


@dataclasses.dataclass(frozen=True)
class Output:
    """What a block has made of a sequence, or what went wrong with it."""

    sequence: Running
    ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob] = ()
    finish_reason: str = ""
    error: Exception | None = None


class Batch:
    """Slots of one batch. Programs are dispatched, and only `outputs` waits for the device."""

    def __init__(self, engine: Engine, slots: int, is_abstract: bool = False):
        """Make empty slots, each with room for the model's context.

        Args:
          is_abstract: take no memory for them; nothing but `warm_up` can be called then, and the
            engine's model may have shapes in place of arrays. Without a mesh only.
        """
        self._engine, config = engine, engine.model.config
        own = cache_config(config, engine.mesh)
        make = partial(empty_slots, own, slots, config.context_length, engine.cache_dtype)
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        if is_abstract:
            state = jax.eval_shape(make)
            state = placed(state, jax.tree.map(lambda _: here, state))
        elif engine.mesh:
            places = state_shardings(jax.eval_shape(make), engine.mesh)
            state = jax.jit(make, out_shardings=places)()
        else:  # committed, as what programs return: each is compiled once
            state = jax.device_put(make(), here)
        self._state = state
        self._slots = [_Slot(index) for index in range(slots)]
        self._reading: _Slot | None = None
        self._sampling: tuple[Any, ...] = ()  # arguments of the last block
        self._steps = STEPS.get(jax.default_backend(), OTHER_STEPS)
        self._no_counts_V = jnp.zeros(config.vocab_size, jnp.int32)
        self._on_cpu = jax.default_backend() == "cpu"

    def warm_up(self) -> None:
        """Compile every program, or load it from the compilation cache."""
        engine, state, zero = self._engine, self._state, np.int32(0)
        calls: list[tuple[Any, tuple[Any, ...]]] = [
            (read_chunk, (engine.model, state, zero, zero, np.zeros(n, np.int32), engine.execution))
            for n in CHUNK_SIZES
        ]
        calls.append((copy_prefix, (state, zero, zero, zero)))
        calls.append((activate, (state, zero, zero, zero, zero, np.uint32(0), self._no_counts_V)))
        calls += [self._call([], level, is_alone=False) for level in Level if self._has(level)]
        if self._on_cpu:
            calls.append(self._call([], Level.ALL, is_alone=True))
        calls.reverse()  # those that take longest first
        with ThreadPoolExecutor() as pool:  # XLA compiles beside Python, which lowers the next one
            made = [pool.submit(program.lower(*arguments).compile) for program, arguments in calls]
            for size, reads in zip(CHUNK_SIZES, reversed(made)):
                made.append(pool.submit(self._lower_scores(size, reads.result()).compile))
        for each in made:
            each.result()

    def _lower_scores(self, size: int, reads: jax.stages.Compiled) -> jax.stages.Lowered:
        """Return the program for the log-probabilities of a chunk that another program reads."""
        config, sharding = self._engine.model.config, reads.output_shardings[1]
        shape = (1, size, config.dim)
        hidden_BTD = jax.ShapeDtypeStruct(shape, config.compute_dtype, sharding=sharding)
        next_BT = np.zeros(shape[:2], np.int32)
        return score_hidden.lower(self._engine.model, hidden_BTD, next_BT, MAX_LOGPROBS)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(array.nbytes for array in jax.tree.leaves(self._state.cache.layers))

    @property
    def num_free(self) -> int:
        """Slots without a sequence."""
        return sum(slot.sequence is None for slot in self._slots)

    @property
    def sequences(self) -> list[Running | Reading[Any]]:
        """The sequences in slots."""
        return [slot.sequence for slot in self._slots if slot.sequence]

    @property
    def is_decoding(self) -> bool:
        """Whether the prompt of some sequence has been read."""
        return bool(self._decoding)

    @property
    def is_reading(self) -> bool:
        """Whether a prompt has been read in part."""
        return self._reading is not None

    @property
    def needs_results(self) -> bool:
        """Whether a block should only be started once the one before has been delivered.

        A mask depends on the last token. And on CPU the host's work takes time from the device's,
        while a new sequence would wait for two blocks.
        """
        return self._on_cpu or any(sequence.constraint for _, sequence in self._decoding)

    @property
    def _decoding(self) -> list[tuple[_Slot, Running]]:
        return [
            (slot, slot.sequence)
            for slot in self._slots
            if slot.is_active and isinstance(slot.sequence, Running)
        ]

    # --- a sequence enters and leaves ---

    def enter(self, sequence: Running | Reading[Any]) -> int:
        """Give a sequence a free slot; return how many tokens of its prompt are in it already.

        It is the one that is read next. Of a text that is only read, each hidden state is needed.
        """
        if isinstance(sequence, Running):
            slot, source, length = self._choose(sequence.prompt)
            if source is not slot and length:
                numbers = map(np.int32, (source.index, slot.index, length))
                self._state = copy_prefix(self._state, *numbers)
            slot.cached, sequence.num_read = list(sequence.prompt[:length]), length
        else:
            slot, length = self._oldest, 0
            slot.cached = []
        slot.sequence, slot.is_active = sequence, False
        slot.used = max(each.used for each in self._slots) + 1
        self._reading = slot
        return length

    @property
    def _oldest(self) -> _Slot:
        """The free slot that was not used for the longest time."""
        free = [slot for slot in self._slots if slot.sequence is None]
        return min(free, key=lambda slot: slot.used)

    def _choose(self, prompt: Sequence[int]) -> tuple[_Slot, _Slot, int]:
        """Return a free slot, a slot that has the first tokens of the prompt, and their number."""
        oldest = self._oldest
        length, _, source = max(
            (
                (common_prefix(slot.cached, prompt), slot.sequence is None, slot)
                for slot in self._slots
            ),
            key=lambda found: found[:2],
        )
        # Used as it is, unless most of another dialogue would be thrown away.
        if source.sequence is None and (2 * length > len(source.cached) or source is oldest):
            return source, source, length
        return oldest, source, length if length >= MIN_PREFIX else 0

    def leave(self, sequence: Running | Reading[Any], has_stopped: bool = False) -> None:
        """Free the slot of a sequence; what is cached there stays.

        Args:
          has_stopped: whether it met a stop token, which is decoded from all tokens before it.
        """
        for slot in self._slots:
            if slot.sequence is sequence:
                if slot.is_active and isinstance(sequence, Running):
                    known = [*sequence.prompt, *sequence.generated]
                    # What was made last is cached only if the model has gone on from it.
                    slot.cached = known if has_stopped else known[:-1]
                slot.sequence, slot.is_active = None, False
                if self._reading is slot:
                    self._reading = None

    def read(self) -> tuple[int, int]:
        """Read a chunk of the prompt that is being read; return its size, and the new tokens in it.

        After its last chunk the sequence takes part in blocks; a text that is only read leaves.
        """
        slot = self._reading
        assert slot is not None and slot.sequence is not None
        sequence, num_read = slot.sequence, slot.sequence.num_read
        if isinstance(sequence, Reading):
            ids = sequence.text
        else:
            ids = sequence.prompt[:-1]  # the first decode step reads the last token
            if num_read == len(ids):
                self._begin(slot, sequence)
                return 0, 0
        size = chunk_size(len(ids) - num_read)
        # A padded chunk may not go beyond the slot; then some tokens are read again.
        start = min(num_read, self._state.cache.size - size)
        slot.cached = list(ids[: start + size])
        ids_T = np.zeros(size, np.int32)
        ids_T[: len(slot.cached) - start] = slot.cached[start:]
        model, at = self._engine.model, (np.int32(slot.index), np.int32(start))
        self._state, hidden_BTD = read_chunk(model, self._state, *at, ids_T, self._engine.execution)
        if isinstance(sequence, Running):
            sequence.num_read = len(slot.cached)
        elif sequence.add(model, hidden_BTD, start):
            self.leave(sequence)
        return size, len(slot.cached) - num_read

    def _begin(self, slot: _Slot, sequence: Running) -> None:
        counts_V: Any = self._no_counts_V
        if sequence.params.has_penalties:
            counts_V = np.bincount(sequence.prompt, minlength=len(counts_V)).astype(np.int32)
        last, seed = len(sequence.prompt) - 1, np.uint32(sequence.params.seed)
        numbers = map(np.int32, (slot.index, sequence.prompt[last], last, sequence.limit))
        self._state = activate(self._state, *numbers, seed, counts_V)
        slot.is_active, self._reading = True, None

    # --- blocks ---

    def start_block(self) -> Block:
        """Start decode steps for all sequences whose prompts have been read."""
        decoding = self._decoding
        is_alone = self._on_cpu and len(decoding) == 1
        running = [(0 if is_alone else slot.index, slot, sequence) for slot, sequence in decoding]
        needed = max(Level.of(sequence.params) for *_, sequence in running)
        level = min(level for level in Level if level >= needed and self._has(level))
        program, arguments = self._call(running, level, is_alone)
        self._state, tokens, stopped_B = program(*arguments)
        return Block(running, tokens, stopped_B)

    def _has(self, level: Level) -> bool:
        """Return whether there are programs of a level.

        On CPU all steps of sampling take little beside the model, and a program takes long to load.
        """
        return level is Level.ALL or not self._on_cpu

    def _call(
        self, running: list[_Row], level: Level, is_alone: bool
    ) -> tuple[Any, tuple[Any, ...]]:
        """Return the program of a block and its arguments."""
        made_for = (running, level, is_alone)
        if self._sampling[:3] != made_for:
            self._sampling = (*made_for, *self._arguments(*made_for))
        which, sampler, stops_BS, constraints = self._sampling[3:]
        is_constrained = any(constraints)
        if is_constrained:
            allowed_BW = masks(constraints, self._engine.model.config.vocab_size)
            sampler = dataclasses.replace(sampler, allowed_BW=allowed_BW)
        # A first token should come early; elsewhere blocks are short, and their steps are equal so
        # that a sequence's bits do not depend on when others begin.
        begins = self._on_cpu and not all(sequence.generated for *_, sequence in running)
        return decode_one_slot if is_alone else decode_slots, (
            self._engine.model,
            self._state,
            which,
            sampler,
            stops_BS,
            np.int32(1 if is_constrained or begins else self._steps),
            MAX_LOGPROBS if level is Level.ALL else None,
            self._engine.execution,
        )

    def _arguments(self, running: list[_Row], level: Level, is_alone: bool) -> tuple[Any, ...]:
        """Return what a block is run with, which changes with the sequences only."""
        rows = 1 if is_alone else len(self._slots)
        params, active_B = [IDLE] * rows, np.zeros(rows, bool)
        constraints: list[Constraint | None] = [None] * rows
        stops_BS = np.full((rows, MAX_STOPS), NO_TOKEN, np.int32)
        for row, _, sequence in running:
            active_B[row], params[row] = True, sequence.params
            constraints[row] = sequence.constraint
            stops_BS[row, : len(sequence.stop_ids)] = sequence.stop_ids
        sampler = Sampler.of(params, level)
        if level is Level.ALL:
            allowed_BW = masks([None] * rows, self._engine.model.config.vocab_size)
            sampler = dataclasses.replace(sampler, allowed_BW=jnp.asarray(allowed_BW))
        slot = next((slot.index for _, slot, _ in running), 0)
        return np.int32(slot) if is_alone else active_B, sampler, stops_BS, constraints

    def outputs(self, block: Block) -> Iterator[Output]:
        """Wait for a block, and yield what each sequence that is still there has got.

        A sequence that ends leaves its slot.
        """
        ids_B, stopped_B = block.tokens.ids(), np.asarray(block.stopped_B)
        for row, slot, sequence in block.running:
            if slot.sequence is not sequence:  # it ended in the block before, or was cancelled
                continue
            ids, top = ids_B[row], sequence.params.logprobs
            sequence.generated += ids
            reason, error = "stop" if stopped_B[row] else "", None
            if len(sequence.prompt) + len(sequence.generated) >= sequence.limit:
                reason = reason or "length"
            try:
                if sequence.constraint and sequence.constraint.extend(ids):
                    reason = "stop"
            except UserError as failure:
                error = failure
            if reason or error:
                self.leave(sequence, has_stopped=bool(stopped_B[row]))
            logprobs = () if top is None else block.tokens.reported(row, top)
            yield Output(sequence, ids, logprobs, reason, error)
