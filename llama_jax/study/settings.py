"""What a study consists of: its scale, its trials, and the config of each trial.

A trial is one training run: a variant (a value of `model.position`) on a task with a learning rate
and a seed. On the first seed every variant is trained with each learning rate of the scale, and the
one with the lowest validation loss is used for the other seeds. Trials of a seed have the same
initial weights in all parameters that their variants share, and read the same batches in the same
order.
"""

import dataclasses
from pathlib import Path

from llama_jax.config import (
    POSITIONS,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
)

TEXT, RETRIEVAL = "text", "retrieval"  # tasks
VARIANTS = POSITIONS
MULTIPLES = (1, 2, 4, 8)  # of the training length, that models are evaluated at


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """The size of a study."""

    name: str
    vocab_size: int
    length: int  # tokens of a training sequence (T)
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden_dim: int = 0
    bias: bool = False
    tied: bool = True  # embedding and output matrix
    norm_eps: float = 1e-5
    batch_size: int
    steps: int = 0  # on text; 0: by `epochs`
    epochs: int = 0
    warmup: float = 0.1  # fraction of the steps
    learning_rates: tuple[float, ...]  # that the first seed is trained with
    eps: float = 1e-8
    clip_norm: float = 1.0
    seeds: int = 3
    validations: int = 10  # in a run
    validation_batches: int = 0  # of each; 0: all
    retrieval_steps: int  # on the retrieval task; 0: it is left out
    evaluation_tokens: int  # of the validation split, that are read at each length


DEFAULT = Scale(
    name="default",
    vocab_size=512,
    length=64,
    dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    batch_size=16,
    steps=400,
    learning_rates=(2e-3, 4e-3, 8e-3),
    validations=8,
    validation_batches=8,
    retrieval_steps=250,
    evaluation_tokens=2**14,
)
FULL = Scale(
    name="full",
    vocab_size=2048,
    length=256,
    dim=256,
    num_layers=6,
    num_heads=8,
    num_kv_heads=8,
    batch_size=32,
    steps=2000,
    learning_rates=(5e-4, 1e-3, 2e-3),
    seeds=5,
    validations=20,
    retrieval_steps=3000,
    evaluation_tokens=2**17,
)
# The study that this one repeats under fair conditions (github.com/tomsawyer0224/llama).
AS_PUBLISHED = Scale(
    name="as-published",
    vocab_size=8192,
    length=32,
    dim=512,
    num_layers=8,
    num_heads=16,
    num_kv_heads=8,
    hidden_dim=1536,
    bias=True,
    tied=False,
    batch_size=64,
    epochs=100,
    warmup=0.2,
    learning_rates=(5e-5,),
    eps=1e-5,
    clip_norm=0.0,
    seeds=1,
    validations=100,
    retrieval_steps=0,
    evaluation_tokens=2**15,
)


@dataclasses.dataclass(frozen=True, order=True)
class Trial:
    """One training run of a study."""

    task: str
    variant: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.task}-{self.variant}-lr{self.learning_rate:g}-seed{self.seed}"


def tasks(scale: Scale) -> tuple[str, ...]:
    """Return the tasks of a study."""
    return (TEXT, RETRIEVAL) if scale.retrieval_steps else (TEXT,)


def first_trials(scale: Scale, task: str, variant: str) -> list[Trial]:
    """Return the trials of the first seed, of which the best chooses the learning rate."""
    return [Trial(task, variant, rate, 0) for rate in scale.learning_rates]


def data_folder(folder: Path, task: str) -> Path:
    """Return the token folder of a task."""
    return folder / "data" / task


def run_folder(folder: Path, trial: Trial) -> Path:
    """Return the folder of a trial's run."""
    return folder / "runs" / trial.name


def model_config(scale: Scale, variant: str) -> ModelConfig:
    """Return the model of a variant."""
    return ModelConfig(
        vocab_size=scale.vocab_size,
        dim=scale.dim,
        num_layers=scale.num_layers,
        num_heads=scale.num_heads,
        num_kv_heads=scale.num_kv_heads,
        hidden_dim=scale.hidden_dim,
        multiple_of=32,
        attention_bias=scale.bias,
        mlp_bias=scale.bias,
        norm_eps=scale.norm_eps,
        tied_embeddings=scale.tied,
        context_length=scale.length,
        position=variant,
    )


def trial_config(scale: Scale, folder: Path, trial: Trial, steps: int) -> Config:
    """Return the config of a trial's run.

    Args:
      folder: of the study.
      steps: of the run.
    """
    every = max(1, steps // scale.validations)
    return Config(
        model=model_config(scale, trial.variant),
        data=DataConfig(
            path=str(data_folder(folder, trial.task)),
            batch_size=scale.batch_size,
            sequence_length=scale.length,
            seed=trial.seed,
        ),
        optimizer=OptimizerConfig(
            steps=steps,
            learning_rate=trial.learning_rate,
            min_learning_rate=0.1 * trial.learning_rate,
            warmup_steps=round(scale.warmup * steps),
            eps=scale.eps,
            clip_norm=scale.clip_norm,
        ),
        run=RunConfig(
            checkpoint_dir=str(run_folder(folder, trial)),
            seed=trial.seed,
            log_every=every,
            eval_every=every,
            eval_epochs=trial.task == TEXT,
            eval_batches=scale.validation_batches,
            save_every=max(every, steps // 4),
            keep_last=1,
            sample_tokens=0,
        ),
    )
