"""Experiment trackers of a run, TensorBoard and Weights & Biases: they get every number measured.

A tracker never ends a run: one that fails is a warning, and training goes on without it.
"""

import contextlib
import dataclasses
import importlib.util
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from llama_jax.config import Config, RunConfig
from llama_jax.errors import UsageError, first_line, warn

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # by setting, which names the extra
RUN_ID = "llama_jax_run_id"  # file in RUN/wandb, by which later sessions continue the run


def require_packages(run: RunConfig) -> None:
    """Raise `UsageError` if a tracker is set whose package is not installed."""
    for setting, package in PACKAGES.items():
        is_here = package in sys.modules or importlib.util.find_spec(package)
        if getattr(run, setting) and not is_here:
            raise UsageError(
                f"run.{setting} needs the package {package}; install it with: pip install"
                f' "llama_jax[{setting}]"'
            )


class Tracker(Protocol):
    """What takes numbers by name."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class Trackers:
    """The trackers that a config sets; without a config there are none."""

    def __init__(self, folder: Path, config: Config | None = None) -> None:
        self._open: dict[str, Tracker] = {}
        kinds: dict[str, Callable[[Path, Config], Tracker]] = {
            "tensorboard": TensorBoard,
            "wandb": WeightsAndBiases,
        }
        for name, kind in kinds.items():
            if config is not None and getattr(config.run, name):
                with self._without(name):
                    self._open[name] = kind(folder, config)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Give numbers of a step to all trackers."""
        for name, tracker in list(self._open.items()):
            with self._without(name):
                tracker.log(step, scalars)

    def close(self) -> None:
        """Finish what is still to be written or sent."""
        for name, tracker in list(self._open.items()):
            with self._without(name):
                tracker.close()

    @contextlib.contextmanager
    def _without(self, name: str) -> Iterator[None]:
        """Go on without a tracker that fails in the block."""
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            warn(f"run.{name} has failed ({first_line(error)}); training goes on without it")


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, folder: Path, config: Config) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases with the config, continued by the sessions that resume ours.

    Its own variables apply, such as WANDB_PROJECT, WANDB_NAME and WANDB_MODE=offline.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        import wandb

        file = folder / "wandb" / RUN_ID
        is_resumed = file.is_file()
        run_id = file.read_text().strip() if is_resumed else secrets.token_hex(4)
        file.parent.mkdir(exist_ok=True)
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "llama_jax"),
            name=os.environ.get("WANDB_NAME", folder.resolve().name),
            id=run_id,
            resume="allow" if is_resumed else None,
            dir=str(folder),
            config=dataclasses.asdict(config),
            settings=wandb.Settings(console="off"),  # the progress bar is no log
        )
        file.write_text(run_id)
        # wandb's own step may not go back, as ours does where a session resumes.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def close(self) -> None:
        self._run.finish()
