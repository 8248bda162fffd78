"""AGM: each modality's part of the logits gets a gradient by how far it is ahead or behind.

Li et al., "Boosting Multi-modal Model Performance with Adaptive Gradient Modulation" (ICCV 2023).
With z(S) the logits of the fusion that sees the modalities S and z that of all M, the Shapley part
of modality m is, for two modalities and in general,

    z_1 = (z + z({1}) - z({2})) / 2,    z_m = sum_S |S|! (M - |S| - 1)! / M! (z(S + m) - z(S)),

S over the sets without m and z(none) = 0, so that sum_m z_m = z. Its mean loss and its factor are

    s_m = -mean_b log max(softmax(z_m)_y, 1e-8)
    k_m = exp(alpha min(r_m(S) - r_m(s), 10)),    r_m(s) = exp(mean_{n != m} s_n - s_m)

S_m being the mean of s_m over all steps before (in the first step k_m = 1); the mean over the
others is the extension to M > 2. k_m multiplies the gradient of CE(z) in z_m. The loss

    CE(z) + sum_m (k_m - 1) <g, z_m>,    g = softmax(z) - y and k_m constants,

has that gradient. z(S) are without dropout and from the encoders' one pass; the authors run their
encoders again, on zeros instead of the modality.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rollingq_jax.baselines.hooks import (
    Baseline,
    RunningMean,
    Setting,
    StepContext,
    fused,
    mean_of_others,
    probability_of_label,
)

MOST = 10.0  # of the difference of ratios, as the authors bound it
LEAST_PROBABILITY = 1e-8


def shapley_parts(
    logits: Callable[[tuple[str, ...]], Array], whole: Array, modalities: tuple[str, ...]
) -> Array:
    """z_m, `[M, B, C]`, which add up to `whole` `[B, C]`; `logits(S)` gives z(S)."""
    count = len(modalities)
    parts: dict[str, Any] = dict.fromkeys(modalities, 0.0)
    for size in range(1, count + 1):
        for seen in itertools.combinations(modalities, size):
            z = whole if size == count else logits(seen)
            gained = math.factorial(size - 1) * math.factorial(count - size) / math.factorial(count)
            lost = gained * size / max(count - size, 1)  # |S|! (M - |S| - 1)! / M!
            for m in modalities:
                parts[m] = parts[m] + (gained if m in seen else -lost) * z
    return jnp.stack([parts[m] for m in modalities])


def mean_losses(
    parts: Array, label: Array, weight: Array, reduce: Any = lambda tree: tree
) -> Array:
    """s_m, `[M]`, of z_m `[M, B, C]`, labels `[B]` and the examples' weights `[B]`."""
    probability = jax.vmap(probability_of_label, (0, None))(parts, label)
    losses = -jnp.log(jnp.maximum(probability, LEAST_PROBABILITY))
    total, count = reduce((jnp.sum(losses * weight[None], axis=1), jnp.sum(weight)))
    return total / count


def factors(scores: Array, running: RunningMean, alpha: float) -> Array:
    """k_m, `[M]`, from s_m `[M]` and S_m."""

    def ratio(s: Array) -> Array:
        return jnp.exp(mean_of_others(s) - s)

    before = jnp.where(running.steps > 0, running.mean, scores)
    return jnp.exp(alpha * jnp.minimum(ratio(before) - ratio(scores), MOST))


def add_scores(running: RunningMean, scores: Array) -> RunningMean:
    """S_m with one step more."""
    steps = running.steps + 1
    return RunningMean(running.mean + (scores - running.mean) / steps, steps)


def modulation_loss(logits: Array, parts: Array, label: Array, factor: Array) -> Array:
    """sum_m (k_m - 1) <g, z_m> of each example, `[B]`.

    Args:
      logits: z, `[B, C]`.
      parts: z_m, `[M, B, C]`; the gradient goes through them only.
      label: `[B]`.
      factor: k_m, `[M]`.
    """
    gradient = jax.nn.softmax(logits) - jax.nn.one_hot(label, logits.shape[1], dtype=logits.dtype)
    gradient, factor = jax.lax.stop_gradient((gradient, factor))
    return jnp.einsum("bc,mbc,m->b", gradient, parts, factor - 1)


def agm_baseline(setting: Setting) -> Baseline:
    """AGM in a training step; the fusion sees each set of modalities once a step."""
    modalities, alpha = setting.spec.modalities, setting.config.agm_alpha

    def read(context: StepContext) -> tuple[Array, Array]:
        parts = shapley_parts(lambda seen: fused(context, seen), context.logits, modalities)
        still = jax.lax.stop_gradient(parts)
        label = context.batch["label"]
        return parts, mean_losses(still, label, context.weight, context.reduce)

    def loss(state: RunningMean, context: StepContext) -> Array:
        parts, scores = read(context)
        active = context.step < setting.active_steps
        factor = jnp.where(active, factors(scores, state, alpha), 1.0)
        return modulation_loss(context.logits, parts, context.batch["label"], factor)

    return Baseline(
        init=lambda *_: RunningMean.of_nothing(len(modalities)),
        loss=loss,
        update=lambda state, context: add_scores(state, read(context)[1]),
        whole_batch=True,
    )
