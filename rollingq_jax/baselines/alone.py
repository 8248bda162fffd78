"""Each modality's own answer in any fusion, and losses of these answers."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from rollingq_jax.baselines.hooks import StepContext, fused, presence
from rollingq_jax.baselines.unimodal import unimodal_logits
from rollingq_jax.models.spec import ModelSpec


def logits_alone(context: StepContext, modalities: Sequence[str]) -> Array:
    """u_m, `[M, B, C]` float32: see `hooks.fused`."""
    return jnp.stack([fused(context, (m,)) for m in modalities])


def losses_alone(context: StepContext, modalities: tuple[str, ...]) -> Array:
    """The task's loss of u_m, `[M, B]`; 0 where the example lacks the modality."""
    losses = jax.vmap(context.loss, (0, None))
    values = losses(logits_alone(context, modalities), context.batch["label"])
    return values * presence(context.out, modalities)


def part_logits(context: StepContext, spec: ModelSpec) -> dict[str, Array]:
    """z_m, `{m: [B, C]}`: parts of z (`unimodal_logits`) in concat and sum, u_m elsewhere."""
    if spec.head in ("concat", "sum"):
        return unimodal_logits(context.params, context.out, spec)
    return dict(zip(spec.modalities, logits_alone(context, spec.modalities), strict=True))
