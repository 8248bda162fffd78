"""Attention fusion: a class token attends over every modality's tokens.

Upstream's `models/fusion_modules.py`, for M modalities, H heads and n layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict
from jax import Array

from rollingq_jax import quality
from rollingq_jax.attention import (
    attention_share,
    broadcast_query,
    class_token_attention,
    mean_key,
)
from rollingq_jax.errors import ConfigError
from rollingq_jax.models.fusion import Masks, Output, Tokens
from rollingq_jax.models.fusion_layers import (
    Seen,
    fuse,
    normed,
    query_projection,
    seen_in,
    split_tokens,
)
from rollingq_jax.models.layers import Block, Dense, HeadProjection, dropout, example_keys
from rollingq_jax.rotation import HIGHEST, rotate


class AttentionFusion(nn.Module):
    """A class token attends over all modalities' tokens; a linear head reads its output.

    The sequence is [cls, tokens of m_1, ..., tokens of m_M]; q = R (cls W_q + b_q); scale
    1/sqrt(d_h); dropout on the attention weights and on the output projection; no residual, no
    LayerNorm. Keys, values and the L x L matrix never exist (see `rollingq_jax.attention`).

    With n > 1 layers, the first n - 1 are Transformer blocks over the whole sequence (see
    `fusion_layers`), and the above is the last, whose cls and tokens come from the layer below.
    Every layer has its own rotation of the class token's query, so there are n H heads to roll,
    those of the first layer first.

    Attributes:
      num_classes: C.
      dim: d, width of the tokens.
      num_heads: H, heads of each layer; d_h = d / H.
      dropout: rate of both dropouts.
      token_scale: standard deviation of the class token's initial values.
      num_layers: n.
      block: fields of the lower layers' `Block`.
      remat: recompute the lower layers in the backward pass.
      quality_bias: gamma of the norm bias (see `rollingq_jax.quality`), whose statistics `center`
        and `scale` `[M]` are in the collection "quality"; 0: none. For one layer only.
      quality_shuffled: each sample gets the bias of the one before it in the batch.
      logit_scale: factor on the logits of the class token, in every layer; 0 is mean pooling. The
        query that is returned, scored and rotated is without it.
    """

    num_classes: int
    dim: int
    num_heads: int = 1
    dropout: float = 0.2
    token_scale: float = 0.02
    num_layers: int = 1
    block: FrozenDict[str, Any] = FrozenDict()
    remat: bool = False
    logit_scale: float = 1.0
    quality_bias: float = 0.0
    quality_shuffled: bool = False

    def setup(self) -> None:
        """Declares the parameters, which `class_query` and the fusion share."""
        heads = (self.num_heads, self.dim // self.num_heads)
        init = nn.initializers.normal(self.token_scale)
        self.cls = self.param("cls", init, (self.dim,), jnp.float32)
        self.layer = {
            str(i): Block(self.num_heads, **self.block) for i in range(self.num_layers - 1)
        }
        self.query = HeadProjection(*heads)
        self.key = HeadProjection(*heads)
        self.value = HeadProjection(*heads)
        self.out = Dense(self.dim)
        self.head = Dense(self.num_classes)

    def class_query(self, rotation: Array | None = None) -> Array:
        """R (cls W_q + b_q): `[H, d_h]` float32, from the parameters alone.

        With several layers the first one's, in which cls is norm1(cls). Higher layers' queries
        depend on the sample.

        Args:
          rotation: `[n H, d_h, d_h]`, or None for the identity.

        Raises:
          ConfigError: the rotation's shape does not fit the heads.
        """
        return self._query(0, self.cls, self._rotations(rotation)[0])

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
          rotation: `[n H, d_h, d_h]`, or None for the identity.
          train: whether dropout applies (key "dropout").
          return_attention: whether to return the weights.
          example_index: `[B]` int32, positions in the global batch, for dropout.

        Returns:
          logits, and a dict with `query` `[B, n H, d_h]` (rotated), `mean_keys`
          `{m: [B, n H, d_h]}`, `attention_share` `{m: [B, n H]}`, and the last layer's `attention`
          `[B, H, 1 + sum L_m]` before dropout; with a norm bias `token_norms` `{m: [B]}`.

        Raises:
          ConfigError: the rotation does not fit, or the variables lack the norm bias's statistics.
        """
        modalities = sorted(tokens)
        reals = [masks[m] for m in modalities]
        lengths = tuple(tokens[m].shape[1] for m in modalities)
        batch_size = tokens[modalities[0]].shape[0]
        rotations = self._rotations(rotation)
        sequence, mask = self._sequence([tokens[m] for m in modalities], reals)
        rng = self.make_rng("dropout") if train and self.dropout > 0 else None
        weights_rng, out_rng = (None, None) if rng is None else jax.random.split(rng)
        sequence, cls, seen = self._lower_layers(
            sequence, mask, rotations, lengths, reals, train, example_index
        )
        query = self._query(self.num_layers - 1, cls, rotations[-1])
        key, value = self.key(self.dim), self.value(self.dim)
        norms, bias = None, None
        if self.quality_bias:
            norms = quality.token_norms([tokens[m] for m in modalities], reals)
            bias = quality.logit_bias(self._quality_bias(norms), lengths)
        attended, weights = class_token_attention(
            sequence,
            self._scaled(query),
            key[0],
            value[0],
            key[1],
            value[1],
            mask=mask,
            dropout_rate=self.dropout,
            rng=None if weights_rng is None else example_keys(weights_rng, example_index),
            logit_bias=bias,
        )
        projected = self.out(attended.reshape(batch_size, self.dim))
        logits = self.head(dropout(out_rng, projected, self.dropout, example_index))
        parts = split_tokens(sequence, lengths) if seen else [tokens[m] for m in modalities]
        means = [mean_key(x, *key, mask=real) for x, real in zip(parts, reals, strict=True)]
        seen += [Seen(broadcast_query(query, batch_size), means, attention_share(weights, lengths))]
        out = _joined(modalities, seen)
        if return_attention:
            out["attention"] = weights
        if norms is not None:
            out["token_norms"] = {m: norms[:, i] for i, m in enumerate(modalities)}
        return logits, out

    def _lower_layers(
        self,
        sequence: Array,
        mask: Array | None,
        rotations: list[Array | None],
        lengths: tuple[int, ...],
        reals: list[Array | None],
        train: bool,
        example_index: Array,
    ) -> tuple[Array, Array, list[Seen]]:
        """The sequence after all layers but the last, its class token, and what each layer saw."""
        cls, seen = self.cls, []
        rng = None
        if self.layer and train and self.block.get("dropout", 0.0) > 0:
            rng = self.make_rng("dropout")
        for i, block in enumerate(self.layer.values()):
            if self.is_initializing():
                block(sequence, mask, None, example_index)  # makes the parameters
            query = broadcast_query(self._query(i, cls, rotations[i]), sequence.shape[0])
            scaled = self._scaled(query)
            what = seen_in(block, sequence, mask, scaled, lengths, reals)
            seen.append(what._replace(query=query))
            layer_rng = None if rng is None else jax.random.fold_in(rng, i)
            sequence = fuse(
                block, sequence, mask, scaled, layer_rng, example_index, remat=self.remat
            )
            cls = sequence[:, 0].astype(jnp.float32)
        return sequence, cls, seen

    def _scaled(self, query: Array) -> Array:
        """The query whose logits are `logit_scale` times those of the one given."""
        return query if self.logit_scale == 1.0 else self.logit_scale * query

    def _quality_bias(self, norms: Array) -> Array:
        """gamma (n - nu) / tau of each modality, `[B, M] -> [B, M]`."""
        if self.is_initializing():
            for name in ("center", "scale"):
                self.put_variable("quality", name, jnp.zeros(norms.shape[1:], jnp.float32))
        if not self.has_variable("quality", "center"):
            raise ConfigError(
                "the variables have no collection 'quality', with the statistics of "
                "model.quality_bias; allowed: those of the run, `run.variables`"
            )
        center, scale = (
            jax.lax.stop_gradient(self.get_variable("quality", name))
            for name in ("center", "scale")
        )
        bias = self.quality_bias * quality.standardize(norms, center, scale)
        return jnp.roll(bias, 1, axis=0) if self.quality_shuffled else bias

    def _query(self, layer: int, cls: Array, rotation: Array | None) -> Array:
        """A layer's rotated class query, `[..., d] -> [..., H, d_h]` float32."""
        if layer < self.num_layers - 1:
            block = self.layer[str(layer)]
            cls, (kernel, bias) = normed(block, cls), query_projection(block)
        else:
            kernel, bias = self.query(self.dim)
        query = jnp.einsum("...d,dhk->...hk", cls, kernel, precision=HIGHEST)
        query = query + jnp.broadcast_to(bias, query.shape)
        return query if rotation is None else rotate(rotation, query)

    def _rotations(self, rotation: Array | None) -> list[Array | None]:
        """Each layer's rotation, `[H, d_h, d_h]` or None."""
        if rotation is None:
            return [None] * self.num_layers
        width = self.dim // self.num_heads
        allowed = (self.num_layers * self.num_heads, width, width)
        if rotation.shape != allowed:
            raise ConfigError(
                f"rotation has shape {rotation.shape}; allowed: {allowed}, one matrix a head"
            )
        return list(jnp.split(rotation, self.num_layers))

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


def _joined(modalities: list[str], seen: list[Seen]) -> dict[str, Any]:
    """What all layers saw, the first layer's heads first."""
    share = jnp.concatenate([layer.share for layer in seen], axis=1)
    return {
        "query": jnp.concatenate([layer.query for layer in seen], axis=1),
        "mean_keys": {
            m: jnp.concatenate([layer.mean_keys[i] for layer in seen], axis=1)
            for i, m in enumerate(modalities)
        },
        "attention_share": {m: share[..., i] for i, m in enumerate(modalities)},
    }
