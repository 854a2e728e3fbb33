"""The train step, as the TPU compiler makes it on a machine without a TPU.

Each test keeps away something that was found in an optimised program; see benchmarks/RESULTS.md.
"""

import dataclasses
import functools
import re
from types import SimpleNamespace

import pytest

from llama_jax.cli.config_flags import read_config
from llama_jax.config import (
    Config,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
)
from llama_jax.hardware.hlo import collectives, nbytes
from llama_jax.model.parameters import block_parameters
from llama_jax.planning.compile import is_installed, target_mesh
from llama_jax.planning.targets import parse_target
from llama_jax.training.summary import run_summary

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.optimized,
    pytest.mark.skipif(not is_installed(), reason="needs libtpu: pip install '.[plan]'"),
]

# Heads as wide as the vector unit's lanes; sizes pairwise different.
B, T, L, D, N, K, H, F, V = 6, 768, 3, 256, 4, 2, 128, 640, 1024
MODEL = {"vocab_size": V, "dim": D, "num_layers": L, "num_heads": N, "num_kv_heads": K}
MODEL |= {"head_dim": H, "hidden_dim": F, "context_length": T, "compute_dtype": "bfloat16"}
BFLOAT16, FLOAT32 = 2, 4


def make_config(mesh=None, batch=B, remat="none", **model):
    """A small config of a run."""
    return Config(
        model=ModelConfig(**MODEL | model),
        data=DataConfig(path="none", batch_size=batch, sequence_length=T),
        optimizer=OptimizerConfig(steps=2, learning_rate=0.1, warmup_steps=0),
        mesh=mesh or MeshConfig(),
        run=RunConfig(remat=remat),
    )


@functools.cache
def training(config, target="v5e-1"):
    from tpu import compile_training

    return compile_training(config, target)


def largest(made):
    """Bytes of the largest array that an instruction makes."""
    return max(nbytes(one.result) for one, _ in made.instructions() if "(" not in one.result)


def test_dropout_leaves_attention_fused():
    made = training(make_config(dropout=0.1))
    assert any(
        one.opcode == "custom-call" and "splash" in one.name for one, _ in made.instructions()
    )
    assert largest(made) < B * N * T * T * BFLOAT16  # no scores


def test_a_run_says_what_its_dropout_drops():
    folder = SimpleNamespace(
        path="x", splits=dict.fromkeys(("train", "validation"), SimpleNamespace(tokens=9))
    )
    mesh = target_mesh(MeshConfig(), parse_target("v5e-1"))
    data = SimpleNamespace(folders=(folder,), weights=(1,))
    for rate, kept in ((0.0, ""), (0.1, ", whose weights are not dropped, only residuals;")):
        said = "\n".join(run_summary(make_config(dropout=rate), mesh, data, "ckpt", 0))
        assert f"attention splash (run.attention=auto){kept}" in said


def test_the_step_writes_for_the_backward_pass_what_its_policy_names_and_no_more():
    kept = (N + 2 * K + N) * H + 2 * F + D  # q, k, v, what attention returns, gate, up; the input
    stacks = kept_arrays(training(make_config(remat="auto")))
    assert sum(stacks) == B * T * (kept * BFLOAT16 + N * FLOAT32)  # and the log of denominators
    assert sum(kept_arrays(training(make_config(remat="none")))) > 1.8 * sum(stacks)


def test_the_backward_pass_of_attention_is_one_kernel_and_adds_up_no_parts():
    made = training(make_config(remat="auto"))
    kernels = [one for one, _ in made.instructions() if one.opcode == "custom-call"]
    named = [one.name for one in kernels if "splash" in one.name]
    assert [sum(part in name for name in named) for part in ("fwd", "dkv", "dq")] == [1, 1, 0]


def test_of_the_loops_over_layers_most_cycles_are_matmuls():
    sizes = ["model.num_layers=2", "data.batch_size=16", "optimizer.accumulation_steps=1"]
    config = read_config("110m_tpu", [f"--config.{size}" for size in sizes])
    longest = training(config).loops()[:3]  # of the loss, of both passes over the layers
    assert min(share for _, share in longest) > 0.55


@pytest.mark.parametrize(
    ("target", "times_scattered"),
    # A ring through all chips adds up shards. Where XLA would rather use all axes of the torus at
    # once, it adds up everything on each chip: twice the bytes, over more links. See RESULTS.md.
    [("v5e-8", 1), ("v5e-16", 2), ("v5p-64", 2)],
)
def test_fsdp_gathers_parameters_twice_and_adds_up_gradients_once(target, times_scattered):
    chips = parse_target(target).devices
    sizes = {"dim": 512, "hidden_dim": 1024, "vocab_size": 2048, "tied_embeddings": False}
    config = make_config(MeshConfig(data=1, fsdp=-1), chips, "save-matmuls", **sizes)
    found = collectives(training(config, target).text)
    blocks = block_parameters(config.model) * L * BFLOAT16
    table = 2048 * 512  # of the output; the embedding's rows alone are exchanged
    sent = dict.fromkeys(("all-gather", "added"), 0)
    for one in found:
        if one.kind in ("all-gather", "all-reduce", "reduce-scatter"):
            kind = one.kind if one.kind == "all-gather" else "added"
            sent[kind] += one.sent(chips) * one.times
    part = (chips - 1) / chips
    assert sent["all-gather"] == pytest.approx(part * (2 * blocks + table * BFLOAT16), rel=0.05)
    added = part * (blocks + table * FLOAT32)
    assert sent["added"] == pytest.approx(times_scattered * added, rel=0.05)
    largest_gathered = max(one.bytes for one in found if one.kind == "all-gather")
    assert largest_gathered <= table * BFLOAT16  # a matrix of one layer, never those of all


def test_with_sharded_sequences_a_block_scatters_each_sum_once():
    """Two sums forward and two backward, though three matrices read what is gathered once."""
    mesh = MeshConfig(data=1, fsdp=2, tensor=4, sequence=True)
    made = training(make_config(mesh, 2 * B, num_kv_heads=N, hidden_dim=1024), "v5e-8")
    streams = dict.fromkeys(("all-gather", "reduce-scatter"), 0.0)  # residual streams of a device
    for one in collectives(made.text):
        if one.kind in streams and one.group == 4:
            streams[one.kind] += one.sent(4) * one.times / (3 / 4 * B * T * D * BFLOAT16)
    ends = 2  # of the loss and its gradient
    # For the gradients of weights, inputs are gathered again: sharded, they take less to keep.
    assert streams == {"all-gather": 6 * L + ends, "reduce-scatter": 4 * L + ends}


def test_of_a_frozen_base_no_matrix_is_copied_to_another_layout():
    config = make_config(remat="block", num_kv_heads=N)
    run = dataclasses.replace(config.run, init_from="none")
    made = training(dataclasses.replace(config, run=run, lora=LoraConfig(rank=2)))
    matrices = {D * N * H, D * F}  # of all layers at once, or of one
    copied = {*made.copies(D * N * H)}
    assert not {size * layers * BFLOAT16 for size in matrices for layers in (1, L)} & copied


def kept_arrays(made):
    """Bytes of a layer of each array that the backward loop over layers reads for each layer."""
    loops = [one for one, _ in made.instructions() if one.opcode == "while"]
    (backward,) = (one.result for one in loops if "transpose(jvp())/while" in one.attributes)
    found = re.findall(rf"(?:bf16|f32)\[{L},(?:{B},|{B * T},)[\d,]*\]", backward)
    return [nbytes(one) // L for one in found]
