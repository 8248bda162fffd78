"""One modality's encoder: embedding, class token, positions, Transformer blocks.

As upstream's `models/vit.py`, after Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021). The
final LayerNorm is the classifier's, since bottleneck layers may come before it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from rollingq_jax.errors import DataError
from rollingq_jax.models import initializers
from rollingq_jax.models.embeddings import Presence, check_input, embedding, make_features
from rollingq_jax.models.layers import Block, Dense
from rollingq_jax.models.self_attention import AttentionFn
from rollingq_jax.models.spec import EncoderSpec

CLASS_TOKEN_STD = 1e-6
POSITION_STD = 0.02


def block_function(block: Block, remat: bool = False) -> Callable[..., Array]:
    """`(params, x, mask, rng, example_index) -> x` of a block, its parameters an argument.

    With `remat`, what the block computes is not kept for the backward pass but computed again.
    """
    unbound = block.clone(parent=None, name=None)

    def apply(params: Any, *args: Array | None) -> Any:
        return unbound.apply({"params": params}, *args)

    return jax.checkpoint(apply) if remat else apply


def block_params(block: Block) -> Any:
    """Parameters of a bound block."""
    return block.variables["params"]


def run_blocks(
    blocks: Sequence[Block],
    x: Array,
    mask: Array | None,
    rng: Array | None,
    example_index: Array,
    *,
    scan: bool = False,
    remat: bool = False,
) -> Array:
    """Applies blocks of equal shape one after the other: `[B, L, d] -> [B, L, d]`.

    Args:
      blocks: bound modules, each with its own parameters.
      x: `[B, L, d]`.
      mask: `[B, L]` or None.
      rng: one dropout key, folded with each block's number; None keeps everything.
      example_index: `[B]`.
      scan: stack the blocks' parameters and loop over them, so that one block is compiled. The
        stack is a copy, made at run time; parameters keep one layout either way.
      remat: see `block_function`.
    """
    rngs = (
        None
        if rng is None
        else jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(len(blocks)))
    )
    if not blocks:
        return x
    if blocks[0].is_initializing() or not (scan or remat):
        for i, block in enumerate(blocks):
            x = block(x, mask, None if rngs is None else rngs[i], example_index)
        return x
    apply = block_function(blocks[0], remat)
    params = [block_params(block) for block in blocks]
    if not scan:
        for i, layer in enumerate(params):
            x = apply(layer, x, mask, None if rngs is None else rngs[i], example_index)
        return x

    def step(x: Array, layer: tuple[Any, Array | None]) -> tuple[Array, None]:
        return apply(layer[0], x, mask, layer[1], example_index), None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    return jax.lax.scan(step, x, (stacked, rngs))[0]


class Encoder(nn.Module):
    """Tokens of one modality, its class token first.

    Attributes:
      spec: kind, patch, depth, width and heads.
      dim: d, width of the output; a projection is added where the encoder's own width differs.
      mlp_ratio, dropout, gelu, dtype, attention_fn: see `Block`.
      scan_layers, remat: see `run_blocks`.
    """

    spec: EncoderSpec
    dim: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    gelu: str = "exact"
    dtype: Any = jnp.float32
    attention_fn: AttentionFn | None = None
    scan_layers: bool = False
    remat: bool = False

    def _with_class_token(self, tokens: Array) -> Array:
        """[cls, tokens] + position: `[B, L, width] -> [B, 1 + L, width]`."""
        length, width = 1 + tokens.shape[1], tokens.shape[2]
        if self.has_variable("params", "position"):
            learned = jnp.shape(self.get_variable("params", "position"))[0]
            if learned != length:
                raise DataError(
                    f"{self.spec.name} has {length - 1} tokens; allowed: {learned - 1}, the number "
                    "that the parameters' position embedding was made for"
                )
        cls = self.param("cls", initializers.normal(CLASS_TOKEN_STD), (width,), jnp.float32)
        position = self.param(
            "position", initializers.normal(POSITION_STD), (length, width), jnp.float32
        )
        cls = jnp.broadcast_to(cls.astype(self.dtype)[None, None], (tokens.shape[0], 1, width))
        return jnp.concatenate([cls, tokens], axis=1) + position.astype(self.dtype)[None]

    def _check_width(self, features: Array) -> None:
        """The parameters' embedding was made for as many numbers a token."""
        params: Any = self.get_variable("params", "embed", {})
        made_for = jnp.shape(params["kernel"])[0] if "kernel" in params else None
        if made_for not in (None, features.shape[-1]):
            raise DataError(
                f"{self.spec.name} has {features.shape[-1]} numbers a token; allowed: {made_for}, "
                "for which the parameters' embedding was made"
            )

    @nn.compact
    def __call__(
        self,
        x: Array,
        presence: Presence | None = None,
        *,
        train: bool = False,
        example_index: Array | None = None,
    ) -> Array:
        """`[B, ...] -> [B, 1 + L, dim]` in `dtype`.

        Args:
          x: `[B, ...]` in the layout of the kind, float or uint8 (ids: integer).
          presence: what of it is real, by default everything. Tokens attend to real positions
            alone; an example without the modality still gets tokens, which mean nothing.
          train: whether dropout applies (key "dropout").
          example_index: `[B]` int32, positions in the global batch; default 0, 1, ...

        Raises:
          DataError: `x` or the mask does not fit the kind, or not the parameters.
        """
        check_input(self.spec, x)
        presence = presence or Presence()
        features = make_features(self.spec, x, presence)
        self._check_width(features)
        tokens = embedding(self.spec, features, self.dtype, "embed")(features)
        tokens = self._with_class_token(tokens)
        mask = presence.positions
        if mask is not None:
            mask = jnp.concatenate([jnp.ones((mask.shape[0], 1), jnp.bool_), mask], axis=1)
        block = {
            "num_heads": self.spec.num_heads,
            "mlp_ratio": self.mlp_ratio,
            "dropout": self.dropout,
            "gelu": self.gelu,
            "dtype": self.dtype,
            "attention_fn": self.attention_fn,
        }
        tokens = run_blocks(
            [Block(**block, name=f"block_{i}") for i in range(self.spec.depth)],
            tokens,
            mask,
            self.make_rng("dropout") if train and self.dropout > 0 else None,
            jnp.arange(x.shape[0]) if example_index is None else example_index,
            scan=self.scan_layers,
            remat=self.remat,
        )
        if self.spec.width == self.dim:
            return tokens
        return Dense(self.dim, self.dtype, name="project")(tokens)
