"""Weights from elsewhere: upstream's PyTorch models, ImageNet-21k ViTs, torchvision's ResNet-18.

Examples:
  >>> import numpy as np, rollingq_jax as rq
  >>> batch = rq.convert.upstream_batch(np.zeros((2, 257, 188)), np.zeros((2, 3, 1, 224, 224)))
  >>> {name: array.shape for name, array in batch.items()}
  {'audio': (2, 257, 188, 1), 'visual': (2, 1, 224, 224, 3)}
"""

from rollingq_jax.convert.files import fetch_weights, load_state_dict
from rollingq_jax.convert.resnet import is_resnet, load_resnet
from rollingq_jax.convert.upstream import (
    dropped_tensors,
    from_upstream,
    to_upstream,
    upstream_batch,
    upstream_model,
    upstream_shapes,
)
from rollingq_jax.convert.vit import VitReport, load_vit, patch_grids

__all__ = [
    "VitReport",
    "dropped_tensors",
    "fetch_weights",
    "from_upstream",
    "is_resnet",
    "load_resnet",
    "load_state_dict",
    "load_vit",
    "patch_grids",
    "to_upstream",
    "upstream_batch",
    "upstream_model",
    "upstream_shapes",
]
