"""The README's blocks, copied and run in its order, as a reader would: `make test-readme`.

They run in a copy of the repository with small files in place of those that a reader has, such as
Llama 2. Long runs get flags that shorten them. Lines that are not run are listed with the reason.
"""

import dataclasses
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from tiny_weights import tiny_weights

from llama_jax.cli import convert
from llama_jax.formats import checkpoint

pytestmark = [pytest.mark.readme, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).resolve().parents[1]
NOT_RUN = {  # beginnings of lines, and why
    "git clone": "the address is the reader's",
    "pip install": "`make test-readme` installs what the blocks need",
    "python train.py --config configs/15m.py": "needs four devices, TinyStories and hours",
    "python train.py --config configs/7b.py": "needs a pod",
    "python train.py --config configs/110m_tpu.py": "needs a pod",
    "python evaluate.py --ckpt ckpt/llama-2-7b": "the harness fetches its tasks",
    "make test": "CI runs it",
    "make docs": "CI runs it",
}
SHORT = "--config.optimizer.steps=2 --config.optimizer.warmup_steps=1 --config.run.eval_batches=1"
SMALL = f"{SHORT} --config.data.batch_size=1 --config.run.sample_tokens=4"
SHORTER = {  # beginnings of lines, and what is added to them
    "make demo": f'FLAGS="{SHORT}"',
    "make finetune": f'FLAGS="{SMALL}"',
    "python train.py --config configs/sft_lora.py": SMALL,
    "python train.py --config configs/shakespeare.py": SHORT,
    "python evaluate.py --ckpt smollm2": "--limit 4",
    "python plan.py": "--fast",  # libtpu need not be there
    "python convert.py --input ckpt/sft_lora": "--no_verify",
    "python sample.py": "--max_tokens 8",
    "llama-jax chat": "--max_tokens 8",
}
QUIZ = '{"context": "Ice is made of frozen", "choices": ["water", "sand"], "answer": 0}\n'
CONVERTED = {  # a tiny chat model in the formats of others
    "llama-2-7b": "meta",
    "TinyLlama-1.1B": "hf",
    "stories15M.bin": "llama2c",
}
QUESTION = "What is the capital of France?\n"  # to everything that reads standard input
PATIENCE = 900  # seconds


def find_blocks():
    """Return (language, code) of the README's lines to run; a block of Python is one."""
    found = []
    text = (ROOT / "README.md").read_text()
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language == "":
            lines = block.replace("\\\n", "").splitlines()
            found += [("shell", line) for line in lines]
        elif language == "python":
            found.append(("python", block))
    return found


def added(line, table):
    """Return what a table has for the beginning of a line, or None."""
    return next((value for begin, value in table.items() if line.startswith(begin)), None)


def free_port():
    """Return a port that no program uses now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Reader:
    """A copy of the repository, in which a reader enters lines."""

    def __init__(self, folder):
        self.folder, self.port, self.server, self.served = folder, free_port(), None, ""
        ignored = shutil.ignore_patterns("__pycache__")
        for part in ("llama_jax", "configs", "examples", "benchmarks"):
            shutil.copytree(ROOT / part, folder / part, ignore=ignored)
        for path in [*ROOT.glob("*.py"), *ROOT.glob("*.toml"), *ROOT.glob("*.md")]:
            shutil.copy(path, folder)
        shutil.copy(ROOT / "Makefile", folder)
        self.environment = os.environ | {
            "PATH": f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(folder),
            "XLA_FLAGS": "",
        }

    def bring_files(self):
        """Put small files where a reader has others; after `make demo`, whose run is in ckpt/."""
        if (self.folder / "book.txt").exists():
            return
        weights = tiny_weights(dim=96, hidden_dim=256, num_layers=2, context_length=512)
        weights = dataclasses.replace(weights, chat_template="llama2")
        for name in ("llama-2-7b-chat", "chat", "lora"):
            checkpoint.write(weights, self.folder / "ckpt" / name)
        for name, target in CONVERTED.items():
            words = [f"--input={self.folder / 'ckpt' / 'chat'}", f"--output={self.folder / name}"]
            assert not convert.main([*words, f"--to={target}", "--no_verify"])
        book = "\n".join(path.read_text() for path in sorted(ROOT.glob("docs/**/*.md")))
        (self.folder / "book.txt").write_text(book)
        (self.folder / "held_out.txt").write_text(book[:2000])
        (self.folder / "mine.jsonl").write_text(QUIZ)
        examples = (ROOT / "examples" / "lantern_shop.jsonl").read_text().splitlines(keepends=True)
        (self.folder / "chats.jsonl").write_text("".join(examples[:40]))

    def run(self, command):
        """Run a command of a shell, which must succeed; return what it printed."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            input=QUESTION,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}"
        return done.stdout

    def serve(self, line):
        """Start a server in place of the one before, unless it is the same, and wait for it."""
        if line == self.served:
            return
        self.stop()
        command = line.replace("python ", "exec python ", 1)
        self.server = subprocess.Popen(
            ["bash", "-c", f"{command} --port {self.port}"],
            cwd=self.folder,
            env=self.environment,
        )
        end = time.monotonic() + PATIENCE
        while self.server.poll() is None and time.monotonic() < end:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                self.served = line
                return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"{line} is not ready")

    def stop(self):
        """End the server."""
        if self.server:
            self.server.terminate()
            self.server.wait(PATIENCE)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    made = Reader(tmp_path_factory.mktemp("reader"))
    yield made
    made.stop()


@pytest.mark.parametrize(
    ("language", "code"),
    [block for block in find_blocks() if not added(block[1], NOT_RUN)],
    ids=lambda text: text[:70],
)
def test_block(reader, language, code):
    address = f"http://127.0.0.1:{reader.port}"
    if "http://127.0.0.1:8000" in code.partition("#")[0]:
        reader.serve("python serve.py --model smollm2")
    shorter = added(code, SHORTER) or ""
    code = code.replace("http://127.0.0.1:8000", address)
    if language == "python":
        for package in re.findall(r"^from (\w+) import", code, re.MULTILINE):
            pytest.importorskip(package)
        (reader.folder / "block.py").write_text(code)
        code = "python block.py"
    if not code.startswith("make demo"):
        reader.bring_files()
    if code.startswith("make "):
        code = code.replace("make ", f"make VENV={sys.prefix} -o {sys.prefix}/.installed ", 1)
    line = code.partition("#")[0].strip()
    if "python serve.py" in line:
        reader.serve(line)
    else:
        assert reader.run(f"{line} {shorter}")
