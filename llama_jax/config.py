"""The settings of a run, as frozen dataclasses that validate themselves.

A field is a choice; what follows from choices is a property, so that overriding a field leaves
nothing stale. There is no `None`: "off" is a value that the field's comment names. Each field's
line gives its type, range, default, meaning and unit.
"""

import dataclasses
import math
import sys
from functools import cache
from typing import Annotated, Any, ClassVar, get_type_hints

from llama_jax.errors import require, shown

COMPUTE_DTYPES = ("float32", "bfloat16")
LOSSES = ("next_token", "dpo")
# Of the weights that adapters leave frozen. "stored-…": as the checkpoint has them.
FLOAT_BASES, STORED = ("compute", "float32", "bfloat16"), "stored-"
BASES = (*FLOAT_BASES, "int8", "int4", "nf4", "stored-int8", "stored-int4-32", "stored-int4-64")
REMAT_POLICIES = ("none", "block", "save-qkv", "offload", "save-matmuls", "auto")
ATTENTION_BACKENDS = ("auto", "xla", "blockwise", "cudnn", "triton", "splash")
MOMENT_DTYPES = ("float32", "bfloat16")
PACKINGS = ("none", "documents")
CORPORA = ("", "stories", "shakespeare", "tinystories")
MAX_INT = 2**31 - 1  # of int32: sizes, steps and seeds are numbers on devices
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn", "dynamic")
POSITIONS = ("rope", "absolute", "sinusoidal", "alibi", "relative", "none")


@dataclasses.dataclass(frozen=True)
class Range:
    """The finite numbers from `low` to `high`, both included."""

    low: float
    high: float = math.inf

    def check(self, name: str, value: float) -> None:
        """Raise `UsageError` unless the value is in range."""
        low, high = f"{self.low:.10g}", f"{self.high:.10g}"
        is_open = self.high == math.inf or self.high == MAX_INT >= value
        expected = f"at least {low}" if is_open else f"from {low} to {high}"
        is_within = self.low <= value <= min(self.high, sys.float_info.max)
        require(is_within, f"{name}={shown(value)} is out of range; expected {expected}")


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of some strings."""

    choices: tuple[str, ...]

    def check(self, name: str, value: str) -> None:
        """Raise `UsageError` unless the value is one of the choices."""
        expected = ", ".join(map(repr, self.choices))
        message = f"{name}={shown(value)} is unknown; expected one of {expected}"
        require(value in self.choices, message)


Positive = Annotated[int, Range(1, MAX_INT)]
Count = Annotated[int, Range(0, MAX_INT)]


@cache
def _constraints(cls: type) -> dict[str, tuple[Range | Choice, ...]]:
    """Return the constraints of each annotated field of a section."""
    hints = get_type_hints(cls, include_extras=True)
    return {
        name: hint.__metadata__ for name, hint in hints.items() if hasattr(hint, "__metadata__")
    }


class Section:
    """A group of settings, whose fields are checked against their annotations."""

    section: ClassVar[str]  # its name in a config

    def __post_init__(self) -> None:
        for name, constraints in _constraints(type(self)).items():  # type: ignore[arg-type]
            for constraint in constraints:
                constraint.check(f"{self.section}.{name}", getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling(Section):
    """Scaling of rotary wavelengths, for a context longer than that of the first training.

    "linear" divides all frequencies by `factor` (Chen et al. 2023). "llama3" divides those that
    rotate less than `low_frequency_factor` times within the original context, and none that rotate
    more than `high_frequency_factor` times; "yarn" (Peng et al. 2023) does so with `beta_slow` and
    `beta_fast`, and multiplies cosines and sines by `attention_factor`, at 0 by 0.1·ln(factor) + 1.
    "dynamic" (NTK-aware) raises the base with the length of the sequence.
    """

    section = "model.rope_scaling"

    kind: Annotated[str, Choice(ROPE_SCALINGS)] = "none"  # "none": wavelengths are not scaled
    factor: Annotated[float, Range(1, 1e6)] = 1.0  # by which wavelengths are multiplied
    low_frequency_factor: Annotated[float, Range(1e-3, 1e3)] = 1.0  # llama3: full scaling below it
    high_frequency_factor: Annotated[float, Range(1e-3, 1e3)] = 4.0  # llama3: no scaling above it
    original_context: Positive = 8192  # llama3, yarn, dynamic: tokens of the first training
    beta_fast: Annotated[float, Range(1e-3, 1e6)] = 32.0  # yarn: no scaling above so many rotations
    beta_slow: Annotated[float, Range(1e-3, 1e6)] = 1.0  # yarn: full scaling below so many
    truncate: bool = True  # yarn: whether the blend begins and ends at whole pairs
    attention_factor: Annotated[float, Range(0, 1e3)] = 0.0  # yarn: of cosines; 0: by `factor`

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.kind != "llama3" or self.low_frequency_factor < self.high_frequency_factor,
            f"model.rope_scaling.low_frequency_factor={self.low_frequency_factor} is not below"
            f" high_frequency_factor={self.high_frequency_factor}; lower it",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The shape and numerics of a Llama 2 (Touvron et al. 2023, section 2.2)."""

    section = "model"

    vocab_size: Positive  # tokens in the vocabulary (V)
    dim: Positive  # width of the residual stream (D)
    num_layers: Positive  # transformer blocks (L)
    num_heads: Positive  # query heads (N)
    num_kv_heads: Positive  # key/value heads (K); equal to num_heads: no grouped-query attention
    head_dim: Count = 0  # width of one head (H); 0: dim / num_heads; read it as `head_size`
    attention_bias: bool = False  # add a bias to queries, keys, values and attention's output
    mlp_bias: bool = False  # add a bias in each linear layer of the feed-forward
    sliding_window: Count = 0  # positions that a query attends to, up to its own; 0: all
    context_length: Positive  # longest sequence the model is meant for, tokens
    hidden_dim: Count = 0  # width of the feed-forward (F); 0: computed, see `ffn_dim`
    multiple_of: Positive = 256  # a computed feed-forward width is rounded up to a multiple of this
    ffn_dim_multiplier: Annotated[float, Range(1e-3, 1e3)] = 1.0  # scales a computed width first
    norm_eps: Annotated[float, Range(1e-12, 1)] = 1e-5  # added to the mean square in RMSNorm
    position: Annotated[str, Choice(POSITIONS)] = "rope"  # "rope": queries and keys are rotated;
    # "absolute", "sinusoidal": a learned table, or sines and cosines, added to the embedding;
    # "alibi", "relative": scores lowered with distance, by fixed or learned slopes; "none"
    rope_theta: Annotated[float, Range(1)] = 10000.0  # base of the rotary wavelengths
    rope_scaling: RopeScaling = RopeScaling()
    tied_embeddings: bool = True  # share the embedding table with the output layer
    init_std: Annotated[float, Range(0, 1)] = 0.02  # standard deviation of initial matrices;
    # divided by √(2·num_layers) in those that write to the residual stream
    dropout: Annotated[float, Range(0, 0.99)] = 0.0  # probability, in training only; of attention
    # weights too where run.attention is "xla", as it is for "auto" on CPU; elsewhere of residuals
    compute_dtype: Annotated[str, Choice(COMPUTE_DTYPES)] = "float32"  # of activations and matmuls;
    # parameters are always float32

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            bool(self.head_dim) or self.dim % self.num_heads == 0,
            f"model.dim={self.dim} does not divide into model.num_heads={self.num_heads} heads;"
            f" use a dim that is a multiple of {self.num_heads}, or set model.head_dim",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads={self.num_heads} does not divide over"
            f" model.num_kv_heads={self.num_kv_heads}; use a multiple of it",
        )
        source = "" if self.head_dim else f"model.dim={self.dim} / num_heads={self.num_heads}: "
        require(
            self.head_size % 2 == 0 or self.position != "rope",
            f"{source}model.head_dim={self.head_size} is odd; RoPE rotates pairs: make it even",
        )
        kind = self.rope_scaling.kind
        require(
            kind == "none" or self.position == "rope",
            f"model.rope_scaling.kind={kind!r} scales rotary embeddings, which a model with"
            f" model.position={self.position!r} does not use; set it to 'none', or model.position"
            " to 'rope'",
        )
        require(
            kind not in ("yarn", "dynamic") or (self.head_size > 2 and self.rope_theta > 1),
            f"model.rope_scaling.kind={kind!r} needs a head_dim above 2 and a rope_theta above 1",
        )

    @property
    def head_size(self) -> int:
        """Width of one head (H): `head_dim`, or dim / num_heads where that is 0."""
        return self.head_dim or self.dim // self.num_heads

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward (F): 2/3 of 4·dim, scaled, rounded up (Meta's `model.py`)."""
        if self.hidden_dim:
            return self.hidden_dim
        width = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier != 1.0:
            width = int(self.ffn_dim_multiplier * width)
        return self.multiple_of * -(-width // self.multiple_of)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """The tokens that a run reads, and its batches."""

    section = "data"

    path: str  # token folder, written by prepare.py
    sources: str = ""  # in place of path, token folders and how often each is drawn from, such as
    # "data/a:0.7,data/b:0.3"
    corpus: Annotated[str, Choice(CORPORA)] = ""  # prepare.py's name for it; "stories" is
    # generated when the folder is missing
    batch_size: Positive  # sequences per step, over all devices and microbatches
    sequence_length: Annotated[int, Range(2)]  # tokens per sequence (T), up to model.context_length
    seed: Count = 42  # of the shuffled order
    packing: Annotated[str, Choice(PACKINGS)] = "none"  # "documents": pack complete documents
    # into sequences, each attending to itself only; "none": cut the token stream into sequences
    allow_change: bool = False  # resume a run although its data have changed

    def __post_init__(self) -> None:
        super().__post_init__()
        is_given = bool(self.path or self.sources)
        require(is_given, "data.path is empty; expected a folder that prepare.py wrote")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """AdamW with warm-up, cosine decay, gradient clipping and gradient accumulation."""

    section = "optimizer"

    steps: Positive  # optimizer updates in total
    epochs: Annotated[float, Range(0, 1e6)] = 0.0  # passes over the data, in place of the steps
    # above; 0: those count
    learning_rate: Annotated[float, Range(0, 10)]  # at the peak
    min_learning_rate: Annotated[float, Range(0, 10)] = 0.0  # at the end of the cosine decay
    warmup_steps: Count  # steps of linear increase from 0
    beta1: Annotated[float, Range(0, 0.999999)] = 0.9  # decay of the first moment
    beta2: Annotated[float, Range(0, 0.999999)] = 0.95  # decay of the second moment
    eps: Annotated[float, Range(1e-20, 1)] = 1e-8  # added to the root of the second moment
    weight_decay: Annotated[float, Range(0, 10)] = 0.1  # of matrices only, not of norm scales
    clip_norm: Annotated[float, Range(0)] = 1.0  # maximum global gradient norm; 0: no clipping
    accumulation_steps: Positive = 1  # microbatches per step
    moments_dtype: Annotated[str, Choice(MOMENT_DTYPES)] = "float32"  # of both moments
    loss: Annotated[str, Choice(LOSSES)] = "next_token"  # to minimise; "dpo": of preference pairs
    z_loss: Annotated[float, Range(0, 1)] = 0.0  # weight of the squared log-partition function in
    # the loss, which keeps logits small

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.warmup_steps <= self.steps,
            f"optimizer.warmup_steps={self.warmup_steps} is longer than the run of"
            f" optimizer.steps={self.steps}; lower the warm-up",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Section):
    """The device mesh. Sizes are 1 or more and multiply to the number of devices.

    One of them may be -1, for the devices that the others leave.
    """

    section = "mesh"

    data: int = -1  # data parallelism: replicas of the model, each with a shard of the batch
    fsdp: int = 1  # shards of parameters, optimizer state and batch
    tensor: int = 1  # tensor parallelism: shards of heads, feed-forward and vocabulary
    sequence: bool = False  # shard activations between blocks over `tensor` along the sequence

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for name, size in sizes.items():
            message = f"mesh.{name}={size} is out of range; expected 1 or more, or -1 for the rest"
            require(size == -1 or size >= 1, message)
        greedy = [name for name, size in sizes.items() if size == -1]
        require(
            len(greedy) <= 1,
            f"{' and '.join(f'mesh.{name}=-1' for name in greedy)}, but only one axis can take the"
            f" devices left; add {' '.join(f'--config.mesh.{name}=1' for name in greedy[:-1])}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """A run's folder, its intervals, and how its step is executed."""

    section = "run"

    checkpoint_dir: str = "ckpt"  # everything the run writes
    init_from: str = ""  # checkpoint that training starts from, with its model; "": random weights
    seed: Count = 0  # of initial weights and dropout
    log_every: Positive = 10  # steps between log lines
    eval_every: Positive = 250  # steps between validations; also after the last step
    eval_epochs: bool = False  # validate after each pass over the data too
    eval_batches: Count = 0  # batches per validation, always the same ones; 0: all
    save_every: Positive = 250  # steps between checkpoints; also after the last step
    keep_last: Positive = 3  # checkpoints kept, besides the best
    sample_tokens: Count = 64  # length of the sample printed at each validation; 0: no sample
    sample_prompt: str = ""  # prompt of that sample
    remat: Annotated[str, Choice(REMAT_POLICIES)] = "auto"  # what the backward pass computes again;
    # "auto": "none" on CPU, "save-matmuls" elsewhere
    attention: Annotated[str, Choice(ATTENTION_BACKENDS)] = "auto"  # kernel; "auto": the fastest
    tensorboard: bool = False  # also write TensorBoard events
    wandb: bool = False  # also log to Weights & Biases, with its own settings as WANDB_PROJECT
    peak_flops: Annotated[float, Range(0)] = 0.0  # of one device, FLOP/s, for MFU; 0: by its name

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.checkpoint_dir), "run.checkpoint_dir is empty; expected a folder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(Section):
    """Low-rank adapters, trained in place of the weights that they adapt (Hu et al. 2021)."""

    section = "lora"

    rank: Count = 0  # of each adapter (R); 0: no adapters, all weights are trained
    alpha: Annotated[float, Range(1e-6, 1e6)] = 16.0  # what adapters add is scaled by alpha / rank
    rslora: bool = False  # scale by alpha / √rank instead (Kalajdzievski 2023)
    dropout: Annotated[float, Range(0, 0.99)] = 0.0  # probability, of inputs of adapted layers
    targets: str = "linear"  # what is adapted, separated by commas: linear (every linear layer of
    # the blocks), wq, wk, wv, wo, gate, up, down, embedding, output
    base: Annotated[str, Choice(BASES)] = "compute"  # storage of the frozen weights; "compute": in
    # model.compute_dtype; "nf4": QLoRA's (Dettmers et al. 2023)
    double_quantization: bool = False  # nf4: quantise its scales too


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpoConfig(Section):
    """Direct preference optimisation (Rafailov et al. 2023), with optimizer.loss="dpo"."""

    section = "dpo"

    beta: Annotated[float, Range(1e-6, 1e3)] = 0.1  # how close to stay to the reference model
    label_smoothing: Annotated[float, Range(0, 0.5)] = 0.0  # probability that a label is wrong


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a training run."""

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig = MeshConfig()
    run: RunConfig = RunConfig()
    lora: LoraConfig = LoraConfig()
    dpo: DpoConfig = DpoConfig()

    def __post_init__(self) -> None:
        batch, accumulation = self.data.batch_size, self.optimizer.accumulation_steps
        require(
            batch % accumulation == 0,
            f"data.batch_size={batch} does not divide over"
            f" optimizer.accumulation_steps={accumulation}; use a multiple of {accumulation}",
        )
        require(
            self.data.sequence_length <= self.model.context_length,
            f"data.sequence_length={self.data.sequence_length} is longer than"
            f" model.context_length={self.model.context_length}; shorten it",
        )
        is_dpo = self.optimizer.loss == "dpo"
        for key, is_set in (
            (f"lora.rank={self.lora.rank}", self.lora.rank > 0),
            (f"optimizer.loss={self.optimizer.loss!r}", is_dpo),
        ):
            message = f"{key} needs a model to start from; set run.init_from to a checkpoint"
            require(not is_set or bool(self.run.init_from), message)
        require(
            self.lora.rank > 0 or self.lora.base == "compute",
            f"lora.base={self.lora.base!r} is of frozen weights, and lora.rank=0 trains all; set"
            " lora.rank, such as 16",
        )
        require(
            self.lora.base == "nf4" or not self.lora.double_quantization,
            f"lora.double_quantization is of NF4's scales, not of lora.base={self.lora.base!r}; set"
            " lora.base='nf4', or leave it out",
        )
        needs, z_loss = "optimizer.loss='dpo' needs", self.optimizer.z_loss
        require(not is_dpo or z_loss == 0, f"{needs} optimizer.z_loss=0, not {z_loss}")
        packing = f"{needs} data.packing='documents', not {self.data.packing!r}"
        require(not is_dpo or self.data.packing == "documents", packing)

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimizer step."""
        return self.data.batch_size * self.data.sequence_length

    @property
    def microbatch_size(self) -> int:
        """Sequences in one forward and backward pass, over all devices."""
        return self.data.batch_size // self.optimizer.accumulation_steps


def as_config_dict(config: Any) -> Any:
    """Return the `ml_collections.ConfigDict` of a config, whose fields flags can override."""
    from ml_collections import ConfigDict

    return ConfigDict(dataclasses.asdict(config))
