"""Fusion: from every modality's tokens to the logits.

Equations of upstream's `models/fusion_modules.py`, for M modalities where they allow it. All take
the tokens `{m: [B, L_m, d]}` (class token first) and the masks `{m: [B, L_m] or None}` (True where
real, all False for an absent modality), and return the logits `[B, C]` with a dict of what they
computed. The static ones compute in float32 and read only the class tokens, zeros for an absent
modality. In attention fusion a class token of its own attends to all tokens, in one layer or in
several (the paper's extension), and RollingQ rotates its query. The dynamic fusions weigh each
modality's own answer, sample by sample. Those in which modalities attend to each other are in
`cross_fusion`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
from rollingq_jax.models.layers import (
    Block,
    Dense,
    LayerNorm,
    Mlp,
    Projection,
    SelfAttention,
    default_attention,
    dropout,
    example_keys,
    on_each_device,
    project,
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
        present = jnp.stack([real_tokens(tokens[m], masks[m])[:, 0] for m in names])
        present = present.astype(logits.dtype)
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
    return jnp.split(sequence[:, 1:], np.cumsum(lengths)[:-1], axis=1)


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
    return join_streams([first, *tokens], [None, *masks])


def join_streams(
    tokens: Sequence[Array], masks: Sequence[Array | None]
) -> tuple[Array, Array | None]:
    """Tokens of several modalities in one sequence, and its mask, None where everything is real."""
    sequence = jnp.concatenate(list(tokens), axis=1)
    if all(mask is None for mask in masks):
        return sequence, None
    return sequence, jnp.concatenate(list(map(real_tokens, tokens, masks)), axis=1)


def real_tokens(tokens: Array, mask: Array | None) -> Array:
    """The mask `[B, L]` of tokens `[B, L, d]`, True everywhere where there is none."""
    return jnp.ones_like(tokens[:, :, 0], jnp.bool_) if mask is None else mask


def with_class_query(queries: Array, query: Array, scale: float) -> Array:
    """The queries `[B, L, H, d_h]`, of which the first one's is `scale` times `query`."""
    scaled = query if scale == 1.0 else scale * query
    return jnp.concatenate([scaled.astype(queries.dtype)[:, None], queries[:, 1:]], axis=1)


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


class RotatedSelfAttention(SelfAttention, kw_only=True):
    """`layers.SelfAttention` in which the first token has a query of its own: q_0 <- R q_0."""

    dim: int
    logit_scale: float = 1.0

    def setup(self) -> None:
        """Declares the parameters, which have the names of `SelfAttention`'s."""
        self.qkv = Projection((3 * self.dim,))
        self.out = Dense(self.dim, dtype=self.dtype)

    def class_query(self, x: Array, rotation: Array | None) -> Array:
        """R (x W_q + b_q), `[..., d] -> [..., H, d_h]` float32."""
        kernel, bias = self.qkv(self.dim)
        heads = (self.num_heads, self.dim // self.num_heads)
        query = kernel[:, : self.dim].reshape(self.dim, *heads), bias[: self.dim].reshape(heads)
        return rotated_query(x, *query, rotation)

    def __call__(  # type: ignore[override]
        self,
        x: Array,
        query: Array,
        mask: Array | None,
        lengths: tuple[int, ...],
        masks: list[Array | None],
    ) -> tuple[Array, ClassTokenStats]:
        """`[B, 1 + sum L_m, d]` to the same, and what the first token saw.

        `query` is the class token's, `[B, H, d_h]`; the other arguments are as for `FusionBlock`.
        """
        batch_size, length, width = x.shape
        qkv = project(x, *self.qkv(width), self.dtype)
        heads = (self.num_heads, width // self.num_heads)
        qkv = batch_reshape(qkv, batch_size, length, 3, *heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        q = with_class_query(q, query, self.logit_scale)
        attention = self.attention_fn or default_attention(length)
        out = self.out(batch_reshape(on_each_device(attention, (q, k, v, mask)), *x.shape))
        # The attention function keeps its weights to itself: the class token's row once more.
        share = attention_share(class_token_weights(q[:, 0], k, mask), lengths)
        parts = split_tokens(batch_reshape(k, batch_size, length, width), lengths)
        means = [
            batch_reshape(mean_token(part, real), *query.shape)
            for part, real in zip(parts, masks, strict=True)
        ]
        return out, ClassTokenStats(query, means, share)


class FusionBlock(Block, kw_only=True):
    """`layers.Block` over all tokens, in which the class token's query is rotated.

    x <- x + A(norm1(x)), x <- x + MLP(norm2(x)), where A is `RotatedSelfAttention`.

    Attributes:
      dim: d.
      logit_scale: factor on the logits of the class token.
    """

    dim: int
    logit_scale: float = 1.0

    def setup(self) -> None:
        """Declares the parameters, which have the names of `Block`'s."""
        # In float32, whatever the block computes in: the query that rolls is read from it.
        self.norm1 = LayerNorm()
        self.attention = RotatedSelfAttention(
            self.num_heads,
            self.dtype,
            self.attention_fn,
            dim=self.dim,
            logit_scale=self.logit_scale,
        )
        self.norm2 = LayerNorm(self.dtype)
        self.mlp = Mlp(int(self.dim * self.mlp_ratio), self.gelu, self.dtype)

    def class_query(self, cls: Array, rotation: Array | None) -> Array:
        """R (norm1(cls) W_q + b_q), `[..., d] -> [..., H, d_h]` float32."""
        return self.attention.class_query(self.norm1(cls), rotation)

    def __call__(  # type: ignore[override]
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
        fields = {**self.block, "dim": self.dim, "logit_scale": self.logit_scale}
        self.layer = {
            str(i): make_block(self.num_heads, **fields) for i in range(self.num_layers - 1)
        }
        self.query, self.key, self.value = (Projection(heads) for _ in range(3))
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
        modalities = sorted(tokens)
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
        example_index = batch_broadcast(example_index, sequence.shape[:1], sequence)
        # Drawn before the blocks' key, so that a model of one layer draws what it always drew.
        weights_rng = out_rng = block_rng = None
        if train and self.dropout > 0:
            weights_rng, out_rng = jax.random.split(self.make_rng("dropout"))
        if self.layer and train and self.block.get("dropout", 0.0) > 0:
            block_rng = self.make_rng("dropout")

        cls, stats = self.cls, []
        for i, block in enumerate(self.layer.values()):
            layer_rng = None if block_rng is None else jax.random.fold_in(block_rng, i)
            sequence, seen = block(
                sequence, cls, rotations[i], mask, lengths, reals, layer_rng, example_index
            )
            stats.append(seen)
            cls = sequence[:, 0].astype(jnp.float32)  # scores and rotation are never in bfloat16
        if self.layer:
            parts = split_tokens(sequence, lengths)

        query = rotated_query(cls, *self.query(self.dim), rotations[-1])
        (w_key, b_key), (w_value, b_value) = self.key(self.dim), self.value(self.dim)
        bias = None
        if signal is not None:
            bias = quality.logit_bias(self._quality_bias(signal), lengths)
        attended, weights = class_token_attention(
            sequence,
            query if self.logit_scale == 1.0 else self.logit_scale * query,
            w_key,
            w_value,
            b_key,
            b_value,
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

        # Of the last layer's tokens under its own keys, without the keys of all tokens.
        means = [
            mean_key(part, w_key, b_key, mask=real) for part, real in zip(parts, reals, strict=True)
        ]
        share = attention_share(weights, lengths)
        stats.append(ClassTokenStats(broadcast_query(query, sequence), means, share))
        out = join_statistics(modalities, stats, uniform_shares(sequence, lengths, mask))
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
    present = [real_tokens(x, mask)[:, 0] for x, mask in zip(tokens, masks, strict=True)]
    return mean_token(firsts, jnp.stack(present, axis=1))


def uniform_shares(sequence: Array, lengths: Sequence[int], mask: Array | None) -> Array:
    """Each modality's share under uniform attention: `[B, M]`, laid out as `sequence` `[B, ...]`.

    `mask` `[B, 1 + L]` has the fusion class token first, which belongs to no modality.
    """
    shares = uniform_share(lengths, mask=mask)
    return batch_broadcast(shares, (sequence.shape[0], len(lengths)), sequence)


def join_statistics(
    modalities: list[str], stats: list[ClassTokenStats], uniform: Array
) -> dict[str, Any]:
    """What a fusion returns of all layers, the first layer's heads first; `uniform` is `[B, M]`."""
    share = jnp.concatenate([layer.share for layer in stats], axis=1)
    return {
        "query": jnp.concatenate([layer.query for layer in stats], axis=1),
        "mean_keys": {
            m: jnp.concatenate([layer.mean_keys[i] for layer in stats], axis=1)
            for i, m in enumerate(modalities)
        },
        "attention_share": {m: share[..., i] for i, m in enumerate(modalities)},
        "uniform_share": {m: uniform[:, i] for i, m in enumerate(modalities)},
    }
