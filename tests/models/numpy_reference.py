"""The model's equations in NumPy and float64, one sample, one head and one token at a time."""

import math

import numpy as np


def linear(p, x):
    return x @ np.asarray(p["kernel"], np.float64) + np.asarray(p["bias"], np.float64)


def layer_norm(p, x):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * np.asarray(p["scale"]) + np.asarray(p["bias"])


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def attention(q, k, v, mask=None):
    """[B, L, H, d_h] x 3, mask [B, L] -> [B, L, H, d_h]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b in range(q.shape[0]):
        real = np.ones(q.shape[1], bool) if mask is None else np.asarray(mask[b])
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                scores = k[b, real, h] @ q[b, i, h] / math.sqrt(q.shape[-1])
                out[b, i, h] = softmax(scores) @ v[b, real, h]
    return out


def self_attention(p, x, num_heads, mask=None):
    """Columns of the one projection: q, k, v, each with one head after the other."""
    width = x.shape[-1]
    q, k, v = np.split(linear(p["qkv"], x), 3, axis=-1)
    heads = (*x.shape[:2], num_heads, width // num_heads)
    out = attention(q.reshape(heads), k.reshape(heads), v.reshape(heads), mask)
    return linear(p["out"], out.reshape(x.shape))


def block(p, x, num_heads, mask=None):
    x = x + self_attention(p["attention"], layer_norm(p["norm1"], x), num_heads, mask)
    return x + linear(p["mlp"]["fc2"], gelu(linear(p["mlp"]["fc1"], layer_norm(p["norm2"], x))))


def encoder(p, features, num_heads, depth, mask=None):
    """features [B, L, P] -> tokens [B, 1 + L, d]; mask [B, 1 + L]."""
    tokens = linear(p["embed"], np.asarray(features, np.float64))
    cls = np.broadcast_to(np.asarray(p["cls"]), (tokens.shape[0], 1, tokens.shape[-1]))
    x = np.concatenate([cls, tokens], axis=1) + np.asarray(p["position"])
    for i in range(depth):
        x = block(p[f"block_{i}"], x, num_heads, mask)
    return x


def bottleneck(p, streams, num_layers, num_tokens, present=None):
    """{m: [B, L, d]} -> {m: [B, L, d]}; present {m: [B]}."""
    streams = {m: np.asarray(x, np.float64) for m, x in streams.items()}
    batch_size = next(iter(streams.values())).shape[0]
    shared = np.repeat(np.asarray(p["tokens"], np.float64)[None], batch_size, axis=0)
    for layer in range(num_layers):
        updated = {}
        for m, x in streams.items():
            updated[m] = block(p[f"{m}_block_{layer}"], np.concatenate([shared, x], axis=1), 1)
        for b in range(batch_size):
            copies = [
                updated[m][b, :num_tokens]
                for m in streams
                if present is None or bool(present[m][b])
            ]
            shared[b] = sum(copies) / len(copies)
        streams = {m: updated[m][:, num_tokens:] for m in streams}
    return streams


def fusion_attention(p, tokens, query, num_heads):
    """tokens {m: [B, L, d]} with keys, values and the class token's own; query [H, d_h].

    Returns logits [B, C], weights [B, H, L], mean keys {m: [B, H, d_h]}, shares {m: [B, H]}.
    """
    cls = np.asarray(p["cls"], np.float64)
    kernel = {n: np.asarray(p[n]["kernel"], np.float64) for n in ("key", "value")}
    bias = {n: np.asarray(p[n]["bias"], np.float64) for n in ("key", "value")}
    batch_size = next(iter(tokens.values())).shape[0]
    logits, weights, means, shares = [], [], {m: [] for m in tokens}, {m: [] for m in tokens}
    for b in range(batch_size):
        sequence = np.concatenate(
            [cls[None]] + [np.asarray(x[b], np.float64) for x in tokens.values()]
        )
        row, out = [], []
        for h in range(num_heads):
            keys = sequence @ kernel["key"][:, h] + bias["key"][h]
            values = sequence @ kernel["value"][:, h] + bias["value"][h]
            row.append(softmax(keys @ np.asarray(query[h]) / math.sqrt(keys.shape[-1])))
            out.append(row[-1] @ values)
            start = 1
            for m, x in tokens.items():
                stop = start + x.shape[1]
                means[m].append(keys[start:stop].mean(0))
                shares[m].append(row[-1][start:stop].sum() / row[-1][1:].sum())
                start = stop
        weights.append(row)
        logits.append(linear(p["head"], linear(p["out"], np.concatenate(out))))
    head_dim = cls.size // num_heads
    means = {m: np.reshape(x, (batch_size, num_heads, head_dim)) for m, x in means.items()}
    shares = {m: np.reshape(x, (batch_size, num_heads)) for m, x in shares.items()}
    return np.array(logits), np.array(weights), means, shares
