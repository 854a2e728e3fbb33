"""Load of a server: tokens per second, and time to the first token, one by one and together.

    python benchmarks/serve.py
    python benchmarks/serve.py --model ckpt/ --clients 8 --rounds 5 --mixed 200
    python benchmarks/serve.py --gguf model.gguf

The server is a process of its own. Each round sends `--requests` requests, first one by one and
then from so many clients; every prompt is new, so that no prefix is found, and greedy. Answers have
half to one and a half times `--tokens` tokens, unless the model ends earlier. With `--gguf`, the
same model for llama.cpp (package xllamacpp), its server gets the same requests with as many slots,
in turn.

With `--mixed`, so many requests of mixed lengths and parameters follow from 16 clients, a quarter
of which go away in the midst of their answers. Then each greedy answer is compared with what its
request gets alone, and the server's memory and slots with what they were before.
"""

import argparse
import dataclasses
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common

ROOT = Path(__file__).resolve().parents[1]
SUBJECTS = ("a lighthouse", "two rivers", "an old violin", "the first snow", "a lost key")
TASKS = ("Write a story about", "Explain to a child", "Write a letter about", "Describe in detail")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a client saw of an answer."""

    text: str
    tokens: int
    first: float  # seconds to the first text
    seconds: float  # in all


class Served:
    """A server of this package, in a process of its own."""

    def __init__(self, model: str):
        start = time.perf_counter()
        command = [sys.executable, str(ROOT / "serve.py"), "--model", model, "--port", "0"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if found := re.search(r"^serving .* at (http://\S+)", line):  # it is ready
                break
        else:
            sys.exit("the server does not start; see above")
        self.seconds_to_start = time.perf_counter() - start
        self.url = found[1].rstrip("/")
        threading.Thread(target=self._process.stderr.read, daemon=True).start()  # its log

    def resident_mib(self) -> float:
        """Return the memory of the process."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024

    def figures(self) -> dict[str, float]:
        """Return the server's metrics of its model."""
        with urllib.request.urlopen(f"{self.url}/metrics") as reply:
            found = re.findall(r"llama_jax_(\w+)\{model=[^}]*\} (\d+)", reply.read().decode())
        return {name: float(value) for name, value in found}

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()


class LlamaCpp:
    """llama.cpp's server, on a thread of this process, with the same slots."""

    def __init__(self, path: str, slots: int):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.port = path, 0
        params.n_parallel, params.n_ctx = slots, 2048 * slots
        params.warmup = True
        self._server = xllamacpp.Server(params)
        self.url = self._server.listening_address


def ask(url: str, body: dict[str, Any], leave_after: float = float("inf")) -> Answer:
    """Stream an answer; go away after so many characters."""
    content = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}})
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", content.encode(), {"Content-Type": "application/json"}
    )
    start, first, text, tokens = time.perf_counter(), 0.0, "", 0
    with urllib.request.urlopen(request, timeout=600) as reply:
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
            for choice in chunk["choices"]:
                if gained := choice["delta"].get("content"):
                    first = first or time.perf_counter() - start
                    text += gained
            if len(text) > leave_after:
                break
    return Answer(text, tokens, first, time.perf_counter() - start)


def ask_all(url: str, bodies: Sequence[dict[str, Any]], clients: int) -> tuple[list[Answer], float]:
    """Return the answers to requests from so many clients, and tokens per second."""
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda body: ask(url, body), bodies))
    return answers, sum(answer.tokens for answer in answers) / (time.perf_counter() - start)


class Prompts:
    """Requests that begin differently, so that none finds another one's prompt in a slot."""

    def __init__(self) -> None:
        self._number = 0

    def body(self, tokens: int, **options: Any) -> dict[str, Any]:
        """Return the next one."""
        self._number += 1
        number = self._number
        task, subject = TASKS[number % len(TASKS)], SUBJECTS[number % len(SUBJECTS)]
        messages = [
            {"role": "system", "content": f"{number} is the number of this request."},
            {"role": "user", "content": f"{task} {subject}, and mention {number}."},
        ]
        return {"messages": messages, "max_tokens": tokens, "temperature": 0} | options


def show(name: str, values: Sequence[float]) -> None:
    """Print a row of the table."""
    low, middle, high = min(values), statistics.median(values), max(values)
    print(f"| {name} | {low:.3g} | {middle:.3g} | {high:.3g} |")


def measure_load(servers: dict[str, str], flags: argparse.Namespace) -> None:
    """Print rates and times to the first token of servers, in turn."""
    prompts, order = Prompts(), list(range(flags.requests))
    random.Random(0).shuffle(order)
    rates: dict[tuple[str, str], list[float]] = {}
    firsts: dict[tuple[str, str], list[float]] = {}
    for number in range(flags.rounds + 1):
        for clients, how in ((1, "one by one"), (flags.clients, "together")):
            lengths = [flags.tokens // 2 + n * flags.tokens // flags.requests for n in order]
            bodies = [prompts.body(length) for length in lengths]
            for name, url in servers.items():
                answers, rate = ask_all(url, bodies, clients)
                if number:  # the first round warms the servers up
                    rates.setdefault((name, how), []).append(rate)
                    times = firsts.setdefault((name, how), [])
                    times += [answer.first for answer in answers if answer.first]
    print("| | minimum | median | maximum |\n|---|---:|---:|---:|")
    for key in rates:
        show(f"{' '.join(key)}, tokens/s", rates[key])
        show(f"{' '.join(key)}, seconds to the first token", firsts[key])
    for name in servers:
        ratios = [a / b for a, b in zip(rates[name, "together"], rates[name, "one by one"])]
        show(f"{name}, together / one by one", ratios)
    for name in [*servers][1:]:
        ours = rates[next(iter(servers)), "together"]
        show(f"ours / {name}, together", [a / b for a, b in zip(ours, rates[name, "together"])])


def measure_mixed(server: Served, count: int) -> None:
    """Print whether answers are what they are alone, and what the server keeps."""
    choose, prompts = random.Random(0), Prompts()
    bodies, leaves = [], []
    for number in range(count):
        body = prompts.body(choose.choice((1, 7, 24, 60)))
        body["messages"][1]["content"] *= choose.choice((1, 1, 4, 12))
        body |= choose.choice(
            (
                {},
                {},
                {"stop": ["the"]},
                {"logit_bias": {"28": -2}},
                {"temperature": 0.8, "seed": number},
                {"temperature": 1.1, "top_p": 0.7, "top_k": 40, "presence_penalty": 0.5},
            )
        )
        bodies.append(body)
        leaves.append(20 if number % 4 == 3 else float("inf"))
    before = server.resident_mib()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda pair: ask(server.url, *pair), zip(bodies, leaves)))
    deadline = time.monotonic() + 10
    while server.figures()["active"] and time.monotonic() < deadline:
        time.sleep(0.1)
    figures, after = server.figures(), server.resident_mib()
    greedy = [n for n in range(count) if not bodies[n]["temperature"] and leaves[n] > 10**6]
    same = sum(ask(server.url, bodies[n]).text == answers[n].text for n in greedy)
    print(
        f"\n{count} mixed requests: {same} of {len(greedy)} greedy answers are what they are alone"
    )
    print(f"slots in use afterwards: {figures['active']:.0f}; waiting: {figures['waiting']:.0f}")
    print(f"programs compiled during service: {figures['compilations_total']:.0f}")
    print(f"memory: {before:.0f} MiB before, {after:.0f} MiB after")


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=24, help="of a round")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer, on average")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mixed", type=int, default=0, help="mixed requests afterwards")
    parser.add_argument("--gguf", help="the same model for llama.cpp's server")
    flags = parser.parse_args()
    common.heading("serve.py")
    Served(flags.model).stop()  # fills the compilation cache
    server = Served(flags.model)
    print(f"\nready {server.seconds_to_start:.1f} s after its start, with a filled cache\n")
    servers = {"ours": server.url}
    if flags.gguf:
        peer = LlamaCpp(flags.gguf, flags.clients)  # kept: it stops when it is collected
        servers["llama.cpp"] = peer.url
    try:
        measure_load(servers, flags)
        if flags.mixed:
            measure_mixed(server, flags.mixed)
    finally:
        server.stop()


if __name__ == "__main__":
    main()
