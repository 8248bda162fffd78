"""Each modality's own answer: its part in a late fusion's logits, or the fusion of it alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rollingq_jax.baselines.hooks import StepContext, class_tokens, fused, presence
from rollingq_jax.models.spec import ModelSpec
from rollingq_jax.rotation import HIGHEST


def unimodal_logits(
    params: Mapping[str, Any], out: Mapping[str, Any], spec: ModelSpec
) -> dict[str, Array]:
    """Logits z_m, `{m: [B, C]}` float32, which add up to the model's logits z.

    concat: z_m = x_m W_m + b / M, with W_m the rows of the head that read x_m; sum: z_m = x_m W_m
    + b_m, that modality's own head. An absent modality's x_m counts as zeros, as in the fusion.

    Args:
      params: the model's, with `spec.head` "concat" or "sum".
      out: the model's second output.
      spec: of the model.
    """
    names, fusion = spec.modalities, params["fusion"]
    if spec.head == "sum":
        heads = [(fusion[f"head_{m}"]["kernel"], fusion[f"head_{m}"]["bias"]) for m in names]
    else:
        bias = fusion["head"]["bias"] / len(names)
        heads = [(kernel, bias) for kernel in jnp.split(fusion["head"]["kernel"], len(names))]
    tokens, here = class_tokens(out, names), presence(out, names)[..., None]
    return {
        m: jnp.matmul(tokens[m] * here[i], kernel, precision=HIGHEST) + bias[None]
        for i, (m, (kernel, bias)) in enumerate(zip(names, heads, strict=True))
    }


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
