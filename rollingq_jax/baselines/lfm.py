"""LFM: predictions of the modalities are drawn to each other, early in training more than late.

Yang et al., "Facilitating Multimodal Classification via Dynamically Learning Modality Gap" (NeurIPS
2024), with its fixed schedule. With p_m = softmax(u_m), u_m the answer of the fusion that sees
modality m only, and t the part of the training that is done,

    A = mean over pairs m < n of (KL(q || p_m) + KL(q || p_n)) / 2,    q = (p_m + p_n) / 2
    loss = 2 (a(t) CE(z) + (1 - a(t)) A),    a a polynomial of degree 5 from .20 to .92

The authors' z is the mean of two heads' logits; here it is the model's. Their divergences are those
of q from each prediction, not the other way about as in Jensen and Shannon's. The pairs' mean is
the extension to more than two modalities. The learned form of a needs second derivatives on held
out data, and is not here.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rollingq_jax.baselines.hooks import Baseline, Setting, StepContext
from rollingq_jax.baselines.unimodal import logits_alone

EPOCHS = 200  # of the authors' schedule
SCHEDULE = (  # of e^0, e^1, ...
    2.04623704e-1,
    3.35472727e-3,
    1.22989557e-4,
    -2.92947416e-6,
    2.23835486e-8,
    -5.39717505e-11,
)


def share_of_task(progress: Array) -> Array:
    """a(t), `[]`, of the part of the training that is done, `[]` in [0, 1]; constant at the end."""
    epoch = jnp.minimum(EPOCHS * progress, EPOCHS - 1.0)
    return jnp.polyval(jnp.asarray(SCHEDULE[::-1], jnp.float32), epoch.astype(jnp.float32))


def alignment(logits: Array) -> Array:
    """A of each example, `[B]`, from u_m `[M, B, C]`."""
    log_p = jax.nn.log_softmax(logits)

    def divergence(first: Array, second: Array) -> Array:
        log_q = jnp.logaddexp(first, second) - jnp.log(2.0)
        return jnp.sum(jnp.exp(log_q) * (log_q - (first + second) / 2), axis=-1)

    pairs = list(itertools.combinations(range(logits.shape[0]), 2))
    return sum((divergence(log_p[m], log_p[n]) for m, n in pairs), start=jnp.zeros([])) / len(pairs)


def lfm_baseline(setting: Setting) -> Baseline:
    """LFM in a training step; its schedule lasts as long as it is active."""

    def loss(state: Any, context: StepContext) -> Array:
        share = share_of_task(context.step / setting.active_steps)
        aligned = alignment(logits_alone(context, setting.spec.modalities))
        return (2 * share - 1) * context.losses + 2 * (1 - share) * aligned

    return Baseline(loss=loss)
