"""What a training run carries from step to step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

from rollingq_jax.rolling import RollingQuery, RollingState


class TrainState(flax.struct.PyTreeNode):
    """The whole of a run: with the data, which follow from `step`, it determines all that comes.

    Attributes:
      step: `[]` int32, updates done; also the position in the data.
      params: the model's parameters, float32.
      opt_state: the optimiser's.
      rolling: rotations, counts and running sums; None for a fusion without a class query.
      rng: PRNG key `[]`, the same for the whole run; a step folds its number in.
      baseline: of a method of comparison that has one, such as PMR's prototypes; else `()`.
    """

    step: Array
    params: Any
    opt_state: Any
    rolling: RollingState | None
    rng: Array
    baseline: Any = ()

    @property
    def rotation(self) -> Array | None:
        """`[n H, d_h, d_h]` for n fusion layers, or None for a fusion without a class query."""
        return None if self.rolling is None else self.rolling.rotation


def create_state(
    model: Any,
    tx: optax.GradientTransformation,
    roller: RollingQuery,
    *,
    seed: int,
    batch: Any,
    baseline: Any = (),
) -> TrainState:
    """Initial state: parameters drawn from `seed`, R = I.

    Args:
      model: from `build_model`.
      tx: the optimiser.
      roller: from `rolling_query`.
      seed: of parameters and dropout.
      batch: one batch, for its shapes.
      baseline: initial state of a method of comparison.
    """
    init_rng, step_rng = jax.random.split(jax.random.key(seed))
    params = jax.jit(model.init)(init_rng, batch)["params"]
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        params=params,
        opt_state=tx.init(params),
        rolling=init_rolling(model, params, roller),
        rng=step_rng,
        baseline=baseline,
    )


def init_rolling(model: Any, params: Any, roller: RollingQuery) -> RollingState | None:
    """The rolling state that fits the model's class queries; None where it has none."""
    if not model.spec.scores_attention or len(model.spec.modalities) < 2:
        return None
    query = jax.eval_shape(lambda p: model.apply({"params": p}, None, method="class_query"), params)
    heads, head_dim = query.shape  # of the first fusion layer; all layers have as many
    return roller.init(len(model.spec.modalities), head_dim, model.spec.fusion_layers * heads)
