"""A run from a config: checks it against devices and data, takes its folder, and trains.

What happens between the first step and the last is in `trainer`.
"""

from pathlib import Path

import jax
from jax.sharding import Mesh

from llama_jax.config import Config
from llama_jax.data.tokens import TokenFolder
from llama_jax.errors import UsageError
from llama_jax.metrics import MetricsFile
from llama_jax.run_folder import Run, claimed, start_or_resume
from llama_jax.sharding import batch_parts, make_mesh
from llama_jax.stop_signal import stop_signal
from llama_jax.trainer import Trainer


def fit(config: Config) -> int:
    """Train as the config says, resuming by itself; 0 at the end, 130 or 143 after a signal.

    Raises:
      UsageError: when the config does not fit the devices or the data.
      UserError: when data or folder are not as they should be.
      NonFiniteLossError: when a loss or gradient is not finite; the last good state is saved.
    """
    folder = Path(config.run.checkpoint_dir).expanduser()
    mesh = make_mesh(config.mesh)
    _require_divisible(config, mesh)
    with claimed(folder), stop_signal() as stop:
        data = open_data(config)
        run = Run(config=config, bos=data.bos, eos=data.eos)
        start_or_resume(folder, run, data.tokenizer_path)
        with (
            jax.set_mesh(mesh),
            MetricsFile(folder, config.run.tensorboard) as metrics,
            Trainer(config, folder, data, mesh, stop, metrics) as trainer,
        ):
            return trainer.run()


def open_data(config: Config) -> TokenFolder:
    """The run's token folder; the embedded stories are prepared if it is missing.

    Raises:
      UsageError: when its vocabulary is not the model's.
      UserError: when it is missing or damaged.
    """
    path = Path(config.data.path).expanduser()
    if config.data.corpus == "stories" and not path.exists():
        from llama_jax.data.corpora import prepare_corpus
        from llama_jax.data.prepare import TokenOptions

        options = TokenOptions(vocab_size=config.model.vocab_size)
        prepare_corpus("stories", path, options)
    folder = TokenFolder.open(path)
    if folder.vocab_size != config.model.vocab_size:
        raise UsageError(
            f"{path} has a vocabulary of {folder.vocab_size} and model.vocab_size is"
            f" {config.model.vocab_size}; set --config.model.vocab_size={folder.vocab_size}"
        )
    return folder


def _require_divisible(config: Config, mesh: Mesh) -> None:
    """Each microbatch must be cut evenly over the devices that share the batch."""
    parts = batch_parts(mesh) * config.optimizer.accumulation_steps
    if config.data.batch_size % parts:
        nearest = max(1, round(config.data.batch_size / parts)) * parts
        raise UsageError(
            f"data.batch_size={config.data.batch_size} does not divide over {batch_parts(mesh)}"
            f" devices × optimizer.accumulation_steps={config.optimizer.accumulation_steps};"
            f" the nearest that does is {nearest}"
        )
