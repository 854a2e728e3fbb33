"""What every request passes: its id, the key, the log, and errors in OpenAI's form."""

import collections
import dataclasses
import hmac
import json
import logging
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama_jax.errors import UserError, format_line, is_out_of_memory
from llama_jax.serving.fields import ApiError

MAX_RUNNING = 1000  # requests at a time, waiting ones included
OPEN = ("/", "/health")  # paths that need no key; the page asks for it
QUIET = ("/health", "/metrics")  # routes that monitors ask every few seconds
log = logging.getLogger("llama_jax.serving")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a server treats its clients."""

    api_key: str = ""  # "": none is needed
    allow_origins: Sequence[str] = ()  # pages of other servers that may use this one
    request_seconds: float = 600.0  # a request's time, its wait included
    send_seconds: float = 30.0  # in which a client has to take a piece of a stream
    log_prompts: bool = False
    debug: bool = False  # log tracebacks


class Json(Response):
    """JSON as UTF-8; unlike Starlette's also with a lone surrogate of a client's."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False).encode("utf-8", "backslashreplace")


def error_response(error: ApiError) -> Json:
    """Return an error in OpenAI's form."""
    return Json(error.body(), status_code=error.status, headers=error.headers)


async def http_error(request: Request, error: Exception) -> Json:
    """Return an error of Starlette's, such as an unknown route, in OpenAI's form."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    message = {
        404: f"{path} is not a route of this server; expected one such as /v1/chat/completions",
        405: f"{path} does not take {method}; expected {(error.headers or {}).get('Allow')}",
    }.get(error.status_code, error.detail)
    found = ApiError(message, status=error.status_code)
    found.headers = dict(error.headers or {})
    return error_response(found)


def as_api_error(error: Exception, debug: bool) -> ApiError:
    """Return what a client gets for any exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(error)
    if is_out_of_memory(error):
        log.error("out of memory: %s", format_line(str(error)))
        return ApiError("the server is out of memory; ask for less", status=503, retry_after="5")
    text = f"{type(error).__name__}: {format_line(str(error))}"
    log.error("this is a bug in llama_jax: %s", text, exc_info=error if debug else None)
    return ApiError("the server failed; its log says how", status=500, x_should_retry="false")


class Gate:
    """Lets requests with the right key pass; answers, counts and logs all."""

    def __init__(
        self, app: ASGIApp, options: Options, counts: collections.Counter[tuple[str, int]]
    ):
        """Wrap an application; `counts` gets the number of answers by path and status."""
        self._app, self._options, self._counts = app, options, counts
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0
        scope["request_id"] = f"req_{uuid.uuid4().hex}"

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = (b"x-request-id", scope["request_id"].encode())
                message = {**message, "headers": [*message["headers"], own]}
            await send(message)

        self._running += 1
        try:
            if scope["path"] not in OPEN:
                self._check_key(scope)
            if self._running > MAX_RUNNING:
                message = f"{MAX_RUNNING} requests are running; try again later"
                raise ApiError(message, status=503, retry_after="1")
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            has_gone = isinstance(error, ClientDisconnect) or (
                isinstance(error, TimeoutError) and status  # a stream that is not read
            )
            if not has_gone:
                found = as_api_error(error, self._options.debug)
                if not status:
                    await error_response(found)(scope, receive, send_with_id)
        finally:
            self._running -= 1
            route = getattr(scope.get("route"), "path", "unknown")
            self._counts[route, status or 499] += 1
            seconds = time.perf_counter() - start
            what = f"{scope['method']} {format_line(scope['path'])} {status or 499}"
            level = logging.DEBUG if route in QUIET and status == 200 else logging.INFO
            log.log(level, "%s %s %.3f s", scope["request_id"], what, seconds)

    def _check_key(self, scope: Scope) -> None:
        """Raise `ApiError` unless a request has the key; compares in constant time."""
        key = self._options.api_key.encode()
        if not key or scope["method"] == "OPTIONS":
            return
        found = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, given = found.partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), key):
            what = "has no key" if not found else "has a wrong key"
            raise ApiError(
                f"the request {what}; expected the header Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
                www_authenticate="Bearer",
            )
