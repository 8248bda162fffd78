"""CGGM: encoders of the modalities that improve least get the largest gradient.

Guo et al., "Classifier-guided Gradient Modulation for Enhanced Multimodal Learning" (NeurIPS 2024),
its magnitudes. With eps_m the accuracy of a classifier that sees modality m alone, and d_m the
change of eps_m in a step,

    B_m = (sum_n d_n - d_m) / sum_n d_n,    gradient of encoder m times rho B_m

The classifiers are the probes. The authors compare two batches' accuracies, whose difference is
mostly chance, and divide by a sum that may be 0 or negative: here eps_m is an exponential mean over
steps, B_m lies in [0, 2], and is (M - 1) / M, its mean over the modalities, where the sum is 0.
Their term for the gradients' directions reads the classifiers' weights instead of gradients, and is
not here.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from rollingq_jax.baselines.hooks import (
    Baseline,
    RunningMean,
    Setting,
    StepContext,
    presence,
    scale_encoders,
)

EPSILON = 1e-8


def balance(before: Array, after: Array) -> Array:
    """B_m, `[M]`, from eps_m `[M]` before and after a step."""
    change = after - before
    total, count = jnp.sum(change), change.shape[0]
    some = jnp.abs(total) > EPSILON
    found = (total - change) / jnp.where(some, total, 1.0)
    return jnp.where(some, jnp.clip(found, 0.0, 2.0), (count - 1) / count)


def observe(accuracies: RunningMean, current: Array, decay: float) -> RunningMean:
    """eps_m with one step more: the first accuracy is taken as it is."""
    mixed = decay * accuracies.mean + (1 - decay) * current
    mean = jnp.where(accuracies.steps > 0, mixed, current)
    return RunningMean(mean, accuracies.steps + 1)


def cggm_baseline(setting: Setting) -> Baseline:
    """CGGM's magnitudes in a training step."""
    config, modalities = setting.config, setting.spec.modalities

    def observed(state: RunningMean, context: StepContext) -> RunningMean:
        answers = jnp.stack([jnp.argmax(context.out["probe_logits"][m], -1) for m in modalities])
        weight = presence(context.out, modalities) * context.weight[None]
        right = (answers == context.batch["label"][None]).astype(jnp.float32)
        total, count = context.reduce((jnp.sum(right * weight, 1), jnp.sum(weight, 1)))
        return observe(state, total / jnp.maximum(count, 1.0), config.cggm_decay)

    def gradient_args(state: RunningMean, context: StepContext) -> dict[str, Any]:
        after = observed(state, context).mean
        before = jnp.where(state.steps > 0, state.mean, after)
        factors = config.cggm_rho * balance(before, after)
        return {"factors": jnp.where(context.step < setting.active_steps, factors, 1.0)}

    return Baseline(
        init=lambda *_: RunningMean.of_nothing(len(modalities)),
        update=observed,
        transform=scale_encoders(modalities),
        gradient_args=gradient_args,
        whole_batch=True,
    )
