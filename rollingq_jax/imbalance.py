"""How unevenly a class query looks at its modalities, and where it should look instead.

Paper section 4; upstream `main.py` (AIR, weights) and `models/fusion_modules.py` (anchor). No head
axis: `jax.vmap` adds it. Modalities are in alphabetical order.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from rollingq_jax.errors import UserError
from rollingq_jax.rotation import ZERO_NORM, as_float, dot, safe_norm, unit
from rollingq_jax.shapes import check_arrays

ZERO_SUM = 1e-6  # norm(u) of opposite unit keys is about 6e-8 in float32, not 0


def cosine_scores(query: Array, mean_keys: Array, weight: Array | None = None) -> Array:
    """c^m = mean_i cos(q_i, k_i^m), the mean cosine of query and mean key over a batch.

    Args:
      query: `[B, d]`.
      mean_keys: `[M, B, d]`, k_i^m = mean of sample i's keys over the tokens of modality m.
      weight: `[B]`, how much each sample counts; all alike by default.

    Returns:
      `[M]` in [-1, 1]. A vector without direction (norm at most 1e-12, or not finite) has cosine 0,
      and so has a batch without samples.

    Raises:
      UserError: the shapes do not fit each other.

    Example:
      >>> query = jnp.array([[2.0, 0.0], [1.0, 1.0]])  # [B, d]
      >>> keys = jnp.array([[[1.0, 0.0], [3.0, 3.0]], [[0.0, 1.0], [0.0, 0.0]]])  # [M, B, d]
      >>> cosine_scores(query, keys).tolist()
      [1.0, 0.0]
    """
    check_arrays(query=(query, "B d"), mean_keys=(mean_keys, "M B d"), weight=(weight, "B or None"))
    cosines = dot(unit(as_float(query))[None], unit(as_float(mean_keys)))
    if weight is None:
        return jnp.sum(cosines, axis=-1) / max(len(query), 1)
    weight = weight.astype(cosines.dtype)
    total = jnp.sum(weight)
    return jnp.sum(cosines * weight[None], axis=-1) / jnp.where(total > 0, total, 1.0)


def attention_imbalance_rate(query: Array, keys_first: Array, keys_second: Array) -> Array:
    """AIR = c^1 - c^2 in [-2, 2] (paper section 4): `[B, d]` three times `-> []`.

    Raises:
      UserError: the shapes are not one `[B, d]`.

    Example:
      >>> along, across = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
      >>> float(attention_imbalance_rate(2.0 * along, along, across))
      1.0
    """
    check_arrays(
        query=(query, "B d"), keys_first=(keys_first, "B d"), keys_second=(keys_second, "B d")
    )
    first, second = cosine_scores(query, jnp.stack([keys_first, keys_second]))
    return first - second


def imbalance(scores: Array) -> Array:
    """max_m c^m - min_m c^m, which is |AIR| for two modalities: `[..., M] -> [...]`.

    Raises:
      UserError: there is no axis of modalities.

    Example:
      >>> float(imbalance(jnp.array([0.75, -0.25, 0.5])))
      1.0
    """
    if not getattr(scores, "shape", ()) or scores.shape[-1] == 0:
        came = getattr(scores, "shape", type(scores).__name__)
        raise UserError(f"scores has shape {came}; allowed: an array [..., M]")
    return jnp.max(scores, axis=-1) - jnp.min(scores, axis=-1)


def rebalance_weights(scores: Array, rho: float | Array) -> Array:
    """alpha = softmax_m(-2 rho c^m): `[M] -> [M]`, sums to 1, equal weights at rho = 0.

    For two modalities this is the paper's alpha^1 = (1 - tanh(rho AIR)) / 2. (rho is upstream's
    flag `sigma`.)

    Raises:
      UserError: the scores are not `[M]`, or rho is negative or not finite.

    Example:
      >>> rebalance_weights(jnp.array([0.5, 0.5, 0.5]), 2.0).round(3).tolist()
      [0.333..., 0.333..., 0.333...]
      >>> bool(rebalance_weights(jnp.array([1.0, 0.0]), 100.0)[1] > 0.99)  # to the neglected one
      True
    """
    check_arrays(scores=(scores, "M"))
    if isinstance(rho, int | float) and not 0 <= rho < math.inf:
        raise UserError(f"rho is {rho}; allowed: 0 or more, and finite")
    scores = as_float(scores)
    return jax.nn.softmax(-2.0 * jnp.asarray(rho, scores.dtype) * scores)


def anchor_direction(mean_keys: Array, weights: Array) -> Array:
    """u = sum_m alpha^m mu^m / |mu^m|: `[M, d], [M] -> [d]`."""
    return jnp.sum(as_float(weights)[:, None] * unit(as_float(mean_keys)), axis=0)


def has_anchor(query: Array, mean_keys: Array, weights: Array) -> Array:
    """Whether the anchor is defined: `[d], [M, d], [M] -> []` bool.

    It is not where |q|, or any |mu^m|, is at most 1e-12, where |u| is at most 1e-6, or where a
    value is not finite.
    """
    vectors = jnp.concatenate([as_float(query)[None], as_float(mean_keys)])
    finite = jnp.all(jnp.isfinite(vectors)) & jnp.all(jnp.isfinite(weights))
    known = jnp.all(safe_norm(vectors) > ZERO_NORM)
    return finite & known & (safe_norm(anchor_direction(mean_keys, weights)) > ZERO_SUM)


def rebalance_anchor(query: Array, mean_keys: Array, weights: Array) -> Array:
    """q_b = |q_bar| u / |u|, where u = sum_m alpha^m mu^m / |mu^m| (paper section 4).

    Args:
      query: `[d]`, q_bar.
      mean_keys: `[M, d]`, mu^m = the mean over samples of k_i^m.
      weights: `[M]`, alpha.

    Returns:
      `[d]` with the norm of `query`; `query` itself where the anchor is not defined (`has_anchor`).

    Raises:
      UserError: the shapes do not fit each other.

    Example:
      >>> keys = jnp.array([[5.0, 0.0], [0.0, 0.1]])  # a key's length does not matter
      >>> rebalance_anchor(jnp.array([2.0, 0.0]), keys, jnp.array([0.5, 0.5])).round(3).tolist()
      [1.414..., 1.414...]
    """
    check_arrays(query=(query, "d"), mean_keys=(mean_keys, "M d"), weights=(weights, "M"))
    query = as_float(query)
    anchor = safe_norm(query) * unit(anchor_direction(mean_keys, weights), epsilon=ZERO_SUM)
    return jnp.where(has_anchor(query, mean_keys, weights), anchor, query)
