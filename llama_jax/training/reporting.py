"""What the steps told, fetched from the device now and then: metrics.jsonl and the console's line.

Does not know what to do about a step that was not finite; it says which one it was.
"""

import jax

from llama_jax.config import Config
from llama_jax.instruments.device_memory import MemoryUse, memory_use
from llama_jax.instruments.flops import flops_per_token, peak_flops
from llama_jax.instruments.goodput import SITTING, WALL, StepClock
from llama_jax.instruments.metrics import Console, MetricsFile, spelled_duration
from llama_jax.training.train_step import StepMetrics


class Reporter:
    """Collects what steps tell and reports it in portions."""

    def __init__(
        self,
        config: Config,
        devices: list[jax.Device],
        metrics: MetricsFile,
        console: Console,
        clock: StepClock,
    ):
        self._config, self._devices, self._clock = config, devices, clock
        self._metrics, self._console = metrics, console
        self._pending: list[StepMetrics] = []  # of steps not reported yet, still on the device
        self._peak = peak_flops(devices[0], config.run.peak_flops) * len(devices)
        self._flops = flops_per_token(config.model, config.data.sequence_length)

    def add(self, metrics: StepMetrics) -> None:
        """Take what a step will tell; wait only for the one before it."""
        self._pending.append(metrics)
        jax.block_until_ready(self._pending[-2:][0])  # at most one step is queued

    def report(self, step: int) -> tuple[int, StepMetrics] | None:
        """Write and say what the steps up to `step` told; the first that was not finite, if any."""
        told, self._pending = jax.device_get(self._pending), []
        if not told:
            return None
        seconds = self._clock.lap(len(told))
        use = memory_use(self._devices)
        for number, metrics in enumerate(told, step - len(told) + 1):
            if not metrics.healthy:
                return number, metrics
            record = {
                "step": number,
                "loss": float(metrics.loss),
                "learning_rate": float(metrics.learning_rate),
                "gradient_norm": float(metrics.gradient_norm),
                "seconds": seconds,
            }
            self._metrics.write(
                record | (self._instruments(seconds, use) if number == step else {})
            )
        loss = sum(float(metrics.loss) for metrics in told) / len(told)
        self._console.progress(step, self._line(step, loss, told[-1], seconds, use))
        return None

    def _instruments(self, seconds: float, use: MemoryUse | None) -> dict[str, int | float]:
        """What the last step of a portion tells besides: speed, memory and time well spent."""
        clock, rate = self._clock, self._config.tokens_per_step / seconds
        told: dict[str, int | float] = {"tokens_per_second": rate}
        if self._peak:
            told["mfu"] = rate * self._flops / self._peak
        if use:
            told |= {"memory_gb": use.in_use / 1e9, "peak_memory_gb": use.peak / 1e9}
        told |= {"goodput": clock.goodput, "run_goodput": clock.run_goodput}
        return told | {WALL: clock.wall, SITTING: clock.sitting}

    def _line(
        self, step: int, loss: float, metrics: StepMetrics, seconds: float, use: MemoryUse | None
    ) -> str:
        """A step's line."""
        total, rate = self._config.optimizer.steps, self._config.tokens_per_step / seconds
        mfu = f"  mfu {rate * self._flops / self._peak:.1%}" if self._peak else ""
        memory = f"  mem {use.peak / 1e9:.1f} GB" if use else ""
        left = spelled_duration(seconds * (total - step))
        return (
            f"step {step:>{len(str(total))}}/{total}  loss {loss:.4f}"
            f"  lr {metrics.learning_rate:.2e}  norm {metrics.gradient_norm:.2f}"
            f"  {rate:,.0f} tok/s  {1000 * seconds:.0f} ms/step{mfu}{memory}"
            f"  goodput {self._clock.goodput:.0%}  left {left}"
        )
