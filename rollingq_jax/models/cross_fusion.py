"""Fusions in which modalities attend to each other, which the paper compares with: MulT, MMML, JMT.

Arguments and results are those of every fusion (see `fusion`). RollingQ rotates the query of each
modality's class token in each of these attentions.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from rollingq_jax.attention import attention_share, mean_key, uniform_share
from rollingq_jax.models.encoders import run_blocks
from rollingq_jax.models.fusion import (
    ClassTokenStats,
    Masks,
    Output,
    Tokens,
    class_token_weights,
    class_tokens,
    join_statistics,
    join_streams,
    real_tokens,
    rotated_query,
    split_rotation,
    with_class_query,
)
from rollingq_jax.models.layers import (
    Block,
    Dense,
    LayerNorm,
    Mlp,
    Projection,
    dense_attention,
    dropout,
    on_each_device,
    project,
)
from rollingq_jax.shapes import batch_reshape


class CrossAttention(nn.Module):
    """softmax(Q K^T / sqrt(d_h)) V W_o + b_o, Q of one sequence, K and V of another.

    The first token of the former has a query of its own, q_0 <- R q_0.

    Attributes:
      num_heads, dim: H and d; d_h = d / H.
      dtype: of the computation.
      logit_scale: factor on the logits of the first token.
    """

    num_heads: int
    dim: int
    dtype: Any = jnp.float32
    logit_scale: float = 1.0

    def setup(self) -> None:
        """Declares the parameters, which the attention and the mean keys share."""
        heads = (self.num_heads, self.dim // self.num_heads)
        self.query, self.key, self.value = (Projection(heads) for _ in range(3))
        self.out = Dense(self.dim, dtype=self.dtype)

    def __call__(
        self, x: Array, source: Array, mask: Array | None, rotation: Array | None
    ) -> tuple[Array, Array, Array]:
        """`[B, L, d], [B, L', d] -> [B, L, d]`, and of the first token query and weights.

        Args:
          x: makes the queries.
          source: makes keys and values.
          mask: `[B, L']`, True where a token of the source is real, or None where all are. Where
            none is, what is added is b_o.
          rotation: `[H, d_h, d_h]`, or None for the identity.

        Returns:
          the output; the query `[B, H, d_h]` float32, rotated; the weights `[B, H, L']` float32.
        """
        query = rotated_query(x[:, 0].astype(jnp.float32), *self.query(self.dim), rotation)
        q = project(x, *self.query(self.dim), self.dtype)
        k = project(source, *self.key(self.dim), self.dtype)
        v = project(source, *self.value(self.dim), self.dtype)
        q = with_class_query(q, query, self.logit_scale)
        weights = class_token_weights(q[:, 0], k, mask)
        out = on_each_device(dense_attention, (q, k, v, mask))
        if mask is not None:
            some = jnp.any(mask, axis=1)[:, None, None, None]
            out = jnp.where(some, out, jnp.zeros_like(out))
        return self.out(batch_reshape(out, *x.shape)), query, weights

    def mean_keys(self, tokens: Sequence[Array], masks: Sequence[Array | None]) -> list[Array]:
        """Mean key of each modality under this attention's keys: M x `[B, H, d_h]` float32."""
        key = self.key(self.dim)
        return [mean_key(x, *key, mask=m) for x, m in zip(tokens, masks, strict=True)]


class CrossRead(NamedTuple):
    """What the class token of one stream saw in one attention."""

    query: Array  # [B, H, d_h], rotated
    mean_keys: list[Array]  # M x [B, H, d_h], of every modality, read or not
    weights: Mapping[str, Array]  # m: [B, H, L_m] of the modalities that the attention reads


Fused = tuple[Array, list[list[CrossRead]]]


class Drop(NamedTuple):
    """Dropout of one branch after the other, each with a key of its own, or with None: none."""

    keys: Iterator[Array | None]
    rate: float
    example_index: Array  # [B] int32, positions in the global batch

    def __call__(self, x: Array) -> Array:
        """`[B, ...] -> [B, ...]`."""
        return dropout(next(self.keys), x, self.rate, self.example_index)


def cross_statistics(
    layers: Sequence[Sequence[CrossRead]],
    tokens: Tokens,
    masks: Masks,
    return_attention: bool,
) -> dict[str, Any]:
    """What `AttentionFusion` returns beside the logits, over the attentions of all layers.

    Heads stand in the order of the attentions, the first layer's first. The share of a modality is
    that of the weights over the tokens that an attention reads; where it finds nothing to read, the
    modalities that the example has share alike. `uniform_share` is the mean over the attentions of
    the first layer, and `attention` that over those of the last.
    """
    modalities = sorted(tokens)
    lengths = [tokens[m].shape[1] for m in modalities]
    real = {m: real_tokens(tokens[m], masks[m]) for m in modalities}
    present = jnp.stack([jnp.any(mask, axis=1) for mask in real.values()], axis=-1)

    def whole(read: CrossRead) -> Array:
        """Weights over the tokens of all modalities, `[B, H, sum L_m]`."""
        weights = []
        for m, mask in real.items():
            shape = (mask.shape[0], read.query.shape[1], mask.shape[1])
            none = jnp.broadcast_to(jnp.zeros_like(mask, jnp.float32)[:, None], shape)
            weights.append(read.weights.get(m, none))
        return jnp.concatenate(weights, axis=-1)

    def among_present(share: Array) -> Array:
        """`[B, H, M]`, the absent modalities' parts given to the others."""
        kept = share * present[:, None].astype(share.dtype)
        total = jnp.sum(kept, axis=-1, keepdims=True)
        return jnp.where(total > 0, kept / jnp.where(total > 0, total, 1.0), share)

    stats, even = [], []
    for read in itertools.chain(*layers):
        share = among_present(attention_share(whole(read), lengths))
        stats.append(ClassTokenStats(read.query, read.mean_keys, share))
    for read in layers[0]:
        seen = [mask & (m in read.weights) for m, mask in real.items()]
        uniform = uniform_share(lengths, mask=jnp.concatenate(seen, axis=1))
        even.append(among_present(uniform[:, None])[:, 0])
    out = join_statistics(modalities, stats, sum(even[1:], start=even[0]) / len(even))
    if return_attention:
        last = [whole(read) for read in layers[-1]]
        weights = sum(last[1:], start=last[0]) / len(last)
        out["attention"] = jnp.concatenate([jnp.zeros_like(weights[..., :1]), weights], axis=-1)
    return out


class CrossFusion(nn.Module):
    """Fields and helpers that MulT, MMML and JMT have in common.

    RollingQ. The rotated queries are those of the class tokens in the attentions between
    modalities. Such an attention may read one modality only; the scores compare its query with the
    mean keys of every modality under its own key projection, those of the query's modality as well.
    Queries depend on the sample, so a roll turns the mean query of the window. The n layers roll
    one after the other, and each has its attentions' heads, the first attention's first.

    An example without a modality: the others' attentions do not read it, and the head reads zeros
    for its class token. Dropout is that of the branches, none of the attention weights.

    Attributes:
      num_classes: C.
      dim: d, width of the tokens.
      num_heads: H, heads of each attention; d_h = d / H.
      dropout: rate, for what each branch adds.
      num_layers: n.
      dtype: of the tokens' computation; class tokens' queries and the head are float32.
      logit_scale: factor on the logits of the class tokens in the attentions that roll.
    """

    num_classes: int
    dim: int
    num_heads: int = 1
    dropout: float = 0.2
    num_layers: int = 1
    dtype: Any = jnp.float32
    logit_scale: float = 1.0

    @nn.compact
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
        """Logits and statistics, see `AttentionFusion`."""
        keys: Iterator[Array | None] = itertools.repeat(None)
        if train and self.dropout > 0:
            rng = self.make_rng("dropout")
            keys = (jax.random.fold_in(rng, i) for i in itertools.count())
        drop = Drop(keys, self.dropout, example_index)
        logits, layers = self._fuse(tokens, masks, rotation, drop)
        return logits, cross_statistics(layers, tokens, masks, return_attention)

    def _fuse(self, tokens: Tokens, masks: Masks, rotation: Array | None, drop: Drop) -> Fused:
        """Logits, and what the attentions of each layer saw."""
        raise NotImplementedError

    def _attention(self, name: str) -> CrossAttention:
        return CrossAttention(self.num_heads, self.dim, self.dtype, self.logit_scale, name=name)

    def _block(self, name: str, **fields: Any) -> Block:
        fields |= {"dropout": self.dropout, "gelu": "relu", "dtype": self.dtype}
        return Block(self.num_heads, **fields, name=name)

    def _rotations(self, rotation: Array | None, attentions: int) -> list[list[Array | None]]:
        """Of each layer's attentions."""
        count = self.num_layers * attentions
        one = iter(split_rotation(rotation, count, self.num_heads, self.dim))
        return [[next(one) for _ in range(attentions)] for _ in range(self.num_layers)]


def self_mask(mask: Array | None) -> Array | None:
    """The mask of attention within a stream: its class token is always there."""
    return mask if mask is None else jnp.concatenate([jnp.ones_like(mask[:, :1]), mask[:, 1:]], 1)


class MultFusion(CrossFusion):
    """MulT: a crossmodal Transformer from each modality to each other one (Tsai et al., 2019).

    For every pair of a target t and a source s, n layers in which the source stays as it came,

        h <- h + A(norm0(h), norm0(x_s)),    h <- h + W_2 relu(W_1 norm1(h))    (h = x_t at first)

    and a LayerNorm. A target's streams, joined on the features, pass max(n, 3) pre-norm Transformer
    blocks and a LayerNorm. With c the class tokens of all targets, z = (c + W_4 relu(W_3 c)) W + b.

    Ours, since tokens are unordered patches with positions and a class token from the encoders:
    no causal mask, no projection to a common width, no sinusoidal positions, and the class token in
    place of the last time step.
    """

    def _fuse(self, tokens: Tokens, masks: Masks, rotation: Array | None, drop: Drop) -> Fused:
        modalities = sorted(tokens)
        # Rotations stand layer by layer, and the layers of a pair are made one after the other.
        pairs = list(itertools.permutations(modalities, 2))
        rotations = self._rotations(rotation, len(pairs))
        reals = [masks[m] for m in modalities]
        streams: dict[str, list[Array]] = {m: [] for m in modalities}
        layers: list[list[CrossRead]] = [[] for _ in range(self.num_layers)]
        for number, (target, source) in enumerate(pairs):
            h, pair = tokens[target], f"{target}_from_{source}"
            for i in range(self.num_layers):
                name = f"{pair}_{i}"
                norm = LayerNorm(self.dtype, name=f"{name}_norm0")
                attention = self._attention(f"{name}_attention")
                # Every modality's, for the mean keys that the query is scored with.
                low = {m: norm(tokens[m]) for m in modalities}
                rolled = rotations[i][number]
                added, query, weights = attention(norm(h), low[source], masks[source], rolled)
                h = h + drop(added)
                mlp = Mlp(4 * self.dim, "relu", self.dtype, name=f"{name}_mlp")
                added = mlp(LayerNorm(self.dtype, name=f"{name}_norm1")(h))
                h = h + drop(added)
                means = attention.mean_keys(list(low.values()), reals)
                layers[i].append(CrossRead(query, means, {source: weights}))
            streams[target].append(LayerNorm(self.dtype, name=f"{pair}_norm")(h))
        joined = {}
        for m in modalities:
            blocks = [self._block(f"{m}_block_{i}") for i in range(max(self.num_layers, 3))]
            h = jnp.concatenate(streams[m], axis=-1)
            h = run_blocks(blocks, h, self_mask(masks[m]), next(drop.keys), drop.example_index)
            joined[m] = LayerNorm(name=f"{m}_norm")(h)
        c = jnp.concatenate(list(class_tokens(joined, masks).values()), axis=-1)
        hidden = jax.nn.relu(Dense(c.shape[-1], name="fc1")(c))
        hidden = drop(hidden)
        c = c + Dense(c.shape[-1], name="fc2")(hidden)
        return Dense(self.num_classes, name="head")(c), layers


class MmmlFusion(CrossFusion):
    """MMML: cross-modal encoder layers and a head on the class tokens (Wu et al., 2024).

    In each of n layers, for all modalities at once,

        x_m <- norm(x_m + A_m(x_m, x_others)),    x_m <- post-norm block(x_m)   (hidden width 4 d)

    where with more than two modalities the others' tokens stand in one sequence. With c the class
    tokens of all modalities, z = relu(relu(c W_1 + b_1) W_2 + b_2) W + b of widths M d, d, d / 2
    and C (released: d = 768 and 512 in the place of d / 2; with d / 2 the paper's count comes out).
    MMML's losses of the modalities alone are those of `config.baseline.name` "joint".
    """

    def _fuse(self, tokens: Tokens, masks: Masks, rotation: Array | None, drop: Drop) -> Fused:
        modalities = sorted(tokens)
        rotations = self._rotations(rotation, len(modalities))
        reals = [masks[m] for m in modalities]
        x, layers = dict(tokens), []
        for i in range(self.num_layers):
            new, layer, parts = {}, [], [x[m] for m in modalities]
            for number, m in enumerate(modalities):
                others = [other for other in modalities if other != m]
                source, mask = join_streams([x[o] for o in others], [masks[o] for o in others])
                attention = self._attention(f"{m}_attention_{i}")
                added, query, weights = attention(x[m], source, mask, rotations[i][number])
                h = x[m] + drop(added)
                h = LayerNorm(self.dtype, name=f"{m}_norm_{i}")(h)
                block = self._block(f"{m}_block_{i}", post_norm=True)
                new[m] = block(h, self_mask(masks[m]), next(drop.keys), drop.example_index)
                ends = np.cumsum([x[o].shape[1] for o in others])[:-1]
                each = dict(zip(others, jnp.split(weights, ends, axis=-1), strict=True))
                layer.append(CrossRead(query, attention.mean_keys(parts, reals), each))
            x = new  # at once: within a layer all read what the layer below made
            layers.append(layer)
        h = jnp.concatenate(list(class_tokens(x, masks).values()), axis=-1)
        for name, width in (("fc1", self.dim), ("fc2", max(1, self.dim // 2))):
            h = jax.nn.relu(Dense(width, name=name)(h))
            h = drop(h)
        return Dense(self.num_classes, name="head")(h), layers


def pooling(length: int, steps: int, mask: Array | None) -> Array:
    """Means over `steps` stretches of equal length, as `[steps, length]` or `[B, steps, length]`.

    Row t has 1 / n at the n real positions from floor(t L / T) up to ceil((t + 1) L / T), 0
    everywhere where none is real (`torch.nn.AdaptiveAvgPool1d`, over real positions).
    """
    place, t = jnp.arange(length)[None], jnp.arange(steps)[:, None]
    inside = (place >= t * length // steps) & (place < -((t + 1) * length // -steps))
    if mask is not None:
        inside = inside[None] & mask[:, None]
    count = jnp.sum(inside, axis=-1, keepdims=True)
    return inside.astype(jnp.float32) / jnp.maximum(count, 1).astype(jnp.float32)


class JmtFusion(CrossFusion):
    """JMT: attention between the modalities and their joint representation (Waligora et al., 2024).

    Streams: each modality's class token and its other tokens, averaged over stretches to the length
    of the shortest modality and scaled to length 1; and the joint stream j, [x_1; ...; x_M] W + b
    at each step. Each stream passes a post-norm block (hidden width d). Each of the M + 1 streams
    has an attention, whose class token attends to each of the other streams in turn, without
    residual and LayerNorm. The (M + 1) M results are joined, and with c = [...] W_1 + b_1 of width
    d, z = relu(c W_2 + b_2) W + b with d / 4 units inside.

    Ours: the common length, since JMT takes aligned frames; and the class token's answer in place
    of a regression at each frame. Weights are of the modalities' streams; those over the joint
    stream, which belong to no modality, are left out of shares. There is one layer.
    """

    def _fuse(self, tokens: Tokens, masks: Masks, rotation: Array | None, drop: Drop) -> Fused:
        modalities = sorted(tokens)
        count = len(modalities)
        rotations = self._rotations(rotation, count + 1)[0]
        steps = min(tokens[m].shape[1] for m in modalities) - 1
        spread = {}  # [1 + T, 1 + L_m] of each modality, with a leading B under a mask
        streams, reals = [], []
        for m in modalities:
            x, mask = tokens[m], masks[m]
            rows = pooling(x.shape[1] - 1, steps, None if mask is None else mask[:, 1:])
            # The class token is a step of its own, before those that are pooled.
            rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 2) + [(1, 0), (1, 0)])
            spread[m] = rows = rows.at[..., 0, 0].set(1.0)
            letters = "tl" if mask is None else "btl"
            x = jnp.einsum(f"{letters},bld->btd", rows, x.astype(jnp.float32))
            x = x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-12))
            real = None
            if mask is not None:  # a step is real where one of its tokens is
                real = jnp.concatenate([mask[:, :1], jnp.any(rows[:, 1:] > 0, axis=-1)], axis=1)
                x = jnp.where(real[..., None], x, 0.0)
            streams.append(x.astype(self.dtype))
            reals.append(real)
        joint = Dense(self.dim, dtype=self.dtype, name="joint")(jnp.concatenate(streams, axis=-1))
        # A joint step is real where any modality's is.
        known = [real for real in reals if real is not None]
        some = jnp.any(jnp.stack(known), axis=0) if len(known) == count else None
        streams, reals = [*streams, joint], [*reals, some]
        names = [f"stream_{m}" for m in modalities] + ["joint_stream"]
        for i, name in enumerate(names):
            block = self._block(f"{name}_block", post_norm=True, mlp_ratio=1.0)
            streams[i] = block(streams[i], self_mask(reals[i]), next(drop.keys), drop.example_index)
        answers, reads = [], []
        for i, name in enumerate(names):
            attention = self._attention(f"{name}_attention")
            weights = {}
            for j in range(count + 1):
                if j == i:
                    continue
                answer, query, over_pooled = attention(
                    streams[i][:, :1], streams[j], reals[j], rotations[i]
                )
                answers.append(answer[:, 0].astype(jnp.float32))
                if j < count:  # those over the joint stream belong to no modality
                    rows = spread[modalities[j]]
                    letters = "tl" if rows.ndim == 2 else "btl"
                    weights[modalities[j]] = jnp.einsum(f"bht,{letters}->bhl", over_pooled, rows)
            means = attention.mean_keys(streams[:count], reals[:count])
            reads.append(CrossRead(query, means, weights))
        c = Dense(self.dim, name="merge")(jnp.concatenate(answers, axis=-1))
        h = jax.nn.relu(Dense(max(1, self.dim // 4), name="fc")(c))
        h = drop(h)
        return Dense(self.num_classes, name="head")(h), [reads]


CROSS_FUSIONS: Mapping[str, type[CrossFusion]] = {
    "mult": MultFusion,
    "mmml": MmmlFusion,
    "jmt": JmtFusion,
}
