"""Small checkpoints to serve, and servers as processes of their own."""

import collections
import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import numpy as np
from tiny_weights import tiny_weights

from llama_jax.formats import checkpoint
from llama_jax.formats.weights import Tensor

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = re.compile(r"serving .* at (http://\S+)")
SCRIPT = "on🙂ly 本."  # what the scripted model says; no byte occurs twice


def write_tiny(folder, **changes):
    """Write a model with random weights, whose answers depend on all of a prompt."""
    options = {"num_layers": 2, "context_length": 512, **changes}
    weights = dataclasses.replace(tiny_weights(**options), chat_template="chatml")
    checkpoint.write(weights, folder)
    return folder


def write_scripted(folder):
    """Write a model that says `SCRIPT` and then EOS, after BOS or a line end, a byte a token.

    Its layers add nothing, and the output matrix maps each token to the one after it.
    """
    first, *others = (3 + byte for byte in SCRIPT.encode())
    after = dict(zip([first, *others], [*others, 2])) | {1: first, 3 + ord("\n"): first}
    weights = tiny_weights(dim=96, num_layers=1, context_length=512, tied_embeddings=False)
    embedding = weights.tensors["embedding"].read() * 5
    output = np.zeros_like(embedding)
    for token, following in after.items():
        output[following] += embedding[token] / 4

    def tensor(name, array):
        if name in ("embedding", "output"):
            array = embedding if name == "embedding" else output
        elif "norm" in name:
            array = np.ones_like(array)
        elif name.endswith(("wo.kernel", "down.kernel")):
            array = np.zeros_like(array)
        return Tensor(array.shape, array.dtype, lambda: array)

    tensors = {name: tensor(name, each.read()) for name, each in weights.tensors.items()}
    scripted = dataclasses.replace(weights, tensors=tensors, chat_template="chatml")
    checkpoint.write(scripted, folder)
    return folder


class Server:
    """A server process of `serve.py`, or of a script with its flags; ready when it is made."""

    def __init__(self, *flags, script=ROOT / "serve.py", env=None):
        command = [sys.executable, str(script), "--port=0", *map(str, flags)]
        self.process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        )
        self.lines, self._clients = [], []
        found = None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := ADDRESS.search(line):
                break
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not found:
            self.stop()
            raise RuntimeError(self.log)
        self.url = found[1]

    def _read(self):
        self.lines.extend(self.process.stderr)

    @property
    def log(self):
        """What the server has written so far."""
        return "".join(self.lines)

    def client(self, key="none", **options):
        """The openai client for this server."""
        import openai

        made = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)
        self._clients.append(made)
        return made

    def figures(self):
        """The values of /metrics by name, those of all models or routes added."""
        found = collections.Counter()
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        for line in lines:
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                found[name.partition("{")[0]] += float(value)
        return found

    def stop(self, number=signal.SIGTERM):
        """End the process; return its exit code."""
        for client in self._clients:
            client.close()
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(30)
        self._reader.join()
        self.process.stderr.close()
        return code
