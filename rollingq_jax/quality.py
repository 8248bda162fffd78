"""The quality bias: attention to a modality follows a signal of how good it is in the sample.

The norm bias reads norms: white noise pulls a modality's tokens apart, so that their mean is short.
With n_i^m the norm of sample i's mean token of modality m, and nu^m and tau^m its mean and standard
deviation over recent training samples, each logit of the class token over the tokens of m is raised
by

  gamma (n_i^m - nu^m) / tau^m,

and that over the class token itself by 0: the mean over samples is 0 for every modality, and only
the sample decides. The statistics are state, like the rotation: no gradient, no weight decay. Not
part of the paper.

With the second signal n is instead the energy of the modality's probe, log sum_c exp z_c (Liu et
al., "Energy-based Out-of-distribution Detection", 2020), which is high where the modality by itself
says something of the class.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rollingq_jax.attention import mean_token
from rollingq_jax.shapes import check_arrays

# Of the sums, at each step: the statistics are those of the last 50 batches or so, since norms
# change while the encoders learn.
DECAY = 0.98
FLOOR = 1e-6  # of tau over the root mean square of n: below it n does not vary, and says nothing
COLLECTION = "quality"


class QualityState(NamedTuple):
    """Exact weighted sums over training samples, a step's weight times `DECAY` at each later one.

    M modalities, in alphabetical order; float32.

    Examples:
      >>> state = observe(init(2), jnp.array([[1.0, 3.0], [2.0, 2.0]]))
      >>> center, scale = statistics(state)
      >>> center.tolist(), scale.tolist()
      ([2.0, 2.0], [1.0, 0.0])
    """

    weight: Array  # [M], sum_i w_i
    total: Array  # [M], sum_i w_i n_i
    squares: Array  # [M], sum_i w_i n_i^2


def init(num_modalities: int) -> QualityState:
    """State in which nothing was observed: every bias is 0."""
    return QualityState(*(jnp.zeros([num_modalities], jnp.float32) for _ in range(3)))


def observe(
    state: QualityState, norms: Array, weight: Array | None = None, axis_name: str | None = None
) -> QualityState:
    """Adds one batch to the sums.

    Args:
      state: the state so far.
      norms: `[M, B]`, n_i^m.
      weight: `[B]` or `[M, B]`; 0 leaves out padding, or a modality that a sample lacks. A sample
        of weight 0 may hold anything, NaN included.
      axis_name: mapped axis over which the increments are summed, so that every replica ends with
        the sums of the global batch.

    Returns:
      The new state; no gradient flows through it. A modality that no sample of the batch has keeps
      its sums.

    Raises:
      UserError: a shape does not fit.
    """
    dims = check_arrays(sums=(state.weight, "M"))
    check_arrays(dims, norms=(norms, "MB"), weight=(weight, "B", "MB", None))
    weight = jnp.ones(norms.shape[1:], jnp.float32) if weight is None else weight
    weight = jnp.broadcast_to(jnp.atleast_2d(jnp.asarray(weight, jnp.float32)), norms.shape)
    norms = jnp.where(weight > 0, jnp.asarray(norms, jnp.float32), 0.0)
    added = tuple(jnp.sum(x, axis=1) for x in (weight, weight * norms, weight * norms**2))
    added = jax.lax.stop_gradient(added)
    if axis_name is not None:
        added = jax.lax.psum(added, axis_name)
    kept = jnp.where(added[0] > 0, DECAY, 1.0)
    return QualityState(*(kept * old + new for old, new in zip(state, added, strict=True)))


def statistics(state: QualityState) -> tuple[Array, Array]:
    """nu `[M]` and tau `[M]`; tau is 0 where norms do not vary, or none was observed."""
    weight = jnp.where(state.weight > 0, state.weight, 1.0)
    center, square = state.total / weight, state.squares / weight
    variance = square - center**2
    return center, jnp.where(variance > FLOOR * square, jnp.sqrt(jnp.maximum(variance, 0.0)), 0.0)


def standardize(norms: Array, center: Array, scale: Array) -> Array:
    """(n - nu) / tau `[..., M]`, 0 where tau is 0."""
    center, scale = (jnp.broadcast_to(x, norms.shape) for x in (center, scale))
    varies = scale > 0
    return jnp.where(varies, (norms - center) / jnp.where(varies, scale, 1.0), 0.0)


def token_norms(tokens: Sequence[Array], masks: Sequence[Array | None]) -> Array:
    """n_i^m = |mean of the sample's real tokens| `[B, M]` float32, without a gradient.

    Args:
      tokens: `M x [B, L_m, d]`, after the encoder's final norm, the modality's class token included
        as in its mean key.
      masks: `M x [B, L_m]` or None; n is 0 where no token is real.
    """
    norms = [
        jnp.linalg.norm(jax.lax.stop_gradient(mean_token(x, mask)).astype(jnp.float32), axis=-1)
        for x, mask in zip(tokens, masks, strict=True)
    ]
    return jnp.stack(norms, axis=-1)


def probe_energy(logits: Mapping[str, Array], present: Mapping[str, Array | None]) -> Array:
    """log sum_c exp z_c of each modality's probe: `[B, M]` float32, without a gradient.

    Args:
      logits: `{m: [B, C]}`.
      present: `{m: [B] bool or None}`; the energy is 0 where a sample lacks the modality.
    """
    energies = []
    for m in sorted(logits):
        energy = jax.nn.logsumexp(jax.lax.stop_gradient(logits[m]).astype(jnp.float32), axis=-1)
        has = present[m]
        energies.append(energy if has is None else jnp.where(has, energy, 0.0))
    return jnp.stack(energies, axis=-1)


def logit_bias(bias: Array, lengths: Sequence[int]) -> Array:
    """The modalities' biases `[B, M]` on their tokens: `[B, 1 + sum L_m]`, the class token's 0."""
    zero = jnp.zeros_like(bias[:, :1])
    parts = [
        jnp.broadcast_to(bias[:, i : i + 1], (bias.shape[0], n)) for i, n in enumerate(lengths)
    ]
    return jnp.concatenate([zero, *parts], axis=1)


def collection(state: QualityState) -> dict[str, Any]:
    """What the model reads of the state, as the Flax collection `quality`."""
    center, scale = statistics(state)
    return {"fusion": {"center": center, "scale": scale}}


def model_variables(
    params: Any, state: QualityState | None, batch_stats: Any = None
) -> dict[str, Any]:
    """A model's variables: its parameters, with a norm bias the statistics, and running averages
    over batches where encoders have them."""
    more = {} if state is None else {COLLECTION: collection(state)}
    return {"params": params} | more | ({} if batch_stats is None else {"batch_stats": batch_stats})
