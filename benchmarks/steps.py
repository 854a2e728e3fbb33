"""What `train.py` measures: whole optimizer steps, ours and those of the same model in PyTorch.

Both train on the same random tokens: forward, loss, backward, clipping, AdamW, one number back to
the host.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import common
import numpy as np
import peers

STEPS = 3  # per run, so that the device may compute while the host prepares the next step
ROOM = 0.92  # fraction of the device's memory that may be used
AS_MANY_AS_FIT = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A step to measure."""

    shape: dict[str, int]  # fields of `ModelConfig`
    sequences: int  # per step, over all microbatches
    length: int  # tokens per sequence
    dtype: str  # of activations and matmuls
    accumulation: int = 1  # microbatches per step
    documents: int = 0  # packed into each sequence; 0: the sequences are not packed
    attention: str = "auto"  # of ours, a `run.attention`

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.sequences * self.length

    def ids(self) -> np.ndarray:
        """Return random tokens, one more per sequence than its inputs."""
        shape = (self.sequences, self.length + 1)
        return np.random.default_rng(0).integers(0, self.shape["vocab_size"], shape, np.int32)


def config_of(job: Job, layers: int) -> Any:
    """Return our config of a job."""
    from llama_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig

    shape = job.shape | {"num_layers": layers}
    return Config(
        model=ModelConfig(
            **shape,
            context_length=job.length,
            tied_embeddings=shape["dim"] < common.UNTIED_DIM,
            compute_dtype=job.dtype,
        ),
        data=DataConfig(
            path="none",
            batch_size=job.sequences,
            sequence_length=job.length,
            packing="documents" if job.documents else "none",
        ),
        optimizer=OptimizerConfig(
            steps=10_000,
            learning_rate=1e-4,
            warmup_steps=0,
            accumulation_steps=job.accumulation,
        ),
        run=RunConfig(attention=job.attention),
    )


def compiled_step(config: Any, mesh: Any) -> Any:
    """Return our step, compiled for abstract arguments."""
    import jax

    from llama_jax.data.loader import abstract_batch
    from llama_jax.training.step import abstract_state, jit_train_step

    with jax.set_mesh(mesh):
        state, batch = abstract_state(config), abstract_batch(config)
        return jit_train_step(config, mesh).lower(state, batch).compile()


def bytes_needed(compiled: Any) -> int:
    """Return the peak bytes of a compiled step, arguments included."""
    found = compiled.memory_analysis()
    made = found.output_size_in_bytes - found.alias_size_in_bytes
    return int(found.argument_size_in_bytes + made + found.temp_size_in_bytes)


def layers_that_fit(job: Job, mesh: Any, limit: float, least: int = 2) -> int:
    """Return the number of layers, at most the shape's own, that fit in `limit` bytes.

    Memory grows by the same amount with each layer, which two compilations determine.
    """
    few, more = (bytes_needed(compiled_step(config_of(job, n), mesh)) for n in (least, 2 * least))
    each = (more - few) / least
    return max(0, min(job.shape["num_layers"], int(least + (ROOM * limit - few) / each)))


def seconds_per_step(step: Callable[[], Any]) -> float:
    """Return the mean of a few steps, after one that is not counted: its memory had been idle."""
    assert float(step()) > 0
    begun = time.perf_counter()
    for _ in range(STEPS):
        loss = step()
    assert float(loss) > 0
    return (time.perf_counter() - begun) / STEPS


class Ours:
    """The step of `training.step.jit_train_step`, on one device."""

    def __init__(self, job: Job, layers: int = -1):
        """Compile a job; `layers` = `AS_MANY_AS_FIT` uses as many as the device's memory allows."""
        import jax

        from llama_jax.config import MeshConfig
        from llama_jax.distributed.mesh import make_mesh
        from llama_jax.model.parameters import flops_per_token
        from llama_jax.training.step import attention_kernel, jit_programs

        device = jax.local_devices()[0]
        self._mesh = make_mesh(MeshConfig(), [device])
        if layers == AS_MANY_AS_FIT:
            limit = (device.memory_stats() or {}).get("bytes_limit", 0)
            layers = layers_that_fit(job, self._mesh, limit)
            if layers == 0:
                raise MemoryError(f"no layer fits in {limit / 1e9:.0f} GB")
        config = config_of(job, layers if layers > 0 else job.shape["num_layers"])
        backend = attention_kernel(config, device, training=True)
        self._step = compiled_step(config, self._mesh)
        self._batch = self._put(job)
        with jax.set_mesh(self._mesh):
            self._state: Any = jit_programs(config, self._mesh).init()
        self.facts = {
            "attention": backend + _custom_calls(self._step.as_text(), backend),
            "flops": flops_per_token(config.model, job.length) * job.tokens,
            "layers": config.model.num_layers,
        }

    def _put(self, job: Job) -> Any:
        import jax

        from llama_jax.data.loader import Batch
        from llama_jax.distributed.mesh import batch_sharding

        ids, weights_BT = job.ids(), np.ones((job.sequences, job.length), np.float32)
        segments_BT = None
        if job.documents:  # from 1, of equal lengths
            segments_T = 1 + np.arange(job.length) * job.documents // job.length
            segments_BT = np.broadcast_to(segments_T.astype(np.int32), weights_BT.shape)
        batch = Batch(
            inputs_BT=ids[:, :-1],
            targets_BT=ids[:, 1:],
            weights_BT=weights_BT,
            segments_BT=segments_BT,
        )
        return jax.device_put(batch, batch_sharding(self._mesh))

    def __call__(self) -> float:
        """Return seconds per step."""

        def step() -> Any:
            self._state, metrics = self._step(self._state, self._batch)
            return metrics.loss

        return seconds_per_step(step)


def _custom_calls(program: str, backend: str) -> str:
    """Return how often a compiled program calls a GPU's attention kernel, as proof that it runs."""
    targets = {"cudnn": "__cudnn$fmha", "triton": "__gpu$xla.gpu.triton"}
    if backend not in targets:
        return ""
    calls = program.count(f'custom_call_target="{targets[backend]}')
    return f", {calls} calls in the program"


class Theirs:
    """The same step in PyTorch."""

    def __init__(self, job: Job, compiled: bool):
        self._step = peers.torch_train_step(job.shape, job.ids(), job.dtype, compiled)
        self.facts: dict[str, Any] = {}

    def __call__(self) -> float:
        """Return seconds per step."""
        return seconds_per_step(self._step)
