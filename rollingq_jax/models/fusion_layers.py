"""The lower layers where several fuse the modalities: Transformer blocks over all tokens.

The sequence is [fusion class token, tokens of m_1, ..., tokens of m_M]. Each layer is the encoders'
pre-norm block, in which the class token's query alone is rotated, by the layer's own rotation:
x <- x + A(norm1(x)), x <- x + MLP(norm2(x)), where A is self-attention with q_0 <- R q_0. The last
layer is `AttentionFusion`'s class-token attention. (The paper's extension to several layers.)
"""

from typing import Any, NamedTuple, cast

import jax.numpy as jnp
from jax import Array

from rollingq_jax.attention import attention_share, class_token_attention, mean_key
from rollingq_jax.models.encoders import block_function, block_params
from rollingq_jax.models.layers import AttentionFn, Block, LayerNorm, default_attention


class Seen(NamedTuple):
    """What the class token's attention saw in one layer."""

    query: Array  # [B, H, d_h], rotated
    mean_keys: list[Array]  # M x [B, H, d_h]
    share: Array  # [B, H, M]


def query_projection(block: Block) -> tuple[Array, Array]:
    """Kernel `[d, H, d_h]` and bias `[H, d_h]` of a bound block's queries."""
    kernel, bias = _projections(block)
    return kernel[:, 0], bias[0]


def normed(block: Block, x: Array, dtype: Any = jnp.float32) -> Array:
    """norm1(x) of a bound block: `[..., d] -> [..., d]`."""
    norm = LayerNorm(dtype, parent=None)
    return cast(Array, norm.apply({"params": block_params(block)["norm1"]}, x))


def fuse(
    block: Block,
    sequence: Array,
    mask: Array | None,
    query: Array,
    rng: Array | None,
    example_index: Array,
    *,
    remat: bool = False,
) -> Array:
    """One layer: `[B, 1 + sum L_m, d] -> [B, 1 + sum L_m, d]`.

    Args:
      block: bound, its parameters made.
      sequence: the class token first.
      mask: `[B, 1 + sum L_m]`, True where a token is real, or None where all are.
      query: `[B, H, d_h]` float32, the class token's, rotated; it takes the place of the block's.
      rng: one dropout key for the layer; None keeps everything.
      example_index: `[B]` int32, positions in the global batch.
      remat: see `encoders.block_function`.
    """
    turned = block.clone(
        parent=None, name=None, attention_fn=_with_class_query(query, block.attention_fn)
    )
    apply = block_function(turned, remat)
    return apply(block_params(block), sequence, mask, rng, example_index)


def seen_in(
    block: Block,
    sequence: Array,
    mask: Array | None,
    query: Array,
    lengths: tuple[int, ...],
    masks: list[Array | None],
) -> Seen:
    """What the class token sees in a layer, from the layer's input.

    O(L d + d^2) a sample beside the block itself, since the keys are those of
    `rollingq_jax.attention`.

    Args:
      block, sequence, mask, query: as in `fuse`.
      lengths: tokens of each modality.
      masks: `[B, L_m]` or None for each.
    """
    kernel, bias = _projections(block)
    tokens = normed(block, sequence, block.dtype)
    _, weights = class_token_attention(
        tokens, query, kernel[:, 1], kernel[:, 2], bias[1], bias[2], mask=mask
    )
    keys = [
        mean_key(part, kernel[:, 1], bias[1], mask=real)
        for part, real in zip(split_tokens(tokens, lengths), masks, strict=True)
    ]
    return Seen(query, keys, attention_share(weights, lengths))


def split_tokens(sequence: Array, lengths: tuple[int, ...]) -> list[Array]:
    """Each modality's tokens, the class token left out: `M x [B, L_m, d]`."""
    bounds = [sum(lengths[:i]) for i in range(1, len(lengths))]
    return jnp.split(sequence[:, 1:], bounds, axis=1)


def _projections(block: Block) -> tuple[Array, Array]:
    """`[d, 3, H, d_h]` and `[3, H, d_h]` of queries, keys and values."""
    qkv = block_params(block)["attention"]["qkv"]
    width = qkv["kernel"].shape[0]
    heads = (3, block.num_heads, width // block.num_heads)
    return qkv["kernel"].reshape(width, *heads), qkv["bias"].reshape(heads)


def _with_class_query(query: Array, attention_fn: AttentionFn | None) -> AttentionFn:
    """Self-attention in which the first token has another query."""

    def attend(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        q = jnp.concatenate([query.astype(q.dtype)[:, None], q[:, 1:]], axis=1)
        return (attention_fn or default_attention(q.shape[1]))(q, k, v, mask)

    return attend
