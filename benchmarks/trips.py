"""Files of the package that one completion, one sample, one training run and one conversion enter.

    python benchmarks/trips.py
    python benchmarks/trips.py --package ../another-checkout --only complete

Counts the distinct files whose functions run, in the order in which they are first entered. What
runs while a module is imported does not count. Each trip is a process of its own, on CPU and in a
temporary folder, with a tiny model:

- `complete`: the first `LLM.complete` of a loaded model, so that what is traced counts.
- `sample`: the command `sample.py`, from its flags to the printed text.
- `train`: the command `train.py`: two steps, a validation with a sample, a checkpoint.
- `convert`: the command `convert.py`, from a checkpoint to Hugging Face's format.
"""

import argparse
import inspect
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGE = "llama_jax"
PROMPT = "The red boat"
TINY = {"vocab_size": 320, "dim": 24, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
TINY |= {"hidden_dim": 40, "context_length": 64}
COMMANDS = {
    "sample": ["sample.py", "--ckpt=ckpt", f"--prompt={PROMPT}", "--max_tokens=20"],
    "train": [
        "train.py",
        *(f"--config.model.{name}={value}" for name, value in TINY.items()),
        "--config.data.path=data",
        "--config.data.corpus=",
        "--config.data.batch_size=4",
        "--config.data.sequence_length=32",
        "--config.optimizer.steps=2",
        "--config.optimizer.warmup_steps=1",
        "--config.run.log_every=1",
        "--config.run.eval_every=2",
        "--config.run.save_every=2",
    ],
    "convert": ["convert.py", "--input=ckpt", "--to=hf", "--output=hf"],
}
TRIPS = ("train", "complete", "sample", "convert")  # the others need the first one's checkpoint


def files_entered(checkout: Path, call: Callable[[], Any]) -> list[str]:
    """Return the files of a checkout's package whose functions a call runs, in order of entry."""
    folder = f"{checkout / PACKAGE}{os.sep}"
    entered: dict[str, None] = {}

    def profile(frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event != "call" or name in entered or not name.startswith(folder):
            return
        is_importing = any(is_body(caller, folder) for caller in stack(frame))
        if not is_importing:
            entered[name] = None

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return [name.removeprefix(folder) for name in entered]


def stack(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield a frame and those that called it."""
    while frame:
        yield frame
        frame = frame.f_back


def is_body(frame: FrameType, folder: str) -> bool:
    """Return whether a frame is the body of a module or class in a folder."""
    is_function = frame.f_code.co_flags & inspect.CO_OPTIMIZED
    return not is_function and frame.f_code.co_filename.startswith(folder)


def trip(name: str, checkout: Path) -> list[str]:
    """Return the files that a trip enters; runs in a process of its own."""
    sys.path.insert(0, str(checkout))
    if name == "complete":
        from llama_jax import LLM

        llm = LLM("ckpt")
        return files_entered(checkout, lambda: llm.complete(PROMPT, max_tokens=20))

    def command() -> None:
        script, *flags = COMMANDS[name]
        sys.argv = [str(checkout / script), *flags]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise

    return files_entered(checkout, command)


def run_trips(checkout: Path, names: list[str]) -> dict[str, list[str]]:
    """Return the files that each trip enters in a checkout of the package."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    # With a setting of its own a command does not start itself again.
    environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=0"
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        environment["LLAMA_JAX_CACHE"] = folder
        run = lambda *words: subprocess.run(  # noqa: E731
            [sys.executable, *words], cwd=folder, env=environment, check=True, stdout=sys.stderr
        )
        text = (f"The red boat number {n} sails home." for n in range(200))
        Path(folder, "text.txt").write_text("\n<|endoftext|>\n".join(text))
        run(checkout / "prepare.py", "text.txt", "--output=data", "--vocab_size=320")
        for name in TRIPS:
            if name in names or name == "train":
                run(__file__, "--package", checkout, "--trip", name)
                found[name] = json.loads(Path(folder, "trip.json").read_text())
    return {name: found[name] for name in names}


def main() -> None:
    """Print the number of files of each trip, and the files."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).resolve().parents[1]
    flags.add_argument("--package", type=Path, default=here, help="another checkout to count")
    flags.add_argument("--only", default="complete,sample,train,convert", help="trips to count")
    flags.add_argument("--trip", choices=TRIPS, help=argparse.SUPPRESS)  # in the child process
    options = flags.parse_args()
    checkout = options.package.resolve()
    if options.trip:
        Path("trip.json").write_text(json.dumps(trip(options.trip, checkout)))
        return
    for name, files in run_trips(checkout, options.only.split(",")).items():
        print(f"{name}: {len(files)} files", *files, "", sep="\n  ")


if __name__ == "__main__":
    main()
