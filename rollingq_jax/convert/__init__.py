"""Weights from elsewhere: upstream's PyTorch models, and ImageNet-21k ViTs."""

from rollingq_jax.convert.architecture import upstream_batch, upstream_model, upstream_shapes
from rollingq_jax.convert.files import load_state_dict
from rollingq_jax.convert.upstream import dropped_tensors, from_upstream, to_upstream
from rollingq_jax.convert.vit import VitReport, load_vit, patch_grids

__all__ = [
    "VitReport",
    "dropped_tensors",
    "from_upstream",
    "load_state_dict",
    "load_vit",
    "patch_grids",
    "to_upstream",
    "upstream_batch",
    "upstream_model",
    "upstream_shapes",
]
