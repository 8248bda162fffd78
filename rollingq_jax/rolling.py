"""When and how to rotate the query: an optax-style transformation `(init, observe, update)`.

Upstream stops at an epoch's end, passes over the whole training set and decides from the last batch
(`main.py`). Here each training step adds what it has already computed to running sums, and `update`
decides from those. All functions are pure and run under jit, vmap and scan.
"""

import numbers
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rollingq_jax.errors import UserError
from rollingq_jax.imbalance import has_anchor, imbalance, rebalance_anchor, rebalance_weights
from rollingq_jax.rotation import (
    HIGHEST,
    as_float,
    dot,
    mend,
    rotation_between,
    safe_norm,
    unit,
)
from rollingq_jax.shapes import check_arrays


class RollingState(NamedTuple):
    """What evolves beside the parameters; no gradient, no weight decay, always checkpointed.

    H heads, M modalities, head width d. Everything is float32 but `count`.

    Example:
      >>> state = rolling_query().init(num_modalities=2, dim=4, num_heads=3)
      >>> state.rotation.shape, state.count.tolist(), state.key_sum.shape
      ((3, 4, 4), [0, 0, 0], (2, 3, 4))
    """

    rotation: Array  # [H, d, d], starts at I
    count: Array  # type: ignore[assignment]  # [H] int32, rotations done; hides tuple.count
    key_sum: Array  # [M, H, d], sum_i w_i k_i^m
    cosine_sum: Array  # [M, H], sum_i w_i cos(q_i, k_i^m)
    weight_sum: Array  # [M], sum_i w_i
    query_sum: Array  # [H, d], sum_i w_i q_i
    query_weight: Array  # []


class RollInfo(NamedTuple):
    """What one `update` saw and did.

    Example:
      >>> roller = rolling_query()
      >>> state, info = roller.update(roller.init(num_modalities=2, dim=4))  # nothing observed
      >>> info.rolled.tolist(), info.imbalance.tolist(), info.weights.tolist()
      ([False], [0.0], [[0.5, 0.5]])
    """

    scores: Array  # [H, M], c^m
    imbalance: Array  # [H], max_m c^m - min_m c^m
    weights: Array  # [H, M], alpha
    anchor: Array  # [H, d], q_b; the query itself where the anchor is not defined
    angle: Array  # [H], between query and anchor, in radians
    rolled: Array  # [H] bool
    mended: Array  # [H] bool, whether R had drifted from orthogonal and was mended


class RollingQuery(NamedTuple):
    """The method as three pure functions, in the manner of `optax.GradientTransformation`.

    Example:
      >>> init, observe, update = rolling_query(beta=0.1)
      >>> init(num_modalities=3, dim=8).rotation.shape
      (1, 8, 8)
    """

    init: Callable[..., RollingState]
    observe: Callable[..., RollingState]
    update: Callable[..., tuple[RollingState, RollInfo]]


def init_state(num_modalities: int, dim: int, num_heads: int = 1) -> RollingState:
    """State with R = I and empty sums; `dim` is the head width.

    Raises:
      UserError: fewer than two modalities, `dim` below 2 or no head.
    """
    for name, value, least in (
        ("num_modalities", num_modalities, 2),
        ("dim", dim, 2),
        ("num_heads", num_heads, 1),
    ):
        if not (isinstance(value, numbers.Integral) and value >= least):
            raise UserError(f"{name} is {value!r}; allowed: an integer >= {least}")
    return RollingState(
        rotation=jnp.tile(jnp.eye(dim, dtype=jnp.float32)[None], (num_heads, 1, 1)),
        count=jnp.zeros([num_heads], jnp.int32),
        key_sum=jnp.zeros([num_modalities, num_heads, dim], jnp.float32),
        cosine_sum=jnp.zeros([num_modalities, num_heads], jnp.float32),
        weight_sum=jnp.zeros([num_modalities], jnp.float32),
        query_sum=jnp.zeros([num_heads, dim], jnp.float32),
        query_weight=jnp.zeros([], jnp.float32),
    )


def observe(
    state: RollingState,
    query: Array,
    mean_keys: Array,
    weight: Array | None = None,
    axis_name: str | None = None,
) -> RollingState:
    """Adds one batch to the running sums.

    Args:
      state: the state so far.
      query: `[B, H, d]` or `[H, d]`, as the attention used it (already rotated).
      mean_keys: `[M, B, H, d]`, k_i^m.
      weight: `[B]` or `[M, B]`; 0 leaves out padding, or a modality that a sample lacks. A sample
        of weight 0 may hold anything, NaN included.
      axis_name: mapped axis over which the increments are summed, so that every replica ends with
        the sums of the global batch.

    Returns:
      The new state; no gradient flows through it.

    Raises:
      UserError: a shape does not fit the state's M, H and d.
    """
    check_arrays(
        _sizes(state),
        query=(query, "B H d or H d"),
        mean_keys=(mean_keys, "M B H d"),
        weight=(weight, "B or M B or None"),
    )
    query, mean_keys = jax.lax.stop_gradient((as_float(query), as_float(mean_keys)))
    num_modalities, batch_size = mean_keys.shape[:2]
    query = jnp.broadcast_to(query[None] if query.ndim == 2 else query, mean_keys.shape[1:])
    if weight is None:
        weight = jnp.ones([batch_size], jnp.float32)
    weight = jnp.broadcast_to(jnp.atleast_2d(weight), (num_modalities, batch_size))
    weight = jax.lax.stop_gradient(weight).astype(jnp.float32)
    query_weight = jnp.max(weight, axis=0)
    mean_keys = jnp.where(weight[:, :, None, None] > 0, mean_keys, 0.0)
    query = jnp.where(query_weight[:, None, None] > 0, query, 0.0)
    cosines = dot(unit(query)[None], unit(mean_keys))  # [M, B, H]
    increments = (
        jnp.einsum("mb,mbhd->mhd", weight, mean_keys, precision=HIGHEST),
        jnp.einsum("mb,mbh->mh", weight, cosines, precision=HIGHEST),
        jnp.sum(weight, axis=1),
        jnp.einsum("b,bhd->hd", query_weight, query, precision=HIGHEST),
        jnp.sum(query_weight),
    )
    if axis_name is not None:
        increments = jax.lax.psum(increments, axis_name)
    key_sum, cosine_sum, weight_sum, query_sum, total = increments
    return state._replace(
        key_sum=state.key_sum + key_sum,
        cosine_sum=state.cosine_sum + cosine_sum,
        weight_sum=state.weight_sum + weight_sum,
        query_sum=state.query_sum + query_sum,
        query_weight=state.query_weight + total,
    )


def _sizes(state: RollingState) -> dict[str, int]:
    """What is known before a batch comes: broadcasting would take another number of heads."""
    if not isinstance(state, RollingState):
        raise UserError(f"state is a {type(state).__name__}; allowed: what `init` made")
    return dict(zip("MHd", state.key_sum.shape, strict=True))


def scores_and_means(state: RollingState) -> tuple[Array, Array, Array]:
    """Scores `[H, M]`, mean keys `[H, M, d]` and mean query `[H, d]` of what was observed."""
    weight = jnp.where(state.weight_sum > 0, state.weight_sum, 1.0)
    total = jnp.where(state.query_weight > 0, state.query_weight, 1.0)
    scores = jnp.swapaxes(state.cosine_sum / weight[:, None], 0, 1)
    mean_keys = jnp.swapaxes(state.key_sum / weight[:, None, None], 0, 1)
    return scores, mean_keys, state.query_sum / total


def reset_sums(state: RollingState) -> RollingState:
    """The state with empty running sums; rotation and count as they were."""
    sums = ("key_sum", "cosine_sum", "weight_sum", "query_sum", "query_weight")
    return state._replace(**{name: jnp.zeros_like(getattr(state, name)) for name in sums})


def roll(
    state: RollingState,
    query: Array,
    mean_keys: Array,
    scores: Array,
    *,
    beta: float,
    rho: float,
    max_rotations: int,
    method: str = "geodesic",
    joint: bool = False,
) -> tuple[RollingState, RollInfo]:
    """R <- R_new R, with R_new q_bar = q_b, in every head whose imbalance exceeds beta.

    Args:
      state: the state; its sums are neither read nor reset here.
      query: `[H, d]`, q_bar, already rotated.
      mean_keys: `[H, M, d]`, mu^m.
      scores: `[H, M]`, c^m.
      beta, rho, max_rotations, method, joint: see `rolling_query`.

    Returns:
      The state with its new rotations and counts, and what was decided.
    """
    query, mean_keys = as_float(query), as_float(mean_keys)
    if joint:
        scores = jnp.broadcast_to(jnp.mean(scores, axis=0, keepdims=True), scores.shape)
    heads_imbalance = imbalance(scores)
    weights = jax.vmap(rebalance_weights, (0, None))(scores, rho)
    anchor = jax.vmap(rebalance_anchor)(query, mean_keys, weights)
    defined = jax.vmap(has_anchor)(query, mean_keys, weights)
    rolled = (heads_imbalance > beta) & (state.count < max_rotations) & defined
    if joint:
        rolled = jnp.broadcast_to(jnp.all(rolled), rolled.shape)

    def rotated():
        new = rotation_between(query, anchor, method)
        new, mended = mend(jnp.matmul(new, state.rotation, precision=HIGHEST))
        return jnp.where(rolled[:, None, None], new, state.rotation), mended & rolled

    # The condition keeps O(d^2) products, and the SVD, out of the steps that do not roll.
    rotation, mended = jax.lax.cond(
        jnp.any(rolled), rotated, lambda: (state.rotation, jnp.zeros_like(rolled))
    )
    x, y = unit(query), unit(anchor)
    info = RollInfo(
        scores=scores,
        imbalance=heads_imbalance,
        weights=weights,
        anchor=anchor,
        angle=2.0 * jnp.arctan2(safe_norm(x - y), safe_norm(x + y)),
        rolled=rolled,
        mended=mended,
    )
    return state._replace(rotation=rotation, count=state.count + rolled.astype(jnp.int32)), info


def rolling_query(
    beta: float = 0.0,
    rho: float = 0.0,
    max_rotations: int = 1,
    method: str = "geodesic",
    joint: bool = False,
) -> RollingQuery:
    """RollingQ for any attention that exposes a class query and keys (paper, algorithm 1).

    `init(num_modalities, dim, num_heads=1)` makes the state; `observe(state, query, mean_keys,
    weight=None, axis_name=None)` adds a batch to it; `update(state, query=None)` rolls the heads
    where it is due and resets the sums, without a host synchronisation; in the forward pass the
    class query is `rotate(state.rotation, query)`.

    Args:
      beta: a head rolls when its imbalance is larger; 0 or more.
      rho: sharpness of the rebalance weights; 0 gives equal weights.
      max_rotations: the most a head rolls.
      method: "geodesic" or "svd", see `rotation_between`.
      joint: heads decide together, by the mean of their scores, in place of each by its own.

    Raises:
      UserError: an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, rollingq_jax as rq
      >>> roller = rq.rolling_query(beta=0.1, rho=1.0)
      >>> state = roller.init(num_modalities=2, dim=2)
      >>> query = jnp.array([[1.0, 0.0]])  # [H, d]
      >>> keys = jnp.array([[[[1.0, 0.0]]], [[[0.0, 1.0]]]])  # [M, B, H, d]
      >>> state, info = roller.update(roller.observe(state, query, keys), query)
      >>> bool(info.rolled[0])
      True
    """
    for name, value in (("beta", beta), ("rho", rho), ("max_rotations", max_rotations)):
        if isinstance(value, str) or not value >= 0:
            raise UserError(f"{name} is {value!r}; allowed: 0 or more")
    if method not in ("geodesic", "svd"):
        raise UserError(f"method is {method!r}; allowed: geodesic, svd")

    def update(
        state: RollingState, query: Array | None = None, scores: Array | None = None
    ) -> tuple[RollingState, RollInfo]:
        """Rolls where due and resets the sums.

        `query` `[H, d]` is the one in use now, rotated; None takes the observed mean. `scores`
        `[H, M]` are used in place of the observed ones.
        """
        check_arrays(_sizes(state), query=(query, "H d or None"), scores=(scores, "H M or None"))
        seen_scores, mean_keys, mean_query = scores_and_means(state)
        query = mean_query if query is None else jax.lax.stop_gradient(query)
        state, info = roll(
            state,
            query,
            mean_keys,
            seen_scores if scores is None else jax.lax.stop_gradient(scores),
            beta=beta,
            rho=rho,
            max_rotations=max_rotations,
            method=method,
            joint=joint,
        )
        return reset_sums(state), info

    return RollingQuery(init=init_state, observe=observe, update=update)
