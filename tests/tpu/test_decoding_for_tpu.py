"""Programs of the engine, as the TPU compiler makes them on a machine without a TPU.

Each test keeps away something that was found in an optimised program; see benchmarks/RESULTS.md.
"""

import dataclasses
import functools
import math
import re

import pytest

from llama_jax.config import ModelConfig
from llama_jax.hardware.hlo import collectives, nbytes
from llama_jax.model.cache import chunk_size
from llama_jax.planning.compile import is_installed

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.optimized,
    pytest.mark.skipif(not is_installed(), reason="needs libtpu: pip install '.[plan]'"),
]

# Heads as wide as the vector unit's lanes, and no size that a loop of the sampler has.
B, L, D, N, K, H, S = 16, 2, 256, 4, 2, 128, 512
SIZES = {"vocab_size": 512, "dim": D, "num_layers": L, "num_heads": N, "num_kv_heads": K}
SIZES |= {"head_dim": H, "hidden_dim": 384, "context_length": S}
CONFIG = ModelConfig(**SIZES, compute_dtype="bfloat16")
BFLOAT16 = 2


@functools.cache
def decoding(batch, target="v5e-1"):
    from tpu import compile_decoding

    return compile_decoding(CONFIG, batch, target=target)


def test_a_step_of_a_batch_writes_the_cache_without_a_loop_over_it():
    turns = decoding(B).turns()
    assert B not in turns
    assert B * K not in turns


@pytest.mark.parametrize(("batch", "target"), [(1, "v5e-1"), (B, "v5e-1"), (B, "v5e-4")])
def test_no_step_copies_the_cache(batch, target):
    heads = {"v5e-1": K, "v5e-4": 1}[target]  # of a device
    assert batch * heads * S * H * BFLOAT16 not in decoding(batch, target).copies(0)


def test_chips_that_share_kv_heads_send_nothing_of_the_cache():
    """Two kv heads on four chips: beside sums, the sampler alone sends something, a few numbers."""
    sent = collectives(decoding(B, "v5e-4").text)
    assert {one.kind for one in sent if one.bytes > 8 * B} == {"all-reduce"}


@pytest.mark.parametrize("batch", [1, B])
def test_weights_are_read_in_the_layout_in_which_they_are_stored(batch):
    matrices = {D * N * H, D * K * H, D * 384, 512 * D}
    assert not {size * BFLOAT16 for size in matrices} & {*decoding(batch).copies(0)}


def test_one_sequence_is_multiplied_on_the_matrix_unit():
    opcodes = [one.opcode for one, _ in decoding(1).instructions()]
    # Seven matrices of a block, its scores and the sums of its values; and the logits.
    assert opcodes.count("convolution") >= L * (7 + 2) + 1


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_no_step_holds_floats_or_a_copy_of_a_quantized_table(kind, batch):
    from tpu import compile_decoding

    wide = dataclasses.replace(CONFIG, vocab_size=2**17, dim=1024)  # more than the chip's VMEM
    assert compile_decoding(wide, batch, kind).temporary < wide.vocab_size * wide.dim // 2


# So large that nothing stays in the chip's memory from one token to the next.
LARGE = {"vocab_size": 32000, "dim": 2048, "num_layers": 1, "num_heads": 16, "num_kv_heads": 16}
LARGE |= {"hidden_dim": 5632, "context_length": 4096, "compute_dtype": "bfloat16"}
WIDER = LARGE | {"dim": 4096, "num_heads": 32, "num_kv_heads": 32, "hidden_dim": 11264}


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(("target", "chips", "sizes"), [("v5e-1", 1, LARGE), ("v5e-4", 4, WIDER)])
def test_a_step_reads_weights_and_a_chunk_of_the_cache_once(target, chips, sizes, kind, batch):
    from hbm import hbm_bytes
    from tpu import compile_decoding

    config = ModelConfig(**sizes)
    program = compile_decoding(config, batch, kind, target).program
    entry = program.computations[program.entry].values()
    arrays = {one.name: nbytes(one.result) for one in entry if one.opcode == "parameter"}
    K, H, slots = config.num_kv_heads // chips, config.head_size, config.context_length
    cache = 2 * batch * K * slots * H * BFLOAT16
    chunk = cache * chunk_size(slots, batch * K, 1, H) // slots  # the loop over chunks counts once
    needed = sum(arrays.values()) - cache + chunk
    assert 0.99 * needed < hbm_bytes(program) < 1.1 * needed


def test_prefill_runs_splash_and_holds_no_scores_of_all_slots():
    from tpu import compile_prefill

    T, slots = 128, 8 * S  # so many that they are not read at once
    made = compile_prefill(dataclasses.replace(CONFIG, context_length=slots), B, T)
    results = [one.result for one, _ in made.instructions()]
    assert any(one.opcode == "custom-call" for one, _ in made.instructions())
    scores = B * N * T * slots
    assert max(map(largest_float, results)) <= scores // 4


def largest_float(result):
    """Elements of the largest float32 array in a type."""
    shapes = re.findall(r"f32\[([\d,]+)\]", result)
    return max((math.prod(map(int, shape.split(","))) for shape in shapes), default=0)
