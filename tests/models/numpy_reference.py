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
        real = np.ones(k.shape[1], bool) if mask is None else np.asarray(mask[b])
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


def cross_attention(p, x, source, rotation):
    """Queries of x `[B, L, d]` over the source's keys; the first is turned by `[H, d_h, d_h]`."""
    q, k, v = (
        np.einsum("bld,dhk->blhk", t, np.asarray(p[n]["kernel"], np.float64))
        + np.asarray(p[n]["bias"])
        for n, t in (("query", x), ("key", source), ("value", source))
    )
    q[:, 0] = np.einsum("hij,bhj->bhi", rotation, q[:, 0])
    return linear(p["out"], attention(q, k, v).reshape(x.shape))


def relu_mlp(p, x):
    return linear(p["fc2"], np.maximum(linear(p["fc1"], x), 0))


def mult(p, x, rotations, layers, heads):
    """Logits `[B, C]` of tokens `{m: [B, L_m, d]}`; a rotation for each attention of each layer."""
    names, last = sorted(x), []
    pairs = [(t, s) for t in names for s in names if s != t]
    for m in names:
        streams = []
        for number, (target, source) in enumerate(pairs):
            if target != m:
                continue
            h, name = x[target], f"{target}_from_{source}"
            for i in range(layers):
                norm0, at, norm1, mlp = (
                    p[f"{name}_{i}_{part}"] for part in ("norm0", "attention", "norm1", "mlp")
                )
                turn = rotations[i * len(pairs) + number]
                h = h + cross_attention(
                    at, layer_norm(norm0, h), layer_norm(norm0, x[source]), turn
                )
                h = h + relu_mlp(mlp, layer_norm(norm1, h))
            streams.append(layer_norm(p[f"{name}_norm"], h))
        h = np.concatenate(streams, axis=-1)
        for i in range(max(layers, 3)):
            block = p[f"{m}_block_{i}"]
            h = h + self_attention(block["attention"], layer_norm(block["norm1"], h), heads)
            h = h + relu_mlp(block["mlp"], layer_norm(block["norm2"], h))
        last.append(layer_norm(p[f"{m}_norm"], h)[:, 0])
    c = np.concatenate(last, axis=-1)
    return linear(p["head"], c + relu_mlp(p, c))


def post_norm_block(p, x, heads):
    x = layer_norm(p["norm1"], x + self_attention(p["attention"], x, heads))
    return layer_norm(p["norm2"], x + relu_mlp(p["mlp"], x))


def mmml(p, x, rotations, layers, heads):
    """As `mult`."""
    names = sorted(x)
    for i in range(layers):
        new = {}
        for number, m in enumerate(names):
            others = np.concatenate([x[other] for other in names if other != m], axis=1)
            turn = rotations[i * len(names) + number]
            h = x[m] + cross_attention(p[f"{m}_attention_{i}"], x[m], others, turn)
            new[m] = post_norm_block(p[f"{m}_block_{i}"], layer_norm(p[f"{m}_norm_{i}"], h), heads)
        x = new
    h = np.concatenate([x[m][:, 0] for m in names], axis=-1)
    for name in ("fc1", "fc2"):
        h = np.maximum(linear(p[name], h), 0)
    return linear(p["head"], h)


def jmt(p, x, rotations, layers, heads):
    """As `mult`; there is one layer."""
    names = sorted(x)
    steps = min(len(x[m][0]) for m in names) - 1
    streams = []
    for m in names:
        cls, rest = x[m][:, :1], x[m][:, 1:]
        length, parts = rest.shape[1], [cls]
        for t in range(steps):
            start, stop = t * length // steps, math.ceil((t + 1) * length / steps)
            parts.append(rest[:, start:stop].mean(1, keepdims=True))
        stream = np.concatenate(parts, axis=1)
        streams.append(stream / np.linalg.norm(stream, axis=-1, keepdims=True))
    streams.append(linear(p["joint"], np.concatenate(streams, axis=-1)))
    names = [f"stream_{m}" for m in names] + ["joint_stream"]
    blocks = [p[f"{name}_block"] for name in names]
    streams = [post_norm_block(b, s, heads) for b, s in zip(blocks, streams, strict=True)]
    answers = [
        cross_attention(p[f"{name}_attention"], streams[i][:, :1], source, rotations[i])[:, 0]
        for i, name in enumerate(names)
        for j, source in enumerate(streams)
        if j != i
    ]
    c = linear(p["merge"], np.concatenate(answers, axis=-1))
    return linear(p["head"], np.maximum(linear(p["fc"], c), 0))


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
