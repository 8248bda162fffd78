"""RollingQ from top to bottom: scores, imbalance, anchor, the observed state and the roll.

Ni et al., section 4 and algorithm 1. Upstream computes the imbalance and decides in `train_func.py`
and `method.py`: it stops at an epoch's end, passes over the whole training set and decides from the
last batch. Here each training step adds what it has already computed to running sums (`observe`),
and `update` decides from those. All functions are pure and run under jit, vmap and scan.

Modalities are in alphabetical order. The functions of the method proper have no axis of heads;
`jax.vmap` adds it.
"""

import functools
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rollingq_jax.errors import UserError
from rollingq_jax.rotation import (
    HIGHEST,
    ZERO_NORM,
    as_float,
    compose,
    dot,
    normalize,
    rotation_between,
    safe_norm,
)
from rollingq_jax.shapes import check_arrays, laid_out_as, whole_sharding

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

    Examples:
      >>> query = jnp.array([[2.0, 0.0], [1.0, 1.0]])  # [B, d]
      >>> keys = jnp.array([[[1.0, 0.0], [3.0, 3.0]], [[0.0, 1.0], [0.0, 0.0]]])  # [M, B, d]
      >>> cosine_scores(query, keys).tolist()
      [1.0, 0.0]
    """
    check_arrays(query=(query, "Bd"), mean_keys=(mean_keys, "MBd"), weight=(weight, "B", None))
    cosines = dot(normalize(as_float(query))[None], normalize(as_float(mean_keys)))
    if weight is None:
        return jnp.sum(cosines, axis=-1) / max(len(query), 1)
    weight = weight.astype(cosines.dtype)
    total = jnp.sum(weight)
    return jnp.sum(cosines * weight[None], axis=-1) / jnp.where(total > 0, total, 1.0)


def attention_imbalance_rate(query: Array, keys_first: Array, keys_second: Array) -> Array:
    """AIR = c^1 - c^2 in [-2, 2] (paper section 4): `[B, d]` three times `-> []`.

    The trigger in `roll` compares its size, which `imbalance` is for any number of modalities.

    Raises:
      UserError: the shapes are not one `[B, d]`.

    Examples:
      >>> along, across = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
      >>> float(attention_imbalance_rate(2.0 * along, along, across))
      1.0
    """
    check_arrays(
        query=(query, "Bd"), keys_first=(keys_first, "Bd"), keys_second=(keys_second, "Bd")
    )
    first, second = cosine_scores(query, jnp.stack([keys_first, keys_second]))
    return first - second


def imbalance(scores: Array) -> Array:
    """max_m c^m - min_m c^m, which is |AIR| for two modalities: `[..., M] -> [...]`.

    Raises:
      UserError: there is no axis of modalities.

    Examples:
      >>> float(imbalance(jnp.array([0.75, -0.25, 0.5])))
      1.0
    """
    if not getattr(scores, "shape", ()) or scores.shape[-1] == 0:
        came = getattr(scores, "shape", type(scores).__name__)
        raise UserError(f"scores has shape {came}; allowed: an array [..., M]")
    return jnp.max(scores, axis=-1) - jnp.min(scores, axis=-1)


def imbalance_of_known(scores: Array, known: Array) -> Array:
    """`imbalance` `[H]` of scores `[H, M]` over the modalities where `known`, `[H, M]` or `[1, M]`;
    0 for fewer than two.

    What was never observed (mean key 0) has no score, and its 0 is no measure of anything.
    """
    known = jnp.broadcast_to(known, scores.shape)
    count = jnp.sum(known.astype(scores.dtype), axis=-1, keepdims=True)
    mean = jnp.sum(jnp.where(known, scores, 0.0), axis=-1, keepdims=True) / jnp.maximum(count, 1.0)
    return imbalance(jnp.where(known, scores, mean))


def rebalance_weights(scores: Array, rho: float | Array) -> Array:
    """alpha = softmax_m(-2 rho c^m): `[M] -> [M]`, sums to 1, equal weights at rho = 0.

    For two modalities this is the paper's alpha^1 = (1 - tanh(rho AIR)) / 2. (rho is upstream's
    flag `sigma`.)

    Raises:
      UserError: the scores are not `[M]`, or rho is negative or not finite.

    Examples:
      >>> rebalance_weights(jnp.array([0.5, 0.5, 0.5]), 2.0).round(3).tolist()
      [0.333..., 0.333..., 0.333...]
      >>> bool(rebalance_weights(jnp.array([1.0, 0.0]), 100.0)[1] > 0.99)  # to the neglected one
      True
    """
    check_arrays(scores=(scores, "M"))
    _check_number("rho", rho, ", and finite", finite=True)  # inf times a score of 0 is NaN
    scores = as_float(scores)
    return jax.nn.softmax(-2.0 * jnp.asarray(rho, scores.dtype) * scores)


def anchor_direction(mean_keys: Array, weights: Array) -> Array:
    """u = sum_m alpha^m mu^m / |mu^m|: `[M, d], [M] -> [d]`."""
    return jnp.sum(as_float(weights)[:, None] * normalize(as_float(mean_keys)), axis=0)


def has_anchor(query: Array, mean_keys: Array, weights: Array) -> Array:
    """True where the anchor is defined: `[d], [M, d], [M] -> []` bool.

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

    Examples:
      >>> keys = jnp.array([[5.0, 0.0], [0.0, 0.1]])  # a key's length does not matter
      >>> rebalance_anchor(jnp.array([2.0, 0.0]), keys, jnp.array([0.5, 0.5])).round(3).tolist()
      [1.414..., 1.414...]
    """
    check_arrays(query=(query, "d"), mean_keys=(mean_keys, "Md"), weights=(weights, "M"))
    query = as_float(query)
    anchor = safe_norm(query) * normalize(anchor_direction(mean_keys, weights), epsilon=ZERO_SUM)
    return jnp.where(has_anchor(query, mean_keys, weights), anchor, query)


class RollingState(NamedTuple):
    """State that evolves beside the parameters; no gradient, no weight decay, always checkpointed.

    H heads, M modalities, head width d. Everything is float32 but `count`.

    Examples:
      >>> state = init_state(num_modalities=2, dim=4, num_heads=3)
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


StateLike = RollingState | Mapping[str, Any] | Sequence[Any]


def init_state(num_modalities: int | None, dim: int | None, num_heads: int = 1) -> RollingState:
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
    state: StateLike,
    query: Array,
    mean_keys: Array | Mapping[str, Array],
    weight: Array | Mapping[str, Array] | None = None,
    axis_name: str | None = None,
    *,
    modalities: Sequence[str] = (),
) -> RollingState:
    """Adds one batch to the running sums.

    Args:
      state: the state so far.
      query: `[B, H, d]` or `[H, d]`, as the attention used it (already rotated).
      mean_keys: `[M, B, H, d]`, k_i^m, or `{m: [B, H, d]}`. All is converted to float32.
      weight: `[B]`, `[M, B]` or `{m: [B]}`; 0 leaves out padding, or a modality that a sample
        lacks. A sample of weight 0 may hold anything, NaN included.
      axis_name: mapped axis over which the increments are summed, so that every replica ends with
        the sums of the global batch.
      modalities: names in the order of the state, see `rolling_query`; a mapping's names are
        otherwise taken in alphabetical order.

    Returns:
      The new state; no gradient flows through it.

    Raises:
      UserError: a shape does not fit the state's M, H and d, or the names are others.
    """
    state = as_state(state)
    dims = check_arrays(state_dims(state), query=(query, "BHd", "Hd"))
    mean_keys = _stack_named("mean_keys", mean_keys, modalities, dims, "BHd")
    weights = _stack_named("weight", weight, modalities, dims, "B")
    check_arrays(dims, mean_keys=(mean_keys, "MBHd"), weight=(weights, "B", "MB", None))
    # float32 whatever came: with 64-bit types the state has to keep its dtypes under scan and cond.
    query, mean_keys = (
        jax.lax.stop_gradient(jnp.asarray(x, jnp.float32)) for x in (query, mean_keys)
    )
    num_modalities, batch_size = mean_keys.shape[:2]
    query = jnp.broadcast_to(query[None] if query.ndim == 2 else query, mean_keys.shape[1:])
    query = laid_out_as(query, mean_keys[0])
    if weights is None:
        weights = jnp.ones([batch_size], jnp.float32)
    weights = jnp.broadcast_to(jnp.atleast_2d(weights), (num_modalities, batch_size))
    weights = laid_out_as(weights, mean_keys[:, :, 0, 0])
    weights = jax.lax.stop_gradient(weights).astype(jnp.float32)
    query_weight = jnp.max(weights, axis=0)
    # Samples that do not count are set to 0 first: 0 times NaN would be NaN.
    mean_keys = jnp.where(weights[:, :, None, None] > 0, mean_keys, 0.0)
    query = jnp.where(query_weight[:, None, None] > 0, query, 0.0)
    cosines = dot(normalize(query)[None], normalize(mean_keys))  # [M, B, H]

    # A sum over the batch is whole on every device, also under a mesh with explicit axes.
    def total_over_batch(subscripts: str, weight: Array, x: Array) -> Array:
        whole = whole_sharding(x, x.ndim - 1)
        return jnp.einsum(subscripts, weight, x, precision=HIGHEST, out_sharding=whole)

    increments = {
        "key_sum": total_over_batch("mb,mbhd->mhd", weights, mean_keys),
        "cosine_sum": total_over_batch("mb,mbh->mh", weights, cosines),
        "weight_sum": jnp.sum(weights, axis=1),
        "query_sum": total_over_batch("b,bhd->hd", query_weight, query),
        "query_weight": jnp.sum(query_weight),
    }
    if axis_name is not None:  # before anything is decided, so that all replicas decide alike
        increments = jax.lax.psum(increments, axis_name)
    return state._replace(**{name: getattr(state, name) + x for name, x in increments.items()})


def scores_and_means(state: RollingState) -> tuple[Array, Array, Array]:
    """Scores `[H, M]`, mean keys `[H, M, d]` and mean query `[H, d]` of what was observed."""
    weight = jnp.where(state.weight_sum > 0, state.weight_sum, 1.0)
    total = jnp.where(state.query_weight > 0, state.query_weight, 1.0)
    scores = jnp.swapaxes(state.cosine_sum / weight[:, None], 0, 1)
    mean_keys = jnp.swapaxes(state.key_sum / weight[:, None, None], 0, 1)
    return scores, mean_keys, state.query_sum / total


def reset_sums(state: RollingState, when: bool | Array = True) -> RollingState:
    """The state with empty running sums where `when`; rotation and count as they were."""
    sums = {name: x for name, x in state._asdict().items() if name not in ("rotation", "count")}
    return state._replace(**jax.tree.map(lambda x: jnp.where(when, jnp.zeros_like(x), x), sums))


class ModalityNames(tuple[str, ...]):
    """Names of modalities, which are part of a program and not of its data."""


jax.tree_util.register_static(ModalityNames)


class RollInfo(NamedTuple):
    """Scores, decision and rotation of one `update`.

    Examples:
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
    reorthogonalized: Array  # [H] bool, whether R had drifted and is orthogonal again
    modalities: ModalityNames = ModalityNames()  # static

    def scalars(self) -> dict[str, Array]:
        """Flat and named values for any logger, each `[]`.

        `imbalance`, `angle`, `cosine/<m>` and `weight/<m>` are means over the heads, `rolled` is
        how many heads rolled; with several heads each has `imbalance/head_<h>`, too. A modality
        without a name is called by its number.

        Examples:
          >>> roller = rolling_query(modalities=("audio", "text"))
          >>> _, info = roller.update(roller.init(dim=4))
          >>> sorted(info.scalars())
          ['angle', 'cosine/audio', 'cosine/text', 'imbalance', 'rolled', ...]
        """
        heads, count = self.scores.shape
        names = self.modalities or [str(m) for m in range(count)]
        values = {
            "imbalance": jnp.mean(self.imbalance),
            "angle": jnp.mean(self.angle),
            "rolled": jnp.sum(self.rolled.astype(jnp.int32)),
        }
        for i, m in enumerate(names):
            values[f"cosine/{m}"] = jnp.mean(self.scores[:, i])
            values[f"weight/{m}"] = jnp.mean(self.weights[:, i])
        if heads > 1:
            values |= {f"imbalance/head_{h}": self.imbalance[h] for h in range(heads)}
        return values

    @property
    def mended(self) -> Array:
        """`reorthogonalized` by its former name."""
        return self.reorthogonalized


def split_by_layer(values: Array, layers: int) -> Array:
    """`[H, ...] -> [layers, H / layers, ...]`, the heads of one layer together."""
    return values.reshape(layers, -1, *values.shape[1:])


def lowest_layer_only(due: Array, layers: int) -> Array:
    """Of the heads that are due, those in the lowest layer that has one: `[H] -> [H]` bool."""
    together = split_by_layer(due, layers)
    lowest = jnp.argmax(jnp.any(together, axis=1))  # the first
    return (together & (jnp.arange(layers) == lowest)[:, None]).reshape(due.shape)


def named_layers_only(due: Array, layers: int, named: Sequence[int]) -> Array:
    """Of the heads that are due, those in the layers that are named: `[H] -> [H]` bool."""
    chosen = np.isin(np.arange(layers), named)
    return (split_by_layer(due, layers) & chosen[:, None]).reshape(due.shape)


def roll(
    state: RollingState,
    query: Array,
    mean_keys: Array,
    scores: Array,
    *,
    beta: float | Array,
    rho: float | Array,
    max_rotations: int | Array | None,
    method: str = "geodesic",
    joint: bool = False,
    layers: int = 1,
    roll_layers: str | Sequence[int] = "lowest first",
    when: bool | Array = True,
) -> tuple[RollingState, RollInfo]:
    """R <- R_new R, with R_new q_bar = q_b, in every head whose imbalance exceeds beta.

    Args:
      state: the state; its sums are neither read nor reset here.
      query: `[H, d]`, q_bar, already rotated.
      mean_keys: `[H, M, d]`, mu^m.
      scores: `[H, M]`, c^m.
      beta, rho, max_rotations, method, joint, layers, roll_layers: see `rolling_query`.
      when: `[]` bool; no head rolls where it is False.

    Returns:
      The state with its new rotations and counts, and what was decided.
    """
    query, mean_keys, scores = (jnp.asarray(x, jnp.float32) for x in (query, mean_keys, scores))
    if joint:  # one decision a layer: its heads get the mean of their scores
        together = split_by_layer(scores, layers)
        mean = jnp.mean(together, axis=1, keepdims=True)
        scores = jnp.broadcast_to(mean, together.shape).reshape(scores.shape)
    heads_imbalance = imbalance_of_known(scores, safe_norm(mean_keys) > ZERO_NORM)
    weights = jax.vmap(rebalance_weights, (0, None))(scores, rho)
    anchor = jax.vmap(rebalance_anchor)(query, mean_keys, weights)
    defined = jax.vmap(has_anchor)(query, mean_keys, weights)
    rolled = (heads_imbalance > beta) & defined & when
    if max_rotations is not None:
        rolled &= state.count < max_rotations
    if joint:  # and roll all or none, should one of them have no anchor or no rotation left
        together = split_by_layer(rolled, layers)
        every = jnp.all(together, axis=1, keepdims=True)
        rolled = jnp.broadcast_to(every, together.shape).reshape(rolled.shape)
    if roll_layers == "lowest first":
        rolled = lowest_layer_only(rolled, layers)
    elif roll_layers != "all":
        rolled = named_layers_only(rolled, layers, [int(i) for i in roll_layers])

    def rotated():
        new, drifted = compose(rotation_between(query, anchor, method), state.rotation)
        return jnp.where(rolled[:, None, None], new, state.rotation), drifted & rolled

    # The condition keeps O(d^2) products, and the SVD, out of the steps that do not roll.
    rotation, drifted = jax.lax.cond(
        jnp.any(rolled), rotated, lambda: (state.rotation, jnp.zeros_like(rolled))
    )
    x, y = normalize(query), normalize(anchor)  # arctan2, as arccos loses digits at small angles
    info = RollInfo(
        scores=scores,
        imbalance=heads_imbalance,
        weights=weights,
        anchor=anchor,
        angle=2.0 * jnp.arctan2(safe_norm(x - y), safe_norm(x + y)),
        rolled=rolled,
        reorthogonalized=drifted,
    )
    return state._replace(rotation=rotation, count=state.count + rolled.astype(jnp.int32)), info


class InitFn(Protocol):
    """`init` of `RollingQuery`."""

    def __call__(
        self, num_modalities: int | None = None, dim: int | None = None, num_heads: int = ...
    ) -> RollingState:
        """Makes the state."""


class ObserveFn(Protocol):
    """`observe` of `RollingQuery`."""

    def __call__(
        self,
        state: StateLike,
        query: Array,
        mean_keys: Array | Mapping[str, Array],
        weight: Array | Mapping[str, Array] | None = None,
        axis_name: str | None = None,
    ) -> RollingState:
        """Adds a batch to the state."""


class UpdateFn(Protocol):
    """`update` of `RollingQuery`."""

    def __call__(
        self, state: StateLike, query: Array | None = None, *, when: bool | Array = True
    ) -> tuple[RollingState, RollInfo]:
        """Rolls the heads that are due and resets the sums."""


class RollingQuery(NamedTuple):
    """The method as three pure functions, in the manner of `optax.GradientTransformation`.

    Examples:
      >>> init, observe, update = rolling_query(beta=0.1)
      >>> init(num_modalities=3, dim=8).rotation.shape
      (1, 8, 8)
    """

    init: InitFn
    observe: ObserveFn
    update: UpdateFn


def rolling_query(
    beta: float | Array = 0.0,
    rho: float | Array = 0.0,
    max_rotations: int | Array | None = 1,
    method: str = "geodesic",
    joint: bool = False,
    layers: int = 1,
    roll_layers: str | Sequence[int] = "lowest first",
    modalities: Sequence[str] | None = None,
) -> RollingQuery:
    """RollingQ for any attention that exposes a class query and keys (paper, algorithm 1).

    `init(num_modalities, dim, num_heads=1)` makes the state; `observe(state, query, mean_keys,
    weight=None, axis_name=None)` adds a batch to it; `update(state, query=None, *, when=True)`
    rolls the heads where it is due and resets the sums, without a host synchronization; in the
    forward pass the class query is `rotate(state.rotation, query)`.

    `beta`, `rho` and `max_rotations` may be traced. A grid of them is one `vmap` over a function
    that makes its roller, and a schedule is a roller made inside the step:
    `rolling_query(beta=schedule(step))`. Values that are traced are not checked.

    Args:
      beta: a head rolls when its imbalance is larger; 0 or more.
      rho: sharpness of the rebalance weights; 0 gives equal weights; finite.
      max_rotations: the most a head rolls; None sets no limit, 0 means never.
      method: "geodesic" or "svd", see `rotation_between`.
      joint: heads decide together, by the mean of their scores, instead of each by its own.
      layers: attention layers among which the heads are divided, the lowest layer's heads first.
        `joint` heads are those of one layer.
      roll_layers: "lowest first": at one update the lowest layer with a head that is due rolls and
        no other, since the inputs of those above change with it, and what was observed there no
        longer holds. "all": every layer whose heads are due. Numbers such as `(0, 2)`: these layers
        only, all that are due.
      modalities: names in the order of the state's M. `init` then needs no number, and `observe`
        takes mean keys (and weights by modality) as mappings with these names: an array, whose
        first axis could be any, is refused.

    Raises:
      UserError: an argument is out of range.

    Examples:
      >>> import jax.numpy as jnp, rollingq_jax as rq
      >>> roller = rq.rolling_query(beta=0.1, rho=1.0)
      >>> state = roller.init(num_modalities=2, dim=2)
      >>> query = jnp.array([[1.0, 0.0]])  # [H, d]
      >>> keys = jnp.array([[[[1.0, 0.0]]], [[[0.0, 1.0]]]])  # [M, B, H, d]
      >>> state, info = roller.update(roller.observe(state, query, keys), query)
      >>> bool(info.rolled[0])
      True
    """
    _check_options(beta, rho, max_rotations, method, layers, roll_layers)
    names = _check_names(modalities)

    def init(
        num_modalities: int | None = None, dim: int | None = None, num_heads: int = layers
    ) -> RollingState:
        """See `init_state`; the heads are those of all layers, by default one each."""
        if names and num_modalities not in (None, len(names)):
            raise UserError(
                f"num_modalities is {num_modalities!r}; allowed: {len(names)}, for "
                f"{', '.join(names)}"
            )
        state = init_state(len(names) or num_modalities, dim, num_heads)
        if num_heads % layers:
            raise UserError(
                f"num_heads is {num_heads}; allowed: a multiple of layers, which is {layers}"
            )
        return state

    def update(
        state: StateLike, query: Array | None = None, *, when: bool | Array = True
    ) -> tuple[RollingState, RollInfo]:
        """Rolls where due and resets the sums.

        `query` `[H, d]` is the one in use now, rotated; None takes the observed mean. Where `when`,
        a bool or `[]` bool that may be traced, is False, nothing rolls and the state stays as it
        is: a training step can call this every time and say when the check is due.
        """
        state = as_state(state)
        check_arrays(state_dims(state), query=(query, "Hd", None))
        check_arrays(None, "bool", when=(np.bool_(when) if isinstance(when, bool) else when, ""))
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
            roll_layers=roll_layers,
            when=when,
        )
        return reset_sums(rolled, when), info._replace(modalities=names)

    observe_named = functools.partial(observe, modalities=names) if names else observe
    return RollingQuery(init=init, observe=observe_named, update=update)


# What callers pass: refused in one line each, and the forms in which a state comes.


def _check_number(name: str, value: Any, more: str = "", finite: bool = False) -> None:
    """Refuses what is no number >= 0; one that is traced has no value to check."""
    if isinstance(value, jax.core.Tracer):
        fits = value.ndim == 0
    else:
        number = isinstance(value, numbers.Real) or getattr(value, "shape", None) == ()
        fits = number and bool(value >= 0) and not (finite and bool(value == math.inf))
    if not fits:
        raise UserError(f"{name} is {value!r}; allowed: 0 or more{more}")


def _check_options(
    beta: Any,
    rho: Any,
    max_rotations: Any,
    method: str,
    layers: int,
    roll_layers: str | Sequence[int],
) -> None:
    """Refuses what is out of range; see `rolling_query`."""
    _check_number("beta", beta)
    _check_number("rho", rho, ", and finite", finite=True)
    if max_rotations is not None:
        _check_number("max_rotations", max_rotations, ", or None for no limit")
    if method not in ("geodesic", "svd"):
        raise UserError(f"method is {method!r}; allowed: geodesic, svd")
    if not (isinstance(layers, numbers.Integral) and layers >= 1):
        raise UserError(f"layers is {layers!r}; allowed: an integer >= 1")
    if isinstance(roll_layers, str):
        known = roll_layers in ("lowest first", "all")
    else:
        known = bool(roll_layers) and all(i in range(layers) for i in roll_layers)
    if not known:
        raise UserError(
            f"roll_layers is {roll_layers!r}; allowed: 'lowest first', 'all', or numbers of layers "
            f"from 0 to {layers - 1}"
        )


def _check_names(modalities: Sequence[str] | None) -> ModalityNames:
    """The names as a tuple, empty where there are none."""
    if modalities is None:
        return ModalityNames()
    names = () if isinstance(modalities, str) else tuple(modalities)
    if len(names) < 2 or len(set(names)) < len(names) or not all(isinstance(m, str) for m in names):
        raise UserError(f"modalities is {modalities!r}; allowed: two or more names, no two alike")
    return ModalityNames(names)


STATE_AXES = {
    "rotation": "Hdd",
    "count": "H",
    "key_sum": "MHd",
    "cosine_sum": "MH",
    "weight_sum": "M",
    "query_sum": "Hd",
    "query_weight": "",
}


def as_state(state: StateLike) -> RollingState:
    """The state itself, or made from what a checkpoint library gives back without its type.

    Raises:
      UserError: it is neither a `RollingState`, nor its fields by name, nor all of them in order.
    """
    if isinstance(state, RollingState):
        return state
    if isinstance(state, Mapping) and set(state) == set(RollingState._fields):
        return RollingState(**state)
    if isinstance(state, list | tuple) and len(state) == len(RollingState._fields):
        return RollingState(*state)
    more = ""
    if isinstance(state, Mapping):
        more = f" with {', '.join(map(str, state)) or 'no field'}"
    raise UserError(
        f"state is a {type(state).__name__}{more}; allowed: what `init` made, or its fields "
        f"{', '.join(RollingState._fields)} by name or in that order"
    )


def state_dims(state: RollingState) -> chex.Dimensions:
    """M, H and d of a state: broadcasting would take a batch with another number of heads.

    Raises:
      UserError: its arrays do not have the axes of a state; says where a leading axis of devices
        comes from.
    """
    shapes = {name: tuple(getattr(array, "shape", ())) for name, array in state._asdict().items()}
    extra = {len(shapes[name]) - len(axes) for name, axes in STATE_AXES.items()}
    if extra == {0}:
        dims = chex.Dimensions()
        dims["MHd"] = shapes["key_sum"]
        if all(shapes[name] == dims[axes] for name, axes in STATE_AXES.items() if axes):
            return dims
    came = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    hint = "what `init` made, unchanged in shape"
    if extra == {1} and len({shape[0] for shape in shapes.values()}) == 1:
        hint = (
            "a state without the leading axis that `flax.jax_utils.replicate`, pmap or vmap gives: "
            "call this inside pmap or vmap, or take the axis off first "
            "(`flax.jax_utils.unreplicate`)"
        )
    raise UserError(f"state has the shapes {came}; allowed: {hint}")


def _stack_named(
    name: str, values: Any, names: Sequence[str], dims: chex.Dimensions, shape: str
) -> Any:
    """`{m: [B, ...]} -> [M, B, ...]`, by name; an array passes where there are no names."""
    if not isinstance(values, Mapping):
        if names and values is not None and np.ndim(values) > len(shape):
            came = getattr(values, "shape", type(values).__name__)
            raise UserError(
                f"{name} is one array {came} and the modalities have names; allowed: a mapping "
                f"with {', '.join(names)}"
            )
        return values
    names = names or sorted(values)
    if set(values) != set(names) or len(names) != dims.M:
        raise UserError(
            f"{name} has {', '.join(sorted(map(str, values))) or 'no modality'}; allowed: "
            f"{', '.join(names) if len(names) == dims.M else f'{dims.M} modalities'}"
        )
    check_arrays(dims, **{f"{name}[{m!r}]": (values[m], shape) for m in names})
    return jnp.stack([jnp.asarray(values[m], jnp.float32) for m in names])
