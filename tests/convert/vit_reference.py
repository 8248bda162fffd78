"""A small Vision Transformer in NumPy, and its weights in every layout that files use."""

import math

import numpy as np

SIDE, PATCH, DIM, HEADS, DEPTH, HIDDEN = 4, 4, 12, 3, 3, 48


def random_weights(seed=0):
    """AugReg names without prefix, blocks numbered, every array random (scales around 1)."""
    rng = np.random.default_rng(seed)

    def normal(*shape, loc=0.0):
        return (loc + 0.3 * rng.standard_normal(shape)).astype(np.float32)

    weights = {
        "cls": normal(1, 1, DIM),
        "embedding/kernel": normal(PATCH, PATCH, 3, DIM),
        "embedding/bias": normal(DIM),
        "Transformer/posembed_input/pos_embedding": normal(1, SIDE**2 + 1, DIM),
        "Transformer/encoder_norm/scale": normal(DIM, loc=1.0),
        "Transformer/encoder_norm/bias": normal(DIM),
        "head/kernel": normal(DIM, 7),
        "head/bias": normal(7),
    }
    head = DIM // HEADS
    for i in range(DEPTH):
        block = {
            "LayerNorm_0/scale": normal(DIM, loc=1.0),
            "LayerNorm_0/bias": normal(DIM),
            "LayerNorm_2/scale": normal(DIM, loc=1.0),
            "LayerNorm_2/bias": normal(DIM),
            "MultiHeadDotProductAttention_1/out/kernel": normal(HEADS, head, DIM),
            "MultiHeadDotProductAttention_1/out/bias": normal(DIM),
            "MlpBlock_3/Dense_0/kernel": normal(DIM, HIDDEN),
            "MlpBlock_3/Dense_0/bias": normal(HIDDEN),
            "MlpBlock_3/Dense_1/kernel": normal(HIDDEN, DIM),
            "MlpBlock_3/Dense_1/bias": normal(DIM),
        }
        for part in ("query", "key", "value"):
            name = f"MultiHeadDotProductAttention_1/{part}"
            block |= {
                f"{name}/kernel": normal(DIM, HEADS, head),
                f"{name}/bias": normal(HEADS, head),
            }
        weights |= {f"Transformer/encoderblock_{i}/{name}": v for name, v in block.items()}
    return weights


def prefixed(weights, prefix):
    return {prefix + name: value for name, value in weights.items()}


def with_pre_logits(weights):
    return weights | {"pre_logits/kernel": np.eye(DIM, dtype=np.float32)}


def big_vision_names(weights):
    """Modules numbered by kind, position table at the top, prefix `params/`."""
    renames = {
        "LayerNorm_2": "LayerNorm_1",
        "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
        "MlpBlock_3": "MlpBlock_0",
        "Transformer/posembed_input/pos_embedding": "pos_embedding",
    }
    renamed = {}
    for name, value in weights.items():
        for old, new in renames.items():
            name = name.replace(old, new)
        renamed[f"params/{name}"] = value
    return renamed


def stacked(weights):
    """Blocks on a leading axis under one `encoderblock`."""
    result = {name: v for name, v in weights.items() if "encoderblock_" not in name}
    for name in weights:
        if "encoderblock_0/" in name:
            blocks = [weights[name.replace("block_0/", f"block_{i}/")] for i in range(DEPTH)]
            result[name.replace("encoderblock_0/", "encoderblock/")] = np.stack(blocks)
    return result


def timm(weights):
    """timm's names; PyTorch's layouts, with the heads' projections as one matrix."""
    result = {
        "cls_token": weights["cls"],
        "pos_embed": weights["Transformer/posembed_input/pos_embedding"],
        "patch_embed.proj.weight": weights["embedding/kernel"].transpose(3, 2, 0, 1),
        "patch_embed.proj.bias": weights["embedding/bias"],
        "norm.weight": weights["Transformer/encoder_norm/scale"],
        "norm.bias": weights["Transformer/encoder_norm/bias"],
        "head.weight": weights["head/kernel"].T,
        "head.bias": weights["head/bias"],
    }
    for i in range(DEPTH):
        ours, theirs = f"Transformer/encoderblock_{i}/", f"blocks.{i}."
        attention = f"{ours}MultiHeadDotProductAttention_1/"
        kernels = [
            weights[f"{attention}{p}/kernel"].reshape(DIM, DIM) for p in ("query", "key", "value")
        ]
        biases = [weights[f"{attention}{p}/bias"].reshape(DIM) for p in ("query", "key", "value")]
        result |= {
            f"{theirs}norm1.weight": weights[f"{ours}LayerNorm_0/scale"],
            f"{theirs}norm1.bias": weights[f"{ours}LayerNorm_0/bias"],
            f"{theirs}norm2.weight": weights[f"{ours}LayerNorm_2/scale"],
            f"{theirs}norm2.bias": weights[f"{ours}LayerNorm_2/bias"],
            f"{theirs}attn.qkv.weight": np.concatenate([k.T for k in kernels]),
            f"{theirs}attn.qkv.bias": np.concatenate(biases),
            f"{theirs}attn.proj.weight": weights[f"{attention}out/kernel"].reshape(DIM, DIM).T,
            f"{theirs}attn.proj.bias": weights[f"{attention}out/bias"],
        }
        for j in (0, 1):
            dense = f"{ours}MlpBlock_3/Dense_{j}"
            result[f"{theirs}mlp.fc{j + 1}.weight"] = weights[f"{dense}/kernel"].T
            result[f"{theirs}mlp.fc{j + 1}.bias"] = weights[f"{dense}/bias"]
    return {name: np.ascontiguousarray(value) for name, value in result.items()}


def forward(weights, images, depth, cls_position=True):
    """Tokens `[B, 1 + SIDE^2, DIM]` of images `[B, H, W, 3]` after `depth` blocks and the norm."""
    w = {name: np.float64(value) for name, value in weights.items()}
    rows = [
        images[:, r : r + PATCH, c : c + PATCH]
        for r in range(0, SIDE * PATCH, PATCH)
        for c in range(0, SIDE * PATCH, PATCH)
    ]
    patches = np.stack([np.einsum("bhwc,hwcd->bd", p, w["embedding/kernel"]) for p in rows], 1)
    x = patches + w["embedding/bias"]
    cls = np.broadcast_to(w["cls"], (len(x), 1, DIM))
    position = w["Transformer/posembed_input/pos_embedding"]
    x = (
        np.concatenate([cls, x], 1) + position
        if cls_position
        else np.concatenate([cls, x + position], 1)
    )
    for i in range(depth):
        b = {n.split("/", 2)[2]: v for n, v in w.items() if f"encoderblock_{i}/" in n}
        y = _norm(x, b["LayerNorm_0/scale"], b["LayerNorm_0/bias"])
        q, k, v = (
            np.einsum("bld,dhk->bhlk", y, b[f"MultiHeadDotProductAttention_1/{p}/kernel"])
            + b[f"MultiHeadDotProductAttention_1/{p}/bias"][:, None]
            for p in ("query", "key", "value")
        )
        scores = np.exp(np.einsum("bhlk,bhmk->bhlm", q, k) / math.sqrt(DIM // HEADS))
        mixed = np.einsum("bhlm,bhmk->bhlk", scores / scores.sum(-1, keepdims=True), v)
        out = "MultiHeadDotProductAttention_1/out"
        x = x + np.einsum("bhlk,hkd->bld", mixed, b[f"{out}/kernel"]) + b[f"{out}/bias"]
        y = _norm(x, b["LayerNorm_2/scale"], b["LayerNorm_2/bias"])
        y = y @ b["MlpBlock_3/Dense_0/kernel"] + b["MlpBlock_3/Dense_0/bias"]
        y = y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2
        x = x + y @ b["MlpBlock_3/Dense_1/kernel"] + b["MlpBlock_3/Dense_1/bias"]
    return _norm(x, w["Transformer/encoder_norm/scale"], w["Transformer/encoder_norm/bias"])


def _norm(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6) * scale + bias
