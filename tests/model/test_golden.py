"""Our logits against those that Meta's formulation gave in PyTorch; see golden/make_golden.py."""

from pathlib import Path

import numpy as np
import pytest
import reference
from tiny_model import make_model

N, K, H, L = 6, 2, 4, 3
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "meta_forward.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def halves(weight, heads):
    """Meta's [heads·H, D] with interleaved pairs as our [D, heads, H] with pairs in halves."""
    pairs = weight.reshape(heads, H // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(heads, H, -1).transpose(2, 0, 1)


def ours(golden):
    """Meta's weights under our names and in our layout."""
    layouts = {
        "wq": ("attention.wq", lambda w: halves(w, N)),
        "wk": ("attention.wk", lambda w: halves(w, K)),
        "wv": ("attention.wv", lambda w: w.reshape(K, H, -1).transpose(2, 0, 1)),
        "wo": ("attention.wo", lambda w: w.T.reshape(N, H, -1)),
        "gate": ("feed_forward.w1", np.transpose),
        "down": ("feed_forward.w2", np.transpose),
        "up": ("feed_forward.w3", np.transpose),
        "attention_norm": ("attention_norm", np.array),
        "ffn_norm": ("ffn_norm", np.array),
    }
    weights = {
        name: np.stack([layout(golden[f"layers.{layer}.{theirs}.weight"]) for layer in range(L)])
        for name, (theirs, layout) in layouts.items()
    }
    whole = {"embedding": "tok_embeddings", "output": "output", "norm": "norm"}
    return weights | {name: golden[f"{theirs}.weight"] for name, theirs in whole.items()}


def test_the_model_agrees_with_metas_formulation(golden):
    model = make_model(ours(golden), tied_embeddings=False)
    np.testing.assert_allclose(model(golden["tokens"])[0], golden["logits"], rtol=1e-5, atol=1e-5)


def test_the_oracle_agrees_with_metas_formulation(golden):
    weights = ours(golden)
    logits = [reference.forward(weights, tokens) for tokens in golden["tokens"]]
    np.testing.assert_allclose(logits, golden["logits"], rtol=1e-5, atol=1e-5)


def test_the_record_is_small(golden):
    assert GOLDEN.stat().st_size < 100_000
