"""Static fusion modules: from every modality's class token to the logits.

Equations of upstream's `models/fusion_modules.py`, for M modalities where they allow it. All take
the tokens `{m: [B, L_m, d]}` (class token first) and the masks `{m: [B, L_m] or None}` (True where
real, all False for an absent modality), and return the logits `[B, C]` with a dict of what they
computed. They compute in float32 and read the class tokens alone, zeros for an absent modality.
Attention is in `attention_fusion.py`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from rollingq_jax.models.layers import Dense

Tokens = Mapping[str, Array]
Masks = Mapping[str, Array | None]
Output = tuple[Array, dict[str, Any]]


def class_tokens(tokens: Tokens, masks: Masks) -> dict[str, Array]:
    """Each modality's class token in float32, zeros where it is absent: `{m: [B, d]}`."""
    read = {}
    for m in sorted(tokens):
        token, mask = tokens[m][:, 0].astype(jnp.float32), masks[m]
        read[m] = token if mask is None else jnp.where(mask[:, :1], token, 0.0)
    return read


class ConcatFusion(nn.Module):
    """z = [x_1; ...; x_M] W + b."""

    num_classes: int

    @nn.compact
    def __call__(self, tokens: Tokens, masks: Masks) -> Output:
        """See this module's docstring."""
        joined = jnp.concatenate(list(class_tokens(tokens, masks).values()), axis=-1)
        return Dense(self.num_classes, name="head")(joined), {}


class SumFusion(nn.Module):
    """z = sum_m (x_m W_m + b_m). With one modality, the unimodal model's head."""

    num_classes: int

    @nn.compact
    def __call__(self, tokens: Tokens, masks: Masks) -> Output:
        """See this module's docstring."""
        read = class_tokens(tokens, masks)
        parts = [Dense(self.num_classes, name=f"head_{m}")(x) for m, x in read.items()]
        return sum(parts[1:], start=parts[0]), {}


class FilmFusion(nn.Module):
    """(g, h) = x W_f + b_f;  z = (g * y + h) W_o + b_o.

    The first modality x, in alphabetical order, modulates the second, y: upstream's x_film=True.
    """

    num_classes: int

    @nn.compact
    def __call__(self, tokens: Tokens, masks: Masks) -> Output:
        """See this module's docstring."""
        x, y = class_tokens(tokens, masks).values()
        scale, shift = jnp.split(Dense(2 * x.shape[-1], name="film")(x), 2, axis=-1)
        return Dense(self.num_classes, name="head")(scale * y + shift), {}


class GatedFusion(nn.Module):
    """u = x W_x + b_x;  w = y W_y + b_y;  z = (sigmoid(u) * w) W_o + b_o.

    The first modality x, in alphabetical order, gates the second, y: upstream's x_gate=True.
    """

    num_classes: int

    @nn.compact
    def __call__(self, tokens: Tokens, masks: Masks) -> Output:
        """See this module's docstring."""
        read = class_tokens(tokens, masks)
        u, w = (Dense(x.shape[-1], name=f"in_{m}")(x) for m, x in read.items())
        return Dense(self.num_classes, name="head")(jax.nn.sigmoid(u) * w), {}


STATIC_FUSIONS: Mapping[str, type[nn.Module]] = {
    "unimodal": SumFusion,  # named by modality, so that one tree can hold several such models
    "concat": ConcatFusion,
    "sum": SumFusion,
    "film": FilmFusion,
    "gated": GatedFusion,
}
