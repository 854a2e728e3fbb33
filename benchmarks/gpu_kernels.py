"""What Triton makes of the attention kernels for GPUs, on a machine without one.

    pip install triton
    python benchmarks/gpu_kernels.py
    python benchmarks/gpu_kernels.py --heads 128 --capability 90

Compiles `kernels.triton` for NVIDIA GPUs by the compiler of the package `triton`, which is another
version than the one inside of XLA. A row is a kernel: the shared memory and the registers of a
program, what it spills, and its matmul instructions. A kernel is possible if its shared memory is
at most 163 KiB on an A100, 99 KiB on consumer GPUs of capability 8.6 and 8.9, 227 KiB on an H100.
"""

import argparse
import re
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh

from llama_jax.kernels.triton import triton_attention

B, T, N, K = 2, 4096, 8, 2
HEADS = (64, 128, 256)
CAPABILITIES = (80, 90)
OPTIONS = ("num_warps", "num_stages")


def kernels(head_dim: int) -> dict[str, tuple[str, dict[str, int]]]:
    """Return the kernels for heads so wide, forward and backward: Triton's text and options."""
    from jaxlib.mlir import ir
    from jaxlib.triton import dialect

    def learn(q: Any, k: Any, v: Any, gradient: Any, segments: Any) -> Any:
        out, pull = jax.vjp(partial(triton_attention, segments_BT=segments), q, k, v)
        return out, pull(gradient)

    q, k = (jax.ShapeDtypeStruct((B, T, heads, head_dim), jnp.bfloat16) for heads in (N, K))
    hopper = AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=hopper)):
        traced = jax.jit(learn).trace(q, k, k, q, jax.ShapeDtypeStruct((B, T), jnp.int32))
        lowered = traced.lower(lowering_platforms=("cuda",)).compiler_ir()
    found: dict[str, tuple[str, dict[str, int]]] = {}

    def visit(operation: Any) -> Any:
        if operation.name == "stablehlo.custom_call":
            config = operation.attributes["mhlo.backend_config"]
            with ir.Context() as context:
                dialect.register_dialect(context)
                module = ir.Module.parse(ir.StringAttr(config["ir"]).value_bytes)
                text = module.operation.get_asm()
            options = {key: ir.IntegerAttr(config[key]).value for key in OPTIONS}
            found[ir.StringAttr(config["name"]).value] = text, options
        return ir.WalkResult.ADVANCE

    lowered.operation.walk(visit)
    return found


def main() -> None:
    """Compile the kernels and print a row for each."""
    import triton
    from triton.backends.compiler import GPUTarget

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--heads", type=int, nargs="*", default=HEADS, help="their widths")
    parser.add_argument("--capability", type=int, nargs="*", default=CAPABILITIES)
    flags = parser.parse_args()
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    print(f"triton {triton.__version__}, jax {jax.__version__}; {B} × {T} tokens, {N}/{K} heads")
    print(f"{'':24}{'sm':>4}{'shared':>12}{'registers':>11}{'spilled':>10}  matmuls")
    for head_dim in flags.heads:
        for name, (text, options) in kernels(head_dim).items():
            for capability in flags.capability:
                with tempfile.TemporaryDirectory() as folder:
                    source, binary = Path(folder, "kernel.ttir"), Path(folder, "kernel.cubin")
                    source.write_text(text)
                    target = GPUTarget("cuda", capability, 32)
                    made = triton.compile(str(source), target=target, options=options)
                    binary.write_bytes(made.asm["cubin"])
                    words = [tools / "cuobjdump", "--dump-resource-usage", binary]
                    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
                registers, spilled = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
                matmuls = [
                    f"{made.asm['ptx'].count(word)} {word}"
                    for word in ("wgmma.mma_async", "mma.sync")
                    if word in made.asm["ptx"]
                ]
                print(
                    f"{head_dim:>4} {name:19}{capability:>4}{made.metadata.shared:>9,} B"
                    f"{registers:>11}{spilled:>8} B  {', '.join(matmuls)}",
                    flush=True,
                )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
