"""Learning rate and optimiser as the paper's runs have them (upstream `main.py`)."""

from typing import Any

import jax.numpy as jnp
import optax
from jax import Array


def learning_rate_schedule(
    learning_rate: float,
    steps_per_epoch: int,
    epochs: int,
    *,
    warmup_epochs: float = 2.5,
    extra_step: bool = False,
    clip: bool = True,
) -> optax.Schedule:
    """Learning rate of optimiser step t = 0, 1, ...: linear warm-up, then one cosine.

    With W = int(warmup_epochs * steps_per_epoch) and T = epochs * steps_per_epoch,

        lr(s) = learning_rate s / W                                      for s < W
        lr(s) = learning_rate (1 + cos(pi (s - W) / (T - W))) / 2        after that.

    It is `get_cosine_schedule_with_warmup` of the transformers library, which upstream uses.

    Args:
      learning_rate: the highest.
      steps_per_epoch: optimiser steps in an epoch.
      epochs: their number.
      warmup_epochs: epochs of warm-up; the paper's 2.5 may end inside an epoch.
      extra_step: upstream steps its schedule once more at each epoch's end, so that
        s = t + floor(t / steps_per_epoch); otherwise s = t.
      clip: whether the rate stays at 0 from s = T. Upstream's extra steps go beyond T, where its
        cosine rises again.
    """
    warmup, total = int(warmup_epochs * steps_per_epoch), steps_per_epoch * epochs

    def schedule(count: Any) -> Array:
        step = jnp.asarray(count, jnp.int32)
        if extra_step:
            step = step + step // steps_per_epoch
        step = step.astype(jnp.float32)
        progress = (step - warmup) / max(1, total - warmup)
        if clip:
            progress = jnp.minimum(progress, 1.0)
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return learning_rate * jnp.where(step < warmup, step / max(1, warmup), cosine)

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
