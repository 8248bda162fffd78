"""G-Blending: the joint and the unimodal losses, weighed by how much each head generalizes.

Wang et al., "What Makes Training Multi-modal Classification Networks Hard?" (CVPR 2020). Each head
k, one a modality and the joint one last, has its loss T on training and V on validation data at a
start n and an end N:

    G_k = V_n - V_N        O_k = (V_N - T_N) - (V_n - T_n)        w_k = (G_k / O_k^2) / sum
    loss = w_joint CE(z) + sum_m w_m CE(z_m)

with z_m the probe's answer, here with its gradient to the encoder (as in `joint`). Offline: train
each modality and the joint model on its own, read T and V at the first and the last epoch from
their `metrics.jsonl`, and give `blending_weights` of them as `gblend_weights`. A head whose
validation loss rises gets 0, and all get the same where none falls. The online form, which trains
each head from a copy of the model every few epochs, is not here.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from rollingq_jax.baselines.hooks import Baseline, StepContext
from rollingq_jax.baselines.joint import unimodal_losses
from rollingq_jax.errors import ConfigError

EPSILON = 1e-8


def blending_weights(
    train_start: Array, valid_start: Array, train_end: Array, valid_end: Array
) -> Array:
    """w_k, `[K]`, of each head's mean losses, `[K]` each.

    Examples:
      >>> start = jnp.asarray([1.8, 1.8, 1.8])
      >>> train_end, valid_end = jnp.asarray([1.0, 1.5, 0.8]), jnp.asarray([1.4, 1.6, 1.3])
      >>> weights = blending_weights(start, start, train_end, valid_end)
      >>> [f"{weight:.3f}" for weight in weights.tolist()]
      ['0.102', '0.816', '0.082']
    """
    gain = jnp.maximum(valid_start - valid_end, 0.0)
    overfit = (valid_end - train_end) - (valid_start - train_start)
    weights = gain / (overfit**2 + EPSILON)
    total = jnp.sum(weights)
    even = jnp.full_like(weights, 1 / weights.shape[0])
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), even)


def gblend_baseline(modalities: tuple[str, ...], weights: tuple[float, ...]) -> Baseline:
    """Fixed weights in a training step.

    Args:
      modalities: names.
      weights: one a modality, in alphabetical order, and the joint one last; empty: all the same,
        1 / (M + 1).

    Raises:
      ConfigError: there are more or fewer.
    """
    count = len(modalities) + 1
    if len(weights) not in (0, count):
        raise ConfigError(
            f"config.baseline.gblend_weights is {tuple(weights)!r}; allowed for the modalities "
            f"{', '.join(modalities)}: {count} numbers, one each and the joint one last, or none"
        )
    *alone, joint = weights or (1 / count,) * count

    def loss(state: Any, context: StepContext) -> Array:
        label = context.batch["label"]
        losses = unimodal_losses(context.params, context.out, label, modalities, context.loss)
        return (joint - 1) * context.losses + jnp.einsum("m,mb->b", jnp.asarray(alone), losses)

    return Baseline(loss=loss)
