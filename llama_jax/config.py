"""What a run is: the model, its data, its optimizer, its devices and its habits.

Frozen dataclasses, validated when made. A field is a choice; what follows from choices is a
property, so that nothing goes stale when a field is overridden. There is no `None`: "off" is a
value that the field's comment names. This file knows neither JAX nor any file format.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from llama_jax.errors import UsageError, nearest

COMPUTE_DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "block", "save-qkv", "offload")
ATTENTION_BACKENDS = ("auto", "xla", "blockwise", "cudnn", "splash")
MOMENT_DTYPES = ("float32", "bfloat16")
PACKINGS = ("none", "documents")
CORPORA = ("", "stories", "shakespeare", "tinystories")
ROPE_SCALINGS = ("none", "linear", "llama3")


def require(condition: bool, message: str) -> None:
    """Raise `UsageError(message)` unless the condition holds."""
    if not condition:
        raise UsageError(message)


def _require_range(section: str, low: float, high: float, **values: float) -> None:
    """Each value must be a finite number in [low, high]."""
    expected = f"at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
    for name, value in values.items():
        require(
            math.isfinite(value) and low <= value <= high,
            f"{section}.{name}={value!r} is out of range; expected {expected}",
        )


def _require_choice(section: str, choices: tuple[str, ...], **values: str) -> None:
    """Each value must be one of the choices."""
    expected = ", ".join(map(repr, choices))
    for name, value in values.items():
        message = f"{section}.{name}={value!r} is unknown; expected one of {expected}"
        require(value in choices, message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary wavelengths are stretched for a context longer than the one first trained on."""

    kind: str = "none"  # "linear": all by `factor`; "llama3": only those long in the old context
    factor: float = 1.0  # how much longer a stretched wavelength is
    low_frequency_factor: float = 1.0  # llama3: fewer turns than this in the old context: stretched
    high_frequency_factor: float = 4.0  # llama3: more turns than this: left alone; between: blended
    original_context: int = 8192  # llama3: the old context, tokens

    def __post_init__(self) -> None:
        _require_choice("model.rope_scaling", ROPE_SCALINGS, kind=self.kind)
        _require_range("model.rope_scaling", 1, 1e6, factor=self.factor)
        edges = ("low_frequency_factor", "high_frequency_factor")
        _require_range("model.rope_scaling", 1e-3, 1e3, **{n: getattr(self, n) for n in edges})
        _require_range("model.rope_scaling", 1, math.inf, original_context=self.original_context)
        require(
            self.kind != "llama3" or self.low_frequency_factor < self.high_frequency_factor,
            f"model.rope_scaling.low_frequency_factor={self.low_frequency_factor} is not below"
            f" high_frequency_factor={self.high_frequency_factor}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a Llama 2 and its numerics (Touvron et al. 2023, section 2.2)."""

    vocab_size: int  # pieces in the tokenizer
    dim: int  # width of the residual stream (D)
    num_layers: int  # blocks (L)
    num_heads: int  # query heads (N)
    num_kv_heads: int  # key/value heads (K); equal to num_heads without grouping
    head_dim: int = 0  # width of one head (H); 0: dim / num_heads; read it from `head_size`
    context_length: int  # longest sequence the model is meant for, tokens
    hidden_dim: int = 0  # width of the feed-forward (F); 0: by the rule of `ffn_dim`
    multiple_of: int = 256  # the rule rounds the width up to a multiple of this
    ffn_dim_multiplier: float = 1.0  # the rule scales the width by this before rounding
    norm_eps: float = 1e-5  # added to the mean square inside RMSNorm
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    rope_scaling: RopeScaling = RopeScaling()
    tied_embeddings: bool = True  # one table reads tokens and writes logits
    init_std: float = 0.02  # of fresh matrices; of those into the residual stream / √(2·layers)
    dropout: float = 0.0  # fraction dropped at llama2.c's four sites, training only
    compute_dtype: str = "float32"  # of activations and matmuls; parameters stay float32

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "context_length")
        _require_range("model", 1, math.inf, **{name: getattr(self, name) for name in sizes})
        _require_range("model", 0, math.inf, hidden_dim=self.hidden_dim, head_dim=self.head_dim)
        _require_range("model", 1, math.inf, multiple_of=self.multiple_of)
        _require_range("model", 1e-3, 1e3, ffn_dim_multiplier=self.ffn_dim_multiplier)
        _require_range("model", 1e-12, 1, norm_eps=self.norm_eps)
        _require_range("model", 1, math.inf, rope_theta=self.rope_theta)
        _require_range("model", 0, 1, init_std=self.init_std)
        _require_range("model", 0, 0.99, dropout=self.dropout)
        _require_choice("model", COMPUTE_DTYPES, compute_dtype=self.compute_dtype)
        require(
            bool(self.head_dim) or self.dim % self.num_heads == 0,
            f"model.dim={self.dim} does not divide into model.num_heads={self.num_heads} heads;"
            f" use a dim that is a multiple of {self.num_heads}, or set model.head_dim",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads={self.num_heads} does not divide over"
            f" model.num_kv_heads={self.num_kv_heads}; each kv head serves equally many heads",
        )
        source = "" if self.head_dim else f"model.dim={self.dim} / num_heads={self.num_heads}: "
        require(
            self.head_size % 2 == 0,
            f"{source}model.head_dim={self.head_size} is odd; RoPE rotates pairs, so it must be"
            " even",
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
class DataConfig:
    """Which tokens a run reads, and in what portions."""

    path: str  # folder written by prepare.py
    corpus: str = ""  # name prepare.py knows it by; "stories" is made when the folder is missing
    batch_size: int  # sequences per step, over all devices and all microbatches
    sequence_length: int  # tokens per sequence (T), at most model.context_length
    seed: int = 42  # of the order of the examples
    packing: str = "none"  # "documents": whole documents, several a row, none sees another
    allow_change: bool = False  # resume although the data are not what they were

    def __post_init__(self) -> None:
        _require_range("data", 1, math.inf, batch_size=self.batch_size)
        _require_range("data", 2, math.inf, sequence_length=self.sequence_length)
        _require_range("data", 0, 2**31 - 1, seed=self.seed)
        _require_choice("data", CORPORA, corpus=self.corpus)
        _require_choice("data", PACKINGS, packing=self.packing)
        require(bool(self.path), "data.path is empty; expected a folder that prepare.py wrote")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up, cosine decay, clipping and accumulation."""

    steps: int  # optimizer updates in the whole run
    learning_rate: float  # at its peak
    min_learning_rate: float = 0.0  # at the end of the cosine
    warmup_steps: int  # steps of linear rise from 0
    beta1: float = 0.9  # decay of the mean of gradients
    beta2: float = 0.95  # decay of the mean of squared gradients
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # on matrices only, never on norm scales
    clip_norm: float = 1.0  # largest global norm of the gradient; 0: no clipping
    accumulation_steps: int = 1  # microbatches per step
    moments_dtype: str = "float32"  # of both moments; "bfloat16" halves their memory
    z_loss: float = 0.0  # weight of (log of the softmax's denominator)², which keeps logits small

    def __post_init__(self) -> None:
        _require_range("optimizer", 1, math.inf, steps=self.steps)
        _require_range("optimizer", 0, 10, learning_rate=self.learning_rate)
        _require_range("optimizer", 0, 10, min_learning_rate=self.min_learning_rate)
        _require_range("optimizer", 0, math.inf, warmup_steps=self.warmup_steps)
        _require_range("optimizer", 0, 0.999999, beta1=self.beta1, beta2=self.beta2)
        _require_range("optimizer", 1e-20, 1, eps=self.eps)
        _require_range("optimizer", 0, 10, weight_decay=self.weight_decay)
        _require_range("optimizer", 0, math.inf, clip_norm=self.clip_norm)
        _require_range("optimizer", 1, math.inf, accumulation_steps=self.accumulation_steps)
        _require_range("optimizer", 0, 1, z_loss=self.z_loss)
        _require_choice("optimizer", MOMENT_DTYPES, moments_dtype=self.moments_dtype)
        require(
            self.warmup_steps <= self.steps,
            f"optimizer.warmup_steps={self.warmup_steps} is longer than the run of"
            f" optimizer.steps={self.steps}; lower the warm-up",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices are arranged. Sizes multiply to the number of devices; one may be -1."""

    data: int = -1  # copies of the model, each with its share of the batch; -1: the devices left
    fsdp: int = 1  # parts that parameters, optimizer state and batch are cut into
    tensor: int = 1  # parts that heads, feed-forward and vocabulary are cut into
    sequence: bool = False  # between blocks, cut activations along the sequence over `tensor`

    def __post_init__(self) -> None:
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for name, size in sizes.items():
            require(
                size == -1 or size >= 1,
                f"mesh.{name}={size} is not a size; expected 1 or more, or -1 for the devices left",
            )
        greedy = [name for name, size in sizes.items() if size == -1]
        require(
            len(greedy) <= 1,
            f"{' and '.join(f'mesh.{name}=-1' for name in greedy)}, but only one axis can take the"
            f" devices left; add {' '.join(f'--config.mesh.{name}=1' for name in greedy[:-1])}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run's place on disk, its rhythm and what it spends memory on."""

    checkpoint_dir: str = "ckpt"  # everything the run writes
    seed: int = 0  # of initial weights and dropout
    log_every: int = 10  # steps between lines
    eval_every: int = 250  # steps between validations; also after the last step
    eval_batches: int = 0  # validation batches each time, always the same; 0: all
    save_every: int = 250  # steps between checkpoints; also after the last step
    keep_last: int = 3  # checkpoints kept, besides the best
    sample_tokens: int = 64  # tokens of the sample written at each validation; 0: none
    sample_prompt: str = ""  # what that sample starts from
    remat: str = "none"  # what the backward pass recomputes to save memory; see `remat`
    attention: str = "auto"  # the kernel of training; "auto": the fastest on these devices
    tensorboard: bool = False  # also write events for TensorBoard
    peak_flops: float = 0.0  # of one device, FLOP/s, to tell the share of it; 0: by its chip's name

    def __post_init__(self) -> None:
        rhythm = ("log_every", "eval_every", "save_every", "keep_last")
        _require_range("run", 1, math.inf, **{name: getattr(self, name) for name in rhythm})
        _require_range("run", 0, math.inf, eval_batches=self.eval_batches)
        _require_range("run", 0, math.inf, sample_tokens=self.sample_tokens)
        _require_range("run", 0, 2**31 - 1, seed=self.seed)
        _require_range("run", 0, math.inf, peak_flops=self.peak_flops)
        _require_choice("run", REMAT_POLICIES, remat=self.remat)
        _require_choice("run", ATTENTION_BACKENDS, attention=self.attention)
        require(bool(self.checkpoint_dir), "run.checkpoint_dir is empty; expected a folder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig = MeshConfig()
    run: RunConfig = RunConfig()

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

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer update learns from."""
        return self.data.batch_size * self.data.sequence_length

    @property
    def microbatch_size(self) -> int:
        """Sequences that one forward and backward pass sees, over all devices."""
        return self.data.batch_size // self.optimizer.accumulation_steps


# Configs to and from plain nested mappings: ConfigDicts of config files, JSON of checkpoints.
#
# Unknown keys and wrong types are refused here; ranges are the business of `config`.

T = TypeVar("T")


def as_config_dict(config: Any) -> Any:
    """The `ml_collections.ConfigDict` of a config, whose fields flags can override."""
    from ml_collections import ConfigDict

    return ConfigDict(dataclasses.asdict(config))


def parse(cls: type[T], tree: Mapping[str, Any], prefix: str = "", where: str = "") -> T:
    """A `cls` made from nested mappings such as a ConfigDict or JSON.

    Args:
      prefix: what the names of these keys begin with, in complaints.
      where: the file that should have them, likewise.

    Raises:
      UsageError: for a key that is unknown (with the nearest name) or missing, or a value of the
        wrong type (with key and expected type). Whole numbers are accepted for floats.
    """
    if not isinstance(tree, Mapping) and not hasattr(tree, "keys"):
        raise UsageError(f"{prefix or 'the config'} is {tree!r}; expected a section with keys")
    hints, there = get_type_hints(cls), f" in {where}" if where else ""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in tree:
        key = f"{prefix}{name}"
        require(name in fields, f"unknown key {key!r}{there}{nearest(str(name), fields)}")
    values = {}
    for name, field in fields.items():
        if name in tree:
            values[name] = _parse_value(hints[name], tree[name], prefix + name, where)
        else:
            expected = spelled(hints[name])
            message = f"key {prefix + name!r} is missing{there}; expected {expected}"
            require(field.default is not dataclasses.MISSING, message)
    return cls(**values)


def _parse_value(expected: Any, value: Any, key: str, where: str) -> Any:
    """`value` as the expected type, or a `UsageError` naming the key."""
    if dataclasses.is_dataclass(expected):
        require(
            isinstance(value, Mapping) or hasattr(value, "keys"),
            f"{key}={value!r} has the wrong type; expected a section with keys",
        )
        return parse(expected, value, key + ".", where)  # type: ignore[arg-type]
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    matches = isinstance(value, expected) and (expected is bool or not isinstance(value, bool))
    require(matches, f"{key}={value!r} has the wrong type; expected {spelled(expected)}")
    return value


def spelled(expected: Any) -> str:
    """The name of a type as a user would say it."""
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
    return names.get(expected, "a section with keys")
