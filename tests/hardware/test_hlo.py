"""Collectives parsed from the text of compiled programs, of every backend."""

import jax
import jax.numpy as jnp
import pytest
from collective_axes import axes_of
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.config import MeshConfig
from llama_jax.distributed.mesh import make_mesh
from llama_jax.hardware.hlo import Program, collectives, group_size, nbytes

pytestmark = pytest.mark.optimized


def program(entry, *others):
    """Return a program of some lines in its entry computation, and other computations."""
    lines = "\n".join(f"  {line}" for line in entry)
    return "\n".join(["HloModule m", *others, "ENTRY %main (p: f32[8]) -> f32[8] {", lines, "}"])


def computation(name, *lines):
    return "\n".join([f"%{name} (p: (s32[], f32[8])) -> f32[] {{", *(f"  {x}" for x in lines), "}"])


GATHER = (
    "%all-gather.3 = bf16[4,6]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=1,"
    " replica_groups={{0,1},{2,3}}, dimensions={0}, use_global_device_ids=true,"
    ' metadata={op_name="jit(f)/dot" stack_frame_id=5}'
)


def test_kind_shape_bytes_and_group_of_an_all_gather():
    (found,) = collectives(program([GATHER]))
    assert (found.kind, found.bytes, found.group, found.times) == ("all-gather", 48, 2, 1)


def test_a_tuple_is_one_collective():
    line = (
        "%all-reduce.1 = (f32[], /*index=1*/s8[3,5]{1,0}) all-reduce(%a, %b), channel_id=2,"
        " replica_groups={}, to_apply=%add"
    )
    (found,) = collectives(program([line]))
    assert (found.bytes, found.group) == (19, 0)


@pytest.mark.parametrize(
    ("kind", "groups", "sent"),
    [  # of a result of 24 bytes
        ("all-gather", "{{0,1,2,3}}", 18),
        ("all-reduce", "{{0,1,2,3}}", 36),
        ("reduce-scatter", "{{0,1,2,3}}", 72),
        ("all-to-all", "{{0,1,2,3}}", 18),
        ("all-reduce", "{{0,1}}", 24),
        ("all-reduce", "{}", 42),
    ],
)
def test_bytes_sent_by_ring_algorithms(kind, groups, sent):
    line = f"%c = f32[6]{{0}} {kind}(%p), replica_groups={groups}"
    (found,) = collectives(program([line]))
    assert found.kind == kind
    assert found.sent(8) == sent


def test_a_permute_sends_its_result():
    line = "%c = f32[6]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}"
    (found,) = collectives(program([line]))
    assert (found.kind, found.sent(8)) == ("collective-permute", 24)


@pytest.mark.parametrize(
    "lines",
    [
        (
            "%s = (f32[2]{0}, f32[8]{0}) all-gather-start(%p), replica_groups=[2,4]<=[8]",
            "%d = f32[8]{0} all-gather-done(%s)",
        ),
        (
            "%s = f32[8]{0} all-reduce-start(%p), replica_groups=[2,4]<=[8], to_apply=%add",
            "%d = f32[8]{0} all-reduce-done(%s)",
        ),
        (
            "%s = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p),"
            " source_target_pairs={{0,1},{1,2},{2,0}}",
            "%d = f32[8]{0} collective-permute-done(%s)",
        ),
    ],
    ids=["gather", "reduce", "permute"],
)
def test_a_start_and_its_done_are_one_collective(lines):
    (found,) = collectives(program(lines))
    assert found.bytes == 32 and found.is_async
    assert found.group == (2 if found.kind == "collective-permute" else 4)


def test_an_asynchronous_wrapper_counts_once():
    inner = computation("wrapped", "%r = f32[2]{0} reduce-scatter(%q), replica_groups=[1,4]<=[4]")
    outer = (
        "%s = ((f32[8]{0}), f32[2]{0}) async-start(%p), calls=%wrapped",
        "%u = ((f32[8]{0}), f32[2]{0}) async-update(%s), calls=%wrapped",
        "%d = f32[2]{0} async-done(%u), calls=%wrapped",
    )
    (found,) = collectives(program(outer, inner))
    assert (found.kind, found.times, found.sent(4)) == ("reduce-scatter", 1, 24)
    assert found.is_async


def test_a_collective_split_into_steps_on_tpu_counts_once():
    """Fusions that start, advance and end a gather each contain it, with the same chain."""
    gather = (
        "%g = f32[8]{0} all-gather(%q), channel_id=7, replica_groups=[1,4]<=[4],"
        ' frontend_attributes={chain_id="2"}'
    )
    fusions = [computation(name, gather) for name in ("begin", "middle", "end")]
    calls = [
        f"%{n} = f32[8]{{0}} fusion(%p), kind=kCustom, calls=%{n}" for n in ("begin", "middle")
    ]
    loop = "%w = (s32[]) while(%t), body=%body, condition=%test"
    trips = ', backend_config={"known_trip_count":{"n":"3"}}'
    body = computation("body", "%x = f32[8]{0} fusion(%p), kind=kCustom, calls=%end")
    (found,) = collectives(program([*calls, loop + trips], body, *fusions))
    assert (found.kind, found.bytes) == ("all-gather", 32)
    assert found.is_async


def test_an_all_reduce_with_a_slice_is_a_reduce_scatter_on_tpu():
    fused = computation(
        "all-reduce-scatter.1",
        "%all-reduce.4 = f32[8]{0} all-reduce(%q), replica_groups=[1,4]<=[4], to_apply=%add",
        "ROOT %part = f32[2]{0} dynamic-slice(%all-reduce.4, %i), dynamic_slice_sizes={2}",
    )
    call = "%f = f32[2]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1"
    (found,) = collectives(program([call], fused))
    assert (found.kind, found.bytes, found.sent(4)) == ("reduce-scatter", 8, 24)
    assert not found.is_async


def test_nested_loops_multiply():
    inner = computation("inner", GATHER)
    outer = computation(
        "outer",
        "%w = (s32[]) while(%t), condition=%c, body=%inner,"
        ' backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}',
    )
    loop = "%w = (s32[]) while(%t), condition=%c, body=%outer"
    trips = ', backend_config={"known_trip_count":{"n":"5"}}'
    found = collectives(program([GATHER, loop + trips], inner, outer))
    assert sorted(one.times for one in found) == [1, 15]


@pytest.mark.parametrize(("bound", "step", "trips"), [(4, 1, 4), (4, 2, 2), (5, 2, 3)])
def test_trip_counts_are_read_from_the_condition_where_they_are_not_annotated(bound, step, trips):
    test = computation(
        "test",
        f"%bound = s32[]{{:T(128)}} constant({bound})",
        "%i = s32[]{:T(128)} get-tuple-element(%p), index=1",
        "ROOT %lt = pred[] compare(%i, %bound), direction=LT",
    )
    body = computation(
        "body",
        GATHER,
        f"%step = s32[] constant({step})",
        "%j = s32[] get-tuple-element(%p), index=1",
        "%next = s32[] add(%j, %step)",
        "ROOT %t = (bf16[4,6], s32[]) tuple(%all-gather.3, %next)",
    )
    loop = "%w = (bf16[4,6], s32[]) while(%t), condition=%test, body=%body"
    (found,) = collectives(program([loop], test, body))
    assert found.times == trips


def test_a_loop_of_unknown_trip_count_counts_as_one_iteration():
    loop = "%w = (s32[]) while(%t), condition=%test, body=%body"
    test = computation("test", "ROOT %b = pred[] call(%p), to_apply=%other")
    (found,) = collectives(program([loop], test, computation("body", GATHER)))
    assert found.times == 1


def test_branches_count_and_uncalled_computations_do_not():
    branches = [computation(name, GATHER) for name in ("one", "two", "unused")]
    choice = "%c = f32[] conditional(%p, %a, %b), branch_computations={%one, %two}"
    assert len(collectives(program([choice], *branches))) == 2


@pytest.mark.parametrize(
    ("notation", "size"),
    [
        ("replica_groups={{0,2},{1,3}}", 2),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,2,2]T(2,1,0)", 2),
        ("replica_groups=mesh['a'=2,'b'=3] {'b'}", 3),
        ("replica_groups=mesh['a'=2,'b'=3] {'a','b'}", 6),
        ("replica_groups=mesh['a'=2,'b'=3], device_ids=([2,3]T(1,0)) {'b'}", 3),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", 2),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", 2),
        ("replica_groups={}", 0),
        ("", 0),
    ],
)
def test_the_size_of_groups_in_every_notation(notation, size):
    assert group_size(f"channel_id=1, {notation}, use_global_device_ids=true") == size


def test_bytes_of_a_type():
    text = "(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, pred[], /*index=2*/f8e4m3fn[3]{0}, u4[5], token[])"
    assert nbytes(text) == 2048 + 1 + 3 + 3 + 0


def test_instructions_of_a_program():
    read = Program(program(["%p = f32[8]{0} parameter(0)", "ROOT %n = f32[8]{0} negate(%p)"]))
    assert read.entry == "main"
    root = read.computations["main"]["n"]
    assert (root.opcode, root.operands, root.is_root) == ("negate", ("p",), True)


def test_a_compiled_program():
    """Weights sharded four ways and gathered in a loop of five; a sum over all eight devices."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))

    def run(x_BD, weights_LDD):
        def step(x_BD, weight_DD):
            return jnp.tanh(x_BD @ weight_DD), None

        return jnp.sum(jax.lax.scan(step, x_BD, weights_LDD)[0])

    shapes = (8, 12), (5, 12, 12)
    specs = PartitionSpec(("data", "fsdp")), PartitionSpec(None, "fsdp")
    places = [NamedSharding(mesh, spec) for spec in specs]
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    text = jax.jit(run, in_shardings=places).lower(*given).compile().as_text()
    sizes = dict(mesh.shape)
    found = [(one.kind, one.times, axes_of(one, sizes), one.bytes) for one in collectives(text)]
    assert sorted(found) == [
        ("all-gather", 5, ("fsdp",), 576),
        ("all-reduce", 1, ("data", "fsdp"), 4),
    ]
