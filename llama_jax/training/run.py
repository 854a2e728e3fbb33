"""A run from a config: checks it against devices and data, takes its folder, and trains.

What happens between the first step and the last is in `trainer`.
"""

from pathlib import Path

import jax

from llama_jax.checkpoints.metadata import Run
from llama_jax.checkpoints.restore import finished_steps
from llama_jax.checkpoints.run_folder import (
    claimed_by_all,
    require_same_run,
    settings,
    write_metadata,
)
from llama_jax.config import Config
from llama_jax.data.token_folder import TokenFolder
from llama_jax.distributed.consistency import require_same, together
from llama_jax.distributed.mesh import make_mesh
from llama_jax.distributed.preemption import stop_of_all
from llama_jax.distributed.processes import require_joined
from llama_jax.errors import UsageError, catch_out_of_memory
from llama_jax.hardware.accelerators import memory_limit
from llama_jax.training.loop import Trainer, restore_or_begin
from llama_jax.training.metrics import MetricsFile
from llama_jax.training.profiling import Window
from llama_jax.training.step import jit_programs
from llama_jax.training.summary import memory_advice, versions


def fit(config: Config, profile: Window | None = None) -> int:
    """Train as the config says, resuming by itself; 0 at the end, 130 or 143 after a signal.

    Inside `distributed.processes.joined`, this process does its part of the run. The steps of a
    `profile` are traced.

    Raises:
      UsageError: when the config does not fit the devices or the data.
      UserError: when data or folder are not as they should be, or processes disagree.
      NonFiniteLossError: when a loss or gradient is not finite; the last good state is saved.
      OutOfMemoryError: when the devices cannot hold it.
    """
    require_joined()
    require_same(settings(config) | versions())
    folder = Path(config.run.checkpoint_dir).expanduser()
    mesh = make_mesh(config.mesh)
    programs = jit_programs(config, mesh)  # refused, if at all, before anything is written
    with (
        claimed_by_all(folder),
        stop_of_all() as stop,
        jax.set_mesh(mesh),
        catch_out_of_memory(memory_advice(config, mesh), memory_limit(mesh.devices.flat)),
    ):
        data = _data_of_all(config)
        seen = {"data.fingerprint": data.fingerprint[:16], "checkpoints": finished_steps(folder)}
        require_same(seen)
        run = Run(config=config, bos=data.bos, eos=data.eos)
        require_same_run(folder, run, data.tokenizer_path)
        beginning = restore_or_begin(config, folder, data, mesh)
        with together():
            if jax.process_index() == 0:  # only now does nothing stand against it
                write_metadata(folder, run, data.tokenizer_path)
        with (
            MetricsFile(folder, config.run.tensorboard) as metrics,
            Trainer(
                config, folder, data, mesh, programs, stop, metrics, beginning, profile
            ) as trainer,
        ):
            return trainer.run()


def _data_of_all(config: Config) -> TokenFolder:
    """The run's data; process 0 comes first, to make what is missing for those on its disk."""
    is_first = jax.process_index() == 0
    with together():
        data = open_data(config) if is_first else None
    with together():
        return data or open_data(config)


def open_data(config: Config) -> TokenFolder:
    """The run's token folder; the embedded stories are prepared if it is missing.

    Raises:
      UsageError: when its vocabulary is not the model's.
      UserError: when it is missing or damaged.
    """
    path = Path(config.data.path).expanduser()
    if config.data.corpus == "stories" and not path.exists():
        from llama_jax.data.prepare.tokenize import TokenOptions, prepare_corpus

        options = TokenOptions(vocab_size=config.model.vocab_size)
        prepare_corpus("stories", path, options)
    folder = TokenFolder.open(path)
    if folder.vocab_size != config.model.vocab_size:
        makes_it = "move it away and it is made anew, or " * (config.data.corpus == "stories")
        raise UsageError(
            f"{path} has a vocabulary of {folder.vocab_size} and model.vocab_size is"
            f" {config.model.vocab_size}; {makes_it}set"
            f" --config.model.vocab_size={folder.vocab_size}"
        )
    return folder
