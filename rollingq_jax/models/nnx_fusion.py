"""Attention fusion for Flax NNX: the paper's layer, whose rotation is a variable of the module.

The same numbers as `rollingq_jax.models.AttentionFusion` of one layer, the Linen module (a test
holds this); `copy_params` takes that one's parameters over. The module needs nothing but flax, and
is imported when it is asked for: `from rollingq_jax.models.nnx_fusion import AttentionFusion`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from rollingq_jax import rotation as rotations
from rollingq_jax.attention import (
    attention_share,
    broadcast_query,
    class_token_attention,
    mean_key,
)
from rollingq_jax.errors import UserError
from rollingq_jax.models.fusion import (
    ClassTokenStats,
    Masks,
    Output,
    Tokens,
    join_statistics,
    join_tokens,
    rotated_query,
    uniform_shares,
)
from rollingq_jax.models.layers import dropout, example_keys, xavier_normal
from rollingq_jax.shapes import batch_broadcast, batch_reshape


class Rotation(nnx.Variable):
    """The rotation `[H, d_h, d_h]` of the class query: no `nnx.Param`, so no optimizer's business.

    Examples:
      >>> fusion = AttentionFusion(num_classes=3, dim=8, num_heads=2, rngs=nnx.Rngs(0))
      >>> nnx.state(fusion, Rotation)["rotation"].shape
      (2, 4, 4)
      >>> "rotation" in nnx.state(fusion, nnx.Param)
      False
    """


class AttentionFusion(nnx.Module):
    """A class token attends over all modalities' tokens; a linear head reads its output.

    The sequence is [cls, tokens of m_1, ..., tokens of m_M]; q = R (cls W_q + b_q); scale
    1/sqrt(d_h); dropout on the attention weights and on the output projection; no residual, no
    LayerNorm. R is the module's `rotation`: after `update` of `rolling_query`, assign it with
    `fusion.rotation[...] = state.rotation`.

    Dropout follows NNX: it applies unless `deterministic`, which `model.eval()` sets and
    `model.train()` takes back, and draws from the stream "dropout" of the `rngs` that the module
    was made with. As in Linen each example has a key of its own, by its position in the global
    batch. The keys themselves are others than Linen's, which depend on a module's path.

    Args:
      num_classes: C.
      dim: d, width of the tokens.
      num_heads: H, heads; d_h = d / H.
      dropout: rate of both dropouts.
      token_scale: standard deviation of the class token's initial values.
      rngs: streams "params" and "dropout", or the default one.

    Raises:
      UserError: the heads do not divide the width.

    Examples:
      >>> fusion = AttentionFusion(num_classes=3, dim=8, num_heads=2, rngs=nnx.Rngs(0))
      >>> tokens = {"audio": jnp.ones((2, 4, 8)), "visual": jnp.ones((2, 9, 8))}  # [B, L_m, d]
      >>> logits, out = fusion(tokens)
      >>> logits.shape, out["query"].shape
      ((2, 3), (2, 2, 4))
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        num_heads: int = 1,
        dropout: float = 0.2,
        token_scale: float = 0.02,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        if num_heads < 1 or dim % num_heads:
            raise UserError(f"num_heads is {num_heads}; allowed: a divisor of dim, which is {dim}")
        heads = (num_heads, dim // num_heads)
        self.dropout = dropout
        self.deterministic = False
        self.cls = nnx.Param(token_scale * jax.random.normal(rngs.params(), (dim,), jnp.float32))
        self.query, self.key, self.value = (
            nnx.LinearGeneral(dim, heads, kernel_init=xavier_normal, rngs=rngs) for _ in range(3)
        )
        self.out = nnx.Linear(dim, dim, kernel_init=xavier_normal, rngs=rngs)
        self.head = nnx.Linear(dim, num_classes, kernel_init=xavier_normal, rngs=rngs)
        self.rotation = Rotation(jnp.tile(jnp.eye(heads[1], dtype=jnp.float32), (num_heads, 1, 1)))
        self.rngs = rngs["dropout"].fork()

    def class_query(self) -> Array:
        """R (cls W_q + b_q): `[H, d_h]` float32, from the module's variables alone."""
        return rotated_query(self.cls[...], *_arrays(self.query), self.rotation[...])

    def __call__(
        self,
        tokens: Tokens,
        masks: Masks | None = None,
        *,
        return_attention: bool = False,
        example_index: Array | None = None,
    ) -> Output:
        """Logits `[B, C]` and what the attention saw.

        Args:
          tokens: `{m: [B, L_m, d]}`.
          masks: `{m: [B, L_m] or None}`, True where a token is real; None: all are.
          return_attention: whether to return the weights.
          example_index: `[B]` int32, positions in the global batch, for dropout; default 0, 1, ...

        Returns:
          logits, and a dict with `query` `[B, H, d_h]` (rotated) and `mean_keys`
          `{m: [B, H, d_h]}`, as `observe` of `rolling_query` takes them; `attention_share`
          `{m: [B, H]}` and `uniform_share` `{m: [B]}`, what uniform attention would give; and
          `attention` `[B, H, 1 + sum L_m]` before dropout if asked for.
        """
        modalities = sorted(tokens)
        parts = [tokens[m] for m in modalities]
        reals = [None if masks is None else masks[m] for m in modalities]
        sequence, mask = join_tokens(self.cls[...], parts, reals)
        weights_rng, out_rng = None, None
        if self.dropout > 0 and not self.deterministic:
            weights_rng, out_rng = self.rngs(), self.rngs()
        if example_index is None:
            example_index = jnp.arange(sequence.shape[0], dtype=jnp.int32)
        example_index = batch_broadcast(example_index, sequence.shape[:1], sequence)
        query = self.class_query()
        (w_key, b_key), (w_value, b_value) = _arrays(self.key), _arrays(self.value)
        attended, weights = class_token_attention(
            sequence,
            query,
            w_key,
            w_value,
            b_key,
            b_value,
            mask=mask,
            dropout_rate=self.dropout,
            rng=None if weights_rng is None else example_keys(weights_rng, example_index),
        )
        output = self.out(batch_reshape(attended, sequence.shape[0], -1))
        logits = self.head(dropout(out_rng, output, self.dropout, example_index))
        lengths = [part.shape[1] for part in parts]
        means = [
            mean_key(part, w_key, b_key, mask=real) for part, real in zip(parts, reals, strict=True)
        ]
        share = attention_share(weights, lengths)
        stats = [ClassTokenStats(broadcast_query(query, sequence), means, share)]
        out = join_statistics(modalities, stats, uniform_shares(sequence, lengths, mask))
        return logits, out | ({"attention": weights} if return_attention else {})


def copy_params(fusion: AttentionFusion, params: Mapping[str, Any]) -> None:
    """Takes over the parameters of the Linen `AttentionFusion` of one layer.

    Args:
      fusion: the module, changed in place; its rotation stays.
      params: the Linen module's: `variables["params"]["fusion"]` of a `build_model` model. The way
        back is `nnx.to_pure_dict(nnx.state(fusion, nnx.Param))`.

    Raises:
      UserError: the names or shapes are others than the module's; nothing is changed.
    """
    state = nnx.state(fusion, nnx.Param)
    own, given = flatten_dict(nnx.to_pure_dict(state), sep="/"), flatten_dict(params, sep="/")
    shapes, found = ({name: jnp.shape(x) for name, x in p.items()} for p in (own, given))
    wrong = [name for name in sorted({*shapes, *found}) if shapes.get(name) != found.get(name)]
    if wrong:
        raise UserError(
            f"params has {wrong[0]} {found.get(wrong[0], 'missing')}; allowed: "
            f"{shapes.get(wrong[0], 'no such parameter')}"
        )
    copied = {name: jnp.asarray(x, jnp.float32) for name, x in given.items()}
    nnx.replace_by_pure_dict(state, unflatten_dict(copied, sep="/"))
    nnx.update(fusion, state)


def fold_rotation(
    module: nnx.Module, rotation: nnx.Variable, query_path: Sequence[str] = ("query",)
) -> None:
    """Folds the rotation of an NNX module into its query projection; `rollingq_jax.fold_rotation`.

    Args:
      module: any that holds both; changed in place, and gives the same outputs.
      rotation: its variable `[H, d_h, d_h]`; the identity afterwards.
      query_path: attributes that lead to the projection, with `kernel` and, optionally, `bias`. The
        caller declares that it serves only the query that is rotated.

    Raises:
      UserError: as `rollingq_jax.fold_rotation`; nothing is changed.

    Examples:
      >>> fusion = AttentionFusion(num_classes=3, dim=4, rngs=nnx.Rngs(0))
      >>> fusion.rotation[...] = -jnp.eye(4)[None]
      >>> query = fusion.class_query()
      >>> fold_rotation(fusion, fusion.rotation)
      >>> bool(jnp.allclose(fusion.class_query(), query)), float(fusion.rotation[0, 0, 0])
      (True, 1.0)
    """
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    nnx.update(module, rotations.fold_rotation(params, rotation[...], query_path))
    rotation[...] = jnp.broadcast_to(jnp.eye(rotation.shape[-1]), rotation.shape)


def _arrays(projection: nnx.LinearGeneral) -> tuple[Array, Array]:
    """Kernel `[d, H, d_h]` and bias `[H, d_h]`."""
    assert projection.bias is not None
    return projection.kernel[...], projection.bias[...]
