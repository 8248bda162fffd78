"""The whole model: encoders, an optional bottleneck, final norms, probes and the fusion."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict
from jax import Array

from rollingq_jax import quality
from rollingq_jax.errors import ConfigError
from rollingq_jax.models.cross_fusion import CROSS_FUSIONS
from rollingq_jax.models.encoders import (
    BLOCK_FIELDS,
    Bottleneck,
    Encoder,
    ModalityMask,
    read_inputs,
    read_mask,
)
from rollingq_jax.models.fusion import (
    STATIC_FUSIONS,
    AttentionFusion,
    CosineFusion,
    DynamicFusion,
    class_tokens,
)
from rollingq_jax.models.layers import AttentionFn, Dense, LayerNorm
from rollingq_jax.models.resnet import AxisName, ResNet18
from rollingq_jax.models.spec import DTYPES, DYNAMIC_FUSIONS, RESNET, ModelSpec
from rollingq_jax.shapes import batch_broadcast


def _fusion_mask(presence: ModalityMask, tokens: Array) -> Array | None:
    """`[B, 1 + L]`, True at real tokens, none without the modality; None where all are real."""
    positions, present = presence
    if present is None:
        return None
    if positions is None:
        return jnp.broadcast_to(present[:, None], tokens.shape[:2])
    return jnp.concatenate([present[:, None], positions], axis=1)


class MultimodalTransformer(nn.Module):
    """Multimodal Transformer of the paper (upstream's `models/basic_model.py`), for M modalities.

    Each modality has an encoder, a final LayerNorm, and a probe: a linear head on its class token
    with the gradient stopped, which shows what the modality knows on its own. A unimodal model's
    head is its probe.

    Attributes:
      spec: the fields of `config.model`.
      attention_fn: self-attention of the encoders, see `models.layers`; None chooses by backend
        and length.
    """

    spec: ModelSpec
    attention_fn: AttentionFn | None = None

    def setup(self) -> None:
        """Declares the submodules, whose names are those of the parameter tree."""
        spec = self.spec
        block = {
            "mlp_ratio": spec.mlp_ratio,
            "dropout": spec.encoder_dropout,
            "gelu": spec.gelu,
            "dtype": DTYPES[spec.dtype],
            "attention_fn": self.attention_fn,
            "remat": spec.remat,
        }
        self.encoder = {
            e.name: ResNet18(e, spec.dim, block["dtype"], spec.remat)
            if e.kind == RESNET
            else Encoder(e, spec.dim, scan_layers=spec.scan_layers, **block)
            for e in spec.encoders
        }
        if spec.fusion == "mbt":
            self.bottleneck = Bottleneck(spec.mbt_layers, spec.mbt_tokens, **block)
        self.norm = {m: LayerNorm(DTYPES[spec.dtype]) for m in spec.modalities}
        if spec.fusion != "unimodal":
            self.probe = {m: Dense(spec.num_classes) for m in spec.modalities}
        self.fusion: Any
        attention: dict[str, Any] = {
            "num_classes": spec.num_classes,
            "dim": spec.dim,
            "num_heads": spec.fusion_heads,
            "dropout": spec.dropout,
            "num_layers": spec.fusion_layers,
            "logit_scale": spec.attention_scale,
        }
        if spec.fusion in CROSS_FUSIONS:
            self.fusion = CROSS_FUSIONS[spec.fusion](**attention, dtype=DTYPES[spec.dtype])
        elif spec.uses_class_query:
            self.fusion = AttentionFusion(
                **attention,
                token_scale=spec.fusion_token_scale,
                block=FrozenDict({name: block[name] for name in BLOCK_FIELDS}),
                remat=spec.remat,
                quality_bias=spec.quality_bias,
                quality_shuffled=spec.quality_shuffled,
                pooling=spec.fusion_pooling,
                residual=spec.fusion_residual,
                norm=spec.fusion_norm,
            )
        elif spec.fusion in DYNAMIC_FUSIONS:
            self.fusion = DynamicFusion(spec.fusion)
        elif spec.fusion == "mmcosine":
            self.fusion = CosineFusion(spec.num_classes, spec.cosine_scale)
        else:
            self.fusion = STATIC_FUSIONS[spec.head](spec.num_classes)

    def __call__(
        self,
        batch: Mapping[str, Array],
        rotation: Array | None = None,
        train: bool = False,
        return_attention: bool = False,
        example_index: Array | None = None,
        axis_name: AxisName = None,
    ) -> tuple[Array, dict[str, Any]]:
        """Logits, and every intermediate that is worth looking at.

        Args:
          batch: `"<m>"` `[B, ...]` for each modality, channels last (see `encoders`);
            optionally `"<m>_mask"`, bool `[B, L_m]` (True at real tokens, the class token not
            counted) or `[B]` (True where the example has the modality); with a resnet18 encoder
            "example_mask" `[B]`, False for padding. Other keys are not read.
          rotation: `[n H, d_h, d_h]` for the class queries of n fusion layers of H heads, the first
            layer's first, or None for the identity.
          train: whether dropout applies; it needs an rng "dropout".
          return_attention: whether `out` gets the class token's attention weights.
          example_index: `[B]` int32, positions in the global batch (default 0, 1, ...): dropout
            depends on these, not on the layout of the batch.
          axis_name: mapped axis over which the batch is divided, for the averages of a resnet18
            encoder in training, whose running averages are the collection "batch_stats".

        Returns:
          logits `[B, C]` float32 and a dict:
            `probe_logits` `{m: [B, C]}` float32, no gradient to the encoders;
            `tokens` `{m: [B, 1 + L_m, d]}` after the final LayerNorm, class token first;
            `present` `{m: [B]}` bool;
          with a class query also (float32), H being `spec.rolling_heads`,
            `query` `[B, n H, d_h]`, rotated; `mean_keys` `{m: [B, n H, d_h]}`;
            `attention_share` `{m: [B, n H]}` and `uniform_share` `{m: [B]}`, what uniform attention
            would give; the last layer's `attention` `[B, H, 1 + sum L]` if asked for;
            `quality_signal` `{m: [B]}` with a quality bias;
          with a dynamic fusion, whose heads are its probes and send their gradient on,
            `attention_share` `{m: [B, 1]}` and `uniform_share` `{m: [B]}`, of the votes, and for
            "pdf" `confidence` `{m: [B]}`.
          An absent modality takes no attention, adds nothing to the bottleneck, and in the static
          fusions its class token counts as zeros; its own probe and mean keys mean nothing.

        Raises:
          DataError: the batch lacks a modality, or an array does not fit its kind.
          ConfigError: a rotation is given and the fusion has no class query, or does not fit it; or
            the variables lack the statistics of a quality bias.
        """
        inputs, presences = self._read(batch)
        batch_size = next(iter(inputs.values())).shape[0]
        if example_index is None:
            example_index = jnp.arange(batch_size, dtype=jnp.int32)
        randomness: dict[str, Any] = {"train": train, "example_index": example_index}
        averages = {"train": train, "weight": batch.get("example_mask"), "axis_name": axis_name}
        tokens = {
            e.name: self.encoder[e.name](
                inputs[e.name],
                presences[e.name],
                **(averages if e.kind == RESNET else randomness),
            )
            for e in self.spec.encoders
        }
        if self.spec.fusion == "mbt":
            tokens = self.bottleneck(tokens, presences, **randomness)
        # The last norms of the encoders, here since bottleneck layers may come before them.
        tokens = {m: self.norm[m](tokens[m]) for m in tokens}
        randomness["return_attention"] = return_attention
        logits, out = self._fuse(tokens, presences, rotation, **randomness)
        ones = batch_broadcast(jnp.ones(1, jnp.bool_), (batch_size,), logits)
        out["present"] = {m: ones if p.present is None else p.present for m, p in presences.items()}
        out["tokens"] = tokens
        if self.spec.fusion == "unimodal":  # its head is its probe
            out["probe_logits"] = {m: jax.lax.stop_gradient(logits) for m in tokens}
        elif self.spec.fusion not in DYNAMIC_FUSIONS:  # there they are the heads
            out["probe_logits"] = self._probe(tokens)
        return logits, out

    def fuse(
        self,
        batch: Mapping[str, Array],
        tokens: Mapping[str, Array],
        modalities: tuple[str, ...],
        rotation: Array | None = None,
    ) -> Array:
        """Logits `[B, C]` float32 of the fusion that sees some modalities only, without dropout.

        Args:
          batch: that the tokens are of, for its masks.
          tokens: `{m: [B, 1 + L_m, d]}` of a forward pass.
          modalities: those that are seen; the others count as absent from every example.
          rotation: as in a forward pass.

        Raises:
          DataError, ConfigError: as a forward pass.
        """
        presences = self._read(batch)[1]
        absent = jnp.zeros_like(tokens[self.spec.modalities[0]][:, 0, 0], jnp.bool_)
        presences |= {m: ModalityMask(None, absent) for m in presences if m not in modalities}
        index = jnp.arange(absent.shape[0], dtype=jnp.int32)
        return self._fuse(tokens, presences, rotation, example_index=index)[0]

    def _read(self, batch: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, ModalityMask]]:
        """Each modality's array and its real part."""
        inputs, encoders = read_inputs(batch, self.spec.modalities), self.spec.encoders
        masks = {e.name: batch.get(f"{e.name}_mask") for e in encoders}
        return inputs, {e.name: read_mask(e, inputs[e.name], masks[e.name]) for e in encoders}

    def _fuse(
        self,
        tokens: Mapping[str, Array],
        presences: Mapping[str, ModalityMask],
        rotation: Array | None,
        **how: Any,
    ) -> tuple[Array, dict[str, Any]]:
        masks = {m: _fusion_mask(presences[m], tokens[m]) for m in tokens}
        if not self.spec.uses_class_query:
            self._require_query(rotation is None)
            if self.spec.fusion in DYNAMIC_FUSIONS:
                read = class_tokens(tokens, masks)
                answers = {m: self.probe[m](x) for m, x in read.items()}
                return self.fusion(answers, tokens, masks, how.get("train", False))
            return self.fusion(tokens, masks)
        if not self.spec.has_fixed_query:
            return self.fusion(tokens, masks, rotation, **how)
        signal = None  # of the tokens' norms, which the fusion takes itself
        if self.spec.quality_bias and self.spec.quality_signal == "energy":
            has = {m: p.present for m, p in presences.items()}
            signal = quality.probe_energy(self._probe(tokens), has)
        return self.fusion(tokens, masks, rotation, signal=signal, **how)

    def class_query(self, rotation: Array | None = None) -> Array:
        """The class query R (cls W_q + b_q), `[H, d_h]` float32, from the parameters alone.

        With several fusion layers it is the first one's. `rotation` is `[n H, d_h, d_h]` or None.

        Raises:
          ConfigError: the fusion has no class query, or one that depends on the sample; or the
            rotation does not fit it.
        """
        self._require_query(self.spec.has_fixed_query)
        return self.fusion.class_query(rotation)

    def _probe(self, tokens: Mapping[str, Array]) -> dict[str, Array]:
        return {m: self.probe[m](jax.lax.stop_gradient(x[:, 0])) for m, x in tokens.items()}

    def _require_query(self, holds: bool) -> None:
        if not holds:
            raise ConfigError(
                f"a class query or its rotation is asked for, and model.fusion is "
                f"{self.spec.fusion!r} with head {self.spec.head!r}; allowed: attention"
            )


def build_model(config: Any, attention_fn: AttentionFn | None = None) -> MultimodalTransformer:
    """The model that `config.model` describes.

    Args:
      config: `ModelSpec`, or its fields as a mapping, `ml_collections.ConfigDict` or namespace.
      attention_fn: self-attention of the encoders, see `models.layers`; None chooses by backend
        and length when the model is traced.

    Raises:
      ConfigError: a field is unknown, ill-typed or out of range; names field, value and allowed.

    Examples:
      >>> encoders = {"audio": {"kind": "vector"}, "text": {"kind": "tokens", "vocab_size": 9}}
      >>> model = build_model({"num_classes": 3, "dim": 8, "num_heads": 2, "encoders": encoders})
      >>> batch = {"audio": jnp.ones((2, 5)), "text": jnp.array([[3, 1, 0], [2, 0, 0]])}
      >>> variables = jax.jit(model.init)(jax.random.key(0), batch)
      >>> logits, out = model.apply(variables, batch)
      >>> logits.shape, sorted(out["mean_keys"])
      ((2, 3), ['audio', 'text'])
    """
    return MultimodalTransformer(ModelSpec.from_config(config), attention_fn)
