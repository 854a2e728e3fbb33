"""A request on its way: from the scheduler's thread to the event loop, with text."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from llama_jax.errors import UserError
from llama_jax.inference.completions import RequestText
from llama_jax.inference.request import Delta, Request
from llama_jax.serving.fields import ApiError
from llama_jax.serving.reading import Found, Reading
from llama_jax.serving.scheduler import QueueFullError, Scheduler
from llama_jax.text.tokenizer import Tokenizer


class Generation:
    """The deltas of a request, with text, as an asynchronous iterator."""

    def __init__(
        self, scheduler: Scheduler, request: Request, tokenizer: Tokenizer, deadline: float
    ):
        """Submit the request.

        Args:
          deadline: `time.monotonic()` at which it ends with an error.

        Raises:
          ApiError: when too many requests wait.
          UserError: as `Scheduler.submit`.
        """
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        self._texts = RequestText(request, tokenizer)
        self._deadline = deadline
        try:
            self._ticket = scheduler.submit(request, self._deliver)
        except QueueFullError as error:
            raise busy(error) from error

    def _deliver(self, item: Delta | Exception) -> None:
        """Pass what the scheduler's thread made on to the event loop."""
        with contextlib.suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, item)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while self._texts.running:
            try:
                async with asyncio.timeout(self._deadline - time.monotonic()):
                    item = await self._arrived.get()
            except TimeoutError:
                raise timed_out() from None
            if isinstance(item, Exception):
                raise interrupted(item)
            delta = self._texts.push(item)
            if delta is None:
                continue
            if delta.finish_reason and not item.finish_reason:  # at a stop string
                self._ticket.cancel(delta.index)
            yield delta

    def close(self) -> None:
        """End what still runs, as when the client has gone."""
        if self._texts.running:
            self._ticket.cancel()


async def read_texts(scheduler: Scheduler, reading: Reading[Found], deadline: float) -> list[Found]:
    """Return what is found of texts that are only read; cancelled, it ends the reading.

    Args:
      deadline: as for `Generation`, whose errors this raises too.
    """
    try:
        scheduler.read(reading)
    except QueueFullError as error:
        raise busy(error) from error
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            return await asyncio.wrap_future(reading.future)
    except TimeoutError:
        raise timed_out() from None
    except Exception as error:
        raise interrupted(error) from None


def interrupted(error: Exception) -> Exception:
    """Return the error of a request that the scheduler could not finish."""
    if isinstance(error, UserError):  # such as a server that stops
        return ApiError(error, status=503, code="unavailable", retry_after="1")
    return error


def timed_out() -> ApiError:
    """Return the error of a request that took too long; clients must not repeat it at once."""
    return ApiError(
        "the request took longer than the server allows; ask for fewer tokens",
        status=408,
        code="timeout",
        x_should_retry="false",
    )


def busy(error: QueueFullError) -> ApiError:
    """Return the error of a request that finds the queue full."""
    wait = f"{max(error.retry_after, 1):.0f}"
    return ApiError(error, status=429, code="queue_full", retry_after=wait)
