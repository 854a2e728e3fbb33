"""Files of llama2.c made by hand, byte for byte, from their own tensors in their own layout."""

import struct

import numpy as np

SIZES = {"dim": 48, "hidden_dim": 40, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2}
SIZES |= {"vocab_size": 53, "max_seq_len": 32}  # heads of 8
NORMS = ("attention_norm", "ffn_norm", "norm")
FIRST_ORDER = ("embedding", "attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3")
LATER_ORDER = (*NORMS, "embedding", "wq", "wk", "wv", "wo", "w1", "w2", "w3", "output")


def shapes(sizes):
    """Of each kind, all layers in one array."""
    D, F, L, N, K, V, _ = sizes.values()
    in_layers = {"attention_norm": (D,), "wq": (D, D), "wk": (K * D // N, D), "wv": (K * D // N, D)}
    in_layers |= {"wo": (D, D), "ffn_norm": (D,), "w1": (F, D), "w2": (D, F), "w3": (F, D)}
    kinds = {kind: (L, *shape) for kind, shape in in_layers.items()}
    return kinds | {"embedding": (V, D), "norm": (D,), "output": (V, D)}


def arrays(sizes=SIZES, tied=True, seed=0):
    """Random tensors by kind, in their layout."""
    random = np.random.default_rng(seed)
    made = {
        kind: random.standard_normal(shape, np.float32) for kind, shape in shapes(sizes).items()
    }
    if tied:
        del made["output"]
    return made


def header(version, sizes, tied, group=0):
    """The first bytes of a file."""
    if version == 0:
        sign = 1 if tied else -1
        return struct.pack("<7i", *(sizes | {"vocab_size": sign * sizes["vocab_size"]}).values())
    head = b"24ka" + struct.pack("<i7i?", version, *sizes.values(), tied)
    return (head + (struct.pack("<i", group) if version == 2 else b"")).ljust(256, b"\0")


def version0(made, sizes=SIZES, tables=None):
    """A file of the first version; its tables are zeros unless given."""
    tied = "output" not in made
    heads = sizes["dim"] // sizes["n_heads"]
    tables = (
        np.zeros((2, sizes["max_seq_len"], heads // 2), np.float32) if tables is None else tables
    )
    body = [made[kind] for kind in (*FIRST_ORDER, "norm")] + [tables]
    body += [] if tied else [made["output"]]
    return header(0, sizes, tied) + b"".join(array.tobytes() for array in body)


def version1(made, sizes=SIZES):
    """A file of the second version."""
    body = [made[kind] for kind in LATER_ORDER if kind in made]
    return header(1, sizes, "output" not in made) + b"".join(array.tobytes() for array in body)


def version2(made, group, sizes=SIZES):
    """A file of the third version, quantised by the book, and the tensors that it stands for."""
    file, meant = header(2, sizes, "output" not in made, group), {}
    for kind in LATER_ORDER:
        if kind in NORMS:
            file += made[kind].tobytes()
            meant[kind] = made[kind]
        elif kind in made:
            layers = made[kind] if made[kind].ndim == 3 else made[kind][None]
            meant[kind] = np.empty_like(layers)
            for layer, array in enumerate(layers):
                groups = array.reshape(-1, group)
                scales = np.abs(groups).max(axis=1) / np.float32(127)
                values = np.round(groups / scales[:, None]).astype(np.int8)
                file += values.tobytes() + scales.tobytes()
                floats = values.astype(np.float32) * scales[:, None]
                meant[kind][layer] = floats.reshape(array.shape)
            meant[kind] = meant[kind].reshape(made[kind].shape)
    return file, meant
