"""G-Blending: the joint and the unimodal losses, weighed by how much each head generalizes.

Wang et al., "What Makes Training Multi-modal Classification Networks Hard?" (CVPR 2020). Each head
k, one a modality and the joint one last, has its loss T on training and V on validation data at a
start n and an end N:

    G_k = V_n - V_N        O_k = (V_N - T_N) - (V_n - T_n)        w_k = (G_k / O_k^2) / sum
    loss = w_joint CE(z) + sum_m w_m CE(z_m)

with z_m the probe's answer, here with its gradient to the encoder (as in `joint`). A head whose
validation loss rises gets 0, and all get the same where none falls.

Offline: train each modality and the joint model on its own, read T and V at the first and the last
epoch from their `metrics.jsonl`, and give `blending_weights` of them as `gblend_weights`. Online,
with `gblend_every` epochs: before every so many, each head is trained alone for as long from a copy
of the state, without rolls, and the weights made of these losses hold until the next time.
Rows of validation have them as `loss_weight/<m>` and `loss_weight/joint`.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from rollingq_jax.baselines.hooks import Baseline, Setting, StepContext
from rollingq_jax.baselines.joint import probe_losses
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


def weigh_heads(
    state: Any, train_alone: Callable[[Any, int], Any], losses: Callable[[Any], tuple[Array, Array]]
) -> Array:
    """w_k, `[K]`, of heads that are each trained alone from the same state.

    Args:
      state: where each of them starts.
      train_alone: `(state, k) ->` the state after head k's training; leaves its argument as it is.
      losses: of a state, the heads' mean losses on training and on validation data, `[K]` each.
    """
    train_start, valid_start = losses(state)
    ends = [losses(train_alone(state, k)) for k in range(len(train_start))]
    train_end = jnp.stack([train[k] for k, (train, _) in enumerate(ends)])
    valid_end = jnp.stack([valid[k] for k, (_, valid) in enumerate(ends)])
    return blending_weights(train_start, valid_start, train_end, valid_end)


def gblend_baseline(setting: Setting) -> Baseline:
    """Weighted losses in a training step; weights that are made anew are its state.

    Raises:
      ConfigError: there are more or fewer weights, or some although they are made anew.
    """
    modalities = setting.spec.modalities
    weights, every_epochs = setting.config.gblend_weights, setting.config.gblend_every
    count = len(modalities) + 1
    if weights and every_epochs:
        raise ConfigError(
            f"config.baseline.gblend_weights is {tuple(weights)!r} and gblend_every is "
            f"{every_epochs}, which makes them; allowed: one of both"
        )
    if len(weights) not in (0, count):
        raise ConfigError(
            f"config.baseline.gblend_weights is {tuple(weights)!r}; allowed for the modalities "
            f"{', '.join(modalities)}: {count} numbers, one each and the joint one last, or none"
        )
    fixed = jnp.asarray(weights or (1 / count,) * count, jnp.float32)

    def loss(state: Any, context: StepContext) -> Array:
        losses = probe_losses(context, modalities)
        blend = state if every_epochs else fixed
        return (blend[-1] - 1) * context.losses + jnp.einsum("m,mb->b", blend[:-1], losses)

    if not every_epochs:
        return Baseline(loss=loss)
    return Baseline(init=lambda *_: jnp.copy(fixed), loss=loss, blend_every=every_epochs)
