"""The part of each modality in the logits of a late fusion."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from rollingq_jax.baselines.hooks import class_tokens, presence
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
    names = spec.modalities
    tokens = class_tokens(out, names)
    tokens = {
        m: tokens[m] * here[:, None] for m, here in zip(names, presence(out, names), strict=True)
    }
    fusion = params["fusion"]
    if spec.head == "sum":
        heads = {m: fusion[f"head_{m}"] for m in names}
        return {m: _linear(tokens[m], heads[m]["kernel"], heads[m]["bias"]) for m in names}
    kernels = jnp.split(fusion["head"]["kernel"], len(names))
    bias = fusion["head"]["bias"] / len(names)
    return {m: _linear(tokens[m], kernel, bias) for m, kernel in zip(names, kernels, strict=True)}


def _linear(x: Array, kernel: Array, bias: Array) -> Array:
    return jnp.matmul(x, kernel, precision=HIGHEST) + bias[None]
