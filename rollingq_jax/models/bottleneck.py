"""Bottleneck fusion: streams exchange information through a few shared tokens.

Nagrani et al., "Attention Bottlenecks for Multimodal Fusion" (2021), as upstream's
`models/mbt_backbone.py` has it: the tokens are prepended, and the layers have one attention head.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from rollingq_jax.models import initializers
from rollingq_jax.models.embeddings import Presence
from rollingq_jax.models.encoders import run_blocks
from rollingq_jax.models.layers import Block
from rollingq_jax.models.self_attention import AttentionFn

BOTTLENECK_STD = 0.02


def mean_over_present(copies: list[Array], presences: list[Presence]) -> Array:
    """Mean of one array a modality over the modalities that an example has.

    `M x [B, n, d] -> [B, n, d]`; zeros for an example without any.
    """
    if all(presence.present is None for presence in presences):
        return sum(copies[1:], start=copies[0]) / len(copies)
    batch_size = copies[0].shape[0]
    has = jnp.stack(
        [
            jnp.ones(batch_size, jnp.bool_) if presence.present is None else presence.present
            for presence in presences
        ]
    )[..., None, None]
    count = jnp.maximum(jnp.sum(has, axis=0), 1).astype(copies[0].dtype)
    return jnp.sum(jnp.where(has, jnp.stack(copies), 0.0), axis=0) / count


class Bottleneck(nn.Module):
    """Layers in which every modality's block sees its own tokens and the bottleneck tokens b.

    In each layer, for all modalities m at once (a parallel update: all see the same old b),

        [b_m; x_m] <- Block_m([b; x_m]),    b <- mean of b_m over the modalities present.

    Attributes:
      num_layers: layers.
      num_tokens: n, tokens of the bottleneck.
      mlp_ratio, dropout, gelu, dtype, attention_fn: see `Block`.
      remat: recompute each block in the backward pass.
    """

    num_layers: int
    num_tokens: int = 4
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    gelu: str = "exact"
    dtype: Any = jnp.float32
    attention_fn: AttentionFn | None = None
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Mapping[str, Array],
        presences: Mapping[str, Presence],
        *,
        train: bool = False,
        example_index: Array,
    ) -> dict[str, Array]:
        """`{m: [B, 1 + L_m, d]} -> {m: [B, 1 + L_m, d]}`.

        Args:
          tokens: each modality's, its class token first.
          presences: what of each is real; see `Presence`.
          train: whether dropout applies (key "dropout").
          example_index: `[B]` int32, positions in the global batch.
        """
        modalities = sorted(tokens)
        batch_size, _, width = tokens[modalities[0]].shape
        shared = self.param(
            "tokens", initializers.normal(BOTTLENECK_STD), (self.num_tokens, width), jnp.float32
        )
        shared = jnp.broadcast_to(
            shared.astype(self.dtype)[None], (batch_size, self.num_tokens, width)
        )
        rng = self.make_rng("dropout") if train and self.dropout > 0 else None
        streams = dict(tokens)
        for layer in range(self.num_layers):
            copies = []
            for number, m in enumerate(modalities):
                block = Block(
                    num_heads=1,
                    mlp_ratio=self.mlp_ratio,
                    dropout=self.dropout,
                    gelu=self.gelu,
                    dtype=self.dtype,
                    attention_fn=self.attention_fn,
                    name=f"{m}_block_{layer}",
                )
                stream = run_blocks(
                    [block],
                    jnp.concatenate([shared, streams[m]], axis=1),
                    self._mask(presences[m]),
                    None if rng is None else jax.random.fold_in(rng, layer * len(streams) + number),
                    example_index,
                    remat=self.remat,
                )
                copies.append(stream[:, : self.num_tokens])
                streams[m] = stream[:, self.num_tokens :]
            shared = mean_over_present(copies, [presences[m] for m in modalities])
        return streams

    def _mask(self, presence: Presence) -> Array | None:
        """`[B, n + 1 + L]`: bottleneck and class token are real."""
        if presence.positions is None:
            return None
        leading = (presence.positions.shape[0], self.num_tokens + 1)
        return jnp.concatenate([jnp.ones(leading, jnp.bool_), presence.positions], axis=1)
