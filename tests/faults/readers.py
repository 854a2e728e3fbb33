"""Everything that reads files: what this package has written itself, and the files of others."""

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import tiny_run
from foreign_readers import (
    DIALOGUES,
    FOREIGN,
    PREFERENCES,
    TEXT,
    Reader,
    digest,
    model_files,
    read_token_folder,
)

from llama_jax.checkpoints import load as checkpoint_loader
from llama_jax.checkpoints.metadata import read_run
from llama_jax.checkpoints.restore import restore_newest
from llama_jax.data.prepare.examples import ExampleOptions, prepare_examples
from llama_jax.errors import UserError, warn
from llama_jax.quantization import QuantizationConfig
from llama_jax.text.chat_formats import TEMPLATES
from llama_jax.text.tokenizer import load_tokenizer
from llama_jax.training.metrics import MetricsFile, read_metrics
from llama_jax.training.step import abstract_state


@functools.cache
def _trained() -> tempfile.TemporaryDirectory:
    """Train 10 steps of a tiny model, with checkpoints of steps 5 and 10; once a process."""
    place = tempfile.TemporaryDirectory()
    tokens, run = Path(place.name) / "tokens", Path(place.name) / "ckpt"
    tiny_run.make_tokens(tokens)
    tiny_run.fit(tiny_run.make_config(tokens, run, optimizer__steps=10))
    return place


def _make_run(folder: Path) -> None:
    shutil.copytree(Path(_trained().name) / "ckpt", folder / "ckpt")


def _read_loaded(folder: Path) -> str:
    loaded = checkpoint_loader.load(folder / "ckpt")
    tokenizer = loaded.tokenizer
    ids = tokenizer.encode(TEXT, bos=True, eos=True)
    about = [loaded.config, loaded.bos, loaded.chat_template, ids, tokenizer.decode(ids)]
    return digest([*about, *jax.tree.leaves(loaded.model)])


def _read_resumed(folder: Path) -> str:
    """Read what a session that resumes a run reads."""
    run = read_run(folder / "ckpt")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        abstract_state(run.config),
    )
    items = {"model": state.trainable, "optimizer": state.optimizer}
    restored = restore_newest(folder / "ckpt", items, report=warn)
    if restored is None:
        raise UserError("no checkpoint")
    file = MetricsFile(folder / "ckpt")
    file.earlier_sessions(restored.step)
    file.close()
    read_metrics(folder / "ckpt")
    best = restored.meta.get("best_validation_loss"), restored.meta["data"]
    return digest([best, *jax.tree.leaves(restored.trees)])


def _make_adapters(folder: Path) -> None:
    """Train adapters for 10 steps, with checkpoints of steps 5 and 10."""
    for name, copy in (("tokens", "tokens"), ("ckpt", "base")):
        shutil.copytree(Path(_trained().name) / name, folder / copy)
    settings = {"run__init_from": str(folder / "base"), "lora__rank": 3, "optimizer__steps": 10}
    tiny_run.fit(tiny_run.make_config(folder / "tokens", folder / "ckpt", **settings))
    shutil.rmtree(folder / "tokens")


def _make_tokens(folder: Path) -> None:
    tiny_run.make_tokens(folder / "tokens")


def _make_examples(records: list) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        tiny_run.make_tokens(folder / "text")
        tokenizer = load_tokenizer(folder / "text" / "tokenizer.model")
        located = [(f"record {n}", record) for n, record in enumerate(records)]
        options = ExampleOptions(template=TEMPLATES["llama2"])
        prepare_examples(located, folder / "tokens", tokenizer, options, source="examples")
        shutil.rmtree(folder / "text")

    return make


def _read_tokens(folder: Path) -> str:
    return read_token_folder(folder / "tokens")


def _read_metrics(folder: Path) -> str:
    file = MetricsFile(folder)
    earlier = file.earlier_sessions(7)
    file.close()
    return digest([earlier, read_metrics(folder)])


def _make_metrics(folder: Path) -> None:
    records = [{"step": step, "loss": 5 / step, "tokens_per_second": 1e3} for step in range(1, 10)]
    records += [{"step": 9, "validation_loss": 1.5, "changed": {"mesh.data": [1, 2]}}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)


READERS = FOREIGN | {
    "metrics": Reader(_make_metrics, _read_metrics, "metrics.jsonl"),
    "tokens": Reader(_make_tokens, _read_tokens, "tokens/*", is_checked=True),
    "tokens-dialogues": Reader(
        _make_examples(DIALOGUES), _read_tokens, "tokens/*", is_checked=True
    ),
    "tokens-preferences": Reader(
        _make_examples(PREFERENCES), _read_tokens, "tokens/*", is_checked=True
    ),
    "converted": model_files("ckpt", "ckpt", "ckpt/**/*", is_checked=True),
    "converted-int4": model_files(
        "ckpt",
        "ckpt",
        "ckpt/**/*",
        options={"quantization": QuantizationConfig("int4", 32)},
        is_checked=True,
    ),
    "run-loaded": Reader(_make_run, _read_loaded, "ckpt/**/*", is_checked=True, newest="ckpt/10"),
    "run-resumed": Reader(_make_run, _read_resumed, "ckpt/**/*", is_checked=True, newest="ckpt/10"),
    "adapters": Reader(
        _make_adapters, _read_loaded, "ckpt/**/*", is_checked=True, newest="ckpt/10"
    ),
}
