"""ARL: encoders learn faster whose predictions are sure and which the fusion uses little.

"Improving Multimodal Learning via Imbalanced Learning" (ICCV 2025), as the paper specifies it. Of
u_m, the answers of the fusion that sees modality m only, over the batch,

    H_m = mean_b entropy(softmax(u_m))    n_m = max(H_m / sum H, .3)    r_m = n_m^-1 / sum n^-1
    D_m = mean_b |u_m|_1                  q_m = D_m / sum D
    w = softmax_m(T r_m (1 - q_m) / (M - 1))
    loss = CE(z) + gamma sum_m CE(u_m),    gradient of encoder m times 1 + w_m

Before `start_epoch` gamma is 1 and nothing is multiplied (the authors have 5 of 100 epochs). Their
released code prints w and multiplies both encoders' gradients by 1.5. Division by M - 1 is the
extension to more modalities.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rollingq_jax.baselines.hooks import Baseline, Setting, StepContext, scale_encoders
from rollingq_jax.baselines.unimodal import logits_alone, losses_alone

LEAST_SHARE = 0.3


def encoder_factors(
    logits: Array, weight: Array, temperature: float, reduce: Any = lambda tree: tree
) -> Array:
    """1 + w_m, `[M]`, from u_m `[M, B, C]` and the examples' weights `[B]`."""
    log_p = jax.nn.log_softmax(logits)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    size = jnp.sum(jnp.abs(logits), axis=-1)
    entropy, size, count = reduce(
        (jnp.sum(entropy * weight[None], 1), jnp.sum(size * weight[None], 1), jnp.sum(weight))
    )
    inverse = 1 / jnp.maximum(entropy / jnp.maximum(jnp.sum(entropy), 1e-12), LEAST_SHARE)
    sure, used = inverse / jnp.sum(inverse), size / jnp.maximum(jnp.sum(size), 1e-12)
    return 1 + jax.nn.softmax(temperature * sure * (1 - used) / (used.shape[0] - 1))


def arl_baseline(setting: Setting) -> Baseline:
    """ARL in a training step."""
    config, modalities = setting.config, setting.spec.modalities

    def loss(state: Any, context: StepContext) -> Array:
        weight = jnp.where(context.step < setting.start_step, 1.0, config.arl_gamma)
        return weight * jnp.sum(losses_alone(context, modalities), axis=0)

    def gradient_args(state: Any, context: StepContext) -> dict[str, Any]:
        logits = logits_alone(context, modalities)
        temperature = config.arl_temperature
        factors = encoder_factors(logits, context.weight, temperature, context.reduce)
        active = (setting.start_step <= context.step) & (context.step < setting.active_steps)
        return {"factors": jnp.where(active, factors, 1.0)}

    return Baseline(
        loss=loss,
        transform=scale_encoders(modalities),
        gradient_args=gradient_args,
        whole_batch=True,
    )
