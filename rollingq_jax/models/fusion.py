"""Fusion: from every modality's tokens to the logits.

Equations of upstream's `models/fusion_modules.py`, for M modalities where they allow it. All take
the tokens `{m: [B, L_m, d]}` (class token first) and the masks `{m: [B, L_m] or None}` (True where
real, all False for an absent modality), and return the logits `[B, C]` with a dict of what they
computed. The static ones compute in float32 and read only the class tokens, zeros for an absent
modality. In attention fusion a class token of its own attends to all tokens, in one layer or in
several (the paper's extension), and RollingQ rotates its query. In the models that the paper
compares with (MulT, MMML, JMT) modalities attend to each other, and RollingQ rotates the query of
each modality's class token in each of these attentions. The dynamic fusions weigh each
modality's own answer, sample by sample.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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
    masked_softmax,
    mean_key,
    mean_token,
    uniform_share,
)
from rollingq_jax.errors import ConfigError
from rollingq_jax.models.encoders import run_blocks
from rollingq_jax.models.layers import (
    AttentionFn,
    Block,
    Dense,
    HeadProjection,
    LayerNorm,
    Mlp,
    SelfAttention,
    attend,
    default_attention,
    dense_attention,
    dropout,
    example_keys,
    xavier_normal,
)
from rollingq_jax.rotation import HIGHEST, normalize, rotate
from rollingq_jax.shapes import batch_broadcast, batch_reshape, laid_out_as, whole_sharding

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


class CosineFusion(nn.Module):
    """MMCosine: z_c = scale sum_m cos(x_m, W_m[:, c]), so that no modality wins by its norms.

    Xu et al., "MMCosine: Multi-Modal Cosine Loss Towards Balanced Audio-Visual Fine-Grained
    Learning" (ICASSP 2023); the loss is the usual cross-entropy of z. An absent modality adds 0.
    """

    num_classes: int
    scale: float = 15.0

    @nn.compact
    def __call__(self, tokens: Tokens, masks: Masks) -> Output:
        """See this module's docstring."""
        cosines = []
        for m, x in class_tokens(tokens, masks).items():
            shape = (self.num_classes, x.shape[-1])
            directions = self.param(f"head_{m}", xavier_normal, shape, jnp.float32)
            cosines.append(normalize(x) @ normalize(directions).T)
        return self.scale * sum(cosines[1:], start=cosines[0]), {}


STATIC_FUSIONS: Mapping[str, type[nn.Module]] = {
    "unimodal": SumFusion,  # named by modality, so that one tree can hold several such models
    "concat": ConcatFusion,
    "sum": SumFusion,
    "film": FilmFusion,
    "gated": GatedFusion,
}


def energy(logits: Array) -> Array:
    """QMF's confidence logsumexp(z_m) / 10: `[..., C] -> [...]`."""
    return jax.nn.logsumexp(logits, axis=-1) / 10


def energy_weights(logits: Array, present: Array) -> Array:
    """QMF: w_m = max(logsumexp(z_m), 0) / 10, which need not sum to 1.

    `[M, B, C], [M, B] -> [M, B]`, as for the other weights. The authors let w_m be negative, which
    turns a modality's vote around; that is left out.
    """
    return jnp.maximum(energy(logits), 0.0) * present


def entropy_weights(logits: Array, present: Array) -> Array:
    """MLA at test time: w = softmax_m(-H_m), H_m the entropy of softmax(z_m)."""
    log_p = jax.nn.log_softmax(logits)
    return _softmax_over_modalities(jnp.sum(jnp.exp(log_p) * log_p, axis=-1), present)


def confidence_weights(confidence: Array, present: Array, logits: Array | None = None) -> Array:
    """PDF: w = softmax_m((c_m + h_m) r_m), h_m = sum_{n != m} log c_n / sum_n log c_n.

    Args:
      confidence: c, `[M, B]`, kept in [1e-4, 1 - 1e-4].
      present: `[M, B]`; an absent modality is in none of the sums.
      logits: z, `[M, B, C]`, for the calibration r_m = d_m / max_n d_n with d_m = mean_c
        |softmax(z_m)_c - 1 / C|, which the authors have in their tests; None: r_m = 1.
    """
    confidence = jnp.clip(confidence, 1e-4, 1 - 1e-4)
    doubt = jnp.log(confidence) * present
    total = jnp.sum(doubt, axis=0, keepdims=True)
    score = confidence + (total - doubt) / jnp.where(total < 0, total, 1.0)
    if logits is not None:
        distance = jnp.mean(jnp.abs(jax.nn.softmax(logits) - 1 / logits.shape[-1]), axis=-1)
        most = jnp.max(distance * present, axis=0, keepdims=True)
        score = score * distance / jnp.where(most > 0, most, 1.0)
    return _softmax_over_modalities(score, present)


def _softmax_over_modalities(scores: Array, present: Array) -> Array:
    """softmax over the first axis of what is present, `[M, B]`; zeros where nothing is."""
    return masked_softmax(scores.T, present.T > 0).T


class DynamicFusion(nn.Module):
    """z = sum_m [w_m] z_m of each modality's own answer z_m = x_m W_m + b_m, [.] without gradient.

    The heads are the model's probes, here with their gradient to the encoders, so that the loss is
    CE(z) + sum_m CE(z_m). The weights w follow from a sample's answers:

    - "qmf": `energy_weights`. Zhang et al., "Provable Dynamic Fusion for Low-Quality Multimodal
      Data" (ICML 2023). Their ranking loss is `baselines.qmf`.
    - "pdf": `confidence_weights`, calibrated but in training. Cao et al., "Predictive Dynamic
      Fusion" (ICML 2024). c_m = sigmoid(x_m v_m + a_m) without a gradient to x_m is drawn to the
      probability of the true class: + sum_m |c_m - [softmax(z_m)_y]|. The authors' v_m is three
      linear layers with nothing between them.
    - "entropy": `entropy_weights`. Zhang et al., "Multimodal Representation Learning by Alternating
      Unimodal Adaptation" (MLA, CVPR 2024), its fusion at test time. As there, nothing learns from
      z. With a head for each modality, in place of one for all, their alternating steps share no
      parameter and are one step, and the projection that protects the shared head is not needed.

    No modality's weight comes from a query: there are shares of the votes, w / sum w, but no mean
    keys, no imbalance, and nothing to rotate.
    """

    kind: str

    @nn.compact
    def __call__(
        self, answers: Mapping[str, Array], tokens: Tokens, masks: Masks, train: bool = False
    ) -> Output:
        """Logits `[B, C]`, and `probe_logits`, `attention_share`, `uniform_share`, `confidence`.

        Args:
          answers: z_m, `{m: [B, C]}`.
          tokens: as for every fusion.
          masks: likewise.
          train: whether the weights are those of training.

        Returns:
          logits, and a dict with the answers as `probe_logits`, w / sum w as `attention_share`
          `{m: [B, 1]}`, the share of equal votes as `uniform_share` `{m: [B]}`, and for "pdf" c_m
          as `confidence` `{m: [B]}`.
        """
        names = sorted(answers)
        logits = jnp.stack([answers[m] for m in names])
        ones = jnp.ones_like(logits[0, :, 0])
        masked = [masks[m] for m in names]
        present = jnp.stack(
            [ones if mask is None else mask[:, 0].astype(ones.dtype) for mask in masked]
        )
        out: dict[str, Any] = {"probe_logits": dict(answers)}
        if self.kind == "pdf":
            read = jax.lax.stop_gradient(class_tokens(tokens, masks))
            out["confidence"] = {
                m: jax.nn.sigmoid(Dense(1, name=f"confidence_{m}")(x)[:, 0])
                for m, x in read.items()
            }
            confidence = jnp.stack([out["confidence"][m] for m in names])
            weights = confidence_weights(confidence, present, None if train else logits)
        elif self.kind == "qmf":
            weights = energy_weights(logits, present)
        else:
            weights = entropy_weights(logits, present)
            logits = jax.lax.stop_gradient(logits)
        weights = jax.lax.stop_gradient(weights)
        even = present / jnp.maximum(jnp.sum(present, axis=0, keepdims=True), 1.0)
        total = jnp.sum(weights, axis=0, keepdims=True)
        share = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), even)
        out["attention_share"] = {m: share[i, :, None] for i, m in enumerate(names)}
        out["uniform_share"] = {m: even[i] for i, m in enumerate(names)}
        return jnp.einsum("mb,mbc->bc", weights, logits, precision=HIGHEST), out


class ClassTokenStats(NamedTuple):
    """Statistics of the class token's attention in one layer."""

    query: Array  # [B, H, d_h], rotated
    mean_keys: list[Array]  # M x [B, H, d_h]
    share: Array  # [B, H, M]


def split_tokens(sequence: Array, lengths: tuple[int, ...]) -> list[Array]:
    """Each modality's tokens, the class token left out: `[B, 1 + L, ...] -> M x [B, L_m, ...]`."""
    bounds = [sum(lengths[:i]) for i in range(1, len(lengths))]
    return jnp.split(sequence[:, 1:], bounds, axis=1)


def rotated_query(x: Array, kernel: Array, bias: Array, rotation: Array | None) -> Array:
    """R (x W_q + b_q), `[..., d] -> [..., H, d_h]` float32.

    Args:
      x: `[..., d]` float32.
      kernel, bias: `[d, H, d_h]` and `[H, d_h]`.
      rotation: `[H, d_h, d_h]`, or None for the identity.
    """
    query = jnp.einsum("...d,dhk->...hk", x, kernel, precision=HIGHEST)
    query = query + jnp.broadcast_to(bias, query.shape)
    return query if rotation is None else rotate(rotation, query)


def join_tokens(
    cls: Array, tokens: list[Array], masks: list[Array | None]
) -> tuple[Array, Array | None]:
    """[cls, tokens of every modality] and its mask, None where everything is real.

    `[d], M x [B, L_m, d], M x [B, L_m] -> [B, 1 + sum L_m, d], [B, 1 + sum L_m]`.
    """
    batch_size, _, width = tokens[0].shape
    first = cls.astype(tokens[0].dtype)[None, None]
    first = batch_broadcast(first, (batch_size, 1, width), tokens[0])
    sequence = jnp.concatenate([first, *tokens], axis=1)
    if all(mask is None for mask in masks):
        return sequence, None
    real = [
        jnp.ones_like(x[:, :, 0], jnp.bool_) if mask is None else mask
        for x, mask in zip(tokens, masks, strict=True)
    ]
    return sequence, jnp.concatenate([jnp.ones_like(real[0][:, :1]), *real], axis=1)


def class_token_weights(query: Array, keys: Array, mask: Array | None) -> Array:
    """softmax(q K^T / sqrt(d_h)): `[B, H, d_h], [B, L, H, d_h], [B, L] -> [B, H, L]` float32."""
    logits = jnp.einsum("bhk,blhk->bhl", query, keys, preferred_element_type=jnp.float32)
    logits = logits * query.shape[-1] ** -0.5
    return masked_softmax(logits, None if mask is None else mask[:, None])


def split_rotation(
    rotation: Array | None, attentions: int, num_heads: int, dim: int
) -> list[Array | None]:
    """The rotation `[n H, d_h, d_h]` of each of n attentions, `[H, d_h, d_h]` or None.

    Raises:
      ConfigError: it is for other heads.
    """
    if rotation is None:
        return [None] * attentions
    allowed = (attentions * num_heads, dim // num_heads, dim // num_heads)
    if rotation.shape != allowed:
        raise ConfigError(
            f"rotation has shape {rotation.shape}; allowed: {allowed}, one matrix a head"
        )
    return list(jnp.split(rotation, attentions))


class JointProjection(nn.Module):
    """The parameters of the projection that makes queries, keys and values together."""

    @nn.compact
    def __call__(self, width: int) -> tuple[Array, Array]:
        """Kernel `[d, 3 d]` and bias `[3 d]`, float32."""
        shape = (width, 3 * width)
        kernel = self.param("kernel", xavier_normal, shape, jnp.float32)
        return kernel, self.param("bias", nn.initializers.zeros, shape[1:], jnp.float32)


class RotatedSelfAttention(nn.Module):
    """`layers.SelfAttention` in which the first token has a query of its own: q_0 <- R q_0."""

    num_heads: int
    dim: int
    dtype: Any = jnp.float32
    attention_fn: AttentionFn | None = None
    logit_scale: float = 1.0

    def setup(self) -> None:
        """Declares the parameters, which have the names of `SelfAttention`'s."""
        self.qkv = JointProjection()
        self.out = Dense(self.dim, dtype=self.dtype)

    def class_query(self, x: Array, rotation: Array | None) -> Array:
        """R (x W_q + b_q), `[..., d] -> [..., H, d_h]` float32."""
        kernel, bias = self.qkv(self.dim)
        heads = (self.num_heads, self.dim // self.num_heads)
        query = kernel[:, : self.dim].reshape(self.dim, *heads), bias[: self.dim].reshape(heads)
        return rotated_query(x, *query, rotation)

    def __call__(
        self,
        x: Array,
        query: Array,
        mask: Array | None,
        lengths: tuple[int, ...],
        masks: list[Array | None],
    ) -> tuple[Array, ClassTokenStats]:
        """`[B, 1 + sum L_m, d]` to the same, and what the first token saw.

        Args:
          x: the class token first.
          query: `[B, H, d_h]`, the class token's.
          mask: `[B, 1 + sum L_m]`, True where a token is real, or None where all are.
          lengths: tokens of each modality.
          masks: `[B, L_m]` or None for each.
        """
        batch_size, length, width = x.shape
        kernel, bias = (p.astype(self.dtype) for p in self.qkv(width))
        qkv = batch_reshape(x, -1, width).astype(self.dtype) @ kernel + bias[None]
        heads = (self.num_heads, width // self.num_heads)
        qkv = batch_reshape(qkv, batch_size, length, 3, *heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        scaled = query if self.logit_scale == 1.0 else self.logit_scale * query
        q = jnp.concatenate([scaled.astype(q.dtype)[:, None], q[:, 1:]], axis=1)
        attention = self.attention_fn or default_attention(length)
        out = self.out(batch_reshape(attend(attention, q, k, v, mask), *x.shape))
        return out, self._stats(query, q[:, 0], k, mask, lengths, masks)

    def _stats(
        self,
        query: Array,
        scaled: Array,
        keys: Array,
        mask: Array | None,
        lengths: tuple[int, ...],
        masks: list[Array | None],
    ) -> ClassTokenStats:
        weights = class_token_weights(scaled, keys, mask)
        rows = batch_reshape(keys, *keys.shape[:2], self.dim)
        means = [
            batch_reshape(mean_token(part, real), *query.shape)
            for part, real in zip(split_tokens(rows, lengths), masks, strict=True)
        ]
        return ClassTokenStats(query, means, attention_share(weights, lengths))


class FusionBlock(nn.Module):
    """`layers.Block` over all tokens, in which the class token's query is rotated.

    x <- x + A(norm1(x)), x <- x + MLP(norm2(x)), where A is `RotatedSelfAttention`.

    Attributes:
      num_heads, mlp_ratio, dropout, gelu, dtype, attention_fn: see `Block`.
      dim: d.
      logit_scale: factor on the logits of the class token.
    """

    num_heads: int
    dim: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    gelu: str = "exact"
    dtype: Any = jnp.float32
    attention_fn: AttentionFn | None = None
    logit_scale: float = 1.0

    def setup(self) -> None:
        """Declares the parameters, which have the names of `Block`'s."""
        self.norm1 = LayerNorm()
        self.attention = RotatedSelfAttention(
            self.num_heads, self.dim, self.dtype, self.attention_fn, self.logit_scale
        )
        self.norm2 = LayerNorm(self.dtype)
        self.mlp = Mlp(int(self.dim * self.mlp_ratio), self.gelu, self.dtype)

    def class_query(self, cls: Array, rotation: Array | None) -> Array:
        """R (norm1(cls) W_q + b_q), `[..., d] -> [..., H, d_h]` float32."""
        return self.attention.class_query(self.norm1(cls), rotation)

    def __call__(
        self,
        x: Array,
        cls: Array,
        rotation: Array | None,
        mask: Array | None,
        lengths: tuple[int, ...],
        masks: list[Array | None],
        rng: Array | None,
        example_index: Array,
    ) -> tuple[Array, ClassTokenStats]:
        """`[B, 1 + sum L_m, d]` to the same, and what the class token saw.

        Args:
          x: the class token first.
          cls: the class token in float32, `[d]` or `[B, d]`.
          rotation: `[H, d_h, d_h]`, or None for the identity.
          mask: `[B, 1 + sum L_m]`, True where a token is real, or None where all are.
          lengths: tokens of each modality.
          masks: `[B, L_m]` or None for each.
          rng: one dropout key for the layer; None keeps everything.
          example_index: `[B]` int32, positions in the global batch.
        """
        rngs = (None, None) if rng is None else tuple(jax.random.split(rng))
        query = broadcast_query(self.class_query(cls, rotation), x)
        h = self.norm1(x).astype(self.dtype)
        h, stats = self.attention(h, query, mask, lengths, masks)
        x = x + dropout(rngs[0], h, self.dropout, example_index)
        h = self.mlp(self.norm2(x))
        return x + dropout(rngs[1], h, self.dropout, example_index), stats


class AttentionFusion(nn.Module):
    """A class token attends over all modalities' tokens; a linear head reads its output.

    The sequence is [cls, tokens of m_1, ..., tokens of m_M]; q = R (cls W_q + b_q); scale
    1/sqrt(d_h); dropout on the attention weights and on the output projection; no residual, no
    LayerNorm. Keys, values and the L x L matrix never exist (see `rollingq_jax.attention`).

    With n > 1 layers, the first n - 1 are Transformer blocks over the whole sequence
    (`FusionBlock`), and the above is the last, whose cls and tokens come from the layer below.
    Every layer has its own rotation of the class token's query, so there are n H heads to roll,
    those of the first layer first.

    `pooling`, `residual` and `norm` are not in the paper. With the latter two, of the attention's
    output A and the modalities' class tokens x_m,

        z = LayerNorm(A W_o + b_o + mean_m x_m) W + b.

    Attributes:
      num_classes: C.
      dim: d, width of the tokens.
      num_heads: H, heads of each layer; d_h = d / H.
      dropout: rate of both dropouts.
      token_scale: standard deviation of the class token's initial values.
      num_layers: n.
      block: fields of the lower layers' `FusionBlock`.
      remat: recompute the lower layers in the backward pass.
      logit_scale: factor on the logits of the class token, in every layer; 0 is mean pooling. The
        query that is returned, scored and rotated is without it.
      quality_bias: gamma of the quality bias (see `rollingq_jax.quality`), whose statistics
        `center` and `scale` `[M]` are in the collection "quality"; 0: none. For one layer only.
      quality_shuffled: each sample gets the bias of the one before it in the batch.
      pooling: "tokens", or "class_tokens": only the class token of each modality is attended.
      residual: whether the mean of the class tokens of an example's modalities, as they come to the
        last layer, is added to its output.
      norm: whether LayerNorm follows, before the head.
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
    pooling: str = "tokens"
    residual: bool = False
    norm: bool = False

    def setup(self) -> None:
        """Declares the parameters, which `class_query` and the fusion share."""
        heads = (self.num_heads, self.dim // self.num_heads)
        init = nn.initializers.normal(self.token_scale)
        self.cls = self.param("cls", init, (self.dim,), jnp.float32)
        make_block = nn.remat(FusionBlock, static_argnums=(5,)) if self.remat else FusionBlock
        fields = dict(self.block) | {"logit_scale": self.logit_scale}
        self.layer = {
            str(i): make_block(self.num_heads, self.dim, **fields)
            for i in range(self.num_layers - 1)
        }
        self.query = HeadProjection(*heads)
        self.key = HeadProjection(*heads)
        self.value = HeadProjection(*heads)
        self.out = Dense(self.dim)
        if self.norm:
            self.out_norm = LayerNorm()
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
        first = split_rotation(rotation, self.num_layers, self.num_heads, self.dim)[0]
        if self.layer:
            return self.layer["0"].class_query(self.cls, first)
        return rotated_query(self.cls, *self.query(self.dim), first)

    def __call__(
        self,
        tokens: Tokens,
        masks: Masks,
        rotation: Array | None = None,
        *,
        train: bool = False,
        return_attention: bool = False,
        example_index: Array,
        signal: Array | None = None,
    ) -> Output:
        """Logits `[B, C]` and what the attention saw.

        Args:
          tokens: `{m: [B, L_m, d]}`.
          masks: `{m: [B, L_m] or None}`.
          rotation: `[n H, d_h, d_h]`, or None for the identity.
          train: whether dropout applies (key "dropout").
          return_attention: whether to return the weights.
          example_index: `[B]` int32, positions in the global batch, for dropout.
          signal: `[B, M]` of a quality bias; None: the norms of the mean tokens.

        Returns:
          logits, and a dict with `query` `[B, n H, d_h]` (rotated), `mean_keys`
          `{m: [B, n H, d_h]}`, `attention_share` `{m: [B, n H]}`, `uniform_share` `{m: [B]}`, what
          uniform attention would give, and the last layer's `attention` `[B, H, 1 + sum L_m]`
          before dropout (L_m is 1 where only class tokens are pooled); with a quality bias
          `quality_signal` `{m: [B]}`.

        Raises:
          ConfigError: the rotation does not fit, or the variables lack the statistics of a quality
            bias.
        """
        modalities, bias = sorted(tokens), None
        if self.quality_bias and signal is None:
            # Of all tokens: LayerNorm gives each class token the same norm.
            signal = quality.token_norms(
                [tokens[m] for m in modalities], [masks[m] for m in modalities]
            )
        if self.pooling == "class_tokens":
            tokens = {m: x[:, :1] for m, x in tokens.items()}
            masks = {m: None if mask is None else mask[:, :1] for m, mask in masks.items()}
        parts, reals = [tokens[m] for m in modalities], [masks[m] for m in modalities]
        lengths = tuple(part.shape[1] for part in parts)
        rotations = split_rotation(rotation, self.num_layers, self.num_heads, self.dim)
        sequence, mask = join_tokens(self.cls, parts, reals)
        rng = self.make_rng("dropout") if train and self.dropout > 0 else None
        example_index = batch_broadcast(example_index, sequence.shape[:1], sequence)
        weights_rng, out_rng = (None, None) if rng is None else jax.random.split(rng)

        cls, stats = self.cls, []
        block_rng = None
        if self.layer and train and self.block.get("dropout", 0.0) > 0:
            block_rng = self.make_rng("dropout")
        for i, block in enumerate(self.layer.values()):
            layer_rng = None if block_rng is None else jax.random.fold_in(block_rng, i)
            sequence, seen = block(
                sequence, cls, rotations[i], mask, lengths, reals, layer_rng, example_index
            )
            stats.append(seen)
            cls = sequence[:, 0].astype(jnp.float32)
        if self.layer:
            parts = split_tokens(sequence, lengths)

        query = rotated_query(cls, *self.query(self.dim), rotations[-1])
        key, value = self.key(self.dim), self.value(self.dim)
        if signal is not None:
            bias = quality.logit_bias(self._quality_bias(signal), lengths)
        attended, weights = class_token_attention(
            sequence,
            query if self.logit_scale == 1.0 else self.logit_scale * query,
            key[0],
            value[0],
            key[1],
            value[1],
            mask=mask,
            dropout_rate=self.dropout,
            rng=None if weights_rng is None else example_keys(weights_rng, example_index),
            logit_bias=bias,
        )
        output = self.out(batch_reshape(attended, sequence.shape[0], self.dim))
        output = dropout(out_rng, output, self.dropout, example_index)
        if self.residual:
            output = output + mean_class_token(parts, reals)
        if self.norm:
            output = self.out_norm(output)
        logits = self.head(output)

        means = [mean_key(part, *key, mask=real) for part, real in zip(parts, reals, strict=True)]
        share = attention_share(weights, lengths)
        stats.append(ClassTokenStats(broadcast_query(query, sequence), means, share))
        even = uniform_shares(sequence, lengths, mask)
        out = _joined(modalities, stats) | {
            "uniform_share": dict(zip(modalities, even, strict=True))
        }
        if return_attention:
            out["attention"] = weights
        if signal is not None:
            out["quality_signal"] = {m: signal[:, i] for i, m in enumerate(modalities)}
        return logits, out

    def _quality_bias(self, signal: Array) -> Array:
        """gamma (n - nu) / tau of each modality, `[B, M] -> [B, M]`."""
        if self.is_initializing():
            for name in ("center", "scale"):
                self.put_variable("quality", name, jnp.zeros(signal.shape[1:], jnp.float32))
        if not self.has_variable("quality", "center"):
            raise ConfigError(
                "the variables have no collection 'quality', with the statistics of "
                "model.quality_bias; allowed: those of the run, `run.variables`"
            )
        center: Array = jax.lax.stop_gradient(self.get_variable("quality", "center"))
        scale: Array = jax.lax.stop_gradient(self.get_variable("quality", "scale"))
        bias = self.quality_bias * quality.standardize(signal, center, scale)
        if not self.quality_shuffled:
            return bias
        whole = whole_sharding(bias, bias.ndim)  # along an axis that devices share nothing rolls
        moved = bias if whole is None else jax.sharding.reshard(bias, whole)
        return laid_out_as(jnp.roll(moved, 1, axis=0), bias)


def mean_class_token(tokens: list[Array], masks: list[Array | None]) -> Array:
    """Mean of the class tokens of the modalities that an example has.

    `M x [B, L_m, d] -> [B, d]` float32; zeros for an example without any.
    """
    firsts = jnp.stack([x[:, 0] for x in tokens], axis=1)
    if all(mask is None for mask in masks):
        return mean_token(firsts)
    everyone = jnp.ones_like(firsts[:, 0, 0], jnp.bool_)
    present = [everyone if mask is None else mask[:, 0] for mask in masks]
    return mean_token(firsts, jnp.stack(present, axis=1))


def uniform_shares(sequence: Array, lengths: Sequence[int], mask: Array | None) -> list[Array]:
    """Each modality's share under uniform attention: M x `[B]`, laid out as `sequence` `[B, ...]`.

    `mask` `[B, 1 + L]` has the fusion class token first, which belongs to no modality.
    """
    shares = uniform_share(lengths, mask=mask)
    size = (sequence.shape[0],)
    return [batch_broadcast(shares[..., i], size, sequence) for i in range(len(lengths))]


def _joined(modalities: list[str], stats: list[ClassTokenStats]) -> dict[str, Any]:
    """The statistics of all layers, the first layer's heads first."""
    share = jnp.concatenate([layer.share for layer in stats], axis=1)
    return {
        "query": jnp.concatenate([layer.query for layer in stats], axis=1),
        "mean_keys": {
            m: jnp.concatenate([layer.mean_keys[i] for layer in stats], axis=1)
            for i, m in enumerate(modalities)
        },
        "attention_share": {m: share[..., i] for i, m in enumerate(modalities)},
    }


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
        self.query = HeadProjection(*heads)
        self.key = HeadProjection(*heads)
        self.value = HeadProjection(*heads)
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
        q = self._project(x, *self.query(self.dim))
        k = self._project(source, *self.key(self.dim))
        v = self._project(source, *self.value(self.dim))
        scaled = query if self.logit_scale == 1.0 else self.logit_scale * query
        q = jnp.concatenate([scaled.astype(q.dtype)[:, None], q[:, 1:]], axis=1)
        weights = class_token_weights(q[:, 0], k, mask)
        out = attend(dense_attention, q, k, v, mask)
        if mask is not None:
            some = jnp.any(mask, axis=1)[:, None, None, None]
            out = jnp.where(some, out, jnp.zeros_like(out))
        return self.out(batch_reshape(out, *x.shape)), query, weights

    def mean_keys(self, tokens: Sequence[Array], masks: Sequence[Array | None]) -> list[Array]:
        """Mean key of each modality under this attention's keys: M x `[B, H, d_h]` float32."""
        key = self.key(self.dim)
        return [mean_key(x, *key, mask=m) for x, m in zip(tokens, masks, strict=True)]

    def _project(self, x: Array, kernel: Array, bias: Array) -> Array:
        """`[B, L, d] -> [B, L, H, d_h]` in `dtype`."""
        rows = batch_reshape(x, -1, self.dim).astype(self.dtype)
        made = rows @ kernel.reshape(self.dim, self.dim).astype(self.dtype)
        made = made + bias.reshape(1, self.dim).astype(self.dtype)
        return batch_reshape(made, *x.shape[:2], *bias.shape)


class CrossRead(NamedTuple):
    """What the class token of one stream saw in one attention."""

    query: Array  # [B, H, d_h], rotated
    mean_keys: list[Array]  # M x [B, H, d_h], of every modality, read or not
    weights: list[Array | None]  # M x [B, H, L_m]; None: the attention does not read the modality


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
    like, real = tokens[modalities[0]][:, 0, 0], []
    for m, length in zip(modalities, lengths, strict=True):
        ones = batch_broadcast(jnp.ones((1, 1), jnp.bool_), (like.shape[0], length), like)
        mask = masks[m]
        real.append(ones if mask is None else mask)

    def whole(read: CrossRead) -> tuple[Array, Array]:
        """Weights `[B, H, sum L_m]`, and `[B, sum L_m]`, True at the tokens that are read."""
        heads = read.query.shape[1]
        blank = [jnp.zeros_like(real[i], jnp.float32) for i in range(len(real))]
        weights = [
            jnp.broadcast_to(x[:, None], (x.shape[0], heads, x.shape[1])) if w is None else w
            for x, w in zip(blank, read.weights, strict=True)
        ]
        seen = [r & (w is not None) for r, w in zip(real, read.weights, strict=True)]
        return jnp.concatenate(weights, axis=-1), jnp.concatenate(seen, axis=1)

    present = jnp.stack([jnp.any(mask, axis=1) for mask in real], axis=-1)

    def among_present(share: Array) -> Array:
        """`[B, H, M]`, the absent modalities' parts given to the others."""
        kept = share * present[:, None].astype(share.dtype)
        total = jnp.sum(kept, axis=-1, keepdims=True)
        return jnp.where(total > 0, kept / jnp.where(total > 0, total, 1.0), share)

    stats = [
        ClassTokenStats(
            read.query,
            read.mean_keys,
            among_present(attention_share(whole(read)[0], lengths)),
        )
        for layer in layers
        for read in layer
    ]
    even = [
        among_present(uniform_share(lengths, mask=whole(read)[1])[:, None])[:, 0]
        for read in layers[0]
    ]
    mean = sum(even[1:], start=even[0]) / len(even)
    out = _joined(modalities, stats) | {
        "uniform_share": {m: mean[:, i] for i, m in enumerate(modalities)}
    }
    if return_attention:
        last = [whole(read)[0] for read in layers[-1]]
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

    def _attention(self, name: str) -> CrossAttention:
        return CrossAttention(self.num_heads, self.dim, self.dtype, self.logit_scale, name=name)

    def _rotations(self, rotation: Array | None, attentions: int) -> list[list[Array | None]]:
        """Of each layer's attentions."""
        count = self.num_layers * attentions
        one = iter(split_rotation(rotation, count, self.num_heads, self.dim))
        return [[next(one) for _ in range(attentions)] for _ in range(self.num_layers)]

    def _rngs(self, train: bool) -> Iterator[Array | None]:
        """A dropout key for each branch, one after the other; None without dropout."""
        if not (train and self.dropout > 0):
            return itertools.repeat(None)
        rng = self.make_rng("dropout")
        return (jax.random.fold_in(rng, i) for i in itertools.count())


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
        """Logits and statistics, see `AttentionFusion` and `CrossFusion`."""
        modalities = sorted(tokens)
        pairs = list(itertools.permutations(modalities, 2))
        rotations, rngs = self._rotations(rotation, len(pairs)), self._rngs(train)
        reals = [masks[m] for m in modalities]
        streams: dict[str, list[Array]] = {m: [] for m in modalities}
        layers: list[list[CrossRead]] = [[] for _ in range(self.num_layers)]
        for number, (target, source) in enumerate(pairs):
            h, pair = tokens[target], f"{target}_from_{source}"
            for i in range(self.num_layers):
                name = f"{pair}_{i}"
                norm = LayerNorm(self.dtype, name=f"{name}_norm0")
                attention = self._attention(f"{name}_attention")
                low = [norm(tokens[m]) for m in modalities]
                rolled = rotations[i][number]
                added, query, weights = attention(
                    norm(h), low[modalities.index(source)], masks[source], rolled
                )
                h = h + dropout(next(rngs), added, self.dropout, example_index)
                mlp = Mlp(4 * self.dim, "relu", self.dtype, name=f"{name}_mlp")
                added = mlp(LayerNorm(self.dtype, name=f"{name}_norm1")(h))
                h = h + dropout(next(rngs), added, self.dropout, example_index)
                seen = [weights if m == source else None for m in modalities]
                layers[i].append(CrossRead(query, attention.mean_keys(low, reals), seen))
            streams[target].append(LayerNorm(self.dtype, name=f"{pair}_norm")(h))
        joined = {}
        for m in modalities:
            blocks = [
                Block(
                    self.num_heads,
                    dropout=self.dropout,
                    gelu="relu",
                    dtype=self.dtype,
                    name=f"{m}_block_{i}",
                )
                for i in range(max(self.num_layers, 3))
            ]
            h = jnp.concatenate(streams[m], axis=-1)
            h = run_blocks(blocks, h, self_mask(masks[m]), next(rngs), example_index)
            joined[m] = LayerNorm(name=f"{m}_norm")(h)
        c = jnp.concatenate(list(class_tokens(joined, masks).values()), axis=-1)
        hidden = jax.nn.relu(Dense(c.shape[-1], name="fc1")(c))
        hidden = dropout(next(rngs), hidden, self.dropout, example_index)
        logits = Dense(self.num_classes, name="head")(c + Dense(c.shape[-1], name="fc2")(hidden))
        return logits, cross_statistics(layers, tokens, masks, return_attention)


class PostNormBlock(nn.Module):
    """x <- norm1(x + attention(x)), then x <- norm2(x + W_2 relu(W_1 x)), as BERT has it.

    Attributes:
      num_heads, dropout, dtype: see `Block`.
      hidden: width of the inner layer.
    """

    num_heads: int
    hidden: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, mask: Array | None, rng: Array | None, example_index: Array
    ) -> Array:
        """`[B, L, d] -> [B, L, d]`; arguments as `Block`'s."""
        rngs = (None, None) if rng is None else tuple(jax.random.split(rng))
        h = SelfAttention(self.num_heads, self.dtype, name="attention")(x, mask)
        h = x + dropout(rngs[0], h, self.dropout, example_index)
        x = LayerNorm(self.dtype, name="norm1")(h)
        h = Mlp(self.hidden, "relu", self.dtype, name="mlp")(x)
        h = x + dropout(rngs[1], h, self.dropout, example_index)
        return LayerNorm(self.dtype, name="norm2")(h)


class MmmlFusion(CrossFusion):
    """MMML: cross-modal encoder layers and a head on the class tokens (Wu et al., 2024).

    In each of n layers, for all modalities at once,

        x_m <- norm(x_m + A_m(x_m, x_others)),    x_m <- PostNormBlock(x_m)   (hidden width 4 d)

    where with more than two modalities the others' tokens stand in one sequence. With c the class
    tokens of all modalities, z = relu(relu(c W_1 + b_1) W_2 + b_2) W + b of widths M d, d, d / 2
    and C (released: d = 768 and 512 in the place of d / 2; with d / 2 the paper's count comes out).
    MMML's losses of the modalities alone are those of `config.baseline.name` "joint".
    """

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
        """Logits and statistics, see `AttentionFusion` and `CrossFusion`."""
        modalities = sorted(tokens)
        rotations, rngs = self._rotations(rotation, len(modalities)), self._rngs(train)
        reals = [masks[m] for m in modalities]
        x, layers = dict(tokens), []
        for i in range(self.num_layers):
            new, layer, parts = {}, [], [x[m] for m in modalities]
            for number, m in enumerate(modalities):
                others = [other for other in modalities if other != m]
                source, mask = join_streams([x[o] for o in others], [masks[o] for o in others])
                attention = self._attention(f"{m}_attention_{i}")
                added, query, weights = attention(x[m], source, mask, rotations[i][number])
                h = x[m] + dropout(next(rngs), added, self.dropout, example_index)
                h = LayerNorm(self.dtype, name=f"{m}_norm_{i}")(h)
                block = PostNormBlock(
                    self.num_heads, 4 * self.dim, self.dropout, self.dtype, name=f"{m}_block_{i}"
                )
                new[m] = block(h, self_mask(masks[m]), next(rngs), example_index)
                ends = list(itertools.accumulate(x[o].shape[1] for o in others))
                each = dict(zip(others, jnp.split(weights, ends[:-1], axis=-1), strict=True))
                seen = [each.get(one) for one in modalities]
                layer.append(CrossRead(query, attention.mean_keys(parts, reals), seen))
            x = new
            layers.append(layer)
        h = jnp.concatenate(list(class_tokens(x, masks).values()), axis=-1)
        for name, width in (("fc1", self.dim), ("fc2", max(1, self.dim // 2))):
            h = jax.nn.relu(Dense(width, name=name)(h))
            h = dropout(next(rngs), h, self.dropout, example_index)
        logits = Dense(self.num_classes, name="head")(h)
        return logits, cross_statistics(layers, tokens, masks, return_attention)


def join_streams(
    tokens: Sequence[Array], masks: Sequence[Array | None]
) -> tuple[Array, Array | None]:
    """Tokens of several modalities in one sequence, and its mask, None where everything is real."""
    sequence = jnp.concatenate(list(tokens), axis=1)
    if all(mask is None for mask in masks):
        return sequence, None
    real = [
        jnp.ones_like(x[:, :, 0], jnp.bool_) if mask is None else mask
        for x, mask in zip(tokens, masks, strict=True)
    ]
    return sequence, jnp.concatenate(real, axis=1)


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
    at each step. Each stream passes a `PostNormBlock` (hidden width d). Each of the M + 1 streams
    has an attention, whose class token attends to each of the other streams in turn, without
    residual and LayerNorm. The (M + 1) M results are joined, and with c = [...] W_1 + b_1 of width
    d, z = relu(c W_2 + b_2) W + b with d / 4 units inside.

    Ours: the common length, since JMT takes aligned frames; and the class token's answer in place
    of a regression at each frame. Weights are of the modalities' streams; those over the joint
    stream, which belong to no modality, are left out of shares. There is one layer.
    """

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
        """Logits and statistics, see `AttentionFusion` and `CrossFusion`."""
        modalities = sorted(tokens)
        count = len(modalities)
        rotations, rngs = self._rotations(rotation, count + 1)[0], self._rngs(train)
        steps = min(tokens[m].shape[1] for m in modalities) - 1
        spread = {}  # [1 + T, 1 + L_m] of each modality, with a leading B under a mask
        streams, reals = [], []
        for m in modalities:
            x, mask = tokens[m], masks[m]
            rows = pooling(x.shape[1] - 1, steps, None if mask is None else mask[:, 1:])
            rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 2) + [(1, 0), (1, 0)])
            spread[m] = rows = rows.at[..., 0, 0].set(1.0)
            letters = "tl" if mask is None else "btl"
            x = jnp.einsum(f"{letters},bld->btd", rows, x.astype(jnp.float32))
            x = x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-12))
            real = None
            if mask is not None:
                real = jnp.concatenate([mask[:, :1], jnp.any(rows[:, 1:] > 0, axis=-1)], axis=1)
                x = jnp.where(real[..., None], x, 0.0)
            streams.append(x.astype(self.dtype))
            reals.append(real)
        joint = Dense(self.dim, dtype=self.dtype, name="joint")(jnp.concatenate(streams, axis=-1))
        known = [real for real in reals if real is not None]
        some = jnp.any(jnp.stack(known), axis=0) if len(known) == count else None
        streams, reals = [*streams, joint], [*reals, some]
        names = [f"stream_{m}" for m in modalities] + ["joint_stream"]
        for i, name in enumerate(names):
            block = PostNormBlock(
                self.num_heads, self.dim, self.dropout, self.dtype, name=f"{name}_block"
            )
            streams[i] = block(streams[i], self_mask(reals[i]), next(rngs), example_index)
        answers, reads = [], []
        for i, name in enumerate(names):
            attention = self._attention(f"{name}_attention")
            seen: list[Any] = [None] * (count + 1)
            for j in range(count + 1):
                if j != i:
                    answer, query, seen[j] = attention(
                        streams[i][:, :1], streams[j], reals[j], rotations[i]
                    )
                    answers.append(answer[:, 0].astype(jnp.float32))
            weights = [
                None if w is None else _spread(w, spread[m])
                for m, w in zip(modalities, seen, strict=False)
            ]
            means = attention.mean_keys(streams[:count], reals[:count])
            reads.append(CrossRead(query, means, weights))
        c = Dense(self.dim, name="merge")(jnp.concatenate(answers, axis=-1))
        h = jax.nn.relu(Dense(max(1, self.dim // 4), name="fc")(c))
        h = dropout(next(rngs), h, self.dropout, example_index)
        logits = Dense(self.num_classes, name="head")(h)
        return logits, cross_statistics([reads], tokens, masks, return_attention)


def _spread(weights: Array, rows: Array) -> Array:
    """Weights of pooled tokens, on the tokens that were pooled: `[B, H, T] -> [B, H, L]`."""
    letters = "tl" if rows.ndim == 2 else "btl"
    return jnp.einsum(f"bht,{letters}->bhl", weights, rows)


CROSS_FUSIONS: Mapping[str, type[CrossFusion]] = {
    "mult": MultFusion,
    "mmml": MmmlFusion,
    "jmt": JmtFusion,
}
