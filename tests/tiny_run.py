"""Text, tokens and config of a training run that takes seconds."""

import contextlib
import dataclasses
import sys
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from llama_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from llama_jax.data.prepare.corpora import corpus_from_files
from llama_jax.data.prepare.tokenize import TokenOptions, prepare
from llama_jax.training import run

REPOSITORY = Path(__file__).resolve().parents[1]
DOOR = [sys.executable, str(REPOSITORY / "train.py")]
COLOURS = ("red", "blue", "green", "white", "black")
VOCAB = 320
FILE = "from llama_jax.config import *\nfrom llama_jax.config import as_config_dict\n"
FILE += "def get_config():\n    return as_config_dict({config!r})\n"


def make_text(path, colours=COLOURS, stories=100):
    """Write a text file of short stories and return its path."""
    texts = (
        f"The {colours[n % len(colours)]} boat number {n} sails home.\nIt has {n % 7} sails."
        for n in range(stories)
    )
    path.write_text("\n<|endoftext|>\n".join(texts))
    return path


def make_tokens(path, vocab_size=VOCAB, tokenizer="", **text):
    """Prepare a token folder of such a text."""
    source = make_text(path.with_suffix(".txt"), **text)
    corpus = corpus_from_files(source, validation=0.1)
    return prepare(corpus, path, TokenOptions(vocab_size=vocab_size, tokenizer=str(tokenizer)))


def make_config(data, checkpoint_dir, **changes):
    """Return the run's config; `changes` are named section__key."""
    config = Config(
        model=ModelConfig(
            vocab_size=VOCAB,
            dim=24,
            num_layers=2,
            num_heads=6,
            num_kv_heads=2,
            hidden_dim=40,
            context_length=32,
            dropout=0.1,
        ),
        data=DataConfig(path=str(data), batch_size=8, sequence_length=16),
        optimizer=OptimizerConfig(steps=20, learning_rate=1e-2, warmup_steps=5),
        run=RunConfig(
            checkpoint_dir=str(checkpoint_dir),
            log_every=5,
            eval_every=10,
            eval_batches=2,
            save_every=5,
            sample_tokens=0,
        ),
    )
    for name, value in changes.items():
        section, _, key = name.partition("__")
        changed = dataclasses.replace(getattr(config, section), **{key: value})
        config = dataclasses.replace(config, **{section: changed})
    return config


def write_config(path, config):
    """Write a config file and return its path."""
    path.write_text(FILE.format(config=config))
    return path


def fit(config, profile=None, devices=1):
    """Train on some of the simulated devices."""
    return run.fit(config, profile, devices=jax.devices()[:devices])


@contextlib.contextmanager
def quick_runs(cache):
    """Inside, compiled programs are kept in the folder `cache`."""
    settings = {
        "jax_compilation_cache_dir": str(cache),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
