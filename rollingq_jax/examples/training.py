"""The loop of `plain_jax.py`, for the examples whose point is another attention."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import Array

from rollingq_jax.examples.toy_data import Data, batches, report
from rollingq_jax.rolling import RollingQuery, RollingState

# Class query [B, H, d_h] or [H, d_h], mean keys [M, B, H, d_h] and, optionally, their weights.
Seen = tuple[Array, Array] | tuple[Array, Array, Array]
Forward = Callable[..., Any]  # params, batch, rotation -> logits [B, C], Seen; a module's apply


def fit(
    forward: Forward,
    params: Any,
    roller: RollingQuery,
    rolling: RollingState,
    data: Data,
    num_epochs: int,
    batch_size: int,
) -> tuple[Any, RollingState, list[float]]:
    """Trains with Adam; the heads roll at each epoch's end, where it is due.

    Args:
      forward: returns the logits `[B, C]`, and what the roller observes.
      params, rolling: where to start.
      roller: decides when to rotate.
      data: columns of N examples.
      num_epochs, batch_size: how long.

    Returns:
      Parameters, rolling state and each epoch's last loss.
    """
    tx = optax.adam(5e-3)

    @jax.jit
    def train_step(params: Any, opt_state: Any, rolling: Any, batch: Any) -> tuple[Any, ...]:
        def loss_fn(params: Any) -> tuple[Array, Seen]:
            logits, seen = forward(params, batch, rolling.rotation)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return loss.mean(), seen

        (loss, seen), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, roller.observe(rolling, *seen), loss

    opt_state, losses = tx.init(params), []
    for epoch in range(num_epochs):
        for batch in batches(data, batch_size, epoch):
            params, opt_state, rolling, loss = train_step(params, opt_state, rolling, batch)
        rolling, info = jax.jit(roller.update)(rolling)
        losses.append(report(epoch, loss, info))
    return params, rolling, losses
