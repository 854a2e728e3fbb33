"""Training speed: a whole optimizer step of ours beside the same step written in PyTorch.

    python benchmarks/train.py
    python benchmarks/train.py --models 15m,110m --dtype bfloat16

Both learn from the same random tokens: forward, loss, backward, clipping, AdamW, one number back
to the host. Each peer has its own process and they take turns; see `common`.
Ours runs as train.py runs it, with huge pages; PyTorch runs as it comes, and with huge pages too.
"""

import time
from pathlib import Path
from typing import Any

import common
import numpy as np
import peers

TUNED = "the same with huge pages"
STEPS = 3  # to a turn, so that a step may run on while the host prepares the next
BATCHES = {"260k": (32, 256), "15m": (8, 256), "110m": (2, 512)}  # sequences, tokens of each


def tokens_of(model: str, batch: tuple[int, int]) -> np.ndarray:
    """Random ids, one more in each row than its inputs."""
    vocabulary = common.SHAPES[model]["vocab_size"]
    return np.random.default_rng(0).integers(0, vocabulary, (batch[0], batch[1] + 1), np.int32)


def ours(model: str, batch: tuple[int, int], dtype: str) -> common.Work:
    """The step of `train_step.jit_train_step`, on one device."""
    import jax

    from llama_jax.config import Config, DataConfig, MeshConfig, OptimizerConfig
    from llama_jax.data.batches import Batch
    from llama_jax.sharding import make_mesh, place_batch
    from llama_jax.train_step import jit_init, jit_train_step

    config = Config(
        model=common.model_config(model, batch[1], dtype),
        data=DataConfig(path="none", batch_size=batch[0], sequence_length=batch[1]),
        optimizer=OptimizerConfig(steps=10_000, learning_rate=1e-4, warmup_steps=0),
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    ids = tokens_of(model, batch)
    weights_BT = np.ones(batch, np.float32)
    rows = Batch(inputs_BT=ids[:, :-1], targets_BT=ids[:, 1:], weights_BT=weights_BT)
    state: Any = None
    with jax.set_mesh(mesh):
        step, state = jit_train_step(config, mesh), jit_init(config, mesh)()
        placed = place_batch(rows, mesh)

    def work() -> float:
        nonlocal state
        begun = time.perf_counter()
        with jax.set_mesh(mesh):
            for _ in range(STEPS):
                state, metrics = step(state, placed)
        assert float(metrics.loss) > 0
        return (time.perf_counter() - begun) / STEPS

    return work


def theirs(model: str, batch: tuple[int, int], dtype: str, compiled: bool) -> common.Work:
    """The same step in PyTorch."""
    step = peers.torch_train_step(
        common.SHAPES[model] | {"num_kv_heads": common.KV_HEADS[model]},
        tokens_of(model, batch),
        dtype,
        compiled,
    )

    def work() -> float:
        begun = time.perf_counter()
        for _ in range(STEPS):
            loss = step()
        assert float(loss) > 0
        return (time.perf_counter() - begun) / STEPS

    return work


def main() -> None:
    """Measure each model that was asked for."""
    parser = common.parser(__doc__.splitlines()[0], models="15m")
    parser.add_argument("--batch", default="", help="sequences × tokens, such as 8x256")
    flags = parser.parse_args()
    common.heading(Path(__file__).name)
    with_torch = not flags.no_peers and not common.missing("torch")
    for model in flags.models.split(","):
        rows, length = map(int, flags.batch.split("x")) if flags.batch else BATCHES[model]
        batch = (rows, length)
        made: dict[str, tuple[Any, ...]] = {"llama_jax": (ours, model, batch, flags.dtype)}
        if with_torch:
            made["PyTorch, eager"] = (theirs, model, batch, flags.dtype, False)
            made["PyTorch, torch.compile"] = (theirs, model, batch, flags.dtype, True)
            made[TUNED] = made["PyTorch, torch.compile"]
        title = f"training step, {model}, {rows} × {length} tokens, {flags.dtype}"
        common.compare(title, rows * length, flags.rounds, made, ("llama_jax", TUNED))


if __name__ == "__main__":
    main()
