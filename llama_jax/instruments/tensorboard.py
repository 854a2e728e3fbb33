"""TensorBoard events through tensorboardX, which is an extra."""

from pathlib import Path
from typing import Any

from llama_jax.errors import UsageError


def event_writer(folder: Path) -> Any:
    """A writer with `add_scalar(name, value, step)` and `close()`.

    Raises:
      UsageError: when tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "run.tensorboard needs tensorboardX; install it with: pip install -e '.[tensorboard]'"
        ) from error
    return SummaryWriter(str(folder))
