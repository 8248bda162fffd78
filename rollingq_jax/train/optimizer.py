"""Learning rate and optimiser as the paper's runs have them (upstream `main.py`)."""

import math
from typing import Any

import jax.numpy as jnp
import optax


def learning_rate_schedule(
    learning_rate: float, *, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """lr s / W for s < W, then lr (1 + cos(pi (s - W) / (T - W))) / 2, and 0 from T on.

    Args:
      learning_rate: lr, at the end of the warm-up.
      warmup_steps: W.
      total_steps: T > W.
    """

    def schedule(step):
        step = jnp.minimum(jnp.asarray(step, jnp.float32), total_steps)
        warmup = step / max(warmup_steps, 1)
        cosine = 0.5 * (1 + jnp.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))
        return learning_rate * jnp.where(step < warmup_steps, warmup, cosine)

    return schedule


def make_optimizer(config: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
    """SGD with momentum and weight decay added to the gradient of every parameter; or Adam.

    Args:
      config: `config.optimizer`, checked.
      schedule: learning rate of each step.
    """
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    if config.name == "adam":
        return optax.chain(*clip, optax.adam(schedule))
    return optax.chain(
        *clip,
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(schedule, momentum=config.momentum or None),
    )
