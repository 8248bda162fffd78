"""MMPareto: the joint and the unimodal gradient of an encoder, weighed so that both losses fall.

Wei and Hu, "MMPareto: Boosting Multimodal Learning with Innocent Unimodal Assistance" (ICML 2024).
With the joint loss CE(z), each modality's own CE(z_m) (as in `joint`) and their gradients g and u
in the parameters of encoder m, flattened,

    c = 1/2                                                             if g . u > 0
    c = clip(u . (u - g) / |g - u|^2, .001, .999)                       else: the min-norm point
    G = 2 c g + 2 (1 - c) u,    G <- gamma max(1, |g + u| / |G|) G      for each tensor

The released code rescales tensor by tensor, as here, the paper the encoder's whole vector; gamma is
1.5 there. All other parameters get the gradient of the plain sum of losses. An encoder here is
`encoder_<m>` with its final norm.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rollingq_jax.baselines.hooks import Baseline, Setting, encoder_part, stateless
from rollingq_jax.baselines.joint import probe_losses


def pareto_gradient(joint: Any, alone: Any, gamma: float) -> Any:
    """G of one encoder, a tree like its gradients g (`joint`) and u (`alone`)."""

    def product(first: Any, second: Any) -> Array:
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, first, second)), start=jnp.zeros([]))

    gap = jax.tree.map(jnp.subtract, joint, alone)
    length = jnp.maximum(product(gap, gap), 1e-30)
    nearest = jnp.clip(-product(alone, gap) / length, 0.001, 0.999)
    share = jnp.where(product(joint, alone) > 0, 0.5, nearest)

    def combine(g: Array, u: Array) -> Array:
        mixed = 2 * share.astype(g.dtype) * g + 2 * (1 - share).astype(g.dtype) * u
        size = jnp.linalg.norm(jnp.ravel(mixed))
        larger = jnp.linalg.norm(jnp.ravel(g + u)) / jnp.where(size > 0, size, 1)
        return gamma * jnp.where(size > 0, jnp.maximum(larger, 1), 1) * mixed

    return jax.tree.map(combine, joint, alone)


def mmpareto(gamma: float, modalities: tuple[str, ...]) -> optax.GradientTransformationExtraArgs:
    """MMPareto as a transformation of the whole model's gradient of the joint loss.

    Its `update` takes `apart`, the gradient of the unimodal losses' sum, a tree like the first, and
    optionally `active` `[]` (False gives the sum of both everywhere).

    Args:
      gamma: factor on the encoders' gradients.
      modalities: names; the gradient has `encoder_<m>` and `norm_<m>` for each.
    """

    def change(
        gradient: Mapping[str, Any],
        *,
        apart: Mapping[str, Any],
        active: Array | bool = True,
        **_: Any,
    ) -> dict[str, Any]:
        total = dict(jax.tree.map(jnp.add, gradient, apart))
        for m in modalities:
            found = pareto_gradient(encoder_part(gradient, m), encoder_part(apart, m), gamma)
            total |= jax.tree.map(
                lambda new, old: jnp.where(active, new, old), found, encoder_part(total, m)
            )
        return total

    return stateless(change)


def mmpareto_baseline(setting: Setting) -> Baseline:
    """MMPareto in a training step; after the active ones the plain sum of losses."""
    modalities = setting.spec.modalities
    return Baseline(
        apart=lambda state, context: jnp.sum(probe_losses(context, modalities), axis=0),
        transform=mmpareto(setting.config.mmpareto_gamma, modalities),
        gradient_args=lambda state, context: {"active": context.step < setting.active_steps},
        whole_batch=True,
    )
