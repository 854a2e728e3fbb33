"""A server with scripted answers, for the chat page: quick, and the same each time."""

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import llama_jax

PAGE = Path(llama_jax.__file__).parent / "serving" / "page" / "index.html"
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "top_k": 0, "min_p": 0.0}
SAMPLING |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
MODELS = [
    {"id": "tiny-chat", "context_length": 2048, "chat_format": "chatml", "sampling": SAMPLING},
    {"id": "tiny-base", "context_length": 512, "chat_format": "", "sampling": SAMPLING},
]
MODELS = [{**each, "object": "model", "created": 1, "loaded": True} for each in MODELS]

ATTACKS = """Text <script>window.attacked = "script"</script> and
<img src=x onerror="window.attacked = 'image'"> and [a link](javascript:window.attacked='link')
and [another](JaVaScRiPt:window.attacked=1) and [data](data:text/html,<script>alert(1)</script>) and
![picture](https://elsewhere.example/pixel.png) and [good](https://example.org/page) and
<a href="javascript:window.attacked='anchor'" onclick="window.attacked=1">raw</a>

```html" onmouseover="window.attacked='fence'
<script>window.attacked = "code"</script>
```

| <img src=x onerror=window.attacked=1> | b |
|---|---|
| <svg onload=window.attacked=1> | <iframe src="https://elsewhere.example/"></iframe> |

<style>body { display: none }</style>
"""

MARKDOWN = """# Heading

Some **bold**, *italic*, ~~struck~~ and `code`, with snake_case_names and 2 * 3 * 4.

1. one
2. two
   - nested **item**
   - another

   still two
3. three

> quoted

```python
def add(a, b):
    return a + b  # <b>
```

| left | right |
|:-----|------:|
| 1    | 2     |

See https://example.org/a_b_c. Unclosed **bold and `code
"""


def answer(text):
    """The pieces of the answer to a message, and the seconds before each."""
    if text == "slow":
        return [f"word{i} " for i in range(400)], 0.03
    if text == "lines":
        return [f"line {i}\n\n" for i in range(200)], 0.02
    if text == "attack":
        return re.findall(r"(?s).{1,7}", ATTACKS), 0.001
    if text == "markdown":
        return re.findall(r"(?s).{1,9}", MARKDOWN), 0.001
    return re.findall(r"\S+\s*", f"You said: {text}"), 0.001


def error(status, message, **headers):
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse({"error": {"message": message}}, status, names)


class FakeServer:
    """Serves the page at `url`; has the bodies of `requests`, and how many were `cancelled`."""

    def __init__(self, key="", models=MODELS, answer=answer):
        self.key, self.models, self.answer = key, models, answer
        self.requests, self.cancelled = [], 0
        routes = [
            Route("/", self._page),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._generate, methods=["POST"]),
            Route("/v1/completions", self._generate, methods=["POST"]),
        ]
        config = uvicorn.Config(Starlette(routes=routes), port=0, log_level="critical")
        self._server = uvicorn.Server(config)

    def __enter__(self):
        threading.Thread(target=self._server.run, daemon=True).start()
        while not self._server.started:
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/"
        return self

    def __exit__(self, *_):
        self._server.should_exit = self._server.force_exit = True

    async def _page(self, request):
        page = PAGE.read_text(encoding="utf-8")
        script = re.search(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline';"
        policy += " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
        return Response(page, media_type="text/html", headers={"Content-Security-Policy": policy})

    def _refuses(self, request):
        return self.key and request.headers.get("Authorization") != f"Bearer {self.key}"

    async def _models(self, request):
        if self._refuses(request):
            return error(401, "the key is wrong")
        return JSONResponse({"object": "list", "data": self.models})

    async def _generate(self, request):
        if self._refuses(request):
            return error(401, "the key is wrong")
        body = await request.json()
        self.requests.append(body)
        text = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        if text == "fail":
            return error(500, "the server failed; its log says how")
        if text == "busy":
            return error(429, "64 requests are waiting; try again later", Retry_After="3")
        return StreamingResponse(self._events(body, text), media_type="text/event-stream")

    async def _events(self, body, text):
        is_chat = "messages" in body
        pieces, pause = self.answer(text)
        if body.get("continue_final_message"):
            pieces, pause = [" and", " so", " on."], 0.001
        elif not is_chat:
            pieces = [" and", " then", " it", " ended."] if pause < 0.01 else pieces
        limit = body.get("max_tokens", 2048)
        pieces = pieces[:limit]

        def event(piece, finish=None):
            part = {"delta": {"content": piece}} if is_chat else {"text": piece}
            return f"data: {json.dumps({'choices': [{**part, 'finish_reason': finish}]})}\r\n\r\n"

        yield ": ping\r\n\r\n"
        try:
            for i, piece in enumerate(pieces):
                if text in ("break", "cut") and i == 2:
                    if text == "break":
                        yield 'data: {"error": {"message": "out of memory"}}\r\n\r\n'
                    return
                yield event(piece)
                await asyncio.sleep(pause)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        yield event("", "length" if len(pieces) == limit else "stop")
        read = len(json.dumps(body.get("messages", body.get("prompt")))) // 4
        usage = {"prompt_tokens": read, "completion_tokens": len(pieces)}
        usage["total_tokens"] = read + len(pieces)
        timings = {"tokens_per_second": 41.5, "first_token_seconds": 0.12}
        yield f"data: {json.dumps({'choices': [], 'usage': usage, 'timings': timings})}\r\n\r\n"
        yield "data: [DONE]\r\n\r\n"


if __name__ == "__main__":
    with FakeServer() as server, contextlib.suppress(KeyboardInterrupt):
        print(server.url)
        threading.Event().wait()
