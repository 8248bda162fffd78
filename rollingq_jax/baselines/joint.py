"""The joint loss plus each modality's own: L(z) + weight sum_m L(z_m), the uniform baseline.

z_m is the probe's answer to x_m, the modality's class token, here with its gradient to the encoder.
The head of a probe learns from its own loss with weight 1 as ever; with weight 1 here, the two
together are exactly the sum of losses without a stopped gradient. It so fits every fusion.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rollingq_jax.baselines.hooks import Baseline, Setting, StepContext, class_tokens, presence
from rollingq_jax.rotation import HIGHEST


def unimodal_losses(
    params: Mapping[str, Any],
    out: Mapping[str, Any],
    label: Array,
    modalities: tuple[str, ...],
    loss: Callable[[Array, Array], Array] = optax.softmax_cross_entropy_with_integer_labels,
) -> Array:
    """L(x_m W_m + b_m) of each example and modality, `[M, B]`; 0 where the modality is absent.

    The gradient goes to x_m; W_m and b_m, of `probe_<m>`, are constants. L is the task's `loss`.
    """
    losses = []
    for m, token in class_tokens(out, modalities).items():
        head = jax.lax.stop_gradient(params[f"probe_{m}"])
        logits = jnp.matmul(token, head["kernel"], precision=HIGHEST) + head["bias"][None]
        losses.append(loss(logits, label))
    return jnp.stack(losses) * presence(out, modalities)


def probe_losses(context: StepContext, modalities: tuple[str, ...]) -> Array:
    """`unimodal_losses` of a training step, `[M, B]`."""
    label = context.batch["label"]
    return unimodal_losses(context.params, context.out, label, modalities, context.loss)


def joint_baseline(setting: Setting) -> Baseline:
    """The weighted unimodal losses in a training step."""

    def loss(state: Any, context: StepContext) -> Array:
        losses = probe_losses(context, setting.spec.modalities)
        return setting.config.joint_weight * jnp.sum(losses, axis=0)

    return Baseline(loss=loss)
