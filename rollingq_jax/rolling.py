"""When and how to rotate the query: an optax-style transformation `(init, observe, update)`.

Upstream stops at an epoch's end, passes over the whole training set and decides from the last batch
(`main.py`). Here each training step adds what it has already computed to running sums, and `update`
decides from those. All functions are pure and run under jit, vmap and scan.
"""

import math
import numbers
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rollingq_jax.errors import UserError
from rollingq_jax.imbalance import has_anchor, imbalance, rebalance_anchor, rebalance_weights
from rollingq_jax.observing import (
    RollingState,
    init_state,
    observe,
    reset_sums,
    scores_and_means,
    sizes,
)
from rollingq_jax.rotation import (
    HIGHEST,
    ZERO_NORM,
    mend,
    rotation_between,
    safe_norm,
    unit,
)
from rollingq_jax.shapes import check_arrays


class RollInfo(NamedTuple):
    """What one `update` saw and did.

    Example:
      >>> roller = rolling_query()
      >>> state, info = roller.update(roller.init(num_modalities=2, dim=4))  # nothing observed
      >>> info.rolled.tolist(), info.imbalance.tolist(), info.weights.tolist()
      ([False], [0.0], [[0.5, 0.5]])
    """

    scores: Array  # [H, M], c^m
    imbalance: Array  # [H], max_m c^m - min_m c^m, over the modalities that were observed
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


def by_layer(values: Array, layers: int) -> Array:
    """`[H, ...] -> [layers, H / layers, ...]`, the heads of one layer together."""
    return values.reshape(layers, -1, *values.shape[1:])


def of_lowest_layer(due: Array, layers: int) -> Array:
    """Of the heads that are due, those in the lowest layer that has one: `[H] -> [H]` bool."""
    together = by_layer(due, layers)
    lowest = jnp.argmax(jnp.any(together, axis=1))  # the first
    return (together & (jnp.arange(layers) == lowest)[:, None]).reshape(due.shape)


def imbalance_of_known(scores: Array, known: Array) -> Array:
    """`imbalance` `[H]` of scores `[H, M]` over the modalities where `known`, `[H, M]` or `[1, M]`;
    0 for fewer than two.

    What was never observed (mean key 0) has no score, and its 0 is no measure of anything.
    """
    known = jnp.broadcast_to(known, scores.shape)
    count = jnp.sum(known.astype(scores.dtype), axis=-1, keepdims=True)
    mean = jnp.sum(jnp.where(known, scores, 0.0), axis=-1, keepdims=True) / jnp.maximum(count, 1.0)
    return imbalance(jnp.where(known, scores, mean))


def roll(
    state: RollingState,
    query: Array,
    mean_keys: Array,
    scores: Array,
    *,
    beta: float,
    rho: float,
    max_rotations: int | None,
    method: str = "geodesic",
    joint: bool = False,
    layers: int = 1,
    when: bool | Array = True,
) -> tuple[RollingState, RollInfo]:
    """R <- R_new R, with R_new q_bar = q_b, in every head whose imbalance exceeds beta.

    Args:
      state: the state; its sums are neither read nor reset here.
      query: `[H, d]`, q_bar, already rotated.
      mean_keys: `[H, M, d]`, mu^m.
      scores: `[H, M]`, c^m.
      beta, rho, max_rotations, method, joint, layers: see `rolling_query`.
      when: `[]` bool; no head rolls where it is False.

    Returns:
      The state with its new rotations and counts, and what was decided.
    """
    query, mean_keys, scores = (jnp.asarray(x, jnp.float32) for x in (query, mean_keys, scores))
    if joint:
        together = by_layer(scores, layers)
        mean = jnp.mean(together, axis=1, keepdims=True)
        scores = jnp.broadcast_to(mean, together.shape).reshape(scores.shape)
    heads_imbalance = imbalance_of_known(scores, safe_norm(mean_keys) > ZERO_NORM)
    weights = jax.vmap(rebalance_weights, (0, None))(scores, rho)
    anchor = jax.vmap(rebalance_anchor)(query, mean_keys, weights)
    defined = jax.vmap(has_anchor)(query, mean_keys, weights)
    rolled = (heads_imbalance > beta) & defined & when
    if max_rotations is not None:
        rolled &= state.count < max_rotations
    if joint:
        together = by_layer(rolled, layers)
        every = jnp.all(together, axis=1, keepdims=True)
        rolled = jnp.broadcast_to(every, together.shape).reshape(rolled.shape)
    rolled = of_lowest_layer(rolled, layers)

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
    max_rotations: int | None = 1,
    method: str = "geodesic",
    joint: bool = False,
    layers: int = 1,
) -> RollingQuery:
    """RollingQ for any attention that exposes a class query and keys (paper, algorithm 1).

    `init(num_modalities, dim, num_heads=1)` makes the state; `observe(state, query, mean_keys,
    weight=None, axis_name=None)` adds a batch to it; `update(state, query=None, *, when=True)`
    rolls the heads where it is due and resets the sums, without a host synchronization; in the
    forward pass the class query is `rotate(state.rotation, query)`.

    Args:
      beta: a head rolls when its imbalance is larger; 0 or more.
      rho: sharpness of the rebalance weights; 0 gives equal weights; finite.
      max_rotations: the most a head rolls; None sets no limit, 0 means never.
      method: "geodesic" or "svd", see `rotation_between`.
      joint: heads decide together, by the mean of their scores, in place of each by its own.
      layers: attention layers among which the heads are divided, the lowest layer's heads first. At
        one update the lowest layer with a head that is due rolls and no other, since the inputs of
        those above change with it, and what was observed there no longer holds. `joint` heads are
        those of one layer.

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
        number = isinstance(value, numbers.Real) or hasattr(value, "dtype")
        if value is None and name == "max_rotations":
            continue
        if not number or value is None or not value >= 0:
            more = ", or None for no limit" if name == "max_rotations" else ""
            raise UserError(f"{name} is {value!r}; allowed: 0 or more{more}")
    if rho == math.inf:  # times a score of 0 it makes NaN
        raise UserError(f"rho is {rho!r}; allowed: 0 or more, and finite")
    if method not in ("geodesic", "svd"):
        raise UserError(f"method is {method!r}; allowed: geodesic, svd")
    if not (isinstance(layers, numbers.Integral) and layers >= 1):
        raise UserError(f"layers is {layers!r}; allowed: an integer >= 1")

    def init(num_modalities: int, dim: int, num_heads: int = layers) -> RollingState:
        """See `init_state`; the heads are those of all layers, by default one each."""
        state = init_state(num_modalities, dim, num_heads)
        if num_heads % layers:
            raise UserError(
                f"num_heads is {num_heads}; allowed: a multiple of layers, which is {layers}"
            )
        return state

    def update(
        state: RollingState, query: Array | None = None, *, when: bool | Array = True
    ) -> tuple[RollingState, RollInfo]:
        """Rolls where due and resets the sums.

        `query` `[H, d]` is the one in use now, rotated; None takes the observed mean. Where `when`,
        a bool or `[]` bool that may be traced, is False, nothing rolls and the state stays as it
        is: a training step can call this every time and say when the check is due.
        """
        check_arrays(sizes(state), query=(query, "H d or None"))
        check_arrays(when=(np.bool_(when) if isinstance(when, bool) else when, "", "bool"))
        scores, mean_keys, mean_query = scores_and_means(state)
        rolled, info = roll(
            state,
            mean_query if query is None else jax.lax.stop_gradient(query),
            mean_keys,
            scores,
            beta=beta,
            rho=rho,
            max_rotations=max_rotations,
            method=method,
            joint=joint,
            layers=layers,
            when=when,
        )
        return reset_sums(rolled, when), info

    return RollingQuery(init=init, observe=observe, update=update)
