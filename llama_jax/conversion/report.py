"""A conversion on a terminal: what came of it, and whether it computes what its source does."""

import time

from llama_jax.conversion.transfer import Conversion, convert
from llama_jax.conversion.verification import is_cheap, memory_needed, verify
from llama_jax.model import count_parameters

NEXT = {  # what a user may want to type next
    "ckpt": "sample with: python sample.py --ckpt {}",
    "gguf": "run with: llama-cli -m {}",
    "llama2c": "run with: ./run {}",
}


def convert_and_tell(job: Conversion, verifies: bool | None) -> None:
    """Convert a model and print lines about it.

    Args:
      verifies: whether to run it and its source; None: if memory allows.

    Raises:
      UserError: when it cannot be converted, or the result differs from its source.
    """
    begun = time.perf_counter()
    source = convert(job)
    files = [job.output, *job.output.rglob("*")]
    size = sum(path.stat().st_size for path in files if path.is_file())
    seconds = time.perf_counter() - begun
    parameters = count_parameters(source.config)
    print(f"{job.output}: {parameters:,} parameters, {size / 1e9:,.3f} GB in {seconds:.1f} s")
    if verifies is None and not is_cheap(source):
        needed = memory_needed(source) / 1e9
        print(f"not verified: that takes {needed:.0f} GB of memory and a while; --verify does it")
    elif verifies is not False:
        for line in verify(job, source):
            print(line, flush=True)
    if job.target in NEXT:
        print(NEXT[job.target].format(job.output))
