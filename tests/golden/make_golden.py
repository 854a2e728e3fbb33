"""Writes `meta_forward.npz`: logits of Meta's formulation of Llama 2, recorded with PyTorch 2.13.0.

The forward below follows llama/model.py of Meta's `llama` repository: complex numbers turn
*interleaved* pairs of a head, keys and values are repeated for grouped heads, weights lie
[out, in] under Meta's names. The weights are random from a fixed seed. Run from any folder:

    python tests/golden/make_golden.py
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

VERSION = "2.13.0"
V, D, N, K, HIDDEN, L = 53, 24, 6, 2, 40, 3
H, EPS, THETA = D // N, 1e-5, 10000.0
SHAPES = {
    "attention.wq": (N * H, D),
    "attention.wk": (K * H, D),
    "attention.wv": (K * H, D),
    "attention.wo": (D, N * H),
    "feed_forward.w1": (HIDDEN, D),
    "feed_forward.w2": (D, HIDDEN),
    "feed_forward.w3": (HIDDEN, D),
    "attention_norm": (D,),
    "ffn_norm": (D,),
}


def make_weights():
    shapes = {"tok_embeddings.weight": (V, D), "output.weight": (V, D), "norm.weight": (D,)}
    for layer in range(L):
        shapes |= {f"layers.{layer}.{name}.weight": shape for name, shape in SHAPES.items()}
    return {name: 0.2 * torch.randn(shape) + ("norm" in name) for name, shape in shapes.items()}


def rms_norm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def apply_rotary(x, turns):
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns[None, :, None]).flatten(3)


def forward(weights, tokens):
    B, T = tokens.shape
    frequencies = 1.0 / THETA ** (torch.arange(0, H, 2)[: H // 2].float() / H)
    angles = torch.outer(torch.arange(T).float(), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles)
    mask = torch.triu(torch.full((T, T), float("-inf")), diagonal=1)
    h = weights["tok_embeddings.weight"][tokens]
    for layer in range(L):
        w = {name: weights[f"layers.{layer}.{name}.weight"] for name in SHAPES}
        x = rms_norm(h, w["attention_norm"])
        xq = apply_rotary(F.linear(x, w["attention.wq"]).view(B, T, N, H), turns)
        xk = apply_rotary(F.linear(x, w["attention.wk"]).view(B, T, K, H), turns)
        xv = F.linear(x, w["attention.wv"]).view(B, T, K, H)
        keys, values = (x.repeat_interleave(N // K, dim=2).transpose(1, 2) for x in (xk, xv))
        scores = xq.transpose(1, 2) @ keys.transpose(2, 3) / H**0.5 + mask
        out = (torch.softmax(scores, dim=-1) @ values).transpose(1, 2).reshape(B, T, D)
        h = h + F.linear(out, w["attention.wo"])
        x = rms_norm(h, w["ffn_norm"])
        gated = F.silu(F.linear(x, w["feed_forward.w1"])) * F.linear(x, w["feed_forward.w3"])
        h = h + F.linear(gated, w["feed_forward.w2"])
    return F.linear(rms_norm(h, weights["norm.weight"]), weights["output.weight"])


def main():
    found = torch.__version__.partition("+")[0]
    assert found == VERSION, f"recorded with PyTorch {VERSION}, this is {found}; update the name"
    torch.manual_seed(0)
    weights = make_weights()
    tokens = torch.randint(V, (2, 11))
    arrays = {name: array.numpy() for name, array in weights.items()}
    arrays |= {"tokens": tokens.numpy(), "logits": forward(weights, tokens).numpy()}
    np.savez_compressed(Path(__file__).with_name("meta_forward.npz"), **arrays)


if __name__ == "__main__":
    main()
