"""Class-token attention without the matrices K, V and L x L, and the reference it is tested by.

Upstream's is in `models/dynamic.py`.

Only the class token's output is used and its query does not depend on the other tokens, so the key
projection moves to the query and the value projection behind the weighted sum: O(L D + D^2) for a
sample instead of O(L D^2 + L^2 D), with the same values and the same gradients.
"""

import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rollingq_jax.errors import UserError
from rollingq_jax.rotation import HIGHEST, as_float, wide_dtype
from rollingq_jax.shapes import batch_broadcast, check_arrays, laid_out_as


def masked_softmax(logits: Array, mask: Array | None) -> Array:
    """Softmax over the last axis; positions where `mask` is False get weight 0.

    `[..., L], [..., L] -> [..., L]`. A row with no real position is all zeros, free of NaN.
    """
    if mask is None or logits.shape[-1] == 0:
        return jax.nn.softmax(logits, axis=-1)
    mask = jnp.broadcast_to(mask, logits.shape)
    lowest = jnp.finfo(logits.dtype).min
    top = jax.lax.stop_gradient(jnp.max(jnp.where(mask, logits, lowest), axis=-1, keepdims=True))
    raised = jnp.where(mask, jnp.exp(jnp.where(mask, logits - top, 0.0)), 0.0)
    total = jnp.sum(raised, axis=-1, keepdims=True)
    return raised / jnp.where(total > 0, total, 1.0)


def per_example_keep(rng: Array, rate: float | Array, shape: tuple[int, ...]) -> Array:
    """Bernoulli(1 - rate) of `shape` = `(B, ...)`; `rng` is one key, or keys `[B]`."""
    if rng.ndim == 0 or (rng.ndim == 1 and not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)):
        return jax.random.bernoulli(rng, 1.0 - rate, shape)
    return jax.vmap(lambda one: jax.random.bernoulli(one, 1.0 - rate, shape[1:]))(rng)


def drop(x: Array, rate: float | Array, rng: Array | None) -> Array:
    """Inverted dropout of `[B, ...]`; `rng` as in `per_example_keep`; None or rate 0 keeps all.

    Raises:
      UserError: the rate is a number that is not in [0, 1); one that is traced has no value yet.
    """
    if not isinstance(rate, numbers.Real):
        rate = jnp.asarray(rate, x.dtype)
    elif not 0.0 <= rate < 1.0:
        raise UserError(f"dropout_rate is {rate}; allowed: 0 <= rate < 1")
    elif rate == 0.0:
        return x
    if rng is None:
        return x
    keep = laid_out_as(per_example_keep(rng, rate, x.shape), x)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def _real_tokens(tokens: Array, mask: Array | None) -> Array:
    """`[B, L, D]` in a floating dtype, zeros where no token is real: 0 times NaN would be NaN."""
    tokens = jnp.asarray(tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.floating):
        tokens = as_float(tokens)
    return tokens if mask is None else jnp.where(mask[..., None], tokens, 0.0)


def _read(
    tokens: Array,
    query: Array,
    w_key: Array,
    w_value: Array,
    b_key: Array,
    b_value: Array,
    mask: Array | None,
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """The arguments, checked: real tokens, and the rest in one dtype, the query `[B, H, d_h]`."""
    dims = check_arrays(
        tokens=(tokens, "BLD"),
        w_key=(w_key, "DHd"),
        w_value=(w_value, "DHd"),
        b_key=(b_key, "Hd"),
        b_value=(b_value, "Hd"),
        query=(query, "BHd", "Hd"),
    )
    check_arrays(dims, "bool", mask=(mask, "BL", None))
    tokens = _real_tokens(tokens, mask)
    query = broadcast_query(query, tokens)
    rest = (query, w_key, w_value, b_key, b_value)
    query, w_key, w_value, b_key, b_value = (x.astype(wide_dtype(tokens.dtype)) for x in rest)
    return tokens, query, w_key, w_value, b_key, b_value


def _biased(logits: Array, bias: Array | None) -> Array:
    """`[B, H, L]` plus `[B, L]`."""
    if bias is None:
        return logits
    check_arrays(check_arrays(logits=(logits, "BHL")), logit_bias=(bias, "BL"))
    return logits + bias.astype(logits.dtype)[:, None]


def broadcast_query(query: Array, tokens: Array) -> Array:
    """`[H, d_h]` or `[B, H, d_h]` -> `[B, H, d_h]`, laid out as `tokens` `[B, ...]` are."""
    query = as_float(query)
    each = query[None] if query.ndim == 2 else query
    return batch_broadcast(each, (tokens.shape[0], *query.shape[-2:]), tokens)


def class_token_attention(
    tokens: Array,
    query: Array,
    w_key: Array,
    w_value: Array,
    b_key: Array,
    b_value: Array,
    mask: Array | None = None,
    dropout_rate: float | Array = 0.0,
    rng: Array | None = None,
    logit_bias: Array | None = None,
) -> tuple[Array, Array]:
    """softmax(T (W_k q) / sqrt(d_h)), and (sum_l w_l T_l) W_v + b_v sum_l w_l, per head.

    b_k . q is the same for every token and cancels in the softmax; sum_l w_l is 1 without dropout.

    Args:
      tokens: `[B, L, D]` T; the two products over L run in its dtype (float32 for integers) and
        accumulate in float32 or wider.
      query: `[B, H, d_h]` or `[H, d_h]`, already rotated.
      w_key: `[D, H, d_h]`.
      w_value: `[D, H, d_h]`.
      b_key: `[H, d_h]`; the output does not depend on it.
      b_value: `[H, d_h]`.
      mask: `[B, L]`, True where a token is real; others may hold anything, NaN included. A sample
        without any gets weights and output 0.
      dropout_rate: of the weights; applied when `rng` is given. May be traced, and is then not
        checked.
      rng: one key, or one key an example `[B]`, which makes dropout independent of how a batch is
        laid out over devices.
      logit_bias: `[B, L]`, added to every head's logits before the softmax; None adds nothing.

    Returns:
      output `[B, H, d_h]` before the output projection and weights `[B, H, L]` before dropout, both
      float32, or in the tokens' dtype where that is wider.

    Raises:
      UserError: a shape or dtype does not fit, or the dropout rate is not in [0, 1).

    Examples:
      >>> tokens, query = jnp.eye(2)[None], jnp.array([[10.0, 0.0]])  # [B, L, D], [H, d_h]
      >>> project, bias = jnp.eye(2)[:, None], jnp.zeros((1, 2))  # [D, H, d_h], [H, d_h]
      >>> output, weights = class_token_attention(tokens, query, project, project, bias, bias)
      >>> weights.round(2).tolist()  # the query looks along the first token
      [[[1.0, 0.0]]]
    """
    tokens, query, w_key, w_value, _, b_value = _read(
        tokens, query, w_key, w_value, b_key, b_value, mask
    )
    wide = query.dtype
    folded = jnp.einsum("dhk,bhk->bhd", w_key, query, precision=HIGHEST) * query.shape[-1] ** -0.5
    logits = jnp.einsum(
        "bld,bhd->bhl", tokens, folded.astype(tokens.dtype), preferred_element_type=wide
    )
    logits = _biased(logits, logit_bias)
    weights = masked_softmax(logits, None if mask is None else mask[:, None])
    kept = drop(weights, dropout_rate, rng)
    pooled = jnp.einsum(
        "bhl,bld->bhd", kept.astype(tokens.dtype), tokens, preferred_element_type=wide
    )
    total = jnp.sum(kept, axis=-1)[..., None]
    output = jnp.einsum("bhd,dhk->bhk", pooled, w_value) + total * b_value[None]
    return output, weights


def reference_attention(
    tokens: Array,
    query: Array,
    w_key: Array,
    w_value: Array,
    b_key: Array,
    b_value: Array,
    mask: Array | None = None,
    dropout_rate: float | Array = 0.0,
    rng: Array | None = None,
    logit_bias: Array | None = None,
) -> tuple[Array, Array]:
    """Attention with keys and values for every token: softmax(q K^T / sqrt(d_h)) V.

    Arguments and results as `class_token_attention`, which is tested against it; all of it computed
    in the results' dtype.

    Raises:
      UserError: as `class_token_attention`.

    Examples:
      >>> tokens, query = jnp.eye(2)[None], jnp.array([[10.0, 0.0]])
      >>> project, bias = jnp.eye(2)[:, None], jnp.zeros((1, 2))
      >>> output, weights = reference_attention(tokens, query, project, project, bias, bias)
      >>> output.shape, weights.shape
      ((1, 1, 2), (1, 1, 2))
    """
    tokens, query, w_key, w_value, b_key, b_value = _read(
        tokens, query, w_key, w_value, b_key, b_value, mask
    )
    tokens = tokens.astype(query.dtype)
    keys = jnp.einsum("bld,dhk->bhlk", tokens, w_key) + b_key[None, :, None]
    values = jnp.einsum("bld,dhk->bhlk", tokens, w_value) + b_value[None, :, None]
    logits = jnp.einsum("bhk,bhlk->bhl", query, keys) * query.shape[-1] ** -0.5
    logits = _biased(logits, logit_bias)
    weights = masked_softmax(logits, None if mask is None else mask[:, None])
    return jnp.einsum("bhl,bhlk->bhk", drop(weights, dropout_rate, rng), values), weights


def mean_token(tokens: Array, mask: Array | None = None) -> Array:
    """Mean of the real tokens, `[B, L, D] -> [B, D]` float32 or wider; 0 where none is real."""
    tokens = as_float(_real_tokens(tokens, mask))
    if mask is None:
        return jnp.sum(tokens, axis=1) / max(tokens.shape[1], 1)
    real = mask.astype(tokens.dtype)
    total = jnp.sum(real, axis=1)[:, None]
    return jnp.einsum("bl,bld->bd", real, tokens, precision=HIGHEST) / jnp.maximum(total, 1.0)


def mean_key(tokens: Array, w_key: Array, b_key: Array, mask: Array | None = None) -> Array:
    """k^m = (mean of T^m) W_k + b_k, the mean key of one modality without its keys.

    Args:
      tokens: `[B, L, D]`, the modality's tokens, its own class token included.
      w_key: `[D, H, d_h]`.
      b_key: `[H, d_h]`.
      mask: `[B, L]`, True where a token is real; others may hold anything, NaN included. A sample
        without any has mean token 0.

    Returns:
      `[B, H, d_h]` float32, or in the tokens' dtype where that is wider.

    Raises:
      UserError: a shape or dtype does not fit.

    Examples:
      >>> tokens = jnp.array([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]])  # [B, L, D]
      >>> project, bias = jnp.eye(2)[:, None], jnp.zeros((1, 2))
      >>> mean_key(tokens, project, bias, jnp.array([[True, True, False]])).tolist()
      [[[0.5, 0.5]]]
    """
    dims = check_arrays(tokens=(tokens, "BLD"), w_key=(w_key, "DHd"), b_key=(b_key, "Hd"))
    check_arrays(dims, "bool", mask=(mask, "BL", None))
    mean = mean_token(tokens, mask)
    w_key, b_key = w_key.astype(mean.dtype), b_key.astype(mean.dtype)
    return jnp.einsum("bd,dhk->bhk", mean, w_key, precision=HIGHEST) + b_key[None]


def token_modalities(
    length: int,
    lengths: Sequence[int] | None = None,
    segment_ids: Array | None = None,
    num_modalities: int | None = None,
) -> tuple[Any, int]:
    """Each token's modality `[L]` or `[B, L]`, an integer in [0, M) or another for none; and M.

    Args:
      length: L.
      lengths: tokens of each modality, in the order of the sequence. They make L, or L - 1 where
        the first token is a class token.
      segment_ids: instead of `lengths`, `[L]` or `[B, L]`: interleaved or packed tokens.
      num_modalities: M, needed with `segment_ids`.

    Raises:
      UserError: both or none are given, or they do not fit the sequence.
    """
    if (lengths is None) == (segment_ids is None):
        raise UserError("lengths and segment_ids are both given or both None; allowed: one of them")
    if lengths is not None:
        total = sum(lengths)
        if total not in (length, length - 1):
            raise UserError(
                f"lengths are {tuple(lengths)}, which make {total} tokens, or {1 + total} with a "
                f"class token; allowed: as many as the sequence has, {length}"
            )
        ids = np.repeat(np.arange(len(lengths)), lengths)
        return np.concatenate([np.full(length - total, -1), ids]), len(lengths)
    if not (isinstance(num_modalities, numbers.Integral) and num_modalities >= 1):
        raise UserError(
            f"num_modalities is {num_modalities!r}; allowed with segment_ids: an integer >= 1"
        )
    return segment_ids, int(num_modalities)


def _members(
    ids: Array,
    num_modalities: int,
    mask: Array | None,
    shape: tuple[int, int],
    like: Array | None = None,
) -> Array:
    """`[B, L, M]` bool: the real tokens of each modality, laid out over devices as `like` is."""
    members = jnp.asarray(ids)[..., None] == jnp.arange(num_modalities)[(None,) * np.ndim(ids)]
    members = jnp.broadcast_to(members, (*shape, num_modalities))
    if like is not None:
        members = batch_broadcast(members, members.shape, like)
    return members if mask is None else members & mask[..., None]


def segment_mean_keys(
    keys: Array,
    lengths: Sequence[int] | None = None,
    *,
    segment_ids: Array | None = None,
    num_modalities: int | None = None,
    mask: Array | None = None,
    num_heads: int | None = None,
) -> tuple[Array, Array]:
    """Mean key of each modality from keys that exist already, and how much each counts.

    For attention that makes its keys anyway: after RoPE, from a cache, over interleaved or padded
    tokens, or with fewer heads of keys than of queries.

    Args:
      keys: `[B, L, G, d]` in G groups, as the attention uses them.
      lengths: tokens of each modality, in the order of the sequence; the first token may be a class
        token, which belongs to none.
      segment_ids: instead of `lengths`, integers `[L]` or `[B, L]`: modality m has id m; tokens of
        any other id, such as -1, belong to none.
      num_modalities: M, needed with `segment_ids`.
      mask: `[B, L]`, True where a token is real; others may hold anything, NaN included.
      num_heads: H, query heads; a multiple of G (grouped-query attention), default G. Head h reads
        group h // (H / G).

    Returns:
      mean_keys `[M, B, H, d]`, float32 or wider, and weight `[M, B]`, 1 where the sample has a
      token of the modality and else 0: as `observe` of `rolling_query` takes them.

    Raises:
      UserError: a shape does not fit.

    Examples:
      >>> keys = jnp.array([[[[1.0, 0.0]], [[9.0, 9.0]], [[3.0, 0.0]], [[0.0, 1.0]]]])
      >>> ids = jnp.array([0, -1, 0, 1])  # the second token is of no modality
      >>> mean_keys, weight = segment_mean_keys(keys, segment_ids=ids, num_modalities=2)
      >>> mean_keys[:, 0, 0].tolist(), weight.tolist()
      ([[2.0, 0.0], [0.0, 1.0]], [[1.0], [1.0]])
    """
    dims = check_arrays(keys=(keys, "BLGd"))
    check_arrays(dims, "integers", segment_ids=(segment_ids, "L", "BL", None))
    check_arrays(dims, "bool", mask=(mask, "BL", None))
    groups, heads = dims.G, dims.G if num_heads is None else num_heads
    if not isinstance(heads, numbers.Integral) or int(heads) < 1 or int(heads) % groups:
        raise UserError(f"num_heads is {heads!r}; allowed: a multiple of the keys' {groups} heads")
    ids, count = token_modalities(dims.L, lengths, segment_ids, num_modalities)
    members = _members(ids, count, mask, (dims.B, dims.L), keys)
    keys = as_float(keys)
    real = jnp.any(members, axis=-1)[..., None, None]
    number = jnp.sum(members, axis=1).astype(keys.dtype)  # [B, M]
    total = jnp.einsum(
        "blm,blgd->mbgd",
        members.astype(keys.dtype),
        jnp.where(real, keys, 0.0),
        precision=HIGHEST,
    )
    mean = total / jnp.maximum(number, 1.0).T[..., None, None]
    return jnp.repeat(mean, heads // groups, axis=2), (number.T > 0).astype(jnp.float32)


def uniform_share(
    lengths: Sequence[int] | None = None,
    *,
    segment_ids: Array | None = None,
    num_modalities: int | None = None,
    mask: Array | None = None,
) -> Array:
    """Each modality's part of the tokens, which is its share under uniform attention.

    Args:
      lengths: tokens of each modality, its class token included.
      segment_ids: as in `segment_mean_keys`.
      num_modalities: likewise.
      mask: `[B, L]`, True where a token is real.

    Returns:
      `[M]`, or `[B, M]` where ids or mask differ between samples; equal shares where a sample has
      no token.

    Raises:
      UserError: the arguments do not fit each other.

    Examples:
      >>> uniform_share((6, 2)).tolist()
      [0.75, 0.25]
    """
    dims = check_arrays(None, "integers", segment_ids=(segment_ids, "L", "BL", None))
    check_arrays(dims, "bool", mask=(mask, "BL", None))
    given = next((x for x in (mask, segment_ids) if x is not None), None)
    length = sum(lengths or ()) if given is None else given.shape[-1]
    ids, count = token_modalities(length, lengths, segment_ids, num_modalities)
    batched = mask is not None or np.ndim(ids) == 2
    members = _members(ids, count, mask, (getattr(dims, "B", 1), length), mask)
    number = jnp.sum(members, axis=1).astype(jnp.float32)
    total = jnp.sum(number, axis=-1, keepdims=True)
    shares = jnp.where(total > 0, number / jnp.maximum(total, 1.0), 1.0 / count)
    return shares if batched else shares[0]


def attention_share(
    weights: Array,
    lengths: Sequence[int] | None = None,
    *,
    segment_ids: Array | None = None,
    num_modalities: int | None = None,
    mask: Array | None = None,
    per_token: bool = False,
) -> Array:
    """Each modality's part of the attention: its weights' sum over that of all modalities.

    Args:
      weights: `[B, H, L]` before dropout, 0 at tokens that are not real.
      lengths: tokens of each modality, in the order of the sequence. They make L, or L - 1 where
        the first token is the fusion's class token, which is left out.
      segment_ids: instead of `lengths`, integers `[L]` or `[B, L]`: modality m has id m; tokens of
        any other id are left out.
      num_modalities: M, needed with `segment_ids`.
      mask: `[B, L]`, True where a token is real; `per_token` counts these only.
      per_token: divide by the share that uniform attention would give (`uniform_share`): 64 tokens
        of an image against 6 of a text are no bias, and 1 means as much as its tokens.

    Returns:
      `[B, H, M]`, sums to 1 (equal shares where no modality gets any attention). With `per_token`
      1 for each under uniform attention, and 0 where a sample lacks the modality.

    Raises:
      UserError: the lengths or ids do not fit the weights.

    Examples:
      >>> weights = jnp.array([[[0.5, 0.125, 0.125, 0.25]]])  # class token, 2 tokens, 1 token
      >>> attention_share(weights, (2, 1)).tolist()
      [[[0.5, 0.5]]]
      >>> attention_share(weights, (2, 1), per_token=True).tolist()
      [[[0.75, 1.5]]]
    """
    dims = check_arrays(weights=(weights, "BHL"))
    check_arrays(dims, "integers", segment_ids=(segment_ids, "L", "BL", None))
    check_arrays(dims, "bool", mask=(mask, "BL", None))
    ids, count = token_modalities(dims.L, lengths, segment_ids, num_modalities)
    if lengths is not None:
        bounds = np.cumsum([dims.L - sum(lengths), *lengths[:-1]])
        parts = jnp.split(weights, bounds, axis=-1)[1:]
        sums = jnp.stack([jnp.sum(part, axis=-1) for part in parts], axis=-1)
    else:
        members = _members(ids, count, None, (dims.B, dims.L), weights).astype(weights.dtype)
        sums = jnp.einsum("bhl,blm->bhm", weights, members, precision=HIGHEST)
    total = jnp.sum(sums, axis=-1, keepdims=True)
    shares = jnp.where(total > 0, sums / jnp.where(total > 0, total, 1.0), 1.0 / count)
    if not per_token:
        return shares
    members = _members(ids, count, mask, (dims.B, dims.L), weights)
    number = jnp.sum(members, axis=1).astype(shares.dtype)
    tokens = jnp.sum(number, axis=-1, keepdims=True)
    ratio = shares * tokens[:, None] / jnp.maximum(number, 1.0)[:, None]
    return jnp.where(total > 0, jnp.where(number[:, None] > 0, ratio, 0.0), 1.0)
