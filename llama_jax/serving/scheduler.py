"""The scheduler: runs the requests of many callers on one model."""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator

from llama_jax.errors import UserError
from llama_jax.inference.engine import Engine
from llama_jax.inference.request import Delta, Request

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
    prompt_tokens: int  # read, without those found in a slot
    reused_tokens: int  # of prompts, found in a slot
    generated_tokens: int
    compilations: int  # of programs, after `start`; 0 is what service should have
    cache_bytes: int


class Ticket:
    """A submitted request, by which it can be cancelled."""

    def __init__(self, request: Request, deliver: Deliver):
        self.request, self.deliver = request, deliver
        self.cancelled: set[int] = set()

    def cancel(self, index: int | None = None) -> None:
        """End one sequence of the request, or all; its deltas cease soon after."""
        self.cancelled |= set(range(len(self.request.prompts))) if index is None else {index}


class Scheduler:
    """Runs requests of many callers on one model; one thread of its own uses the device."""

    def __init__(self, engine: Engine, *, slots: int = 0, max_waiting: int = 64):
        self.engine, self.slots, self.max_waiting = engine, slots or 8, max_waiting
        self._tickets: queue.Queue[Ticket | None] = queue.Queue()
        self._generated = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def start(self) -> None:
        """Compile or load every program that service needs, and begin to serve."""
        self._thread.start()

    def submit(self, request: Request, deliver: Deliver) -> Ticket:
        """Queue a request; its deltas are given to `deliver` as they are made.

        Raises:
          UserError, UsageError: at once, as `Engine.generate` does.
          QueueFullError: when `max_waiting` sequences are waiting already.
        """
        self.engine.check(request)
        if self._tickets.qsize() >= self.max_waiting:
            raise QueueFullError(f"{self._tickets.qsize()} requests are waiting; try again later")
        ticket = Ticket(request, deliver)
        self._tickets.put(ticket)
        return ticket

    def generate(self, request: Request) -> Iterator[Delta]:
        """Return an iterator over the deltas of a request, as `Engine.generate` does."""
        deltas: queue.Queue[Delta | Exception] = queue.Queue()
        self.submit(request, deltas.put)
        running = len(request.prompts)
        while running:
            delta = deltas.get()
            if isinstance(delta, Exception):
                raise delta
            running -= bool(delta.finish_reason)
            yield delta

    def stats(self) -> Stats:
        """Return the figures of now."""
        waiting = self._tickets.qsize()
        return Stats(self.slots, 0, waiting, 0, 0, self._generated, 0, 0)

    def close(self, drain: bool = False) -> None:
        """Stop; `drain` finishes what was submitted first."""
        self._tickets.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while ticket := self._tickets.get():
            try:
                for delta in self.engine.generate(ticket.request):
                    if len(ticket.cancelled) == len(ticket.request.prompts):
                        break
                    self._generated += len(delta.ids)
                    ticket.deliver(delta)
            except Exception as error:
                ticket.deliver(error)
