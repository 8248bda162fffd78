"""OGM and OGM-GE: the encoder of the modality that is ahead gets a smaller gradient.

Peng et al., "Balanced Multimodal Learning via On-the-fly Gradient Modulation" (CVPR 2022). With
unimodal logits z_m, labels y and s_m = sum_b softmax(z_m)[b, y_b] over the batch,

    rho_m = s_m / min_n s_n        k_m = 1 - tanh(alpha rho_m) if rho_m > 1, else 1
    g <- k_m g                     OGM
    g <- k_m g + eps               OGM-GE, for every modality, eps ~ N(0, (std(g) + 1e-8)^2)

with std that of the tensor's gradient before scaling, as the authors' code has it (the paper
derives the covariance from SGD's noise). For two modalities rho is their ratio, as published; the
minimum is the extension to more.

Which tensors: every tensor of `encoder_<m>` with more than one axis, as other libraries do. The
authors' code takes those with four, the convolutions of a ResNet, of which a Transformer has the
patch embedding only.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rollingq_jax.baselines.hooks import (
    Baseline,
    Setting,
    StepContext,
    probability_of_label,
    stateless,
)
from rollingq_jax.baselines.unimodal import part_logits
from rollingq_jax.errors import ConfigError
from rollingq_jax.models.spec import ModelSpec


def modality_scores(logits: Mapping[str, Array], label: Array, weight: Array) -> Array:
    """s_m, `[M]`, from `{m: [B, C]}`, `[B]` and the examples' weights `[B]`."""
    return jnp.stack(
        [jnp.sum(weight * probability_of_label(logits[m], label)) for m in sorted(logits)]
    )


def batch_scores(context: StepContext, spec: ModelSpec) -> Array:
    """s_m over the batch of all devices, `[M]`, of `part_logits`."""
    logits = part_logits(context, spec)
    return context.reduce(modality_scores(logits, context.batch["label"], context.weight))


def damping(scores: Array, alpha: float) -> Array:
    """k_m, `[M]`, from s_m `[M]`."""
    ratio = scores / jnp.maximum(jnp.min(scores), 1e-12)
    return jnp.where(ratio > 1, 1 - jnp.tanh(alpha * ratio), 1.0)


def ogm(
    alpha: float, modalities: tuple[str, ...], *, noise: bool = False
) -> optax.GradientTransformationExtraArgs:
    """OGM, or with `noise` OGM-GE, as a transformation of the whole model's gradient.

    Its `update` takes `scores` `[M]` (s_m in the order of `modalities`), optionally `active` `[]`
    (False leaves the gradient as it is), and with `noise` a key `rng`.

    Raises ValueError where noise is asked for and `rng` is missing.

    Args:
      alpha: how strongly; the authors have 0.1 on VGGSound and 0.8 on CREMA-D.
      modalities: names, in alphabetical order; the gradient has `encoder_<m>` for each.
      noise: whether noise makes up for the smaller gradient.
    """

    def change(
        gradient: Mapping[str, Any],
        *,
        scores: Array,
        active: Array | bool = True,
        rng: Array | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        if noise and rng is None:
            raise ValueError("rng is None; OGM-GE draws noise and needs a key")
        scales = jnp.where(active, damping(scores, alpha), 1.0)
        changed = dict(gradient)
        for number, m in enumerate(modalities):
            leaves, structure = jax.tree.flatten(gradient[f"encoder_{m}"])
            for i, leaf in enumerate(leaves):
                if leaf.ndim < 2:
                    continue
                leaves[i] = leaf * scales[number].astype(leaf.dtype)
                if noise and rng is not None:
                    key = jax.random.fold_in(jax.random.fold_in(rng, number), i)
                    leaves[i] += jnp.where(active, like_gradient(key, leaf), 0.0)
            changed[f"encoder_{m}"] = jax.tree.unflatten(structure, leaves)
        return changed

    return stateless(change)


def like_gradient(rng: Array, gradient: Array) -> Array:
    """Noise N(0, (std(g) + 1e-8)^2) of the gradient's shape, std unbiased."""
    deviation = jnp.std(gradient, ddof=min(1, gradient.size - 1)) + 1e-8
    return deviation * jax.random.normal(rng, gradient.shape, gradient.dtype)


def ogm_baseline(setting: Setting) -> Baseline:
    """OGM, or by the name "ogm_ge" OGM-GE, in a training step.

    Raises:
      ConfigError: the fusion does not add the modalities' parts.
    """
    config, spec = setting.config, setting.spec
    if spec.head not in ("concat", "sum"):
        raise ConfigError(
            f"config.baseline.name is {config.name!r}, which needs each modality's part in the "
            f"logits, and config.model.fusion is {spec.fusion!r}; allowed: concat, sum, or mbt "
            "with one of them as mbt_head"
        )

    def gradient_args(state: Any, context: StepContext) -> dict[str, Any]:
        return {
            "scores": batch_scores(context, spec),
            "active": context.step < setting.active_steps,
            "rng": context.rng,
        }

    return Baseline(
        transform=ogm(config.ogm_alpha, spec.modalities, noise=config.name == "ogm_ge"),
        gradient_args=gradient_args,
        whole_batch=True,
    )
