"""UMT: each encoder is drawn to that of a model which was trained on its modality alone.

Du et al., "On Uni-Modal Feature Learning in Supervised Multi-Modal Learning" (ICML 2023), its
Uni-Modal Teacher. With x_m the modality's class token and x_m' that of its teacher,

    loss = CE(z) + weight sum_m mean((x_m - x_m')^2)

the mean over the token's numbers. A run trains its teachers first, with its own configuration but
for the fusion, in `teachers/<m>` of its folder, and takes the best checkpoint of each by
validation. Their encoders are part of the run's state from then on, and do not learn.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rollingq_jax.baselines.hooks import (
    Baseline,
    Setting,
    StepContext,
    class_tokens,
    encoder_parts,
    presence,
)
from rollingq_jax.errors import ConfigError


def umt_baseline(setting: Setting) -> Baseline:
    """The distillation in a training step; its state is the teachers' encoders and their norms.

    Raises:
      ConfigError: encoders see more than their modality, or have a state of their own.
    """
    modalities = setting.spec.modalities
    if setting.spec.fusion == "mbt":
        raise ConfigError(
            "config.baseline.name is 'umt', whose teachers see one modality each, and "
            "config.model.fusion is 'mbt', whose class tokens have seen all; allowed: other fusions"
        )
    if setting.spec.has_batch_stats:
        raise ConfigError(
            "config.baseline.name is 'umt', which keeps its teachers' parameters, and an encoder "
            "is of kind 'resnet18', whose running averages it does not keep; allowed: other kinds"
        )

    def loss(state: Any, context: StepContext) -> Array:
        taught = jax.lax.stop_gradient({**context.params, **state})
        _, out = context.apply(taught)  # of which only the encoders' part is computed
        theirs, ours = class_tokens(out, modalities), class_tokens(context.out, modalities)
        gaps = jnp.stack([jnp.mean((ours[m] - theirs[m]) ** 2, axis=-1) for m in modalities])
        return setting.config.umt_weight * jnp.sum(gaps * presence(context.out, modalities), axis=0)

    return Baseline(
        # A copy: a step that donates its state may not be given the parameters' arrays twice.
        init=lambda params, _: jax.tree.map(jnp.copy, encoder_parts(params, modalities)),
        loss=loss,
        teachers=True,
    )
