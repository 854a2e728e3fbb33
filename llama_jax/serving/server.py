"""Run the application on Uvicorn until a signal ends it."""

import asyncio
import logging
import signal
import socket
import sys

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from llama_jax.serving.app import make_app
from llama_jax.serving.fields import ApiError
from llama_jax.serving.middleware import Options, error_response
from llama_jax.serving.registry import Registry

KEEP_ALIVE_SECONDS = 15  # of a connection without a request
MAX_HEADERS = 2**16  # bytes
SILENT_SECONDS = 30  # after which a new connection is closed that has brought no request


class Protocol(H11Protocol):
    """HTTP/1.1, whose own errors have OpenAI's form too; silent connections are closed."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(SILENT_SECONDS, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        error = error_response(ApiError(f"the request is not HTTP/1.1: {msg}"))
        headers = [*error.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=bytes(error.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def run_server(
    registry: Registry, options: Options, listener: socket.socket, drain_seconds: int
) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish the running answers; a second one ends at once.

    Args:
      drain_seconds: that running answers have.

    Raises:
      UserError: when the first model cannot be loaded.
    """
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    config = uvicorn.Config(
        make_app(registry, options),
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=drain_seconds,
        h11_max_incomplete_event_size=MAX_HEADERS,
    )
    server = uvicorn.Server(config)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host

    async def serve() -> None:
        async with registry.use(""):  # loaded before anybody can connect
            pass
        # Uvicorn repeats the signal when it has ended; here that is the orderly end.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        running = asyncio.create_task(server.serve([listener]))
        while not (server.started or running.done()):
            await asyncio.sleep(0.02)
        if server.started:
            names = ", ".join(each["id"] for each in registry.listing())
            print(f"serving {names} at http://{shown}:{port}", file=sys.stderr, flush=True)
        await running

    asyncio.run(serve())
