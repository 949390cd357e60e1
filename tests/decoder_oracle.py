"""A decoder as its formulas say, in float64, one token of one layer and head after the other."""

import math

import numpy as np


def hidden_and_logits(a, params, ids):
    """What a decoder of these fields makes of one sequence.

    Args:
        a: `transformer.Architecture`.
        params: of the module.
        ids: `[T]`.

    Returns:
        hidden `[T, D]` and logits `[T, K]`.
    """
    params = _float64(params)
    x = params["embedding"][ids] * (math.sqrt(a.width) if a.scaled_embedding else 1)
    if a.positions == "learned":
        x = x + params["position_embedding"][: len(ids)]
    for layer in range(a.layers):
        p = _layer(params["layers"], layer)
        window = a.windows[layer] if a.windows else 0
        y = _attention(a, p, _norm(a, p["attention_norm"], x), window or len(ids))
        x = x + (_norm(a, p["post_attention_norm"], y) if a.post_norms else y)
        y = _mlp(a, p["mlp"], _norm(a, p["mlp_norm"], x))
        x = x + (_norm(a, p["post_mlp_norm"], y) if a.post_norms else y)
    x = _norm(a, params["final_norm"], x)
    unembedding = params["embedding"].T if a.tied else params["unembedding"]
    return x, _capped(x @ unembedding[:, : a.num_classes], a.logit_soft_cap)


def _float64(tree):
    if isinstance(tree, dict):
        return {name: _float64(part) for name, part in tree.items()}
    return np.asarray(tree, np.float64)


def _layer(tree, layer):
    if isinstance(tree, dict):
        return {name: _layer(part, layer) for name, part in tree.items()}
    return tree[layer]


def _norm(a, p, x):
    if a.norm == "layer":
        standard = (x - x.mean(-1, keepdims=True)) / np.sqrt(
            x.var(-1, keepdims=True) + a.norm_epsilon
        )
        return standard * p["scale"] + p["bias"]
    root = np.sqrt(np.mean(x**2, -1, keepdims=True) + a.norm_epsilon)
    return x / root * (p["scale"] + (1 if a.zero_centered_scale else 0))


def _linear(p, x):
    return x @ p["kernel"] + p.get("bias", 0)


def _capped(x, cap):
    return cap * np.tanh(x / cap) if cap else x


def _mlp(a, p, x):
    activation = {
        "silu": lambda x: x / (1 + np.exp(-x)),
        "relu": lambda x: np.maximum(x, 0),
        "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
        "gelu_tanh": lambda x: (
            x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
        ),
    }[a.activation]
    up = _linear(p["up"], x)
    return _linear(p["down"], activation(_linear(p["gate"], x)) * up if a.gated else activation(up))


def _attention(a, p, x, window):
    p, length = p["attention"], len(x)
    parts = [
        _linear(p[name], x).reshape(length, heads, a.head_width)
        for name, heads in [
            ("query", a.heads),
            ("key", a.key_value_heads),
            ("value", a.key_value_heads),
        ]
    ]
    for part, name in [(0, "query_norm"), (1, "key_norm")]:
        if a.query_key_norm:
            parts[part] = _norm(a, p[name], parts[part])
        if a.positions == "rotary":
            parts[part] = np.stack([_turned(a, row, t) for t, row in enumerate(parts[part])])
    query, key, value = parts
    found = np.zeros_like(query)
    for head in range(a.heads):
        group = head // (a.heads // a.key_value_heads)
        for t in range(length):
            seen = slice(max(0, t - window + 1), t + 1)
            logits = key[seen, group] @ query[t, head] / math.sqrt(a.query_scalar)
            weights = np.exp(_capped(logits, a.attention_soft_cap))
            found[t, head] = weights @ value[seen, group] / weights.sum()
    return _linear(p["out"], found.reshape(length, -1))


def _turned(a, heads, position):
    """Heads `[N, H]` at a position: channels i and i + H / 2 are a complex number, turned."""
    half = a.head_width // 2
    frequency = a.rope_theta ** -(np.arange(half) / half)
    if a.rope_type == "linear":
        frequency = frequency / a.rope_factors[0]
    if a.rope_type == "llama3":
        frequency = np.array([_stretched(a, f) for f in frequency])
    turned = (heads[:, :half] + 1j * heads[:, half:]) * np.exp(1j * position * frequency)
    return np.concatenate([turned.real, turned.imag], -1)


def _stretched(a, frequency):
    factor, low, high, length = a.rope_factors
    wavelength = 2 * math.pi / frequency
    if wavelength < length / high:
        return frequency
    if wavelength > length / low:
        return frequency / factor
    smooth = (length / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency
