"""The commands that write, and how to start, disturb and check them."""

import contextlib
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import jax
import tiny_run
from compilation import xla_flags
from readers import digest
from tiny_weights import tiny_weights

from llama_jax.checkpoints.load import read_adapters, read_fingerprint
from llama_jax.checkpoints.restore import finished_steps
from llama_jax.config import LoraConfig
from llama_jax.data.prepare.examples import ExampleOptions, prepare_examples
from llama_jax.data.token_folder import TokenFolder
from llama_jax.formats import adapters, checkpoint, convert
from llama_jax.formats.weights import Weights
from llama_jax.model.lora import init_adapters
from llama_jax.text.chat_formats import TEMPLATES
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer
from llama_jax.training.metrics import read_metrics

SEED = int(os.environ.get("FAULTS_SEED", "0"))
ROUNDS = int(os.environ.get("FAULTS", "1"))  # times as many disturbances as the short form
STEPS = 40
TIMEOUT = 900
PROGRESS = re.compile(r"[\w ./-]+: +\d+(%| s$)")  # written every few seconds, so on a busy machine
TURNS = (("user", "Where is boat"), ("assistant", "At home, with sails:"))


@dataclasses.dataclass(frozen=True)
class Command:
    """A command that writes `out` in the folder that it is started in.

    Attributes:
      words: its arguments.
      result: returns what was written, equal for equal results; checks that it is complete.
      partial: a pattern of what exists only while it writes.
      resumes: what it has written counts the next time; else an existing `out` is refused.
      kills: how many times to kill it in the short form of the suite.
      is_like: a command that writes by the same code; the short form kills this one, and no more.
    """

    words: tuple[str, ...]
    result: Callable[[Path], object]
    partial: str
    resumes: bool = False
    kills: int = 2
    is_like: str = ""


def _run_result(folder: Path) -> object:
    sums = json.loads((folder / str(STEPS) / "meta" / "metadata").read_text())["checksums"]
    losses = {step: record.get("loss") for step, record in read_metrics(folder).items()}
    return sums, losses


def _tokens_result(folder: Path) -> object:
    return TokenFolder.open(folder, full_check_bytes=2**40).fingerprint


def _model_result(source: str) -> Callable[[Path], object]:
    def result(path: Path) -> object:
        weights = convert.FORMATS[source].read(path)
        return digest([weights.config, *(tensor.read() for tensor in weights.tensors.values())])

    return result


def _adapters_result(path: Path) -> object:
    folder = adapters.read(path)
    return digest([folder.lora, folder.fingerprint, *jax.tree.leaves(folder.adapters)])


def _peft_result(folder: Path) -> object:
    return digest([path.name, path.read_bytes()] for path in sorted(folder.iterdir()))


def _training(config: str, **fields: Any) -> Command:
    words = ("train.py", "--config", config, f"--config.run.checkpoint_dir={OUT}")
    return Command(words, _run_result, f"{OUT}/*tmp*", resumes=True, **fields)


def _writing(*words: str, result: Callable[[Path], object], **fields: Any) -> Command:
    return Command((*words, "--output", OUT), result, f".{OUT}.partial-*", **fields)


OUT = "out"
CONVERT = ("convert.py", "--no_verify", "--input")
COMMANDS = {
    "train": _training("tiny.py", kills=5),
    "prepare": _writing(
        "prepare.py", "text.txt", "--vocab_size", "320", result=_tokens_result, kills=6
    ),
    "convert to ckpt": _writing(
        *(*CONVERT, "model", "--to", "ckpt"), result=_model_result("ckpt"), kills=4
    ),
    "convert to gguf": _writing(
        *(*CONVERT, "model", "--to", "gguf"),
        result=_model_result("gguf"),
        is_like="convert to ckpt",
    ),
    "train adapters": _training("lora.py", is_like="train"),
    "train adapters on nf4": _training("qlora.py", is_like="train"),
    "train on preferences": _training("dpo.py", is_like="train"),
    "prepare examples": _writing(
        *("prepare.py", "dialogues.jsonl", "--tokenizer", "model", "--chat", "llama2"),
        *("--sequence_length", "96"),
        result=_tokens_result,
        is_like="prepare",
    ),
    "merge adapters": _writing(
        *(*CONVERT, "adapter", "--merge", "--to", "hf"),
        result=_model_result("hf"),
        is_like="convert to ckpt",
    ),
    "adapters to peft": _writing(
        *(*CONVERT, "adapter", "--to", "peft"),
        result=_peft_result,
        is_like="convert to ckpt",
    ),
    "adapters from peft": _writing(
        *(*CONVERT, "peft", "--base", "model"),
        result=_adapters_result,
        is_like="convert to ckpt",
    ),
}


def make_inputs(place: Path) -> None:
    """Write what the commands read."""
    tokens = tiny_run.make_tokens(place / "tokens")
    tiny_run.make_text(place / "text.txt", stories=20_000)
    run = {"optimizer__steps": STEPS, "run__sample_tokens": 8}
    tiny_run.write_config(place / "tiny.py", tiny_run.make_config(place / "tokens", OUT, **run))
    weights = tiny_weights(dim=96, hidden_dim=320, num_layers=12)
    checkpoint.write(weights, place / "model")
    _make_adapters(place, weights)
    content = tokens.tokenizer_path.read_bytes()
    base = tiny_weights(vocab_size=tiny_run.VOCAB, tokenizer=content, context_length=128)
    checkpoint.write(base, place / "base")
    _make_examples(place, load_tokenizer(tokens.tokenizer_path))
    run |= {"run__init_from": str(place / "base"), "lora__rank": 3, "lora__dropout": 0.1}
    run |= {"data__packing": "documents", "run__sample_tokens": 0, "model__context_length": 128}
    long = {"data__sequence_length": 96}
    for name, data, changes in (
        ("lora", "tokens", {}),
        ("qlora", "tokens", {"lora__base": "nf4", "lora__double_quantization": True}),
        ("dpo", "pairs", {"optimizer__loss": "dpo"} | long),
    ):
        config = tiny_run.make_config(place / data, OUT, **run | changes)
        tiny_run.write_config(place / f"{name}.py", config)


def _make_adapters(place: Path, weights: Weights) -> None:
    """Write adapters of a model, ours and PEFT's."""
    lora = LoraConfig(rank=4)
    description = checkpoint.read_description(place / "model")
    description = dataclasses.replace(description, lora=lora, base=str(place / "model"))
    made = init_adapters(weights.config, lora, jax.random.key(0))
    made = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(1), x.shape), made)
    base = read_fingerprint(place / "model")
    checkpoint.write_adapters(place / "adapter", description, made, base, weights.tokenizer)
    adapters.write_peft(place / "adapter", place / "peft")


def _make_examples(place: Path, tokenizer: Tokenizer) -> None:
    """Write dialogues to prepare, and pairs that are prepared."""
    dialogues = [
        {"messages": [{"role": role, "content": f"{text} {n}"} for role, text in TURNS]}
        for n in range(5_000)
    ]
    lines = "\n".join(map(json.dumps, dialogues))
    (place / "dialogues.jsonl").write_text(lines)
    pairs = [
        {"prompt": f"Boat {n}? ", "chosen": f"It sails {n}.", "rejected": f"It sinks {n}."}
        for n in range(60)
    ]
    located = [(f"pair {n}", pair) for n, pair in enumerate(pairs)]
    options = ExampleOptions(template=TEMPLATES["llama2"])
    prepare_examples(located, place / "pairs", tokenizer, options, source="pairs")


def copy_inputs(place: Path, folder: Path) -> Path:
    """Return a folder that shares the inputs."""
    folder.mkdir(exist_ok=True)
    for path in place.iterdir():
        if path.name not in (OUT, "cache"):
            (folder / path.name).symlink_to(path)
    return folder


def started(command: Command, folder: Path, cache: Path, **options) -> subprocess.Popen:
    """Start a command in a folder."""
    environment = os.environ | {
        "PYTHONPATH": str(tiny_run.REPOSITORY),
        "LLAMA_JAX_CACHE": str(cache),
        "XLA_FLAGS": xla_flags(),
    }
    door, *words = command.words
    words = [sys.executable, str(tiny_run.REPOSITORY / door), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=folder, env=environment, **pipes | options)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Wait for a command; return its exit code and stderr without lines of progress."""
    lines = process.communicate(timeout=TIMEOUT)[1].splitlines(keepends=True)
    stderr = "".join(line for line in lines if not PROGRESS.match(line))
    if stderr.endswith("KeyboardInterrupt\n") and "/llama_jax/" not in stderr:
        return -signal.SIGINT, ""  # Python itself was still starting
    assert "Traceback" not in stderr and "this is a bug" not in stderr, stderr
    assert stderr.count("\n") <= 3, stderr
    return process.returncode, stderr


def wait_for_a_moment(
    random: Random,
    command: Command,
    process: subprocess.Popen,
    folder: Path,
    seconds: float,
    writing: bool,
) -> None:
    """Wait for a random moment: at any time, or just after it began to write something."""
    latest = time.monotonic() + random.uniform(0, seconds)
    if writing:
        latest = time.monotonic() + TIMEOUT
        while process.poll() is None and not any(folder.glob(command.partial)):
            if time.monotonic() > latest:
                break
            time.sleep(0.001)
        latest = time.monotonic() + random.choice((0, 0.01, 0.1)) * random.random()
    while process.poll() is None and time.monotonic() < latest:
        time.sleep(0.001)


def assert_intact(command: Command, folder: Path) -> None:
    """Assert that what a disturbed command has left can be used as it is."""
    out = folder / OUT
    if command.resumes:
        for step in finished_steps(out) if out.is_dir() else []:
            if adapters.is_adapter(out):
                assert read_adapters(out / str(step)).adapters
                continue
            found = convert.FORMATS["ckpt"].read(out / str(step))
            assert all(tensor.read().size for tensor in found.tensors.values())
    elif out.exists():
        command.result(out)
    names = {path.name for path in folder.iterdir() if not path.is_symlink()}
    assert all(name == OUT or name.startswith(f".{OUT}.partial-") for name in names), names


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Callable[[str], None] | None]:
    """Mount a file system in memory at a folder; yield a function that changes its options.

    Args:
      options: of mount, such as "size=1m" or "nr_inodes=20".

    Yields:
      None where mounting is not allowed.
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    with contextlib.suppress(OSError):
        if subprocess.run(mount, capture_output=True).returncode == 0:

            def change(options: str) -> None:
                words = ["mount", "-o", f"remount,{options}", str(folder)]
                subprocess.run(words, check=True, capture_output=True)

            try:
                yield change
            finally:
                subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)
            return
    yield None


def limit_files(size: int) -> Callable[[], None]:
    """Return a function for `preexec_fn` that lets no file grow beyond a size in bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
