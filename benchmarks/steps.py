"""What `train.py` measures: whole optimizer steps, of ours and of the same model in PyTorch.

Both learn from the same random tokens: forward, loss, backward, clipping, AdamW, one number back
to the host. Does not know which steps are worth measuring, nor how results are shown.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import common
import numpy as np
import peers

STEPS = 3  # to a turn, so that a step may run on while the host prepares the next
ROOM = 0.92  # of the device's memory that a stack of layers may take
AS_MANY_AS_FIT = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A step to measure."""

    shape: dict[str, int]  # of the model, in the words of `ModelConfig`
    rows: int  # sequences a step, over all microbatches
    length: int  # tokens of each
    dtype: str  # of activations and products
    accumulation: int = 1  # microbatches a step

    @property
    def tokens(self) -> int:
        """Tokens that a step learns from."""
        return self.rows * self.length

    def ids(self) -> np.ndarray:
        """Random tokens, one more in each row than its inputs."""
        shape = (self.rows, self.length + 1)
        return np.random.default_rng(0).integers(0, self.shape["vocab_size"], shape, np.int32)


def config_of(job: Job, layers: int) -> Any:
    """Our config of a job; models of a billion parameters and more have an output matrix."""
    from llama_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig

    shape = job.shape | {"num_layers": layers}
    return Config(
        model=ModelConfig(
            **shape,
            context_length=job.length,
            tied_embeddings=shape["dim"] < common.PRIVATE_OUTPUT,
            compute_dtype=job.dtype,
        ),
        data=DataConfig(path="none", batch_size=job.rows, sequence_length=job.length),
        optimizer=OptimizerConfig(
            steps=10_000,
            learning_rate=1e-4,
            warmup_steps=0,
            accumulation_steps=job.accumulation,
        ),
    )


def compiled_step(config: Any, mesh: Any) -> Any:
    """Our step, compiled without a state."""
    import jax

    from llama_jax.data.loader import abstract_batch
    from llama_jax.training.step import abstract_state, jit_train_step

    with jax.set_mesh(mesh):
        state, batch = abstract_state(config), abstract_batch(config)
        return jit_train_step(config, mesh).lower(state, batch).compile()


def bytes_needed(compiled: Any) -> int:
    """What a compiled step holds in memory at once, its arguments included."""
    found = compiled.memory_analysis()
    made = found.output_size_in_bytes - found.alias_size_in_bytes
    return int(found.argument_size_in_bytes + made + found.temp_size_in_bytes)


def layers_that_fit(job: Job, mesh: Any, limit: float, least: int = 2) -> int:
    """As many layers, up to the shape's own, as a device of `limit` bytes holds.

    Memory grows by the same amount with each layer; the compiler tells how much.
    """
    few, more = (bytes_needed(compiled_step(config_of(job, n), mesh)) for n in (least, 2 * least))
    each = (more - few) / least
    return max(0, min(job.shape["num_layers"], int(least + (ROOM * limit - few) / each)))


def seconds_a_step(step: Callable[[], Any]) -> float:
    """Of a few in a row. One before them is not counted: its memory lay idle for others' turns."""
    assert float(step()) > 0
    begun = time.perf_counter()
    for _ in range(STEPS):
        loss = step()
    assert float(loss) > 0
    return (time.perf_counter() - begun) / STEPS


class Ours:
    """The step of `training.step.jit_train_step`, on one device."""

    def __init__(self, job: Job, layers: int = -1):
        """With `layers` = `AS_MANY_AS_FIT` the stack is as high as the device's memory allows."""
        import jax

        from llama_jax.config import MeshConfig
        from llama_jax.distributed.mesh import make_mesh
        from llama_jax.kernels.attention import choose_kernel
        from llama_jax.model.parameters import flops_per_token
        from llama_jax.training.step import jit_init

        device = jax.local_devices()[0]
        self._mesh = make_mesh(MeshConfig(), [device])
        if layers == AS_MANY_AS_FIT:
            limit = (device.memory_stats() or {}).get("bytes_limit", 0)
            layers = layers_that_fit(job, self._mesh, limit)
            if layers == 0:
                raise MemoryError(f"no layer fits in {limit / 1e9:.0f} GB")
        config = config_of(job, layers if layers > 0 else job.shape["num_layers"])
        backend = choose_kernel(
            "auto", device, head_dim=config.model.head_size, dtype=config.model.compute_dtype
        )
        self._step = compiled_step(config, self._mesh)
        self._batch = self._placed(job)
        with jax.set_mesh(self._mesh):
            self._state: Any = jit_init(config, self._mesh)()
        self.facts = {
            "attention": backend + _custom_calls(self._step.as_text(), backend),
            "flops": flops_per_token(config.model, job.length) * job.tokens,
            "layers": config.model.num_layers,
        }

    def _placed(self, job: Job) -> Any:
        import jax

        from llama_jax.data.loader import Batch
        from llama_jax.distributed.mesh import batch_sharding

        ids, weights_BT = job.ids(), np.ones((job.rows, job.length), np.float32)
        rows = Batch(inputs_BT=ids[:, :-1], targets_BT=ids[:, 1:], weights_BT=weights_BT)
        return jax.device_put(rows, batch_sharding(self._mesh))

    def __call__(self) -> float:
        """Seconds a step."""

        def step() -> Any:
            self._state, metrics = self._step(self._state, self._batch)
            return metrics.loss

        return seconds_a_step(step)


def _custom_calls(program: str, backend: str) -> str:
    """How often a compiled program calls cuDNN's attention: proof that it is what runs."""
    if backend != "cudnn":
        return ""
    calls = program.count('custom_call_target="__cudnn$fmha')
    return f", {calls} calls in the program"


class Theirs:
    """The same step in PyTorch."""

    def __init__(self, job: Job, compiled: bool):
        self._step = peers.torch_train_step(job.shape, job.ids(), job.dtype, compiled)
        self.facts: dict[str, Any] = {}

    def __call__(self) -> float:
        """Seconds a step."""
        return seconds_a_step(self._step)
