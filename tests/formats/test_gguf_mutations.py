"""GGUF files with bytes changed at random: refused in one line, or read as what they were."""

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_weights import same, tiny_weights

from llama_jax.errors import UserError
from llama_jax.formats.gguf import model as gguf

SHAPE = ("vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim")
COUNTS = [0, 1, 2**15, 2**31 - 1, 2**32 - 1, 2**32, 2**40, 2**62, 2**63, 2**64 - 1]
KEYS = (0, 676)  # bytes of the header with keys, but for the long lists of pieces
CHANGES = st.one_of(
    st.binary(min_size=1, max_size=3),
    st.sampled_from(COUNTS).map(lambda count: count.to_bytes(8, "little")),
    st.sampled_from(COUNTS[:5]).map(lambda count: count.to_bytes(4, "little")),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model, its file's bytes, and a path to write others to."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    weights = tiny_weights(num_layers=2)
    gguf.write(weights, path)
    content = path.read_bytes()
    return weights, content, path


def check(model, content):
    """Either one line of complaint or the model."""
    weights, _, path = model
    path.write_bytes(content)
    try:
        found = gguf.read(path)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500
        return
    for field in SHAPE:
        assert getattr(found.config, field) == getattr(weights.config, field)
    same(dataclasses.replace(found, config=weights.config), weights)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), change=CHANGES)
def test_changed_headers(model, data, change):
    _, content, _ = model
    names = content.index(b"token_embd.weight") - 8
    end = content.index(b"output_norm.weight") + 18 + 4 + 8 + 4 + 8
    at = data.draw(st.one_of(st.integers(*KEYS), st.integers(names, end - 8)))
    check(model, content[:at] + change + content[at + len(change) :])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_cut_or_grown_files(model, data):
    _, content, _ = model
    at = data.draw(st.integers(0, len(content)))
    piece = data.draw(st.binary(max_size=9))
    check(model, content[:at] if not piece else content[:at] + piece + content[at:])
