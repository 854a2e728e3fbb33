"""The scheduler: runs the requests of many callers on one model, by continuous batching.

One thread uses the device. Each turn of its loop reads chunks of waiting prompts into free slots,
starts a block of decode steps for all slots in use, and delivers the tokens of the block before
while the device computes. A sequence leaves its slot as soon as it has ended or is cancelled.
"""

import collections
import dataclasses
import queue
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from llama_jax.distributed.mesh import on_mesh
from llama_jax.errors import UsageError, UserError, whole_number
from llama_jax.inference.engine import Engine
from llama_jax.inference.request import Delta, Request
from llama_jax.inference.sampler import MAX_BIASES
from llama_jax.serving.batch import MAX_STOPS, Batch, Block, Running
from llama_jax.serving.reading import MAX_LOGPROBS, Reading

SLOTS = {"cpu": 8}  # by platform
OTHER_SLOTS = 32
READ_BETWEEN = 256  # tokens of prompts that are read between two blocks
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
class _Submitted(Running):
    """A sequence and whom its tokens are for."""

    ticket: Ticket = dataclasses.field(kw_only=True)
    index: int = dataclasses.field(kw_only=True)

    @property
    def is_cancelled(self) -> bool:
        return self.index in self.ticket.cancelled

    def deliver(self, what: Delta | Exception) -> None:
        if isinstance(what, Exception):
            self.ticket.cancel()
        try:
            self.ticket.deliver(what)
        except Exception:  # the caller is gone, which is not a reason to fail the others
            self.ticket.cancel()


def compile_programs(engine: Engine, slots: int) -> None:
    """Compile every program that a scheduler needs, or load it from the compilation cache.

    Args:
      engine: with a model that may have shapes in place of arrays, on one device.
      slots: as for `Scheduler`.
    """
    Batch(engine, slots or default_slots(), is_abstract=True).warm_up()


def default_slots() -> int:
    """Return how many sequences are decoded together on this device."""
    return SLOTS.get(jax.default_backend(), OTHER_SLOTS)


class Scheduler:
    """Runs requests of many callers on one model; one thread of its own uses the device."""

    def __init__(self, engine: Engine, *, slots: int = 0, max_waiting: int = 64):
        """Make a scheduler, which serves after `start`.

        Args:
          engine: with the model, the cache's dtype and the mesh.
          slots: sequences that are decoded together; 0 chooses by device.
          max_waiting: sequences that may wait for a slot.

        Raises:
          UsageError: for a number out of range.
        """
        whole_number("slots", slots, lambda n: n >= 0, "1 or more, or 0 to choose by device")
        whole_number("max_waiting", max_waiting, lambda n: n >= 0, "0 or more")
        self.engine, self.max_waiting = engine, max_waiting
        self.slots = slots or default_slots()
        self._batch: Batch | None = None
        self._waiting: collections.deque[_Submitted | Reading[Any]] = collections.deque()
        self._changed = threading.Condition()
        self._is_closing = self._drains = False
        self._counts = collections.Counter[str]()
        self._is_ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    # --- what callers use ---

    def start(self) -> None:
        """Compile or load every program that service needs, and begin to serve."""
        self._thread.start()
        self._is_ready.wait()
        if self._failure:
            raise self._failure

    def submit(self, request: Request, deliver: Deliver) -> Ticket:
        """Queue a request; its deltas are given to `deliver` as they are made.

        A constraint is compiled here, which may take a second.

        Raises:
          UserError, UsageError: at once, as `Engine.generate` does.
          QueueFullError: when too many sequences are waiting already.
        """
        self._check(request)
        ticket, context = Ticket(request, deliver), self.engine.model.config.context_length
        arguments = zip(request.prompts, request.params, self.engine.constraints(request))
        sequences = [
            _Submitted(
                prompt,
                params,
                min(len(prompt) + params.max_tokens, context),
                request.stop_ids,
                constraint,
                ticket=ticket,
                index=index,
            )
            for index, (prompt, params, constraint) in enumerate(arguments)
        ]
        self._queue(sequences)
        return ticket

    def read(self, reading: Reading[Any]) -> None:
        """Queue texts that are only read; its future brings what is found.

        Raises:
          UserError: for a text without tokens, or longer than the context.
          QueueFullError: when too many sequences are waiting already.
        """
        context = self.engine.model.config.context_length
        if not 0 < reading.shortest <= reading.longest <= context:
            wrong = reading.longest if reading.shortest else 0
            raise UserError(
                f"a text has {wrong} tokens; expected 1 to {context}, the model's context"
            )
        self._queue([reading])

    def _queue(self, sequences: Sequence[_Submitted | Reading[Any]]) -> None:
        """Queue sequences, all or none."""
        with self._changed:
            if self._is_closing:
                raise QueueFullError("the server is stopping; send the request again later")
            room = self.max_waiting + self._num_free - len(self._waiting)
            if len(sequences) > room:
                raise QueueFullError(
                    f"{len(self._waiting)} sequences are waiting, and at most {self.max_waiting}"
                    " may; try again later"
                )
            self._waiting.extend(sequences)
            self._changed.notify()

    def _check(self, request: Request) -> None:
        self.engine.check(request)
        shared = request.shared
        if shared.rng != "jax" or shared.speculate:
            raise UsageError("rng and speculate are for one request at a time; leave them out")
        if (shared.logprobs or 0) > MAX_LOGPROBS:
            raise UsageError(
                f"logprobs={shared.logprobs} is out of range; expected 0 to {MAX_LOGPROBS}"
            )
        if len(request.stop_ids) > MAX_STOPS:
            raise UsageError(f"{len(request.stop_ids)} stop tokens; expected at most {MAX_STOPS}")
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
            active=self.slots - self._num_free,
            waiting=len(self._waiting),
            prompt_tokens=counts["prompt"],
            reused_tokens=counts["reused"],
            generated_tokens=counts["generated"],
            compilations=counts["compilations"],
            cache_bytes=self._batch.cache_bytes if self._batch else 0,
        )

    def close(self, drain: bool = False) -> None:
        """Stop; `drain` finishes what was submitted first. What is not finished gets an error."""
        with self._changed:
            self._is_closing, self._drains = True, drain
            self._changed.notify()
        if self._thread.ident:
            self._thread.join()

    # --- the thread that uses the device ---

    def _run(self) -> None:
        with on_mesh(self.engine.mesh):
            try:
                self._batch = batch = Batch(self.engine, self.slots)
                batch.warm_up()
            except BaseException as error:
                self._failure = error
                return
            finally:
                self._is_ready.set()
            jax.monitoring.register_event_duration_secs_listener(self._count_compilation)
            reason: Exception = UserError("the server is stopping")
            pending: Block | None = None
            try:
                while self._wait(batch, pending):
                    try:
                        pending = self._turn(batch, pending)
                    except Exception as failure:  # the device's, such as a lack of memory
                        self._fail(batch.sequences, failure)
                        pending = self._batch = None
                        del batch  # its memory is needed, which the failure's frames hold too
                        traceback.clear_frames(failure.__traceback__)
                        self._batch = batch = Batch(self.engine, self.slots)
            except Exception as failure:  # there is no memory for a new batch
                reason = failure
            # JAX would hold this object, and the model, for ever.
            jax.monitoring.unregister_event_duration_listener(self._count_compilation)
            with self._changed:
                self._is_closing = True
                sequences = [*(self._batch.sequences if self._batch else ()), *self._waiting]
                self._waiting.clear()
            self._fail(sequences, reason)
            self._batch = None

    def _wait(self, batch: Batch, pending: Block | None) -> bool:
        """Wait until there is something to do; return False when the thread should end."""
        with self._changed:
            while True:
                is_busy = bool(self._waiting or pending or batch.sequences)
                if self._is_closing and not (is_busy and self._drains):
                    return False
                if is_busy:
                    return True
                self._changed.wait()

    def _turn(self, batch: Batch, pending: Block | None) -> Block | None:
        """Read prompts, start a block, and deliver the one before; return the new one."""
        self._drop_cancelled(batch)
        self._read_prompts(batch)
        if pending and batch.needs_results:
            self._deliver(batch, pending)
            pending = None
        block = batch.start_block() if batch.is_decoding else None
        if pending:
            self._deliver(batch, pending)
        return block

    def _drop_cancelled(self, batch: Batch) -> None:
        with self._changed:
            if any(sequence.is_cancelled for sequence in self._waiting):
                kept = [each for each in self._waiting if not each.is_cancelled]
                self._waiting = collections.deque(kept)
        for sequence in batch.sequences:
            assert isinstance(sequence, _Submitted | Reading)
            if sequence.is_cancelled:
                batch.leave(sequence)

    def _read_prompts(self, batch: Batch) -> None:
        """Read a few chunks of prompts into free slots.

        A reading of several texts queues again for each, so that it does not hold up others.
        """
        left = READ_BETWEEN
        while left > 0:
            if not batch.is_reading:
                with self._changed:
                    if not self._waiting or not batch.num_free:
                        return
                    sequence = self._waiting.popleft()
                    if isinstance(sequence, Reading) and sequence.num_left > 1:
                        self._waiting.append(sequence)
                self._counts["reused"] += batch.enter(sequence)
            size, new = batch.read()
            self._counts["prompt"] += new
            left -= size

    def _deliver(self, batch: Batch, block: Block) -> None:
        """Wait for a block and give its tokens to their callers."""
        for output in batch.outputs(block):
            self._counts["generated"] += len(output.ids)
            sequence, ids = output.sequence, tuple(output.ids)
            assert isinstance(sequence, _Submitted)
            delta = Delta(sequence.index, ids, tuple(output.logprobs), output.finish_reason)
            sequence.deliver(output.error or delta)

    def _fail(self, sequences: Sequence[Running | Reading[Any]], error: Exception) -> None:
        """Give an error to the callers of sequences, once each."""
        for sequence in sequences:
            if isinstance(sequence, _Submitted | Reading) and not sequence.is_cancelled:
                sequence.deliver(error)

    @property
    def _num_free(self) -> int:
        return self._batch.num_free if self._batch else self.slots

    def _count_compilation(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED and threading.current_thread() is self._thread:
            self._counts["compilations"] += 1
