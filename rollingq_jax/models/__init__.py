"""Flax modules of the multimodal Transformer, and `build_model`, which composes them.

Examples:
  >>> import jax, jax.numpy as jnp, rollingq_jax as rq
  >>> fusion = rq.models.ConcatFusion(num_classes=3)
  >>> tokens = {"audio": jnp.ones((2, 4, 8)), "visual": jnp.ones((2, 9, 8))}  # [B, L_m, d]
  >>> masks = {"audio": None, "visual": None}
  >>> (logits, _), _ = fusion.init_with_output(jax.random.key(0), tokens, masks)
  >>> logits.shape
  (2, 3)
"""

from rollingq_jax.models.classifier import MultimodalTransformer, build_model
from rollingq_jax.models.cross_fusion import JmtFusion, MmmlFusion, MultFusion
from rollingq_jax.models.encoders import Bottleneck, Encoder, infer_kind
from rollingq_jax.models.fusion import (
    AttentionFusion,
    ConcatFusion,
    CosineFusion,
    DynamicFusion,
    FilmFusion,
    GatedFusion,
    SumFusion,
)
from rollingq_jax.models.layers import (
    AttentionFn,
    Block,
    default_attention,
    dense_attention,
    fused_attention,
    mapped_attention,
    tpu_flash_attention,
)
from rollingq_jax.models.spec import EncoderSpec, ModelSpec

__all__ = [
    "AttentionFn",
    "AttentionFusion",
    "Block",
    "Bottleneck",
    "ConcatFusion",
    "CosineFusion",
    "DynamicFusion",
    "Encoder",
    "EncoderSpec",
    "FilmFusion",
    "GatedFusion",
    "JmtFusion",
    "MmmlFusion",
    "ModelSpec",
    "MultFusion",
    "MultimodalTransformer",
    "SumFusion",
    "build_model",
    "default_attention",
    "dense_attention",
    "fused_attention",
    "infer_kind",
    "mapped_attention",
    "tpu_flash_attention",
]
