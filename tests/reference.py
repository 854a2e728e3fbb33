"""Llama 2 in NumPy float64, with loops and no tricks: what every other piece must agree with.

Touvron et al. 2023, section 2.2. One sequence at a time. Weights are a dict of arrays: `embedding`
and `output` [V, D] (without `output` the embedding writes logits), `norm` [D]; with a leading
layer dim `attention_norm`, `ffn_norm` [D], `wq` [D, N, H], `wk`, `wv` [D, K, H], `wo` [N, H, D],
`gate`, `up` [D, F] and `down` [F, D]; and perhaps biases, such as `wq_bias` [N, H], the table of
positions `position_embedding` [S, D] and per layer `slopes` [N], which are per position here. The
members of a rotated pair lie H/2 apart.
"""

import math

import numpy as np


def norm(x, scale, eps):
    """Each vector divided by its root mean square, times the scale."""
    out = np.zeros(x.shape)
    for index in np.ndindex(x.shape[:-1]):
        vector = x[index].astype(np.float64)
        out[index] = vector / math.sqrt(np.mean(vector**2) + eps) * scale
    return out


def rope(head, position, theta):
    """One head's vector [H] with pair i turned by position · theta^(-2i/H)."""
    half = len(head) // 2
    out = np.zeros(len(head))
    for i in range(half):
        angle = position * theta ** (-2 * i / len(head))
        a, b = float(head[i]), float(head[i + half])
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = a * math.sin(angle) + b * math.cos(angle)
    return out


def sinusoid(position, dim):
    """The vector [D] of a position: sin and cos of position / 10000^(2i/D) in turns."""
    out = np.zeros(dim)
    for d in range(dim):
        angle = position / 10000 ** (2 * (d // 2) / dim)
        out[d] = math.cos(angle) if d % 2 else math.sin(angle)
    return out


def alibi_slopes(num_heads):
    """The slopes of Press et al. [N], by their recursion."""
    if num_heads & (num_heads - 1) == 0:
        return [2 ** (-8 * (n + 1) / num_heads) for n in range(num_heads)]
    below = 1 << (num_heads.bit_length() - 1)
    return alibi_slopes(below) + alibi_slopes(2 * below)[::2][: num_heads - below]


def attention(q, k, v, window=0, slopes=None):
    """Causal attention of q [T, N, H] over k and v [T, K, H]; head n uses kv head n // (N/K).

    With a window each query attends to that many positions at most, the newest. With slopes [N],
    scores fall by a slope for each position between query and key.
    """
    T, N, H = q.shape
    out = np.zeros((T, N, H))
    for n in range(N):
        kv = n // (N // k.shape[1])
        for t in range(T):
            seen = range(max(0, t + 1 - window) if window else 0, t + 1)
            scores = np.array([q[t, n] @ k[s, kv] / math.sqrt(H) for s in seen], np.float64)
            if slopes is not None:
                scores -= np.array([slopes[n] * (t - s) for s in seen])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            out[t, n] = sum(weight * v[s, kv] for weight, s in zip(weights, seen))
    return out


def attention_layer(x, layer, theta, window=0, position="rope"):
    """Queries, keys and values of x [T, D], attention over them, and the way back."""
    q, k, v = (
        np.einsum("TD,DNH->TNH", x, layer[name]) + layer.get(f"{name}_bias", 0)
        for name in ("wq", "wk", "wv")
    )
    for rotated in (q, k) if position == "rope" else ():
        for t, n in np.ndindex(rotated.shape[:2]):
            rotated[t, n] = rope(rotated[t, n], t, theta)
    slopes = alibi_slopes(q.shape[1]) if position == "alibi" else layer.get("slopes")
    mixed = np.einsum("TNH,NHD->TD", attention(q, k, v, window, slopes), layer["wo"])
    return mixed + layer.get("wo_bias", 0)


def feed_forward(x, layer):
    """SwiGLU: silu(x·gate) · (x·up), then down."""
    gate, up = (x @ layer[name] + layer.get(f"{name}_bias", 0) for name in ("gate", "up"))
    return (gate / (1 + np.exp(-gate)) * up) @ layer["down"] + layer.get("down_bias", 0)


def forward(
    weights, tokens, *, theta=10000.0, eps=1e-5, window=0, position="rope", wave_scale=0.02
):
    """Logits [T, V] of tokens [T]; `wave_scale` is the amplitude of sinusoids."""
    weights = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    x = weights["embedding"][np.asarray(tokens)]
    if position == "absolute":
        x = x + weights["position_embedding"][: len(tokens)]
    if position == "sinusoidal":
        x = x + wave_scale * np.stack([sinusoid(t, x.shape[1]) for t in range(len(tokens))])
    shared = ("embedding", "norm", "output", "position_embedding")
    for i in range(len(weights["wq"])):
        layer = {name: array[i] for name, array in weights.items() if name not in shared}
        x = x + attention_layer(
            norm(x, layer["attention_norm"], eps), layer, theta, window, position
        )
        x = x + feed_forward(norm(x, layer["ffn_norm"], eps), layer)
    return norm(x, weights["norm"], eps) @ weights.get("output", weights["embedding"]).T


def nll(logits, targets):
    """-log p(target) [T] in nats."""
    out = np.zeros(len(targets))
    for t, target in enumerate(targets):
        highest = logits[t].max()
        out[t] = highest + math.log(np.exp(logits[t] - highest).sum()) - logits[t][target]
    return out
