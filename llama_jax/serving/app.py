"""The server's routes: OpenAI's protocol, tokenization, health, metrics and the chat page."""

import asyncio
import base64
import collections
import contextlib
import dataclasses
import hashlib
import json
import re
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from llama_jax.errors import shown
from llama_jax.inference.completions import collect
from llama_jax.inference.request import Delta
from llama_jax.inference.request import Request as Generated
from llama_jax.serving.fields import ApiError, Fields, parse_json, refusing
from llama_jax.serving.generation import Generation, read_texts
from llama_jax.serving.middleware import Gate, Json, Options, as_api_error, http_error, log
from llama_jax.serving.protocol import Call, make_request, parse_chat, parse_completion
from llama_jax.serving.reading import EmbeddingReading, ScoreReading
from llama_jax.serving.registry import Registry, Served
from llama_jax.serving.replies import Reply
from llama_jax.serving.scheduler import Stats

MAX_BODY = 2**20  # bytes
BODY_SECONDS = 30.0  # in which a client has to send it
PING_SECONDS = 10  # between comments that keep a stream alive which waits for tokens
TOTALS = ("prompt_tokens", "reused_tokens", "generated_tokens", "compilations")
PAGE = Path(__file__).parent / "page" / "index.html"


def make_app(registry: Registry, options: Options) -> Starlette:
    """Return the server's application; when it ends, so do the schedulers."""
    # Uvicorn waits for running answers when it shuts down; sse-starlette would cut them.
    AppStatus.disable_automatic_graceful_drain()
    api = Api(registry, options)
    counts: collections.Counter[tuple[str, int]] = collections.Counter()
    middleware = [Middleware(Gate, options=options, counts=counts)]
    if options.allow_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(options.allow_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
        middleware.insert(0, cors)

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(metrics_text(counts, registry.loaded()))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(registry.close)

    return Starlette(
        routes=[*api.routes(), Route("/metrics", metrics)],
        middleware=middleware,
        exception_handlers={HTTPException: http_error},
        lifespan=lifespan,
    )


class Api:
    """The endpoints of a server."""

    def __init__(self, registry: Registry, options: Options):
        self._registry, self._options = registry, options

    def routes(self) -> list[Route]:
        """Return the routes of the endpoints."""
        posts: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/v1/chat/completions": self.chat,
            "/v1/completions": self.complete,
            "/v1/embeddings": self.embed,
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
            "/extras/tokenize": self.tokenize,
            "/extras/tokenize/count": self.tokenize,
            "/extras/detokenize": self.detokenize,
        }
        return [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()),
        ]

    async def page(self, request: Request) -> Response:
        """Return the chat page, which may run no script but its own."""
        try:
            content = PAGE.read_text(encoding="utf-8")
        except OSError:
            raise HTTPException(404) from None
        headers = {"Content-Security-Policy": content_security_policy(content)}
        return Response(content, media_type="text/html", headers=headers)

    async def health(self, request: Request) -> Response:
        """Return that the server runs."""
        return Json({"status": "ok"})

    async def models(self, request: Request) -> Response:
        """Return all models."""
        return Json({"object": "list", "data": self._registry.listing()})

    async def model(self, request: Request) -> Response:
        """Return one model."""
        source = self._registry.find(request.path_params["name"])
        return Json(self._registry.describe(source))

    # ---- text ----

    async def chat(self, request: Request) -> Response:
        """Return the answer to a dialogue, or stream it."""
        return await self._generate(request, parse_chat)

    async def complete(self, request: Request) -> Response:
        """Return completions of prompts, or stream them."""
        return await self._generate(request, parse_completion)

    async def _generate(
        self, request: Request, parse: Callable[[Mapping[str, Any]], Call]
    ) -> Response:
        deadline = time.monotonic() + self._options.request_seconds
        call = parse(await read_body(request))
        if self._options.log_prompts:
            prompts: list[Any] = [vars(each) for each in call.messages] or list(call.prompts)
            log.info("%s %s", request.scope["request_id"], json.dumps(prompts))
        async with contextlib.AsyncExitStack() as stack:
            served = await stack.enter_async_context(self._registry.use(call.model))
            llm = served.llm
            # Encoding a long text takes its time, a chat template may take seconds.
            work = await asyncio.to_thread(make_request, call, llm)
            scores = []
            if call.echo and call.logprobs is not None:
                ids = list(work.prompts[:: call.best_of])
                reading = ScoreReading(ids, call.logprobs)
                with refusing(call.fields, call.text_field):
                    scores = await unless_gone(
                        request, read_texts(served.scheduler, reading, deadline)
                    )
            reply = Reply(call, work, served.source.name, llm.tokenizer, scores)
            deltas: AsyncIterable[Delta] = _nothing(work)
            if call.max_tokens != 0:
                with refusing(call.fields, call.text_field):
                    # Compiling a constraint takes its time; the scheduler finds it compiled.
                    await asyncio.to_thread(llm.engine.constraints, work)
                    generation = Generation(served.scheduler, work, llm.tokenizer, deadline)
                stack.callback(generation.close)
                deltas = generation
            if call.stream:
                events = self._events(deltas, reply)
                return Stream(events, stack.pop_all(), self._options.send_seconds)
            made = await unless_gone(request, _gather(deltas, reply))
            return Json(reply.whole(collect(made, work)))

    async def _events(self, deltas: AsyncIterable[Delta], reply: Reply) -> AsyncIterator[Any]:
        """Yield the events of a stream; what fails in its midst becomes the last one."""

        def event(content: Any) -> ServerSentEvent:
            return ServerSentEvent(json.dumps(content, ensure_ascii=False), sep="\n")

        try:
            for chunk in reply.opening():
                yield event(chunk)
            async for delta in deltas:
                for chunk in reply.chunks(delta):
                    yield event(chunk)
            for chunk in reply.closing():
                yield event(chunk)
        except Exception as error:
            yield event(as_api_error(error, self._options.debug).body())
            return
        yield ServerSentEvent("[DONE]", sep="\n")

    # ---- figures of texts ----

    async def embed(self, request: Request) -> Response:
        """Return the embedding of each text, as numbers or as base64 of float32."""
        deadline = time.monotonic() + self._options.request_seconds
        fields = Fields(await read_body(request))
        texts = fields.prompts("input")
        form = fields.text("encoding_format", "float")
        if form not in ("float", "base64"):
            expected = "expected float or base64"
            raise ApiError(f"encoding_format={shown(form)}; {expected}", "encoding_format")
        if "" in texts:
            raise ApiError("input is empty; expected a text to embed", "input")
        async with self._registry.use(fields.text("model")) as served:
            llm = served.llm
            dim = llm.engine.model.config.dim
            fields.integer("dimensions", dim, dim)
            with refusing(fields.all, "input"):
                ids = await asyncio.to_thread(llm.encode, "input", texts)
            longest = max(map(len, ids))
            if longest > llm.context_length:
                context = f"the model's context holds {llm.context_length}; shorten it"
                raise ApiError(
                    f"input has a text of {longest} tokens, but {context}",
                    "input",
                    code="context_length_exceeded",
                )
            reading = EmbeddingReading(ids)
            with refusing(fields.all, "input"):
                vectors = await unless_gone(
                    request, read_texts(served.scheduler, reading, deadline)
                )
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": vector.tolist()
                if form == "float"
                else base64.b64encode(vector.astype("<f4").tobytes()).decode(),
            }
            for index, vector in enumerate(vectors)
        ]
        count = sum(map(len, ids))
        usage = {"prompt_tokens": count, "total_tokens": count}
        found = {"object": "list", "data": data, "model": served.source.name, "usage": usage}
        return Json(found)

    async def tokenize(self, request: Request) -> Response:
        """Return the token ids of a text; "content" is "input" for llama-cpp-python."""
        fields = Fields(await read_body(request))
        is_llama_cpp = request.url.path.startswith("/extras")
        name = "input" if is_llama_cpp else "content"
        text = fields.text(name)
        async with self._registry.use(fields.text("model")) as served:
            bos = served.llm.bos if is_llama_cpp else fields.flag("add_special")
            with refusing(fields.all, name):
                encode = served.llm.tokenizer.encode
                tokens = await asyncio.to_thread(encode, text, bos=bos)
        count = {"count": len(tokens)}
        return Json(count if request.url.path.endswith("count") else {"tokens": tokens, **count})

    async def detokenize(self, request: Request) -> Response:
        """Return the text of token ids."""
        fields = Fields(await read_body(request))
        tokens = fields.all.get("tokens")
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise ApiError(f"tokens={shown(tokens)}; expected a list of token ids", "tokens")
        async with self._registry.use(fields.text("model")) as served:
            with refusing(fields.all, "tokens"):
                text = served.llm.tokenizer.decode(tokens)
        name = "text" if request.url.path.startswith("/extras") else "content"
        return Json({name: text})


class Stream(EventSourceResponse):
    """A stream of events, at whose end what it used is released, however it ends."""

    def __init__(
        self, events: AsyncIterator[Any], stack: contextlib.AsyncExitStack, send_seconds: float
    ):
        super().__init__(
            events,
            headers={"Cache-Control": "no-cache"},
            ping=PING_SECONDS,
            ping_message_factory=lambda: ServerSentEvent(comment="ping", sep="\n"),
            sep="\n",
            send_timeout=send_seconds,
        )
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            await super().__call__(scope, receive, send)


async def read_body(request: Request) -> dict[str, Any]:
    """Return the JSON object that a request brings.

    Raises:
      ApiError: for another type of content, a body that is too large or comes too slowly, and as
        `parse_json`.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page of another server could send any other type without the browser asking first.
        message = f"the body is {kind or 'of no type'}; expected Content-Type: application/json"
        raise ApiError(message, status=415)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY:
                    message = f"the body has more than {MAX_BODY:,} bytes; send less"
                    raise ApiError(message, status=413, connection="close")
    except TimeoutError:
        message = f"the body did not come in {BODY_SECONDS:.0f} s; send it faster"
        raise ApiError(message, status=408, x_should_retry="false", connection="close") from None
    return parse_json(bytes(body))


async def unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """Return the result of some work; raise `ClientDisconnect` if the client goes before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _gather(deltas: AsyncIterable[Delta], reply: Reply) -> list[Delta]:
    made = []
    async for delta in deltas:
        reply.count(delta)
        made.append(delta)
    return made


async def _nothing(request: Generated) -> AsyncIterator[Delta]:
    """Yield what is generated of no tokens: the echoed prompts, if any."""
    for index in range(len(request.prompts)):
        text = request.echo[index] if request.echo else ""
        yield Delta(index, finish_reason="length", text=text)


def content_security_policy(page: str) -> str:
    """Return the policy under which a page runs its own scripts and asks its own server only."""
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {hashes or repr('none')}; style-src 'unsafe-inline';"
        " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    )


def metrics_text(counts: Mapping[tuple[str, int], int], loaded: Sequence[Served]) -> str:
    """Return the figures of a server in Prometheus' text format."""
    lines = ["# TYPE llama_jax_requests_total counter"]
    for (route, status), count in sorted(counts.items()):
        lines.append(f'llama_jax_requests_total{{route="{route}",status="{status}"}} {count}')
    for field in dataclasses.fields(Stats):
        is_total = field.name in TOTALS
        name = f"llama_jax_{field.name}" + "_total" * is_total
        lines.append(f"# TYPE {name} {'counter' if is_total else 'gauge'}")
        for served in loaded:
            value = getattr(served.scheduler.stats(), field.name)
            lines.append(f"{name}{{model={json.dumps(served.source.name)}}} {value}")
    return "\n".join(lines) + "\n"
