"""Flax modules of the multimodal Transformer, and `build_model`, which composes them."""

from rollingq_jax.models.bottleneck import Bottleneck
from rollingq_jax.models.classifier import MultimodalTransformer, build_model
from rollingq_jax.models.embeddings import infer_kind
from rollingq_jax.models.encoders import Encoder
from rollingq_jax.models.fusion import (
    AttentionFusion,
    ConcatFusion,
    FilmFusion,
    GatedFusion,
    SumFusion,
)
from rollingq_jax.models.layers import Block
from rollingq_jax.models.self_attention import (
    AttentionFn,
    default_attention,
    dense_attention,
    fused_attention,
    mapped_attention,
)
from rollingq_jax.models.spec import EncoderSpec, ModelSpec

__all__ = [
    "AttentionFn",
    "AttentionFusion",
    "Block",
    "Bottleneck",
    "ConcatFusion",
    "Encoder",
    "EncoderSpec",
    "FilmFusion",
    "GatedFusion",
    "ModelSpec",
    "MultimodalTransformer",
    "SumFusion",
    "build_model",
    "default_attention",
    "dense_attention",
    "fused_attention",
    "infer_kind",
    "mapped_attention",
]
