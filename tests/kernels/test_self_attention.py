"""Attention by each kernel: the oracle's values and gradients, alone, packed and on a mesh."""

import functools
import itertools
import re
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import slow, slow_but
from jax.sharding import AbstractDevice, AbstractMesh
from tiny_model import make_model

from llama_jax.config import MeshConfig
from llama_jax.distributed.mesh import make_mesh, shard_heads
from llama_jax.errors import UsageError
from llama_jax.kernels import blockwise, splash, triton
from llama_jax.kernels.attention import xla_attention
from llama_jax.kernels.blockwise import blockwise_attention
from llama_jax.kernels.cudnn import cudnn_attention
from llama_jax.kernels.splash import block_length, key_block_length, splash_attention
from llama_jax.kernels.triton import triton_attention
from llama_jax.model.execution import Execution
from llama_jax.training.loss import summed_nll

pytestmark = pytest.mark.optimized

B, T, N, H = 3, 150, 6, 4  # T is no multiple of any kernel's block
LENGTHS = [
    [40, 61, 20],
    [150],
    [1, 127, 2],
]  # of the documents in each row; what is left is padding
SEGMENTS_BT = np.stack(
    [np.repeat([*range(1, len(row) + 1), 0], [*row, T - sum(row)]) for row in LENGTHS]
).astype(np.int32)


def splash_here(q, k, v, segments=None, window=0):
    """The TPU's kernel, step by step on CPU."""
    return splash_attention(q, k, v, segments, window=window, interpret=True)


def triton_here(q, k, v, segments=None, window=0):
    """A GPU's kernel, step by step on CPU."""
    return triton_attention(q, k, v, segments, window=window, interpret=True)


KERNELS = {
    "xla": xla_attention,
    "blockwise": shard_heads(blockwise_attention),
    "splash": splash_here,
    "triton": shard_heads(triton_here),
}
HERE = list(KERNELS)
QUICK = {"xla_backend_optimization_level": 0}  # of the compiler: halves the time of these tests
# float32 rounds each of up to T = 150 products and sums of order 1 by 6e-8: 1e-5 is far above that
# and far below what one wrong key would change, about 1/T.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Blocks so small that T has several, of every kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "SMALLEST_BLOCK", 64)
        patch.setattr(splash, "LARGEST_BLOCK", 128)
        patch.setattr(splash, "LARGEST_KEY_BLOCK", 128)
        patch.setattr(triton, "OWN_BLOCK", 64)
        patch.setattr(triton, "FORWARD_STEP", 32)
        patch.setattr(triton, "BACKWARD_STEP", 16)
        yield


def arrays(K, dtype="float32", heads=N, rows=B):
    """Queries, keys, values and the gradient of the output."""
    random = np.random.default_rng(K)
    shapes = [(rows, T, heads_, H) for heads_ in (heads, K, K, heads)]
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


def oracle(q, k, v, slope, segments, window=T):
    """Output and gradients of q, k, v in NumPy float64, each document of each row by itself."""
    q, k, v, slope = (np.asarray(x, np.float64) for x in (q, k, v, slope))
    results = [np.zeros(x.shape) for x in (q, q, k, v)]
    group = q.shape[2] // k.shape[2]
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        for document in np.unique(segments[b]):
            at = np.flatnonzero(segments[b] == document)
            kv = n // group
            parts = q[b, at, n], k[b, at, kv], v[b, at, kv], slope[b, at, n]
            for result, head, part in zip(results, (n, n, kv, kv), one_head(*parts, window)):
                result[b, at, head] += part
    return results


def one_head(q, k, v, slope, window):
    """The same of one head and one document, [t, H] each (Dao 2023, section 2.1)."""
    scale = 1 / np.sqrt(q.shape[1])
    mask = np.tri(len(q), dtype=bool) & ~np.tri(len(q), k=-window, dtype=bool)
    scores = np.where(mask, q @ k.T * scale, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    weight_slope = slope @ v.T
    shared = (weight_slope * weights).sum(axis=1, keepdims=True)
    score_slope = weights * (weight_slope - shared) * scale
    return weights @ v, score_slope @ k, score_slope.T @ q, weights.T @ slope


@functools.cache
def compiled(name, **options):
    """(q, k, v, slope, segments or none) → output and gradients, by a kernel that runs here."""
    kernel = partial(KERNELS[name], **options) if options else KERNELS[name]
    return jax.jit(partial(value_and_gradients, kernel), compiler_options=QUICK)


def value_and_gradients(kernel, q, k, v, slope, segments):
    out, pull = jax.vjp(lambda q, k, v: kernel(q, k, v, segments), q, k, v)
    return out, *pull(slope)


def check(results, expected, **tolerance):
    for name, result, right in zip(("out", "dq", "dk", "dv"), results, expected, strict=True):
        np.testing.assert_allclose(result, right, err_msg=name, **tolerance or CLOSE)


def test_the_oracle_agrees_with_the_loops():
    q, k, v, slope = (np.asarray(x, np.float64)[:, :9] for x in arrays(2))
    out = oracle(q, k, v, slope, np.zeros((B, 9)))[0]
    np.testing.assert_allclose(out[1], reference.attention(q[1], k[1], v[1]), rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "K", "packed"),
    slow_but(
        set(itertools.product(HERE, (2,), (True, False))) - {("splash", 2, False)},
        [*itertools.product(HERE, (2,), (True, False)), *((name, 1, True) for name in HERE)],
    ),
)
def test_each_kernel_agrees_with_the_oracle(name, K, packed):
    given = arrays(K)
    results = compiled(name)(*given, jnp.asarray(SEGMENTS_BT) if packed else None)
    check(results, oracle(*given, SEGMENTS_BT if packed else np.zeros((B, T))))


@pytest.mark.parametrize(
    ("name", "window", "packed"),
    [
        case
        for name in HERE
        for case in [slow((name, 1, False)), (name, 37, True), slow((name, 90, False))]
    ],
)
def test_each_kernel_has_a_sliding_window(name, window, packed):
    given = arrays(2)
    results = compiled(name, window=window)(*given, jnp.asarray(SEGMENTS_BT) if packed else None)
    check(results, oracle(*given, SEGMENTS_BT if packed else np.zeros((B, T)), window))


@pytest.mark.slow
def test_splash_may_have_several_blocks_of_queries_to_one_of_keys(monkeypatch):
    monkeypatch.setattr(splash, "LARGEST_KEY_BLOCK", 256)
    given = arrays(2)
    run = jax.jit(partial(value_and_gradients, splash_here), compiler_options=QUICK)
    check(run(*given, jnp.asarray(SEGMENTS_BT)), oracle(*given, SEGMENTS_BT))


@pytest.mark.parametrize("name", HERE)
def test_another_document_changes_not_a_bit(name):
    """Even keys and values so large that the smallest weight on them would show."""
    q, k, v, slope = arrays(2)
    others = (SEGMENTS_BT != 2)[:, :, None, None]
    run, segments = compiled(name), jnp.asarray(SEGMENTS_BT)
    first = run(q, k, v, slope, segments)
    second = run(q, jnp.where(others, 1e3 * k, k), jnp.where(others, 1e6, v), slope, segments)
    for result, same in zip(first, second):
        result, same = (np.asarray(x)[SEGMENTS_BT == 2] for x in (result, same))
        np.testing.assert_array_equal(result, same)


@pytest.mark.parametrize("name", slow_but(["xla", "blockwise"], HERE))
def test_bfloat16_stays_near_the_oracle(name):
    given = arrays(2, "bfloat16")
    results = compiled(name)(*given, jnp.asarray(SEGMENTS_BT))
    assert {result.dtype for result in results} == {jnp.dtype("bfloat16")}
    for result, right in zip(results, oracle(*given, SEGMENTS_BT)):
        # Of the whole: bfloat16 keeps 8 bits, so each number and its parts are off by up to 2^-9.
        error = np.linalg.norm(np.asarray(result, np.float64) - right) / np.linalg.norm(right)
        assert error < 1e-2


# The whole model.

ROWS = [[9, 4], [5, 8], [12]]  # lengths of the documents of each row of 15
WIDTH, V = 15, 53


@pytest.fixture(scope="module")
def documents():
    """A model, its documents, and their logits and summed gradients, each in a row of its own."""
    random = np.random.default_rng(7)
    texts = [random.integers(0, V, length) for row in ROWS for length in row]
    alone = np.zeros((len(texts), WIDTH), np.int32)
    for row, text in zip(alone, texts):
        row[: len(text)] = text
    weights = np.arange(1, WIDTH + 1)[None] < [[len(text)] for text in texts]
    model = make_model()
    _, (gradients, logits) = learn(model, alone, None, weights, xla_attention)
    return model, texts, [row[: len(text)] for row, text in zip(logits, texts)], gradients


@partial(jax.jit, static_argnames="attention", compiler_options=QUICK)
def learn(model, tokens, segments, weights, attention):
    """The loss, and its gradients and the logits."""

    def nll(model):
        hidden, _ = model.hidden(
            tokens, segments_BT=segments, execution=Execution(attention=attention)
        )
        targets = jnp.roll(tokens, -1, axis=1)
        total = summed_nll(hidden, model.output_VD, targets, weights.astype(jnp.float32))
        return total, model.logits(hidden)

    (total, logits), gradients = jax.value_and_grad(nll, has_aux=True)(model)
    return total, (gradients, logits)


def packed(texts):
    """Tokens, segments and weights of the rows; a document's last token predicts nothing."""
    tokens, segments = np.zeros((2, len(ROWS), WIDTH), np.int32)
    weights, texts = np.zeros((len(ROWS), WIDTH), bool), iter(texts)
    for row, lengths in enumerate(ROWS):
        start = 0
        for number, length in enumerate(lengths, 1):
            at = slice(start, start + length)
            tokens[row, at], segments[row, at] = next(texts), number
            weights[row, start : start + length - 1] = True
            start += length
    return tokens, segments, weights


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but(["blockwise"], HERE))
def test_packed_documents_learn_as_separate_ones(documents, name):
    model, texts, logits, gradients = documents
    tokens, segments, weights = packed(texts)
    _, (found, rows) = learn(model, tokens, segments, weights, KERNELS[name])
    ends = [np.cumsum([0, *lengths]) for lengths in ROWS]
    cut = [rows[r, a:b] for r, edges in enumerate(ends) for a, b in itertools.pairwise(edges)]
    for result, right in zip(cut, logits, strict=True):
        np.testing.assert_allclose(result, right, **CLOSE)
    for result, right in zip(jax.tree.leaves(found), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(result, right, rtol=1e-5, atol=2e-5)


# On a mesh.


def mesh_of(data, fsdp, tensor):
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))


@pytest.mark.parametrize(
    ("name", "shape", "heads"),
    [
        ("blockwise", (2, 2, 2), 8),  # the tensor axis divides all heads
        slow(("blockwise", (1, 2, 4), 8)),  # those of queries only: those of keys are repeated
        slow(("blockwise", (2, 1, 4), 6)),  # neither
        slow(("splash", (1, 2, 4), 8)),
        slow(("triton", (1, 2, 4), 8)),
    ],
)
def test_on_a_mesh_as_on_one_device(name, shape, heads):
    given, segments = arrays(2, heads=heads, rows=4), SEGMENTS_BT[[0, 1, 2, 0]]
    with jax.set_mesh(mesh_of(*shape)):
        run = jax.jit(partial(value_and_gradients, KERNELS[name]), compiler_options=QUICK)
        results = run(*given, jnp.asarray(segments))
    check(results, oracle(*given, segments))


@pytest.mark.parametrize(
    ("heads", "K", "tensor", "there"),
    [
        (8, 4, 4, (2, 1)),
        (8, 2, 4, (2, 1)),
        (8, 1, 8, (1, 1)),
        (12, 3, 4, (3, 3)),
        (6, 2, 4, (6, 2)),
    ],
)
def test_devices_share_the_heads_wherever_they_can(heads, K, tensor, there):
    seen = []

    def spy(q, k, segments):
        seen.append((q.shape, k.shape, segments.shape))
        return q

    with jax.set_mesh(mesh_of(8 // tensor, 1, tensor)):
        q, k = (jnp.zeros((8, 5, n, H)) for n in (heads, K))
        jax.eval_shape(shard_heads(spy), q, k, jnp.zeros((8, 5), jnp.int32))
    rows = tensor
    assert seen[-1] == ((rows, 5, there[0], H), (rows, 5, there[1], H), (rows, 5))


# Kernels of devices that are not here: the programs that would run there.


@pytest.mark.parametrize(
    ("T", "block", "keys"),
    [
        (1, 128, 128),
        (128, 128, 128),
        (150, 256, 256),
        (512, 512, 512),
        (640, 384, 768),
        (1024, 512, 1024),
        (1025, 384, 384),  # three blocks, which two do not divide
        (4096, 512, 1024),
    ],
)
def test_splash_blocks_are_few_and_fill_little_up(monkeypatch, T, block, keys):
    monkeypatch.setattr(splash, "LARGEST_BLOCK", 512)
    monkeypatch.setattr(splash, "LARGEST_KEY_BLOCK", 1024)
    assert block_length(T) == block
    assert key_block_length(-(-T // block) * block, block) == keys


def program(kernel, platform, segments, dtype="bfloat16", T=T, mesh=None):
    """The text of the program that computes output and gradients on a platform."""
    given = [jax.ShapeDtypeStruct((4, T, n, 8), dtype) for n in (8, 2, 2, 8)]
    ids = jax.ShapeDtypeStruct((4, T), "int32") if segments else None
    with jax.set_mesh(mesh_of(*mesh or (8, 1, 1))):
        traced = jax.jit(partial(value_and_gradients, kernel)).trace(*given, ids)
        return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("segments", [False, True])
def test_the_splash_kernels_run_on_a_tpu(segments):
    text = program(shard_heads(splash_attention), "tpu", segments, mesh=(2, 1, 4))
    assert text.count("stablehlo.custom_call @tpu_custom_call") == 2  # forward, and all gradients
    assert "256x256" not in text  # scores, of 150 positions filled up to two blocks


TRITON_CALL = "stablehlo.custom_call @__gpu$xla.gpu.triton"


def program_of_triton(kernel, segments):
    """The text of the program for an H100, of heads that are padded."""
    hopper = AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    mesh = AbstractMesh((2, 1, 4), ("data", "fsdp", "tensor"), abstract_device=hopper)
    given = [jax.ShapeDtypeStruct((4, T, n, 24), "bfloat16") for n in (8, 4, 4, 8)]
    ids = jax.ShapeDtypeStruct((4, T), "int32") if segments else None
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        # Of jax 0.12, see docs/decisions/0021.
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
        traced = jax.jit(partial(value_and_gradients, kernel)).trace(*given, ids)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("segments", [False, True])
def test_the_triton_kernels_run_on_a_gpu(segments):
    text = program_of_triton(partial(triton_attention, window=37), segments)
    assert text.count(TRITON_CALL) == 3  # forward; gradient of queries; of keys and values
    assert "stablehlo.dot_general" not in text
    assert "192x192" not in text  # neither scores nor a mask, of positions filled up to blocks


def test_rematerialisation_may_keep_what_triton_returns():
    def calls(policy):
        execution = Execution(remat=policy, gather=lambda tree, dtype: tree)
        kernel = execution.rematerialized(triton_attention, in_scan=True)
        text = program_of_triton(kernel, True)
        results = re.findall(rf"(%\d+)(?::2)? = {re.escape(TRITON_CALL)}", text)
        # XLA drops a call whose results nothing reads.
        return sum(len(re.findall(rf"{name}\b", text)) > 1 for name in results)

    assert [calls(policy) for policy in ("none", "save-matmuls", "block")] == [3, 3, 4]


@pytest.fixture
def with_cudnn(monkeypatch):
    """A machine that seems to have cuDNN, so that programs for GPUs can be written on it."""
    library = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("length", [150, 151])
def test_the_cudnn_kernels_run_on_a_gpu(with_cudnn, segments, length):
    text = program(shard_heads(cudnn_attention), "cuda", segments, T=length, mesh=(2, 1, 4))
    called = "__cudnn$fmhaScaleBiasSoftmax" if segments else "__cudnn$fmhaSoftmax"
    assert text.count(f"@{called}(") == text.count(f"@{called}Backward(") == 1
    assert text.count("CAUSAL") == 2
    assert "dot_general" not in text


def test_rematerialisation_may_keep_what_cudnn_returns(with_cudnn):
    def calls(policy):
        execution = Execution(remat=policy, gather=lambda tree, dtype: tree)
        kernel = execution.rematerialized(cudnn_attention, in_scan=True)
        return program(shard_heads(kernel), "cuda", False).count("@__cudnn$fmhaSoftmax")

    assert [calls(policy) for policy in ("none", "save-matmuls", "block")] == [2, 2, 3]


def test_cudnn_is_given_the_window(with_cudnn):
    """Its positions (pos - window, pos], unless a mask of documents holds the window."""
    kernel = partial(shard_heads(cudnn_attention), window=37)
    text = program(kernel, "cuda", segments=False)
    assert text.count("sliding_window_length\\22: 37") == 2
    text = program(kernel, "cuda", segments=True)
    assert text.count("sliding_window_length\\22: 0") == 2


@pytest.mark.parametrize(
    ("length", "window", "packed"), [(150, 0, True), (149, 20, True), (149, 20, False)]
)
def test_cudnn_is_called_for_what_the_oracle_computes(monkeypatch, length, window, packed):
    """The same request, answered by the library's plain implementation, which runs here."""
    whole = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *a, implementation, **more: whole(*a, **more)
    )
    given = [x[:, :length] for x in arrays(2)]
    segments = SEGMENTS_BT[:, :length] if packed else np.zeros((B, length))
    kernel = partial(cudnn_attention, window=window)
    run = jax.jit(partial(value_and_gradients, kernel), compiler_options=QUICK)
    results = run(*given, jnp.asarray(segments) if packed else None)
    check(results, oracle(*given, segments, window or T))


def test_cudnn_never_computes_in_another_way():
    given = [jnp.zeros((2, 4, 2, 8), "bfloat16")] * 3
    with pytest.raises(UsageError, match=r"^cuDNN's attention is not .*; use run.attention='xla'$"):
        cudnn_attention(*given)


@pytest.mark.skipif("cuda" not in str(jax.config.jax_platforms), reason="no GPU")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("K", "window"), [(2, 0), (1, 0), (2, 1), (2, 37)])
@pytest.mark.parametrize("attention", [cudnn_attention, triton_attention])
def test_on_a_gpu_it_agrees_with_the_oracle(attention, K, window, packed):
    """Run with JAX_PLATFORMS=cuda,cpu."""
    random = np.random.default_rng(K)
    shapes = [(B, T, heads, 64) for heads in (N, K, K, N)]
    given = [jnp.asarray(random.standard_normal(shape), "bfloat16") for shape in shapes]
    segments = SEGMENTS_BT if packed else np.zeros((B, T), np.int32)
    kernel = partial(attention, window=window)
    results = jax.jit(partial(value_and_gradients, kernel))(
        *given, jnp.asarray(segments) if packed else None
    )
    for result, right in zip(results, oracle(*given, segments, window or T)):
        error = np.linalg.norm(np.asarray(result, np.float64) - right) / np.linalg.norm(right)
        assert error < 2e-2  # bfloat16, and weights rounded to it before their products
