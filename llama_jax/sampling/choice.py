"""How tokens are to be chosen, as users say it: the library, the command and a chat alike.

What the numbers mean `sampling` knows, and `xorshift` for llama2.c's way.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np

from llama_jax.config import require
from llama_jax.sampling.sampler import Sampler, make_sampler

RNGS = ("jax", "xorshift")
OF_XORSHIFT = ("temperature", "top_p", "rng")  # what llama2.c's way knows


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The settings of `sampler.make_sampler`, and whose random numbers are drawn.

    Raises:
      UsageError: when made with a number out of range, or one that does not go with `rng`.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)  # by token id
    rng: str = "jax"  # "xorshift": as llama2.c chooses, one text at a time

    def __post_init__(self) -> None:
        require(self.rng in RNGS, f"rng={self.rng!r} is unknown; expected 'jax' or 'xorshift'")
        if self.rng == "xorshift":
            off = SamplingOptions()
            for name, value in vars(self).items():
                require(
                    name in OF_XORSHIFT or value == getattr(off, name),
                    f"{name}={value!r} does not go with rng='xorshift', which knows temperature,"
                    " top_p and seed alone; leave one of them out",
                )
        self.sampler  # noqa: B018  raises

    @functools.cached_property
    def sampler(self) -> Sampler:
        """What chooses on the device."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del settings["rng"]
        return make_sampler(**settings)

    def chooser(self, seed: int) -> Callable[[np.ndarray], int] | None:
        """What chooses a text's tokens on the host; None where the sampler does on the device.

        Raises:
          UsageError: for a seed that xorshift cannot start from.
        """
        if self.rng == "jax":
            return None
        from llama_jax.sampling.xorshift import XorshiftSampler

        return XorshiftSampler(self.temperature, self.top_p, seed).choose
