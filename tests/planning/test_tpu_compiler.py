"""The TPU compiler: its messages, and where it is installed, a real program."""

import jax
import pytest
from plans import make_config

from llama_jax.config import MeshConfig
from llama_jax.errors import UserError
from llama_jax.planning import compile as tpu_compiler
from llama_jax.planning.decoding import DecodingOptions, compile_decoding, plan_decoding
from llama_jax.planning.targets import parse_target
from llama_jax.planning.training import compile_training, estimate

# libtpu crashes with the settings of quick compilation, so these run in `make test-slow`.
needs_libtpu = pytest.mark.skipif(
    not tpu_compiler.is_installed() or jax.config.read("jax_disable_most_optimizations"),
    reason="needs libtpu: pip install '.[plan]'; and make test-slow",
)


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO"
            " temporaries (29.43G) exceeds available HBM (15.75G).",
            29.43 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: XLA:TPU ran out. Used 512.5M of 15.75G hbm.", 512.5 * 2**20),
        ("RESOURCE_EXHAUSTED: something else", None),
        ("INVALID_ARGUMENT: Used 1.0G of 2.0G hbm", None),
    ],
)
def test_bytes_of_a_program_that_does_not_fit(message, size):
    assert tpu_compiler.required_bytes(message) == size


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("Internal error when accessing libtpu multi-process lockfile. Run ...", "another process"),
        ("no such thing", "libtpu refuses the slice v5e:2x4: no such thing"),
    ],
)
def test_an_error_of_libtpu_becomes_one_line(message, shown, monkeypatch):
    from jax.experimental import topologies

    def refuse(**_):
        raise RuntimeError(message)

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    for name in tpu_compiler.ENVIRONMENT:
        monkeypatch.setenv(name, "kept")
    with pytest.raises(UserError, match=shown):
        tpu_compiler.target_mesh(MeshConfig(data=8), parse_target("v5e-8"))


@pytest.mark.parametrize(("estimated", "is_small"), [(1e9, True), (3e9, False)])
def test_only_small_programs_are_compiled_with_all_arrays_in_device_memory(estimated, is_small):
    class Lowered:
        def compile(self, compiler_options):
            options.append(compiler_options)
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 2.5G of 2.0G hbm.")

    options = []
    made = tpu_compiler.compile_program(Lowered, estimated)
    assert (made.total, made.fits) == (2.5 * 2**30, False)
    assert options == [{"xla_msa_enable": False} if is_small else None]


def test_a_compiler_error_becomes_one_line():
    def lower():
        raise jax.errors.JaxRuntimeError("INTERNAL: no such copy\n  at line 7\n")

    with pytest.raises(UserError, match=r"INTERNAL: no such copy;.*--fast") as error:
        tpu_compiler.compile_program(lower, 0.0)
    assert "\n" not in str(error.value)


@needs_libtpu
@pytest.mark.as_used
def test_the_train_step_compiles_for_tpus_that_are_not_here():
    target = parse_target("v5e:2x2")
    config = make_config(
        mesh__data=2,
        mesh__fsdp=2,
        model__dim=256,
        model__num_heads=2,
        model__num_kv_heads=1,
        model__compute_dtype="bfloat16",
        model__hidden_dim=512,
        model__num_layers=2,
        model__context_length=256,
        data__sequence_length=256,
        run__remat="block",
    )
    way = estimate(config, target)
    made = compile_training(way, target)
    assert made.fits and "splash" in made.text
    assert way.memory.total == pytest.approx(made.total, rel=0.25)


@needs_libtpu
@pytest.mark.as_used
def test_the_decoding_loop_compiles_for_tpus_that_are_not_here():
    model = make_config(model__compute_dtype="bfloat16").model
    plan = plan_decoding(model, DecodingOptions(batch=2), parse_target("v5e-4"), compile_decoding)
    assert plan.fits and "while" in plan.compiled.text
