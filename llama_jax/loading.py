"""A trained model from a checkpoint folder, with all that is needed to use it."""

import dataclasses
from pathlib import Path

import jax

from llama_jax.checkpoint import Restored, finished_steps, restore, restore_newest
from llama_jax.config import ModelConfig
from llama_jax.errors import UserError
from llama_jax.metrics import warn
from llama_jax.model import Llama, abstract
from llama_jax.run_folder import TOKENIZER, read_run
from llama_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a checkpoint folder holds."""

    model: Llama  # blocks stacked; see `model.unstack` for decoding
    config: ModelConfig
    tokenizer: Tokenizer
    step: int
    bos: bool  # documents it learnt from begin with BOS


def load(path: str | Path) -> Loaded:
    """The newest whole checkpoint of a run's folder, or the one of a step's folder.

    Nothing is written. A damaged checkpoint is reported and passed over for the one before it.

    Raises:
      UserError: when there is no finished checkpoint, all are damaged, or the tokenizer is not the
        model's.
    """
    path = Path(path).expanduser()
    step = path.absolute()  # "." has no name of its own
    is_step = step.name.isdigit() and (step / "model").is_dir()
    folder = step.parent if is_step else path
    run = read_run(folder)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        abstract(run.config.model),
    )
    restored: Restored | None = None
    if is_step:
        restored = restore(step, {"model": wanted})
    elif finished_steps(folder):
        restored = restore_newest(folder, {"model": wanted}, report=warn)
    if restored is None:
        raise UserError(f"{folder} has no finished checkpoint; train for longer, or look elsewhere")
    tokenizer = Tokenizer(folder / TOKENIZER)
    if tokenizer.vocab_size != run.config.model.vocab_size:
        raise UserError(
            f"{folder / TOKENIZER} has {tokenizer.vocab_size} pieces and the model"
            f" {run.config.model.vocab_size}; restore the tokenizer it was trained with"
        )
    return Loaded(restored.trees["model"], run.config.model, tokenizer, restored.step, run.bos)
