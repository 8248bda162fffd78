"""Fusion modules: from every modality's tokens to the logits.

Equations of upstream's `models/fusion_modules.py`, for M modalities where they allow it. All take
the tokens `{m: [B, L_m, d]}` (class token first) and the masks `{m: [B, L_m] or None}` (True where
real, all False for an absent modality), and return the logits `[B, C]` with a dict of what they
computed. They compute in float32. The static ones read the class tokens alone, and zeros for an
absent modality.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from rollingq_jax.attention import attention_share, class_token_attention, mean_key
from rollingq_jax.errors import ConfigError
from rollingq_jax.models import initializers
from rollingq_jax.models.layers import Dense, HeadProjection, dropout, example_keys
from rollingq_jax.rotation import HIGHEST, rotate

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


class AttentionFusion(nn.Module):
    """A class token attends over all modalities' tokens; a linear head reads its output.

    The sequence is [cls, tokens of m_1, ..., tokens of m_M]; q = R (cls W_q + b_q); scale
    1/sqrt(d_h); dropout on the attention weights and on the output projection; no residual, no
    LayerNorm. Keys, values and the L x L matrix never exist (see `rollingq_jax.attention`).

    Attributes:
      num_classes: C.
      dim: d, width of the tokens.
      num_heads: H; d_h = d / H.
      dropout: rate of both dropouts.
      token_scale: standard deviation of the class token's initial values.
    """

    num_classes: int
    dim: int
    num_heads: int = 1
    dropout: float = 0.2
    token_scale: float = 0.02

    def setup(self) -> None:
        """Declares the parameters, which `class_query` and the fusion share."""
        heads = (self.num_heads, self.dim // self.num_heads)
        init = initializers.normal(self.token_scale)
        self.cls = self.param("cls", init, (self.dim,), jnp.float32)
        self.query = HeadProjection(*heads)
        self.key = HeadProjection(*heads)
        self.value = HeadProjection(*heads)
        self.out = Dense(self.dim)
        self.head = Dense(self.num_classes)

    def class_query(self, rotation: Array | None = None) -> Array:
        """R (cls W_q + b_q): `[H, d_h]` float32, from the parameters alone.

        Args:
          rotation: `[H, d_h, d_h]`, or None for the identity.

        Raises:
          ConfigError: the rotation's shape does not fit the heads.
        """
        kernel, bias = self.query(self.dim)
        query = jnp.einsum("d,dhk->hk", self.cls, kernel, precision=HIGHEST) + bias
        if rotation is None:
            return query
        if rotation.shape != (*query.shape, query.shape[-1]):
            raise ConfigError(
                f"rotation has shape {rotation.shape}; allowed: "
                f"{(*query.shape, query.shape[-1])}, one matrix a head"
            )
        return rotate(rotation, query)

    def __call__(
        self,
        tokens: Tokens,
        masks: Masks,
        rotation: Array | None = None,
        *,
        train: bool = False,
        return_attention: bool = False,
        example_index: Array,
    ) -> Output:
        """Logits `[B, C]` and what the attention saw.

        Args:
          tokens: `{m: [B, L_m, d]}`.
          masks: `{m: [B, L_m] or None}`.
          rotation: `[H, d_h, d_h]`, or None for the identity.
          train: whether dropout applies (key "dropout").
          return_attention: whether to return the weights.
          example_index: `[B]` int32, positions in the global batch, for dropout.

        Returns:
          logits, and a dict with `query` `[B, H, d_h]` (rotated), `mean_keys` `{m: [B, H, d_h]}`,
          `attention_share` `{m: [B, H]}`, and `attention` `[B, H, 1 + sum L_m]` before dropout.
        """
        modalities = sorted(tokens)
        batch_size = tokens[modalities[0]].shape[0]
        query = self.class_query(rotation)
        key, value = self.key(self.dim), self.value(self.dim)
        sequence, mask = self._sequence(
            [tokens[m] for m in modalities], [masks[m] for m in modalities]
        )
        rng = self.make_rng("dropout") if train and self.dropout > 0 else None
        weights_rng, out_rng = (None, None) if rng is None else jax.random.split(rng)
        attended, weights = class_token_attention(
            sequence,
            query,
            key[0],
            value[0],
            key[1],
            value[1],
            mask=mask,
            dropout_rate=self.dropout,
            rng=None if weights_rng is None else example_keys(weights_rng, example_index),
        )
        projected = self.out(attended.reshape(batch_size, self.dim))
        logits = self.head(dropout(out_rng, projected, self.dropout, example_index))
        shares = attention_share(weights, tuple(tokens[m].shape[1] for m in modalities))
        out = {
            "query": jnp.broadcast_to(query[None], (batch_size, *query.shape)),
            "mean_keys": {m: mean_key(tokens[m], *key, mask=masks[m]) for m in modalities},
            "attention_share": {m: shares[..., i] for i, m in enumerate(modalities)},
        }
        if return_attention:
            out["attention"] = weights
        return logits, out

    def _sequence(
        self, tokens: list[Array], masks: list[Array | None]
    ) -> tuple[Array, Array | None]:
        """[cls, tokens of every modality] and its mask, None where everything is real."""
        batch_size, _, width = tokens[0].shape
        cls = self.cls.astype(tokens[0].dtype)[None, None]
        sequence = jnp.concatenate([jnp.broadcast_to(cls, (batch_size, 1, width)), *tokens], axis=1)
        if all(mask is None for mask in masks):
            return sequence, None
        real = [
            jnp.ones(x.shape[:2], jnp.bool_) if mask is None else mask
            for x, mask in zip(tokens, masks, strict=True)
        ]
        return sequence, jnp.concatenate([jnp.ones((batch_size, 1), jnp.bool_), *real], axis=1)


STATIC_FUSIONS: Mapping[str, type[nn.Module]] = {
    "unimodal": SumFusion,  # named by modality, so that one tree can hold several such models
    "concat": ConcatFusion,
    "sum": SumFusion,
    "film": FilmFusion,
    "gated": GatedFusion,
}
