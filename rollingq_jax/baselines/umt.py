"""UMT: each encoder is drawn to that of a model which was trained on its modality alone.

Du et al., "On Uni-Modal Feature Learning in Supervised Multi-Modal Learning" (ICML 2023), its
Uni-Modal Teacher. With x_m the modality's class token and x_m' that of its teacher,

    loss = CE(z) + weight sum_m mean((x_m - x_m')^2)

the mean over the token's numbers. A run trains its teachers first, with its own configuration but
for the fusion, in `teachers/<m>` of its folder, and takes the best checkpoint of each by
validation. Their encoders are part of the run's state from then on, and do not learn.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rollingq_jax.baselines.hooks import (
    Baseline,
    StepContext,
    class_tokens,
    encoder_part,
    presence,
)


def teachers_part(params: Mapping[str, Any], modalities: tuple[str, ...]) -> dict[str, Any]:
    """A copy of the encoders and their norms, by name."""
    parts = {name: x for m in modalities for name, x in encoder_part(params, m).items()}
    return jax.tree.map(jnp.copy, parts)


def umt_baseline(modalities: tuple[str, ...], weight: float) -> Baseline:
    """The distillation in a training step; its state is the teachers' encoders.

    Args:
      modalities: names.
      weight: of the term.
    """

    def loss(state: Any, context: StepContext) -> Array:
        taught = jax.lax.stop_gradient({**context.params, **state})
        _, out = context.apply(taught)  # of which only the encoders' part is computed
        theirs, ours = class_tokens(out, modalities), class_tokens(context.out, modalities)
        gaps = jnp.stack([jnp.mean((ours[m] - theirs[m]) ** 2, axis=-1) for m in modalities])
        return weight * jnp.sum(gaps * presence(context.out, modalities), axis=0)

    return Baseline(
        init=lambda params, examples: teachers_part(params, modalities), loss=loss, teachers=True
    )
