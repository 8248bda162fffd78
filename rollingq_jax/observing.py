"""What is observed of the class query and the keys between two rolls: running weighted sums.

Upstream passes over the whole training set once more at an epoch's end. Here a step adds what it
has already computed.
"""

import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rollingq_jax.errors import UserError
from rollingq_jax.rotation import HIGHEST, dot, unit
from rollingq_jax.shapes import check_arrays


class RollingState(NamedTuple):
    """What evolves beside the parameters; no gradient, no weight decay, always checkpointed.

    H heads, M modalities, head width d. Everything is float32 but `count`.

    Example:
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


AXES = {  # of the arrays of a state
    "rotation": "Hdd",
    "count": "H",
    "key_sum": "MHd",
    "cosine_sum": "MH",
    "weight_sum": "M",
    "query_sum": "Hd",
    "query_weight": "",
}


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
      mean_keys: `[M, B, H, d]`, k_i^m. Both are converted to float32.
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
        sizes(state),
        query=(query, "B H d or H d"),
        mean_keys=(mean_keys, "M B H d"),
        weight=(weight, "B or M B or None"),
    )
    # float32 whatever came: with 64-bit types the state has to keep its dtypes under scan and cond.
    query, mean_keys = (
        jax.lax.stop_gradient(jnp.asarray(x, jnp.float32)) for x in (query, mean_keys)
    )
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


def sizes(state: RollingState) -> dict[str, int]:
    """M, H and d of a state: broadcasting would take a batch with another number of heads.

    Raises:
      UserError: it is no state, or its arrays do not have the axes of one; says where a leading
        axis of devices comes from.
    """
    if not isinstance(state, RollingState):
        raise UserError(f"state is a {type(state).__name__}; allowed: what `init` made")
    shapes = {name: tuple(getattr(array, "shape", ())) for name, array in state._asdict().items()}
    extra = {len(shapes[name]) - len(axes) for name, axes in AXES.items()}
    if extra == {0}:
        known = dict(zip("MHd", shapes["key_sum"], strict=True))
        if all(shapes[n] == tuple(known[axis] for axis in axes) for n, axes in AXES.items()):
            return known
    came = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    hint = "what `init` made, unchanged in shape"
    if extra == {1} and len({shape[0] for shape in shapes.values()}) == 1:
        hint = (
            "a state without the leading axis that `flax.jax_utils.replicate`, pmap or vmap gives: "
            "call this inside pmap or vmap, or take the axis off first "
            "(`flax.jax_utils.unreplicate`)"
        )
    raise UserError(f"state has the shapes {came}; allowed: {hint}")


def scores_and_means(state: RollingState) -> tuple[Array, Array, Array]:
    """Scores `[H, M]`, mean keys `[H, M, d]` and mean query `[H, d]` of what was observed."""
    weight = jnp.where(state.weight_sum > 0, state.weight_sum, 1.0)
    total = jnp.where(state.query_weight > 0, state.query_weight, 1.0)
    scores = jnp.swapaxes(state.cosine_sum / weight[:, None], 0, 1)
    mean_keys = jnp.swapaxes(state.key_sum / weight[:, None, None], 0, 1)
    return scores, mean_keys, state.query_sum / total


def reset_sums(state: RollingState, when: bool | Array = True) -> RollingState:
    """The state with empty running sums where `when`; rotation and count as they were."""
    names = ("key_sum", "cosine_sum", "weight_sum", "query_sum", "query_weight")
    sums = {name: getattr(state, name) for name in names}
    return state._replace(
        **{name: jnp.where(when, jnp.zeros_like(x), x) for name, x in sums.items()}
    )
